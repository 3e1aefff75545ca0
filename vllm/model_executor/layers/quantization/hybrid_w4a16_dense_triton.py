# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Dequantization of the dense ops' weights in Triton, for GEMMs of torch's library.

Import this module only where Triton runs (a GPU, or Triton's interpreter).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fused_moe.experts import (
    hybrid_w4a16_triton as launcher,
)

_BLOCK_N, _BLOCK_K = 8, 512  # of 4 warps, a lane has 32 weights
_variants: launcher.Variants = {}


@triton.jit
def dequantize_int_g(
    w_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N,
    K,
    stride_wn,
    stride_sn,
    stride_zn,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ``(q - zp) * scales`` [N, K], computed in fp32; a lane has runs of 8."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    run = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
    inside = (n < N) & (run < K // 8)
    group = run * 8 // GROUP
    i = tl.arange(0, 8)[None, None, :]
    if BITS == 4:
        words = tl.load(w_ptr + n * stride_wn + run, mask=inside, other=0)
        # nibbles i and i + 4 are elements 2 * i and 2 * i + 1
        q = (words[:, :, None] >> (i // 2 * 4 + i % 2 * 16)) & 15
    else:
        bytes_ptr = w_ptr + (n * stride_wn + run * 8)[:, :, None] + i
        q = tl.load(bytes_ptr, mask=inside[:, :, None], other=0).to(tl.int32)
    if HAS_ZEROS:
        zero_ptr = zeros_ptr + n // 8 * stride_zn + group
        zero = (tl.load(zero_ptr, mask=inside, other=0) >> (n % 8 * 4)) & 15
        q -= zero[:, :, None]
    else:
        q -= 1 << (BITS - 1)
    scale = tl.load(scales_ptr + n * stride_sn + group, mask=inside, other=0.0)
    values = q.to(tl.float32) * scale.to(tl.float32)[:, :, None]
    out_ptrs = out_ptr + (n * K + run * 8)[:, :, None] + i
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=inside[:, :, None])


def dequantize(
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """The weights in the scales' dtype, [N, K], N * K below 2^31; one launch.

    The arguments are as in ``hybrid_w4a16_dense_ops``, and each value is rounded once.
    """
    n, groups = scales.shape
    k = groups * group_size
    out = scales.new_empty(n, k)
    zeros = weights if zero_points is None else zero_points
    numbers = n, k, weights.stride(0), scales.stride(0), zeros.stride(0)
    launcher.launch_kernel(
        dequantize_int_g,
        _variants,
        (-(-n // _BLOCK_N), -(-k // _BLOCK_K), 1),
        (weights, scales, zeros, out, *numbers),
        (weights, scales, zeros, out),
        (),
        (scales.dtype, *numbers),
        constants(bits, group_size, zero_points is not None),
        {"num_warps": 4},
    )
    return out


def constants(bits: int, group_size: int, has_zeros: bool) -> dict[str, Any]:
    """The kernel's ``tl.constexpr`` arguments."""
    return {
        "BITS": bits,
        "GROUP": group_size,
        "HAS_ZEROS": has_zeros,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_K": _BLOCK_K,
    }
