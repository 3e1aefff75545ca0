# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The int4 MoE ops: loading, fake implementations, typed wrappers.

Notation: M tokens, E experts on this rank, K the reduction size, N output rows, G the
group size, I the intermediate size per partition, H the hidden size.

All ops use the weight layout of ``hybrid_w4a16_packing``: w int32 [E, N, K//8], scales
[E, N, K//G], zero_points int32 [E, N//8, K//G] or ``None``. Activations are fp16 or
bf16, accumulation is fp32. All tensors of a call are on one device and may have any row
stride. A bad argument raises ``RuntimeError`` with the argument, what was expected and
what was passed.
"""

import functools

# fork: begin overlay
import os
import struct

# fork: end
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm import envs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

# fork: begin overlay
_LIBRARY = "_hybrid_w4a16_C.so"
# fork: end
_KERNELS = (
    "fused_moe_wvSplitK_int4_gemm",
    "fused_moe_wvSplitK_int4_gate_up",
    "fused_moe_wvSplitK_int4_down",
)
_OPS = (
    *_KERNELS,
    "hybrid_w4a16_build_info",
    "hybrid_w4a16_refusal",
    "hybrid_w4a16_row_invariance",
)


class OpActivation(NamedTuple):
    """An activation's identifiers in the ops and kernels."""

    name: str
    """Value of the ops' ``activation`` argument."""
    formula: int
    """``moe_int4::Activation`` in C++ and the constant of the Triton kernels."""


# Optional tensors of a shared expert: hybrid_w4a16_shared_expert.py has their types.
SharedTensors = tuple[torch.Tensor | None, ...]
_NO_TENSORS: SharedTensors = (None,) * 6
NO_SHARED_EXPERT = (_NO_TENSORS, _NO_TENSORS)  # of gate_up and of down

# SWIGLUOAI is missing: it expects the gate and up rows of w13 interleaved. Only gpt-oss
# stores them so, and its experts have a bias, which the ops do not support.
ACTIVATIONS = {
    MoEActivation.SILU: OpActivation("silu", 0),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: OpActivation("swigluoai", 0),
    MoEActivation.GELU: OpActivation("gelu", 1),
    MoEActivation.GELU_TANH: OpActivation("gelu_tanh", 2),
}


def _ops_registered() -> bool:
    return all(hasattr(torch.ops._rocm_C, op) for op in _OPS)


@functools.cache
def load_error() -> str | None:
    """Load the ops once; why they are not there, ``None`` when they are.

    vLLM's own libraries may hold them (``_rocm_C``, on the CPU ``_C``), which its
    platform imports.
    """
    current_platform.import_kernels()
    # fork: begin overlay
    # else a file at the root of the ``vllm`` package tree that holds this module
    if not _ops_registered():
        package_root = os.path.abspath(__file__)
        for _ in range(4):  # vllm/model_executor/layers/fused_moe/<this file>
            package_root = os.path.dirname(package_root)
        path = os.path.join(package_root, _LIBRARY)
        if not os.path.exists(path):
            return (
                "vLLM's own libraries hold no int4 MoE ops and the op library "
                f"{path} does not exist"
            )
        fault = _file_fault(path)
        if fault is not None:
            return f"the op library {path} {fault}: install it again"
        try:
            torch.ops.load_library(path)
        except OSError as error:
            # torch's message names only the file; its cause has the linker's message
            return f"the op library {path} cannot be loaded: {error.__cause__ or error}"
        if not _ops_registered():
            return f"the op library {path} does not match this version: it lacks ops"
    # fork: end
    if not _ops_registered():
        return "vLLM's own libraries hold no int4 MoE ops"
    for op in _KERNELS:
        torch.library.register_fake(f"_rocm_C::{op}", _no_output)
    set_row_invariant(envs.VLLM_BATCH_INVARIANT)
    return None


# fork: begin overlay
def _file_fault(path: str) -> str | None:
    """Return what is wrong with a library file, ``None`` if it is complete.

    Loading a truncated library kills the process (SIGBUS). Linkers write the section
    table last, and the ELF header has its position and size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return "is not an ELF library"
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    expected = table + entry_size * entries
    return f"is truncated: {size} of {expected} bytes" if size < expected else None


# fork: end


def _no_output(*args: object, **kwargs: object) -> None:
    """Fake implementation: the ops return nothing; they write to argument ``c``."""


def build_info() -> dict[str, tuple[str, ...]]:
    """Return what the loaded op library can run on, by device type.

    For example ``{"cpu": ("avx512_bf16",), "hip": ("gfx1100", "gfx1151")}``. The CPU
    entry lists the instruction sets that this processor supports, best first; a GPU
    entry lists the architectures that the library has code objects for.

    Raises ``RuntimeError`` if the library is not loaded.
    """
    error = load_error()
    if error is not None:
        raise RuntimeError(error)
    lines = torch.ops._rocm_C.hybrid_w4a16_build_info().splitlines()
    return {kind: tuple(rest) for kind, *rest in (line.split() for line in lines)}


def refusal(arch: str) -> str | None:
    """Return why the loaded op library does not run on ``arch``; ``None`` if it does.

    ``arch`` is "cpu" or a GPU architecture such as "gfx1151" or "sm_90". The reason
    names what the library was built for. Raises ``RuntimeError`` if the library is not
    loaded.
    """
    error = load_error()
    if error is not None:
        raise RuntimeError(error)
    return torch.ops._rocm_C.hybrid_w4a16_refusal(arch) or None


def set_row_invariant(on: bool) -> None:
    """Whether rows get the same bits alone and in any batch; for the whole process.

    Applies to all ops of the library, also those of ``hybrid_w4a16_dense_ops``. Loading
    the library sets it from ``VLLM_BATCH_INVARIANT``. Then one kernel runs for any
    number of rows: on the CPU that of few rows, on a GPU the one that reads an expert's
    weights for each pair of token and expert. Layers look at it when they are built.
    """
    torch.ops._rocm_C.hybrid_w4a16_row_invariance(on)


def row_invariant() -> bool:
    """Return what ``set_row_invariant`` set."""
    return torch.ops._rocm_C.hybrid_w4a16_row_invariance()


def cpu_kernels(group_size: int, dtype: torch.dtype) -> list[tuple[str, int]]:
    """Return the kernels that the CPU ops run, each with its smallest number of rows.

    The number of rows counts the rows of one expert in a call: with ``[("avx512_vnni",
    1), ("avx512_bf16", 13)]`` experts with up to 12 rows run the first kernel.
    ``group_size`` is 32, 64 or 128 and ``dtype`` fp16 or bf16; otherwise
    ``RuntimeError``.
    """
    lines = torch.ops._rocm_C.hybrid_w4a16_cpu_kernels(group_size, dtype).splitlines()
    return [(name, int(rows)) for name, rows in (line.split() for line in lines)]


def load_device(device: int, arch: str) -> None:
    """Load the kernels onto a GPU; once per device is enough.

    Must not be called while a graph is captured. Raises ``RuntimeError`` if ``refusal``
    returns a reason for ``arch``.
    """
    torch.ops._rocm_C.hybrid_w4a16_load_device(device, arch)


# fork: begin token
_DENSE_PARAMETERS = "hybrid_w4a16_parameters"


def set_dense_parameters(
    layer: Any, weights: str, scales: str, zero_points: str | None = None
) -> None:
    """Record which parameters of a linear hold its weights as the dense ops take them.

    The layouts are those of ``hybrid_w4a16_dense_ops``, for 4 and for 8 bits.
    """
    setattr(layer, _DENSE_PARAMETERS, (weights, scales, zero_points))


def dense_parameters(
    layer: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """Weights, scales and zero points of a linear, ``None`` if nothing is recorded.

    They are looked up in each call because loading weights again replaces parameters.
    """
    names = getattr(layer, _DENSE_PARAMETERS, None)
    if names is None:
        return None
    weights, scales, zero_points = names
    zeros = None if zero_points is None else getattr(layer, zero_points, None)
    return getattr(layer, weights), getattr(layer, scales), zeros


# fork: end
def fused_moe_wvSplitK_int4_gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    expert_ids: torch.Tensor,
    block_size_m: int,
    cu_count: int,
    group_size: int,
    zero_points: torch.Tensor | None = None,
    sorted_token_ids: torch.Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Grouped skinny GEMM over blocks of rows that share an expert.

    Block ``b`` covers the row ids ``sorted_token_ids[b*block_size_m + j]`` (without
    ``sorted_token_ids``: ``b*block_size_m + j``), ``0 <= j < block_size_m``. For each
    id below ``M*top_k``: ``c[id] = w[expert_ids[b]] @ a[id // top_k]``. Ids from
    ``M*top_k`` on are padding; a block whose expert id is -1 is skipped; rows of ``c``
    that no block covers are not written.

    Args:
        a: fp16/bf16 [M, K], innermost stride 1.
        w: packed weights [E, N, K//8].
        scales: [E, N, K//G] in ``a``'s dtype.
        c: output, ``a``'s dtype [M*top_k, N], innermost stride 1.
        expert_ids: int32 [num_blocks], each -1 or 0..E-1.
        block_size_m: rows per block, 1..5.
        cu_count: compute units to spread the grid over, at least 1; unused on the CPU.
        group_size: G, 32, 64 or 128; K is a multiple of it.
        zero_points: [E, N//8, K//G] or ``None``.
        sorted_token_ids: int32, num_blocks*block_size_m entries or more.
        top_k: experts per token, at least 1.
    """
    torch.ops._rocm_C.fused_moe_wvSplitK_int4_gemm(
        a,
        w,
        scales,
        c,
        expert_ids,
        block_size_m,
        cu_count,
        group_size,
        zero_points,
        sorted_token_ids,
        top_k,
    )


def fused_moe_wvSplitK_int4_gate_up(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    cu_count: int,
    group_size: int,
    zero_points: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    plan: Sequence[int] | None = None,
    shared: SharedTensors = _NO_TENSORS,
) -> None:
    """First half of a decode step: gate and up projections and the activation.

    For token ``m``, slot ``t``, local expert ``e``, with ``y = w[e] @ a[m]`` in fp32:
    ``c[m*top_k + t, i] = act(min(y[i], limit)) * (clamp(y[I+i], +-limit) + beta)``.
    Rows of pairs whose expert is on another rank are not written.

    Args:
        a: fp16/bf16 [M, H], innermost stride 1.
        w: packed w13 [E, 2*I, H//8], rows 0..I-1 gate, I..2*I-1 up.
        scales: [E, 2*I, H//G] in ``a``'s dtype.
        c: output, ``a``'s dtype [M*top_k, I], innermost stride 1.
        topk_ids: int32/int64 [M, top_k], innermost stride 1.
        activation: "silu" (``x * sigmoid(alpha * x)``), "swigluoai" (the same
            formula), "gelu" (erf) or "gelu_tanh".
        cu_count: as in ``fused_moe_wvSplitK_int4_gemm``.
        group_size: G, 32, 64 or 128; H is a multiple of it.
        zero_points: [E, 2*I//8, H//G] or ``None``.
        expert_map: int32 [global experts], global to local expert, -1: not on this
            rank. Without it the ids are local; ids outside 0..E-1 are skipped.
        alpha, beta, limit: parameters of the formula; a limit of ``None`` means no
            clamp. gpt-oss uses 1.702, 1.0, 7.0 (vLLM's ``SWIGLUOAI``).
        plan: GPU launch plan, 1 to 8 integers that the kernels' launcher checks;
            with ``None`` the launcher chooses. Must be ``None`` on the CPU.
        shared: ``SharedGateUp`` of a shared expert, for the same launch.
    """
    torch.ops._rocm_C.fused_moe_wvSplitK_int4_gate_up(
        a,
        w,
        scales,
        c,
        topk_ids,
        activation,
        cu_count,
        group_size,
        zero_points,
        expert_map,
        alpha,
        beta,
        limit,
        plan,
        *shared,
    )


def fused_moe_wvSplitK_int4_down(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    cu_count: int,
    group_size: int,
    zero_points: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    plan: Sequence[int] | None = None,
    shared: SharedTensors = _NO_TENSORS,
) -> None:
    """Second half of a decode step: down projection, weighted and summed over top-k.

    ``c[m] = sum_t topk_weights[m, t] * (w[e(m, t)] @ a[m*top_k + t])`` in fp32, in a
    fixed order, over the pairs whose expert is on this rank; 0 if there are none. Every
    element of ``c`` is written.

    Args:
        a: fp16/bf16 [M*top_k, I], innermost stride 1: the output of gate_up.
        w: packed w2 [E, H, I//8].
        scales: [E, H, I//G] in ``a``'s dtype.
        c: output, ``a``'s dtype [M, H], innermost stride 1.
        topk_ids: int32/int64 [M, top_k], innermost stride 1.
        topk_weights: fp32 [M, top_k], innermost stride 1; ``None`` if the router
            weights were already applied to the input.
        cu_count: as in ``fused_moe_wvSplitK_int4_gemm``.
        group_size: G, 32, 64 or 128; I is a multiple of it.
        zero_points: [E, H//8, I//G] or ``None``.
        expert_map, plan: as in ``fused_moe_wvSplitK_int4_gate_up``.
        shared: ``SharedDown`` of a shared expert, for the same launch.
    """
    torch.ops._rocm_C.fused_moe_wvSplitK_int4_down(
        a,
        w,
        scales,
        c,
        topk_ids,
        topk_weights,
        cu_count,
        group_size,
        zero_points,
        expert_map,
        plan,
        *shared,
    )


# fork: begin overlay
def has_tiled() -> bool:
    """Whether the loaded op library has the tiled ops: a CUDA build."""
    return load_error() is None and hasattr(
        torch.ops._rocm_C, "fused_moe_wvSplitK_int4_tiled_gate_up"
    )


def fused_moe_wvSplitK_int4_tiled_gate_up(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    top_k: int,
    activation: tuple[str, float, float, float | None],
    group_size: int,
    tile: tuple[int, int, int],
    zero_points: torch.Tensor | None = None,
) -> None:
    """As ``fused_moe_wvSplitK_int4_gate_up``, for many tokens and sorted pairs.

    Args:
        a: fp16/bf16 [M, H], rows aligned to 16 bytes.
        w, scales, zero_points: as there; I is even.
        c: output, ``a``'s dtype [M*top_k, I or more], rows aligned to 4 bytes.
        blocks: sorted ids, expert ids and their number, see ``Blocks`` in
            ``hybrid_w4a16_triton``.
        top_k: experts per token.
        activation: name, alpha, beta, limit, as there.
        group_size: G, 32, 64 or 128.
        tile: pairs of a block (8, 16, 32 or 64), waves (1 to 8), and the tiles of rows
            that a wave multiplies one after another.
    """
    name, alpha, beta, limit = activation
    torch.ops._rocm_C.fused_moe_wvSplitK_int4_tiled_gate_up(
        a,
        w,
        scales,
        c,
        *blocks,
        top_k,
        name,
        group_size,
        tile,
        zero_points,
        alpha,
        beta,
        limit,
    )


def fused_moe_wvSplitK_int4_tiled_down(
    a: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    c: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    topk_weights: torch.Tensor | None,
    group_size: int,
    tile: tuple[int, int, int],
    zero_points: torch.Tensor | None = None,
) -> None:
    """The down projection of each sorted pair, times its router weight, not summed.

    Args:
        a: fp16/bf16 [M*top_k, I or more], rows aligned to 16 bytes.
        w, scales, zero_points: as in ``fused_moe_wvSplitK_int4_down``; H is even.
        c: output, ``a``'s dtype [M*top_k, H], rows aligned to 4 bytes. Rows of pairs
            whose expert is on another rank are not written.
        blocks, tile: as in ``fused_moe_wvSplitK_int4_tiled_gate_up``.
        topk_weights: fp32 [M, top_k], contiguous; ``None``: 1.
        group_size: G, 32, 64 or 128.
    """
    torch.ops._rocm_C.fused_moe_wvSplitK_int4_tiled_down(
        a,
        w,
        scales,
        c,
        *blocks,
        topk_weights,
        group_size,
        tile,
        zero_points,
    )


# fork: end
