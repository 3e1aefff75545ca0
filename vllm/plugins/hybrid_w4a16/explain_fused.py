# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Shared experts and routers of a checkpoint's hybrid layers: which run on our kernels.

The answers come from the checks that serving uses. Serving also tries the model's own
shared expert once; explain cannot.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_router,
    hybrid_w4a16_shared_expert,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from .explain_checkpoint import Checkpoint
from .explain_layers import ExpertsLayer
from .explain_linears import LinearGroup

_SHARED_EXPERT = re.compile(
    r"(?P<module>(?P<block>.+)\.shared_experts?)\.(?:gate_proj|up_proj|down_proj)\."
    r"(?P<suffix>\w+)"
)
_GATE = re.compile(
    r"(?P<block>.+)\.(?:gate|router)\.(?P<suffix>weight|qweight|weight_packed)"
)
_FLOATS = ("F16", "BF16", "F32")
_NO_RUNNER = "vLLM's model has no MoE runner for the layer"


@dataclass(frozen=True)
class FusedParts:
    """How many parts of a kind our kernels compute."""

    layers: int
    """Hybrid layers with such a part."""
    fused: int
    """Of these, how many run on our kernels."""
    reason: str | None
    """Why others do not."""


def count(reasons: Iterable[str | None]) -> FusedParts:
    """Count the values of what ``shared_experts`` or ``routers`` returns."""
    reasons = list(reasons)
    others = sorted({reason for reason in reasons if reason})
    return FusedParts(len(reasons), reasons.count(None), "; ".join(others) or None)


def shared_experts(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    linears: dict[tuple[str, str], LinearGroup],
    runners: dict[int, MoERunner] | str,
) -> dict[str, str | None]:
    """The shared experts beside hybrid layers, by name: why vLLM runs one, or ``None``
    if it runs in the launches of the routed experts.

    Args:
        layers: of ``expert_layers``.
        linears: of ``explain_linears.linears``.
        runners: of ``moe_runners``.
    """
    indices = _blocks(layers)
    blocks: dict[str, str] = {}
    quantized: set[str] = set()
    for found, in_floats in _weights(checkpoint, _SHARED_EXPERT, indices):
        blocks[found["module"]] = found["block"]
        if not in_floats:
            quantized.add(found["module"])
    reasons: dict[str, str | None] = {}
    for module, block in blocks.items():
        runner = _runner(runners, indices[block])
        if isinstance(runner, str):
            reasons[module] = runner
        elif runner.shared_experts is None:
            reasons[module] = "vLLM's MoE runner does not hold it"
        elif module in quantized:
            reasons[module] = hybrid_w4a16_shared_expert.misfit(
                runner
            ) or _quantized_reason(linears, module)
        else:
            reasons[module] = hybrid_w4a16_shared_expert.planned_misfit(runner)
    return reasons


def _quantized_reason(
    linears: dict[tuple[str, str], LinearGroup], module: str
) -> str | None:
    """Why the ops cannot read a quantized shared expert; ``None`` if they can."""
    for name in ("gate_up_proj", "down_proj"):
        linear = linears.get((module, name))
        if linear is None:
            return "quantized, not in int4"
        if not linear.hybrid:
            return f"quantized, {linear.reason}"
    return None


def routers(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    runners: dict[int, MoERunner] | str,
    family: DeviceFamily | str,
) -> dict[int, str | None]:
    """The routers of hybrid layers, by index: why vLLM runs one, or ``None`` if it is
    one launch with its top-k.

    Args:
        layers: of ``expert_layers``.
        runners: of ``moe_runners``.
        family: the device to plan for.
    """
    indices = _blocks(layers)
    quantized = {
        found["block"]
        for found, in_floats in _weights(checkpoint, _GATE, indices)
        if not in_floats
    }
    on_cpu = isinstance(family, DeviceFamily) and family.tuning is None
    reasons: dict[int, str | None] = {}
    for block, index in indices.items():
        runner = _runner(runners, index)
        if isinstance(runner, str):
            reasons[index] = runner
        elif block in quantized:
            reasons[index] = "the gate is quantized"
        else:
            reasons[index] = hybrid_w4a16_router.planned_misfit(runner, on_cpu)
    return reasons


def most_router_tokens(
    layers: list[ExpertsLayer], reasons: dict[int, str | None]
) -> int | None:
    """Most tokens of a step for which routers are one launch, or ``None`` if none is.

    Args:
        layers: of ``expert_layers``.
        reasons: of ``routers``.
    """
    fused = any(reasons.get(layer.index, "") is None for layer in layers)
    return hybrid_w4a16_router.MAX_TOKENS if fused else None


def _blocks(layers: list[ExpertsLayer]) -> dict[str, int]:
    """Names of the MoE blocks with hybrid experts, and their layers' indices."""
    return {
        layer.name.removesuffix(".experts"): layer.index
        for layer in layers
        if layer.hybrid
    }


def _weights(
    checkpoint: Checkpoint, pattern: re.Pattern[str], blocks: dict[str, int]
) -> Iterator[tuple[re.Match[str], bool]]:
    """Tensors of these blocks whose names match, and whether each holds floats."""
    for tensor in checkpoint.tensors:
        found = pattern.fullmatch(tensor.name)
        if found is not None and found["block"] in blocks:
            yield found, found["suffix"] == "weight" and tensor.dtype in _FLOATS


def _runner(runners: dict[int, MoERunner] | str, index: int) -> MoERunner | str:
    """The runner of a layer, or why there is none."""
    return runners if isinstance(runners, str) else runners.get(index, _NO_RUNNER)
