# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The float32 reference; every backend is compared with it before it is timed."""

import torch
from torch.nn.functional import silu

from moe_bench.inputs import Batch, Int4Layer, dequantize

# Maximum rows to compare per batch: a float32 expert takes milliseconds on a CPU.
MAX_ROWS = 8


def checked_rows(batch: Batch) -> torch.Tensor:
    """At most ``MAX_ROWS`` row numbers, including the first and the last."""
    tokens = batch.x.shape[0]
    count = min(tokens, MAX_ROWS)
    return torch.linspace(0, tokens - 1, count, device=batch.x.device).long()


def reference_rows(layer: Int4Layer, batch: Batch) -> torch.Tensor:
    """The experts' output for ``checked_rows``, float32 [rows, H]."""
    rows = checked_rows(batch)
    x, ids, weights = (
        tensor[rows] for tensor in (batch.x.float(), batch.topk_ids, batch.topk_weights)
    )
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        w13 = dequantize(layer.w13[expert], layer.s13[expert].float())
        w2 = dequantize(layer.w2[expert], layer.s2[expert].float())
        gate, up = (x[token] @ w13.t()).chunk(2, dim=-1)
        down = (silu(gate) * up) @ w2.t()
        out.index_add_(0, token, down * weights[token, slot].unsqueeze(-1))
    return out


def relative_error(output: torch.Tensor, batch: Batch, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; NaN stays NaN."""
    got = output[checked_rows(batch)].float()
    return float((got - expected).norm() / expected.norm())
