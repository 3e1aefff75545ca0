# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Random layers and router outputs; seeds are fixed, so every run gets the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_bench.shapes import MoEShape


@dataclass(frozen=True)
class Case:
    """What is measured: shape, activation dtype, group size, device."""

    shape: MoEShape
    dtype: torch.dtype
    group_size: int
    device: torch.device


@dataclass(frozen=True)
class Int4Layer:
    """One layer's experts, symmetric (zero point 8), in the plain checkpoint order.

    w13 int32 [E, 2*I, H//8] (gate rows, then up rows) and w2 int32 [E, H, I//8]:
    nibble ``i`` of word ``k8`` is weight ``k = 8*k8 + i``. s13 [E, 2*I, H//G] and s2
    [E, H, I//G] in the activation dtype.
    """

    w13: torch.Tensor
    s13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Input of one experts call: x [M, H], topk_ids int32 and topk_weights fp32
    [M, top_k], and how many distinct experts the routing picks."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    distinct_experts: int


def random_layer(case: Case) -> Int4Layer:
    """Uniform random nibbles, and scales that keep activations near unit variance."""
    generator = torch.Generator(case.device).manual_seed(0)

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        experts = case.shape.num_experts
        words = torch.empty(experts, n, k // 8, dtype=torch.int32, device=case.device)
        words.random_(-(2**31), 2**31, generator=generator)
        scales = torch.rand(
            experts, n, k // case.group_size, device=case.device, generator=generator
        )
        # nibbles minus 8 have a standard deviation of 4.6
        scales = (scales + 0.5) / (4.6 * math.sqrt(k))
        return words, scales.to(case.dtype)

    hidden, intermediate = case.shape.hidden, case.shape.intermediate
    return Int4Layer(*matrix(2 * intermediate, hidden), *matrix(hidden, intermediate))


def dequantize(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Words int32 [N, K//8] and scales [N, K//G] of one expert to weights [N, K].

    The result has the scales' dtype; the product is rounded once.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    groups = (nibbles - 8).to(scales.dtype).view(*scales.shape, -1)
    return (groups * scales.unsqueeze(-1)).flatten(1)


def _balanced(shape: MoEShape, tokens: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(shape.num_experts, generator=generator)
    pairs = torch.arange(tokens * shape.top_k) % shape.num_experts
    return order[pairs].view(tokens, shape.top_k)


def _uniform(shape: MoEShape, tokens: int, generator: torch.Generator) -> torch.Tensor:
    score = torch.rand(tokens, shape.num_experts, generator=generator)
    return score.topk(shape.top_k).indices


def _skewed(shape: MoEShape, tokens: int, generator: torch.Generator) -> torch.Tensor:
    # Draws top_k experts without replacement, popularity falling as 1 / rank (Zipf's
    # law): the Gumbel trick, with -log of an exponential variable as Gumbel noise.
    order = torch.randperm(shape.num_experts, generator=generator)
    noise = torch.empty(tokens, shape.num_experts).exponential_(generator=generator)
    return (-noise.log() - (order + 1).log()).topk(shape.top_k).indices


def _few(shape: MoEShape, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return _uniform(shape, 1, generator).expand(tokens, -1)


# How tokens spread over experts
ROUTINGS: dict[str, Callable[[MoEShape, int, torch.Generator], torch.Tensor]] = {
    "balanced": _balanced,  # experts' token counts differ by at most 1
    "uniform": _uniform,  # every token draws its experts independently
    "skewed": _skewed,  # likewise, the expert of rank r being drawn as 1/r
    "few": _few,  # all tokens go to the same top_k experts
}


def make_batches(case: Case, routing: str, tokens: int, count: int) -> list[Batch]:
    """``count`` batches of ``tokens`` tokens, each with its own routing."""
    shape, device = case.shape, case.device
    generator = torch.Generator().manual_seed(1000 + tokens)
    batches = []
    for _ in range(count):
        ids = ROUTINGS[routing](shape, tokens, generator)
        weights = torch.randn(tokens, shape.top_k, generator=generator).softmax(1)
        x = torch.randn(tokens, shape.hidden, generator=generator)
        batches.append(
            Batch(
                x.to(case.dtype).to(device),
                ids.to(torch.int32).contiguous().to(device),
                weights.to(device),
                ids.unique().numel(),
            )
        )
    return batches
