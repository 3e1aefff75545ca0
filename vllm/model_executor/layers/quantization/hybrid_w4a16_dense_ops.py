# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The dense ops for group-quantized weights: fakes, typed wrappers, quantization.

Notation: M activation rows, K the reduction size, N output rows, G the group size.
Weights have 4 or 8 bits, ``w^[n, k] = (q[n, k] - zp[n, k//G]) * scales[n, k//G]``::

    4 bits   int32 [N, K//8], ExLlama-shuffled as in ``hybrid_w4a16_ops``; zp 8, or
             zero_points int32 [N//8, K//G], row n at word n//8, bits 4*(n%8)
    8 bits   uint8 [N, K], in order of k; zp 128
    scales   activation dtype [N, K//G]
"""

import functools

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops

MAX_ROWS = 16
"""Maximum number of activation rows per call. On the CPU ``wvSplitK_int_g`` takes any
number.
"""
PARTS = 256
"""Parts of the vocabulary in ``partials``: ``kRescoreParts`` of the op library."""

_OPS = ("wvSplitK_int_g", "wvSplitK_int_g_rescore")


@functools.cache
def load_error() -> str | None:
    """Load the op library once; returns why the ops are missing, or ``None``."""
    error = hybrid_w4a16_ops.load_error()
    if error is not None:
        return error
    missing = [op for op in _OPS if not hasattr(torch.ops._rocm_C, op)]
    if missing:
        return f"the op library has another version: it lacks {', '.join(missing)}"
    for op in _OPS:
        torch.library.register_fake(f"_rocm_C::{op}", _no_output)
    return None


def _no_output(*args: object, **kwargs: object) -> None:
    """Fake implementation: the ops write ``c`` and return nothing."""


def wvSplitK_int_g(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    cu_count: int,
    group_size: int,
    bits: int,
    zero_points: torch.Tensor | None = None,
) -> None:
    """``c = a @ w^.T``, accumulated in fp32. Repeatable bits, no host sync.

    Args:
        a: fp16/bf16 [M, K], M up to 16 (on the CPU any number), innermost stride 1.
        w: 4 bits: int32 [N, K//8]; 8 bits: uint8 [N, K]; 16-byte aligned, row stride a
            multiple of 16 bytes.
        scales: [N, K//G] in ``a``'s dtype, innermost stride 1.
        c: output, ``a``'s dtype [M, N], innermost stride 1.
        cu_count: compute units to spread the grid over, at least 1; no effect on CPU.
        group_size: G, 32, 64 or 128; K is a multiple of it.
        bits: 4 or 8.
        zero_points: int32 [N//8, K//G] with 4 bits, or ``None``.

    Raises ``RuntimeError`` naming an argument that does not fit.
    """
    torch.ops._rocm_C.wvSplitK_int_g(
        a, w, scales, c, cu_count, group_size, bits, zero_points
    )


def wvSplitK_int_g_rescore(
    a: torch.Tensor,
    w: torch.Tensor,
    errors: torch.Tensor,
    c: torch.Tensor,
    partials: torch.Tensor,
    window: float,
    bound: float,
) -> None:
    """Recompute the products in ``c`` that could matter, from the 16-bit weights.

    ``c`` is the output of ``wvSplitK_int_g`` for the quantized ``w``. With
    ``reach[m, n] = bound * |a[m]| * errors[n] + 2**-7 * |c[m, n]|`` (the second term
    covers the rounding of ``c``), ``c[m, n]`` becomes ``a[m] @ w[n]``, summed in fp32
    in a fixed order, where

    * ``c[m, n] + reach[m, n] >= max(c[m] - reach[m])``: it may be the largest; or
    * ``c[m, n] >= max(c[m]) - window``.

    So the largest element is that of the 16-bit product, unless an error exceeds its
    bound. Elements more than ``window`` below the largest keep the quantized value. The
    cost grows with the rows that qualify; each row of ``w`` is read once for all of
    ``a``.

    Args:
        a: fp16/bf16 [M, K], M up to 16, K a multiple of 8, innermost stride 1.
        w: [N, K] in ``a``'s dtype, 16-byte aligned, row stride a multiple of 8.
        errors: fp32 [N], ``|w[n] - w^[n]| / sqrt(K)``. A negative value marks a row
            that does not exist: its products are ignored and stay unchanged.
        c: ``a``'s dtype [M, N], innermost stride 1, read and written.
        partials: fp32 [M, 2 * PARTS], scratch, written.
        window: width in units of ``c``, at least 0.
        bound: allowed error in standard deviations, at least 0.

    Raises ``RuntimeError`` naming an argument that does not fit.
    """
    torch.ops._rocm_C.wvSplitK_int_g_rescore(a, w, errors, c, partials, window, bound)


def quantize(
    weight: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows by group, with the scales of the smallest error.

    The search tries fractions of the scale that maps the largest weight of the group to
    the most negative integer. It improves each twice by the least-squares solution for
    the rounded integers, and keeps the scale with the smallest squared error.

    Args:
        weight: fp16/bf16 [N, K], finite; K a multiple of ``group_size``.
        bits: 4 or 8.
        group_size: G.

    Returns the packed weights and the scales, in the form ``wvSplitK_int_g`` takes, and
    fp32 [N], ``|w[n] - w^[n]| / sqrt(K)``.
    """
    n, k = weight.shape
    device = weight.device
    columns, dtype = (k // 8, torch.int32) if bits == 4 else (k, torch.uint8)
    packed = torch.empty(n, columns, dtype=dtype, device=device)
    scales = torch.empty(n, k // group_size, dtype=weight.dtype, device=device)
    errors = torch.empty(n, dtype=torch.float32, device=device)
    rows = max(1, (1 << 24) // k)  # temporaries of up to 64 MiB each
    for begin in range(0, n, rows):
        part = slice(begin, begin + rows)
        groups = weight[part].float().unflatten(1, (-1, group_size))
        scale = _search_scales(groups, bits, weight.dtype)
        q = _round(groups, scale, bits)
        squares = (groups - q * scale).square_().sum((1, 2))
        errors[part] = (squares / k).sqrt_()
        scales[part] = scale.squeeze(-1).to(weight.dtype)
        packed[part] = _pack(q.flatten(1), bits)
    return packed, scales, errors


_FRACTIONS = {4: (1.0, 0.92, 0.84, 0.76), 8: (1.0,)}
_IMPROVEMENTS = 2


def _search_scales(groups: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales [N, groups, 1], rounded to ``dtype``, for weights [N, groups, G]."""
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, float("inf"))
    for fraction in _FRACTIONS[bits]:
        scale = largest * (-fraction / 2 ** (bits - 1))
        for _ in range(1 + _IMPROVEMENTS):
            scale = scale.to(dtype).float()
            q = _round(groups, scale, bits)
            error = (groups - q * scale).square_().sum(2, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best)
            products = (groups * q).sum(2, keepdim=True)
            scale = products / q.square_().sum(2, keepdim=True).clamp_(min=1)
    return best


def _round(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers of the weights, as floats; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    half = 2 ** (bits - 1)
    return (groups * inverse).round_().clamp_(-half, half - 1)


def _pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return (q + 128).to(torch.uint8)
    v = (q + 8).to(torch.int32).unflatten(1, (-1, 8))
    words = torch.zeros_like(v[..., 0])
    for place, i in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= v[..., i] << (4 * place)
    return words


def dequantize(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 [N, K] from the packed weights and scales of ``quantize``."""
    if bits == 8:
        q = packed.float() - 128
    else:
        order = torch.tensor((0, 4, 1, 5, 2, 6, 3, 7), device=packed.device)
        shifts = (4 * order).to(torch.int32)
        q = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1).float() - 8
    groups = q.unflatten(1, (scales.shape[1], -1))
    return (groups * scales.float().unsqueeze(-1)).flatten(1)


def rescored_rows(
    a: torch.Tensor,
    errors: torch.Tensor,
    c: torch.Tensor,
    window: float,
    bound: float,
) -> torch.Tensor:
    """Bool [M, N]: the products that ``wvSplitK_int_g_rescore`` recomputes.

    The same rule in torch, for tests and for counting. The arguments are the same.
    """
    products = c.float()
    exists = errors >= 0
    norms = a.double().square().sum(1, keepdim=True).sqrt().float()
    reach = bound * norms * errors + products.abs() * 2**-7
    nothing = torch.tensor(float("-inf"), device=c.device)
    reached = torch.where(exists, products - reach, nothing).amax(1, keepdim=True)
    largest = torch.where(exists, products, nothing).amax(1, keepdim=True)
    asked = (products + reach >= reached) | (products >= largest - window)
    return asked & exists
