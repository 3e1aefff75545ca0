# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The shared experts of a checkpoint, and which of them run in the experts' launches.

From names, dtypes and shapes of the stored tensors. Serving also tries the model's own
module once; explain cannot.
"""

import re
from dataclasses import dataclass

from .explain_checkpoint import Checkpoint
from .explain_layers import ExpertsLayer
from .explain_linears import LinearGroup

_LINEAR = re.compile(
    r"^(?P<module>(?P<block>.+)\.shared_experts?)\.(?:gate_proj|up_proj|down_proj)\."
    r"(?P<suffix>\w+)$"
)
_LOADED_AS_16_BITS = ("F16", "BF16", "F32")
_WIDTH = 8
"""Weights that the kernels read at a time."""


@dataclass(frozen=True)
class SharedExperts:
    """Layers with a shared expert beside routed experts on the hybrid path."""

    layers: int
    fused: int
    """Of these, how many run in the routed experts' launches."""
    reason: str | None
    """Why others do not."""


def shared_experts(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    linears: dict[tuple[str, str], LinearGroup],
    tp_size: int,
) -> SharedExperts:
    """Count the shared experts.

    ``layers``: of ``expert_layers``; ``linears``: of ``explain_linears.linears``.
    """
    blocks = {layer.name.removesuffix(".experts") for layer in layers if layer.hybrid}
    reasons: dict[str, str | None] = {}
    for tensor in checkpoint.tensors:
        found = _LINEAR.match(tensor.name)
        if found is None or found["block"] not in blocks:
            continue
        reason = None
        if found["suffix"] != "weight" or tensor.dtype not in _LOADED_AS_16_BITS:
            reason = _quantized_reason(linears, found["module"])
        elif tensor.name.endswith(".down_proj.weight"):
            inter, rest = divmod(tensor.shape[1], tp_size)
            if rest or inter % _WIDTH:
                reason = f"{tensor.shape[1] / tp_size:g} columns per GPU"
        reasons[found["block"]] = reasons.get(found["block"]) or reason
    fused = sum(reason is None for reason in reasons.values())
    others = sorted({reason for reason in reasons.values() if reason})
    return SharedExperts(len(reasons), fused, "; ".join(others) or None)


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
