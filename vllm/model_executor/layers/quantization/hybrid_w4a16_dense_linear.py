# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Linears on the weights of the dense ops, for any number of activation rows.

On the CPU one C++ op handles any number. On a GPU the skinny GEMM handles up to
``hybrid_w4a16_dense_ops.MAX_ROWS`` rows. More rows use the GEMM of the MoE prefill.
With 8 bits, and from the number of rows on that the tuning table names, the weights are
dequantized first and torch's GEMM multiplies: that takes time per weight, which many
rows share. In vLLM's batch-invariant mode the skinny GEMM runs on ``MAX_ROWS`` rows at
a time.
"""

import functools

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    dense_tile,
    dequantize_from,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

# fork: begin overlay
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_linear_table as linear_table,
)

# fork: end
from vllm.utils.torch_utils import direct_register_custom_op

# Weights to dequantize at a time: 64 MiB in 16 bits, which most linears stay below.
_AT_ONCE = 1 << 25


def multiply(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    family: DeviceFamily,
) -> torch.Tensor:
    """``x @ w^.T`` in ``x``'s dtype, [..., N] for fp16/bf16 ``x`` [..., K].

    weights, scales and zero_points are as in ``hybrid_w4a16_dense_ops``, on a device of
    ``family``. Repeatable bits, no host sync. On a GPU ``register_gpu_op`` comes first.
    """
    rows = x.reshape(-1, x.shape[-1])
    sizes = family.cu_count, group_size, bits
    if family.tuning is None:
        out = multiply_few(rows, weights, scales, zero_points, *sizes)
    else:
        out = torch.ops.vllm.hybrid_w4a16_linear(
            rows, weights, scales, zero_points, *sizes, family.name
        )
    return out.view(*x.shape[:-1], out.shape[-1])


@functools.cache
def register_gpu_op() -> None:
    """Register the op that branches on the number of rows, opaque to torch.compile.

    Call this before anything is traced.
    """
    direct_register_custom_op(
        "hybrid_w4a16_linear", _multiply_on_gpu, fake_impl=_output_on_gpu
    )


def multiply_few(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    cu_count: int,
    group_size: int,
    bits: int,
) -> torch.Tensor:
    """Multiply with the skinny GEMM, [M, N]; on a GPU M is up to ``ops.MAX_ROWS``."""
    out = x.new_empty(x.shape[0], weights.shape[0])
    ops.wvSplitK_int_g(x, weights, scales, out, cu_count, group_size, bits, zero_points)
    return out


def _multiply_on_gpu(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    cu_count: int,
    group_size: int,
    bits: int,
    arch: str,
) -> torch.Tensor:
    """Choose a kernel by the number of rows; ``arch``: such as "gfx1151"."""
    rows = x.shape[0]
    invariant = hybrid_w4a16_ops.row_invariant()
    few = rows <= ops.MAX_ROWS
    dequantized = bits == 8 or rows >= dequantize_from(arch)
    # fork: begin overlay
    way = linear_table.way(arch, cu_count, weights.shape[0], x.shape[1], rows)
    if way is not None and bits == 4 and not invariant:
        few = few and way == linear_table.SKINNY
        dequantized = way == linear_table.DEQUANTIZED
    # fork: end
    if few:
        return multiply_few(x, weights, scales, zero_points, cu_count, group_size, bits)
    if invariant:
        parts = [
            multiply_few(part, weights, scales, zero_points, cu_count, group_size, bits)
            for part in x.split(ops.MAX_ROWS)
        ]
        return torch.cat(parts)
    if dequantized:
        return multiply_dequantized(x, weights, scales, zero_points, bits, group_size)
    return multiply_in_tiles(x, weights, scales, zero_points, group_size, arch)


def multiply_in_tiles(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    group_size: int,
    arch: str,
) -> torch.Tensor:
    """Multiply 4-bit weights with the GEMM of the MoE prefill on a GPU, [M, N]."""
    # imported here because a CPU machine may not have Triton
    from vllm.model_executor.layers.fused_moe.experts import (
        hybrid_w4a16_triton as prefill,
    )

    tile = dense_tile(arch, x.shape[0], weights.shape[0], x.shape[1])
    return prefill.dense(x, weights, scales, zero_points, group_size, tile)


def multiply_dequantized(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Dequantize on a GPU and multiply with torch's GEMM, [M, N].

    ``_AT_ONCE`` weights at a time, so that the 16-bit copy stays small.
    """
    # imported here because a CPU machine may not have Triton
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_triton

    outputs = weights.shape[0]
    at_once = max(8, _AT_ONCE // x.shape[1] // 8 * 8)  # 8 rows share words of zeros
    out = x.new_empty(x.shape[0], outputs)
    for begin in range(0, outputs, at_once):
        end = begin + at_once
        zeros = None if zero_points is None else zero_points[begin // 8 : end // 8]
        dense = hybrid_w4a16_dense_triton.dequantize(
            weights[begin:end], scales[begin:end], zeros, bits, group_size
        )
        torch.mm(x, dense.t(), out=out[:, begin:end])
    return out


def _output_on_gpu(x: torch.Tensor, weights: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights.shape[0])
