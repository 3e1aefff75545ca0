# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The launches of this project's kernels in a decode step, by part of the model.

On the CPU: op calls. One token; what vLLM's kernels and the lm_head add is not counted.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16_pair import (
    FIRST,
    SECOND,
)

from .explain_bytes import ROUTED, ROUTER, SHARED, part_of
from .explain_checkpoint import Checkpoint
from .explain_layers import ExpertsLayer
from .explain_linears import LinearGroup

OF_EXPERTS = 2
"""Launches of a layer's routed experts, gate_up and down (hybrid_w4a16_moe.py)."""


@dataclass(frozen=True)
class PartLaunches:
    """Launches of one part of the model."""

    launches: int
    """Per token."""
    per_layer: tuple[int, int]
    """The fewest and the most, over layers where the part runs on our kernels."""


def launches(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    linears: dict[tuple[str, str], LinearGroup],
    shared_experts: dict[str, str | None],
    routers: dict[int, str | None],
) -> dict[str, PartLaunches]:
    """Launches by part, with ``explain_bytes``'s names; parts that vLLM runs are left
    out.

    Args:
        layers: of ``expert_layers``.
        linears: of ``explain_linears.linears``.
        shared_experts, routers: of ``explain_fused``.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for layer in layers:
        if layer.hybrid:
            counts[ROUTED][str(layer.index)] = OF_EXPERTS
    for index, reason in routers.items():
        if reason is None:
            counts[ROUTER][str(index)] = 1
    for module, reason in shared_experts.items():
        if reason is None:
            counts[SHARED][module] = 0
    depth = checkpoint.value("num_hidden_layers", "n_layer", "num_layers")
    for (module, name), linear in linears.items():
        if _shares_a_launch(linear, linears.get((module, FIRST))):
            continue
        if linear.hybrid and shared_experts.get(module, "") is not None:
            counts[part_of(f"{module}.{name}.weight", depth)][module] += 1
    return {
        part: PartLaunches(
            sum(of_layers.values()), (min(of_layers.values()), max(of_layers.values()))
        )
        for part, of_layers in counts.items()
    }


def _shares_a_launch(linear: LinearGroup, first: LinearGroup | None) -> bool:
    """Whether hybrid_w4a16_pair.py computes ``linear`` with ``first``.

    Biases and AITER's kernels, which keep linears apart, are not considered.
    """
    if linear.name != SECOND or first is None:
        return False
    both = [
        (group.hybrid, group.inputs, group.group_size, group.zero_points)
        for group in (linear, first)
    ]
    return linear.hybrid and both[0] == both[1]
