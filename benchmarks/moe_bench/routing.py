# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The router's op as the benchmarks call it."""

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router as router


def route(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    arrived: torch.Tensor,
    cu_count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate, softmax and top-k in one launch, renormalized.

    Args:
        x: [M, H] in the dtype of ``gate`` [E, H].
        top_k: experts per token.
        arrived: int32 [1], zero before and after the call.
        cu_count: compute units, see ``load_kernels``.

    Returns:
        fp32 weights and int32 ids, [M, top_k].
    """
    weights = x.new_empty(len(x), top_k, dtype=torch.float32)
    ids = x.new_empty(len(x), top_k, dtype=torch.int32)
    logits = x.new_empty(len(x), len(gate))
    router.fused_moe_router_topk(
        x, gate, logits, weights, ids, arrived, "softmax", True, cu_count
    )
    return weights, ids
