# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which variants of a checkpoint format the hybrid path reads.

Each function returns the packing of the checkpoint's experts, or the reason why the
path does not read them.
"""

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    AWQ,
    GPTQ_V1,
    GPTQ_V2,
    PACK_QUANTIZED,
    CheckpointPacking,
)

# By the config's checkpoint_format, which GPTQModel writes.
_GPTQ = {"gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}
_PACK_FORMAT = "pack-quantized"


def gptq(checkpoint_format: str | None, desc_act: bool) -> CheckpointPacking | str:
    """GPTQ, by ``checkpoint_format`` (``None``: v1) and ``desc_act`` of its config."""
    packing = _GPTQ.get(checkpoint_format or "gptq")
    if packing is None:
        supported = ", ".join(map(repr, _GPTQ))
        return f"checkpoint_format is {checkpoint_format!r}, supported: {supported}"
    if desc_act:
        return "desc_act: groups follow the activation order"
    return packing


def awq(version: str | None) -> CheckpointPacking | str:
    """AWQ, by ``version`` of its config (``None``: gemm)."""
    version = str(version or "gemm").lower()
    if version != "gemm":
        return f"AWQ version {version!r}, supported: 'gemm'"
    return AWQ


def compressed_tensors(
    strategy: str | None, actorder: str | None, format: str | None = _PACK_FORMAT
) -> CheckpointPacking | str:
    """compressed-tensors, by what the scheme of the experts' weights says."""
    if format != _PACK_FORMAT:
        return f"format is {format!r}, supported: {_PACK_FORMAT!r}"
    if strategy != "group":
        return f"strategy is {str(strategy)!r}, supported: 'group'"
    if actorder == "group":
        return "actorder 'group': groups follow the activation order"
    return PACK_QUANTIZED
