# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Prefill: a grouped W4A16 GEMM in Triton on the decode ops' weight buffer.

The weights stay in the layout that ``setup_hybrid_w4a16_moe`` produces
(``hybrid_w4a16_packing``). There are two forms of the product, in two orders of k. A
tile names its order, and the tiles come from the tuning table.

``planes``, for CUDA. The kernel does not unpack a word into eight adjacent values.
Nibble ``p`` of all words of a tile forms a matrix of its own (a plane), which is
multiplied with the activations of the same plane. A plane of 16 words is a K of 16, one
step of the matrix units. Extracting it takes one shift and one mask, and the words are
already in the lanes where the matrix instruction expects its operand: no shuffles, and
16-bit weights do not pass through shared memory. In return the activations must be in
plane order::

    plane order   element k of a row is at
                  128 * (k // 128) + 16 * (k % 8) + (k % 128) // 8
                  and rows are padded with zeros to a multiple of 128

The first kernel converts the layer's input to plane order; gate_up writes its output in
it.

``natural``, for RDNA, whose matrix instruction wants 8 or 16 adjacent k in a lane: one
or two whole words. A shift, a mask and an or turn two nibbles into two 16-bit values
``16 + q``. The offset and the zero point leave after the product, once per group::

    sum_k (q[k] - z) * x[k]  =  sum_k (16 + q[k]) * x[k]  -  (16 + z) * sum_k x[k]

The weights are the second operand of the dot: Triton then lays the warps over weight
rows, so that no two warps dequantize the same weight.

Import this module only where Triton runs (a GPU, or Triton's interpreter).
"""

# fork: begin overlay
import functools

# fork: end
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

# fork: begin token
from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_launch as direct

# fork: end
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import PrefillTiles, Tile

# Weights of a row per step of the main loop: 8 planes of 16, the smallest K of the
# matrix units.
_STEP = 128

# Formulas, numbered as in ``hybrid_w4a16_ops.ACTIVATIONS``.
SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
_FORMULAS = {name: formula for name, formula in ops.ACTIVATIONS.values()}


@triton.jit
def _plane(words, plane: tl.constexpr, zero, dtype: tl.constexpr):
    """Nibble ``plane`` of each word minus ``zero``, exactly, as fp16 or bf16.

    ``0x6400 | q`` is 1024 + q in fp16 and ``0x4300 | q`` is 128 + q in bf16; ``zero``
    includes the 1024 or 128. bf16 is computed in fp32, because RDNA has no bf16
    subtraction. Small integers in fp32 fill only the upper half of the word.
    """
    shift: tl.constexpr = 4 * (plane // 2) + 16 * (plane % 2)
    if dtype == tl.float16:
        value = (((words >> shift) & 0xF) | 0x6400).to(tl.int16)
        return value.to(tl.float16, bitcast=True) - zero.to(tl.float16)
    upper = words << (16 - shift) if shift < 16 else words >> (shift - 16)
    value = ((upper & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True) - zero
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _load_zero(
    zeros_ptr, n, group, stride_zn, dtype: tl.constexpr, HAS_ZEROS: tl.constexpr
):
    """Zero points of rows ``n`` in fp32, including the 1024 or 128 of ``_plane``."""
    magic: tl.constexpr = 1024 if dtype == tl.float16 else 128
    if HAS_ZEROS:
        words = tl.load(zeros_ptr + (n // 8) * stride_zn + group)
        zero = ((words >> (4 * (n % 8))) & 0xF) + magic
    else:
        zero = (n + group) * 0 + (magic + 8)
    return zero.to(tl.float32)


@triton.jit
def _multiply(
    acc,
    words,
    x_ptrs,
    scales_ptr,
    zeros_ptr,
    n,
    step,
    stride_sn,
    stride_zn,
    last_group,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """``acc [block_n, block_m] += dequantized(words) @ x`` for one step of 128 weights.

    words int32 [block_n, 16]; ``x_ptrs [16, block_m]`` point at plane 0.
    """
    dtype: tl.constexpr = scales_ptr.dtype.element_ty
    if GROUP == 128:
        # A step is a group: scale its sum, and multiply with unscaled integers.
        part = tl.zeros_like(acc)
        zero = _load_zero(zeros_ptr, n, step, stride_zn, dtype, HAS_ZEROS)[:, None]
        for plane in tl.static_range(8):
            x = tl.load(x_ptrs + plane * 16)
            part = tl.dot(_plane(words, plane, zero, dtype), x, part)
        scale = tl.load(scales_ptr + n * stride_sn + step).to(tl.float32)
        acc += part * scale[:, None]
    else:
        group = step * (128 // GROUP) + tl.arange(0, 16)[None, :] // (GROUP // 8)
        group = tl.minimum(group, last_group)
        zero = _load_zero(zeros_ptr, n[:, None], group, stride_zn, dtype, HAS_ZEROS)
        scale = tl.load(scales_ptr + n[:, None] * stride_sn + group)
        for plane in tl.static_range(8):
            x = tl.load(x_ptrs + plane * 16)
            w = _plane(words, plane, zero, dtype) * scale
            acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def _load_words(w_ptrs, step, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(w_ptrs)
    inside = step * 16 + tl.arange(0, 16) < K // 8
    return tl.load(w_ptrs, mask=inside[None, :], other=0)


@triton.jit
def _halves(words):
    """Split words [n, w] into the first and the last w / 2 columns."""
    n: tl.constexpr = words.shape[0]
    w: tl.constexpr = words.shape[1]
    return tl.split(tl.reshape(words, (n, 2, w // 2)).permute(0, 2, 1))


@triton.jit
def _offset_weights(words, dtype: tl.constexpr):
    """Return 16 + q of all nibbles of words [n, w], exactly, as [n, 8 * w] in k order.

    A nibble goes to the bits of the mantissa that are worth 1, 2, 4 and 8 where the
    value is 16: bit 6 and up in fp16 (16 is 0x4C00), bit 3 and up in bf16 (0x4180).
    Nibbles i and i + 4 of a word, 16 bits apart, are elements 2 * i and 2 * i + 1.
    """
    n: tl.constexpr = words.shape[0]
    w: tl.constexpr = words.shape[1]
    if dtype == tl.float16:
        v01 = ((words << 6) & 0x03C003C0) | 0x4C004C00
        v23 = ((words << 2) & 0x03C003C0) | 0x4C004C00
        v45 = ((words >> 2) & 0x03C003C0) | 0x4C004C00
        v67 = ((words >> 6) & 0x03C003C0) | 0x4C004C00
    else:
        v01 = ((words << 3) & 0x00780078) | 0x41804180
        v23 = ((words >> 1) & 0x00780078) | 0x41804180
        v45 = ((words >> 5) & 0x00780078) | 0x41804180
        v67 = ((words >> 9) & 0x00780078) | 0x41804180
    pairs = tl.join(tl.join(v01, v45), tl.join(v23, v67))
    values = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(values, (n, 8 * w)).to(dtype, bitcast=True)


@triton.jit
def _natural_product(
    x_ptr,
    x_rows,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    n,
    K,
    stride_wn,
    stride_sn,
    stride_zn,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Return ``x @ dequantized(w)^T``, fp32 [block_m, block_n].

    ``x_rows`` [block_m]: offsets of the rows of x; ``n`` [block_n]: rows of w.
    """
    dtype: tl.constexpr = scales_ptr.dtype.element_ty
    # x of a dot is in registers as a whole: at most 64 weights of a row per dot. Words
    # of two dots are loaded at once if the sums leave registers for them.
    chunk: tl.constexpr = min(GROUP, 64)
    at_once: tl.constexpr = GROUP if x_rows.shape[0] < 64 else chunk
    x_ptrs = x_ptr + x_rows[:, None] + tl.arange(0, chunk)[None, :]
    w_ptrs = w_ptr + n[:, None] * stride_wn + tl.arange(0, at_once // 8)[None, :]
    scale_ptrs = scales_ptr + n * stride_sn
    zero_ptrs = zeros_ptr + n // 8 * stride_zn
    acc = tl.zeros((x_rows.shape[0], n.shape[0]), tl.float32)
    for group in range(0, K // GROUP):
        part = tl.zeros_like(acc)
        words = tl.load(w_ptrs)
        if at_once > chunk:
            words, more_words = _halves(words)
        x = tl.load(x_ptrs)
        total = tl.sum(x.to(tl.float32), axis=1)
        part = tl.dot(x, tl.trans(_offset_weights(words, dtype)), part)
        if chunk < GROUP:
            if at_once == chunk:
                more_words = tl.load(w_ptrs + chunk // 8)
            x = tl.load(x_ptrs + chunk)
            total += tl.sum(x.to(tl.float32), axis=1)
            part = tl.dot(x, tl.trans(_offset_weights(more_words, dtype)), part)
        if HAS_ZEROS:
            zero = (tl.load(zero_ptrs + group) >> (4 * (n % 8))) & 0xF
            part -= total[:, None] * (16 + zero).to(tl.float32)[None, :]
        else:
            part -= (total * 24.0)[:, None]
        acc += part * tl.load(scale_ptrs + group).to(tl.float32)[None, :]
        x_ptrs += GROUP
        w_ptrs += GROUP // 8
    return acc


@triton.jit
def _plane_position(k):
    """Return the position of element ``k`` of a row in plane order."""
    return k // 128 * 128 + k % 8 * 16 + k % 128 // 8


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activate(x, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return x * _sigmoid(alpha * x)
    if ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # tanh(z) = 2 * sigmoid(2 * z) - 1; 0.044715 and sqrt(2 / pi) are GELU's tanh
    # constants.
    return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gated(gate, up, alpha, beta, limit, ACTIVATION: tl.constexpr):
    gate = _activate(tl.minimum(gate, limit), alpha, ACTIVATION)
    return gate * (tl.minimum(tl.maximum(up, -limit), limit) + beta)


@triton.jit
def moe_int4_prefill_to_planes(
    x_ptr, out_ptr, K, stride_xm, stride_om, STEPS: tl.constexpr
):
    """Write rows of x [M, K] in plane order; a program handles STEPS * 128 elements."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * STEPS * 128 + tl.arange(0, STEPS * 128)
    x = tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0)
    x = tl.reshape(x, (STEPS, 16, 8)).permute(0, 2, 1).reshape(STEPS * 128)
    padded = (K + 127) // 128 * 128
    tl.store(out_ptr + row * stride_om + k, x, mask=k < padded)


# Not specialized: these change from call to call, and each variant would be compiled.
@triton.jit(do_not_specialize=["num_pairs", "top_k"])
def moe_int4_prefill_gate_up(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    sorted_ids_ptr,
    expert_ids_ptr,
    num_padded_ptr,
    num_pairs,
    top_k,
    I,  # noqa: E741
    H,
    stride_xm,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_ze,
    stride_zn,
    stride_om,
    alpha,
    beta,
    limit,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NATURAL: tl.constexpr,
    OUT_NATURAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Activated gate * up of a block of pairs.

    x is in the order of k that NATURAL says, out in that of OUT_NATURAL; plane order
    includes the padding.
    """
    tiles = tl.cdiv((I + 127) // 128 * 128, BLOCK_N)
    block = tl.program_id(0) // tiles
    if block * BLOCK_M >= tl.load(num_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + block).to(tl.int64)
    if expert < 0:
        return
    pairs = tl.load(sorted_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = pairs < num_pairs
    token = tl.where(valid, pairs // top_k, 0).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptr += expert * stride_we
    scales_ptr += expert * stride_se
    zeros_ptr += expert * stride_ze
    if NATURAL:
        # A row of gate, then the same row of up: one product, x is read once.
        both = tl.arange(0, 2 * BLOCK_N)
        first = tl.program_id(0) % tiles * BLOCK_N
        n = tl.minimum(first + both // 2, I - 1) + both % 2 * I
        acc = _natural_product(
            x_ptr,
            token * stride_xm,
            w_ptr,
            scales_ptr,
            zeros_ptr,
            n,
            H,
            stride_wn,
            stride_sn,
            stride_zn,
            GROUP,
            HAS_ZEROS,
        )
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
        y = _gated(gate, up, alpha, beta, limit, ACTIVATION)
        y = tl.where((column < I)[None, :], y, 0.0).to(out_ptr.dtype.element_ty)
    else:
        j = tl.arange(0, 16)
        n = tl.minimum(column, I - 1)
        x_ptrs = x_ptr + token[None, :] * stride_xm + j[:, None]
        gate_ptrs = w_ptr + n[:, None] * stride_wn + j[None, :]
        up_ptrs = w_ptr + (n + I)[:, None] * stride_wn + j[None, :]
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        last_group = H // GROUP - 1
        for step in range(0, tl.cdiv(H, 128)):
            gate_words = _load_words(gate_ptrs, step, H, EVEN_K)
            up_words = _load_words(up_ptrs, step, H, EVEN_K)
            gate = _multiply(
                gate,
                gate_words,
                x_ptrs,
                scales_ptr,
                zeros_ptr,
                n,
                step,
                stride_sn,
                stride_zn,
                last_group,
                GROUP,
                HAS_ZEROS,
            )
            up = _multiply(
                up,
                up_words,
                x_ptrs,
                scales_ptr,
                zeros_ptr,
                n + I,
                step,
                stride_sn,
                stride_zn,
                last_group,
                GROUP,
                HAS_ZEROS,
            )
            x_ptrs += 128
            gate_ptrs += 16
            up_ptrs += 16
        y = _gated(gate, up, alpha, beta, limit, ACTIVATION)
        y = tl.where((column < I)[:, None], y, 0.0)
        y = tl.trans(y).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * stride_om
    if OUT_NATURAL:
        inside = column < I
        out_ptrs += column[None, :]
    else:
        inside = column < (I + 127) // 128 * 128
        out_ptrs += _plane_position(column)[None, :]
    tl.store(out_ptrs, y, mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def moe_int4_prefill_down(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    weights_ptr,
    sorted_ids_ptr,
    expert_ids_ptr,
    num_padded_ptr,
    num_pairs,
    H,
    I,  # noqa: E741
    stride_xm,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_ze,
    stride_zn,
    stride_om,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATURAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Down projection of a block of pairs, times the pairs' router weights.

    x is in the order of k that NATURAL says. Without SORTED the pairs are rows in their
    own order, all of expert 0.
    """
    tiles = tl.cdiv(H, BLOCK_N)
    block = tl.program_id(0) // tiles
    if SORTED:
        if block * BLOCK_M >= tl.load(num_padded_ptr):
            return
        expert = tl.load(expert_ids_ptr + block).to(tl.int64)
        if expert < 0:
            return
        pairs = tl.load(sorted_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    else:
        expert = 0
        pairs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = pairs < num_pairs
    row = tl.where(valid, pairs, 0).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(column, H - 1)

    w_ptr += expert * stride_we
    scales_ptr += expert * stride_se
    zeros_ptr += expert * stride_ze
    if NATURAL:
        y = _natural_product(
            x_ptr,
            row * stride_xm,
            w_ptr,
            scales_ptr,
            zeros_ptr,
            n,
            I,
            stride_wn,
            stride_sn,
            stride_zn,
            GROUP,
            HAS_ZEROS,
        )
        if HAS_WEIGHTS:
            y *= tl.load(weights_ptr + row)[:, None]
    else:
        j = tl.arange(0, 16)
        x_ptrs = x_ptr + row[None, :] * stride_xm + j[:, None]
        w_ptrs = w_ptr + n[:, None] * stride_wn + j[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        last_group = I // GROUP - 1
        for step in range(0, tl.cdiv(I, 128)):
            words = _load_words(w_ptrs, step, I, EVEN_K)
            acc = _multiply(
                acc,
                words,
                x_ptrs,
                scales_ptr,
                zeros_ptr,
                n,
                step,
                stride_sn,
                stride_zn,
                last_group,
                GROUP,
                HAS_ZEROS,
            )
            x_ptrs += 128
            w_ptrs += 16
        if HAS_WEIGHTS:
            acc *= tl.load(weights_ptr + row)[None, :]
        y = tl.trans(acc)
    y = y.to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * stride_om + column[None, :]
    tl.store(out_ptrs, y, mask=valid[:, None] & (column < H)[None, :])


@triton.jit(do_not_specialize=["num_ids"])
def moe_int4_prefill_sum(
    x_ptr,
    out_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    H,
    num_ids,
    stride_om,
    stride_im,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum x [M * top_k, H] over a token's pairs whose expert is on this rank."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(topk_ids_ptr + token * stride_im + slot)
        known = tl.minimum(tl.maximum(expert, 0), num_ids - 1)
        local = tl.where(known == expert, known, -1)
        if HAS_MAP:
            local = tl.where(local < 0, local, tl.load(expert_map_ptr + known))
        width = tl.where(local < 0, 0, H)
        x = tl.load(x_ptr + (token * TOP_K + slot) * H + n, mask=n < width, other=0.0)
        acc += x.to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * stride_om + n, out, mask=n < H)


# Outside of CUDA graphs the host's work limits short prompts. So this code uses plain
# arithmetic and few views (triton.cdiv and tensor_split take microseconds each).
_INFINITY = float("inf")

Variants = dict[tuple[Any, ...], Any]  # see hybrid_w4a16_launch


def launch_kernel(
    kernel: Any,
    variants: Variants,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    large: tuple[torch.Tensor, ...],
    small: tuple[torch.Tensor, ...],
    key: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Launch ``kernel[grid](*arguments, **constants, **options)``."""
    # fork: begin token
    if direct.can_launch(large, small):
        direct.launch(kernel, variants, grid, arguments, key, constants, options)
        return
    # fork: end
    kernel[grid](*arguments, **constants, **options)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(k: int) -> int:
    return _cdiv(k, _STEP) * _STEP


class Blocks(NamedTuple):
    """Pairs (token, slot) sorted by expert, see ``sort_pairs``.

    sorted_ids int32: pair ids; each expert's are padded to a multiple of ``block_m``
    with ids >= M * top_k. expert_ids int32: local expert of each block, -1: not on this
    rank. num_padded int32 [1]: how many of sorted_ids are valid, padding included.
    """

    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_padded: torch.Tensor


def sort_pairs(
    topk_ids: torch.Tensor,
    block_m: int,
    num_experts: int,
    expert_map: torch.Tensor | None,
) -> Blocks:
    """Sort the pairs by expert, with vLLM's op ``moe_align_block_size``.

    topk_ids int32/int64 [M, top_k], global ids; those outside 0..num_experts-1 are left
    out. num_experts counts the experts of all ranks. expert_map int32 [num_experts]
    maps to a local expert or -1, or ``None``.
    """
    pairs = topk_ids.numel()
    # at most: every expert in use is padded by block_m - 1
    most = pairs + min(pairs, num_experts) * (block_m - 1)
    blocks = Blocks(
        topk_ids.new_empty(most, dtype=torch.int32),
        topk_ids.new_empty(_cdiv(most, block_m), dtype=torch.int32),
        topk_ids.new_empty(1, dtype=torch.int32),
    )
    _custom_ops.moe_align_block_size(
        topk_ids, num_experts, block_m, *blocks, expert_map
    )
    return blocks


class Activation(NamedTuple):
    """The activation arguments of ``fused_moe_wvSplitK_int4_gate_up``."""

    name: str
    alpha: float
    beta: float
    limit: float | None


class Int4Matrix:
    """A projection of all experts, in the layout of ``hybrid_w4a16_packing``.

    Make it once per layer: it holds what its launches need in every call.
    """

    def __init__(
        self,
        words: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        group_size: int,
    ) -> None:
        self.words, self.scales, self.zero_points = words, scales, zero_points
        self.group_size = group_size
        self.experts, self.rows = words.shape[:2]
        self.columns = scales.shape[2] * group_size
        zeros = words if zero_points is None else zero_points
        self.tensors = words, scales, zeros
        self.strides = tuple(t.stride(i) for t in self.tensors for i in (0, 1))
        self.gate_up_variants: Variants = {}
        self.down_variants: Variants = {}
        self.constants = {
            "GROUP": group_size,
            "HAS_ZEROS": zero_points is not None,
            "EVEN_K": self.columns % _STEP == 0,
        }

    def is_of(self, words: torch.Tensor, scales: torch.Tensor | None) -> bool:
        """Whether the matrix holds these tensors."""
        return self.words is words and self.scales is scales


_to_planes_variants: Variants = {}


def to_planes(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copy x [M, K] to out [M, padded K] in plane order.

    Both are fp16 or bf16 with innermost stride 1.
    """
    tokens, k = x.shape
    steps = min(8, 1 << (_cdiv(k, _STEP) - 1).bit_length())
    numbers = k, x.stride(0), out.stride(0)
    launch_kernel(
        moe_int4_prefill_to_planes,
        _to_planes_variants,
        (tokens, _cdiv(k, steps * _STEP), 1),
        (x, out, *numbers),
        (x, out),
        (),
        (x.dtype, out.dtype, *numbers),
        {"STEPS": steps},
        {"num_warps": 4},
    )


def gate_up(
    x: torch.Tensor,
    w13: Int4Matrix,
    out: torch.Tensor,
    blocks: Blocks,
    top_k: int,
    activation: Activation,
    tiles: PrefillTiles,
) -> None:
    """Gate and up projections and the activation.

    x is [M, H] if the tile's order is natural, else [M, padded H] in plane order. out
    [M * top_k, padded I] is in the order of down's tile. w13 is [E, 2*I, H//8], rows
    0..I-1 gate. Rows of pairs whose expert is on another rank are not written.
    """
    tile = tiles.gate_up
    # fork: begin overlay
    if tile.tiled:
        ops.fused_moe_wvSplitK_int4_tiled_gate_up(
            x,
            w13.words,
            w13.scales,
            out,
            blocks,
            top_k,
            activation,
            w13.group_size,
            tile.launch(columns=16),
            w13.zero_points,
        )
        return
    # fork: end
    intermediate = w13.rows // 2
    columns = _cdiv(_padded(intermediate), tile.block_n)
    limit = _INFINITY if activation.limit is None else float(activation.limit)
    x_stride, out_stride = x.stride(0), out.stride(0)
    launch_kernel(
        moe_int4_prefill_gate_up,
        w13.gate_up_variants,
        (blocks.expert_ids.shape[0] * columns, 1, 1),
        (
            x,
            *w13.tensors,
            out,
            *blocks,
            out.shape[0],
            top_k,
            intermediate,
            w13.columns,
            x_stride,
            *w13.strides,
            out_stride,
            float(activation.alpha),
            float(activation.beta),
            limit,
        ),
        (x, out),
        blocks,
        (x.dtype, out.dtype, x_stride, out_stride),
        {
            **w13.constants,
            "ACTIVATION": _FORMULAS[activation.name],
            "NATURAL": tile.natural,
            "OUT_NATURAL": tiles.down.natural,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def down(
    x: torch.Tensor,
    w2: Int4Matrix,
    out: torch.Tensor,
    blocks: Blocks,
    topk_weights: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Down projection of each pair, times its router weight, not yet summed.

    x [M * top_k, padded I] is the output of ``gate_up``, in the tile's order; w2
    [E, H, I//8]; out [M * top_k, H]; topk_weights fp32 [M, top_k], contiguous, or
    ``None`` for weights of 1. Rows of pairs whose expert is on another rank are not
    written.
    """
    # fork: begin overlay
    if tile.tiled:
        ops.fused_moe_wvSplitK_int4_tiled_down(
            x,
            w2.words,
            w2.scales,
            out,
            blocks,
            topk_weights,
            w2.group_size,
            tile.launch(columns=32),
            w2.zero_points,
        )
        return
    # fork: end
    columns = _cdiv(w2.rows, tile.block_n)
    weights = out if topk_weights is None else topk_weights
    x_stride, out_stride = x.stride(0), out.stride(0)
    constants = w2.constants
    launch_kernel(
        moe_int4_prefill_down,
        w2.down_variants,
        (blocks.expert_ids.shape[0] * columns, 1, 1),
        (
            x,
            *w2.tensors,
            out,
            weights,
            *blocks,
            out.shape[0],
            w2.rows,
            w2.columns,
            x_stride,
            *w2.strides,
            out_stride,
        ),
        (x, out),
        (weights, *blocks),
        (x.dtype, out.dtype, weights.dtype, x_stride, out_stride),
        {
            "GROUP": constants["GROUP"],
            "HAS_ZEROS": constants["HAS_ZEROS"],
            "HAS_WEIGHTS": topk_weights is not None,
            "SORTED": True,
            "EVEN_K": constants["EVEN_K"],
            "NATURAL": tile.natural,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


_sum_variants: Variants = {}


def sum_pairs(
    pairs: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
) -> None:
    """out [M, H]: sum of pairs [M * top_k, H] over slots with an expert on this rank.

    topk_ids int32/int64 [M, top_k], innermost stride 1. expert_map int32 [global
    experts] maps to a local expert or -1. Without it the ids are local, and ids outside
    0..num_experts-1 are skipped.
    """
    tokens, hidden = out.shape
    num_ids = num_experts if expert_map is None else expert_map.shape[0]
    map_ = topk_ids if expert_map is None else expert_map
    strides = out.stride(0), topk_ids.stride(0)
    launch_kernel(
        moe_int4_prefill_sum,
        _sum_variants,
        (tokens, _cdiv(hidden, 1024), 1),
        (pairs, out, topk_ids, map_, hidden, num_ids, *strides),
        (pairs, out),
        (topk_ids, map_),
        (pairs.dtype, out.dtype, topk_ids.dtype, map_.dtype, hidden, *strides),
        {
            "TOP_K": topk_ids.shape[1],
            "HAS_MAP": expert_map is not None,
            "BLOCK_N": 1024,
        },
        {"num_warps": 4},
    )


class Workspace(NamedTuple):
    """Buffers between the launches; ``down_out`` shares memory with ``planes``."""

    planes: torch.Tensor
    """[M, padded H]: the input in plane order; unused if gate_up's order is natural."""
    middle: torch.Tensor
    """[M * top_k, padded I]: the output of gate_up, in the order of down's tile."""
    down_out: torch.Tensor
    """[M * top_k, H]: the output of down, before the sum."""

    @staticmethod
    def elements(tokens: int, top_k: int, hidden: int, intermediate: int) -> int:
        """Return how many elements of the activation dtype ``split`` needs."""
        pairs = tokens * top_k
        shared = max(tokens * _padded(hidden), pairs * hidden)
        return pairs * _padded(intermediate) + shared

    @classmethod
    def split(
        cls,
        buffer: torch.Tensor,
        tokens: int,
        top_k: int,
        hidden: int,
        intermediate: int,
    ) -> "Workspace":
        """Split a contiguous buffer into views.

        Raises ``ValueError`` if it has fewer than ``elements(...)`` elements.
        """
        needed = cls.elements(tokens, top_k, hidden, intermediate)
        if buffer.numel() < needed:
            raise ValueError(
                f"workspace: expected at least {needed} elements, got {buffer.numel()}"
            )
        pairs = tokens * top_k
        planes, middle = _padded(hidden), _padded(intermediate)
        shared = buffer.storage_offset() + pairs * middle
        return cls(
            buffer.as_strided((tokens, planes), (planes, 1), shared),
            buffer.as_strided((pairs, middle), (middle, 1)),
            buffer.as_strided((pairs, hidden), (hidden, 1), shared),
        )


def prefill_experts(
    x: torch.Tensor,
    w13: Int4Matrix,
    w2: Int4Matrix,
    out: torch.Tensor,
    workspace: Workspace,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    blocks: Blocks,
    activation: Activation,
    tiles: PrefillTiles,
) -> None:
    """Run the routed experts on many tokens, without host synchronisation.

    Three launches (gate_up, down, sum), and one more for plane order.

    Args:
        x: fp16/bf16 [M, H], innermost stride 1.
        w13, w2: [E, 2*I, H//8] and [E, H, I//8].
        out: [M, H] in ``x``'s dtype, innermost stride 1; every element is written.
        topk_ids, topk_weights, expert_map: as in ``down`` and ``sum_pairs``.
        blocks: made for ``tiles.gate_up.block_m``.
    """
    if not tiles.gate_up.natural:
        to_planes(x, workspace.planes)
        x = workspace.planes
    top_k = topk_ids.shape[1]
    middle = workspace.middle
    gate_up(x, w13, middle, blocks, top_k, activation, tiles)
    down(middle, w2, workspace.down_out, blocks, topk_weights, tiles.down)
    sum_pairs(workspace.down_out, out, topk_ids, expert_map, w13.experts)


# fork: begin overlay
_MOST_ROWS = 1 << 16  # of a dense call without new lists


@functools.cache
def _lists_of(device: torch.device, rows: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.arange(_cdiv(rows, 64) * 64, dtype=torch.int32, device=device),
        torch.zeros(_cdiv(rows, 8), dtype=torch.int32, device=device),
        torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device),
    )


def _rows_in_order(device: torch.device, rows: int, block_m: int) -> Blocks:
    """The lists of ``rows`` rows that all go to expert 0."""
    made = max(_MOST_ROWS, 1 << (rows - 1).bit_length())  # few sizes, as they are kept
    ids, experts, count = _lists_of(device, made)
    lists = _cdiv(rows, block_m)
    return Blocks(ids[: lists * block_m], experts[:lists], count)


# fork: end
# fork: begin lm_head
_dense_variants: Variants = {}


def dense(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    group_size: int,
    tile: Tile,
) -> torch.Tensor:
    """``x @ w^.T`` [M, N] of many rows, without host synchronisation.

    One launch, and one more for plane order.

    x fp16/bf16 [M, K], innermost stride 1; words int32 [N, K//8], scales [N, K//G] and
    zero_points int32 [N//8, K//G] as one expert of ``hybrid_w4a16_packing``.
    """
    num_rows, k = x.shape
    n = words.shape[0]
    # fork: end
    # fork: begin overlay
    if tile.tiled:
        if x.data_ptr() % 16 or x.stride(0) % 8:
            x = x.clone(memory_format=torch.contiguous_format)
        out = x.new_empty(num_rows, n)
        ops.fused_moe_wvSplitK_int4_tiled_down(
            x,
            words.unsqueeze(0),
            scales.unsqueeze(0),
            out,
            _rows_in_order(x.device, num_rows, tile.block_m),
            None,
            group_size,
            tile.launch(columns=32),
            None if zero_points is None else zero_points.unsqueeze(0),
        )
        return out
    # fork: end
    # fork: begin lm_head
    if not tile.natural:
        planes = x.new_empty(num_rows, _padded(k))
        to_planes(x, planes)
        x = planes
    out = x.new_empty(num_rows, n)
    zeros = words if zero_points is None else zero_points
    strides = (0, words.stride(0), 0, scales.stride(0), 0, zeros.stride(0))
    numbers = (n, k, x.stride(0), *strides, n)
    launch_kernel(
        moe_int4_prefill_down,
        _dense_variants,
        (_cdiv(num_rows, tile.block_m) * _cdiv(n, tile.block_n), 1, 1),
        # without sorted pairs: no router weights, ids and numbers of pairs
        (x, words, scales, zeros, out, out, words, words, words, num_rows, *numbers),
        (x, out, words, scales, zeros),
        (),
        (x.dtype, *numbers),
        {
            "GROUP": group_size,
            "HAS_ZEROS": zero_points is not None,
            "HAS_WEIGHTS": False,
            "SORTED": False,
            "EVEN_K": k % _STEP == 0,
            "NATURAL": tile.natural,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    return out


# fork: end
