# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which MoE layers go hybrid, and the log of it.

Every hook asks ``accept``. A layer that is declined goes vLLM's own way, with one log
line per distinct reason; once a model's last accepted layer is ready, one line sums up.
"""

from typing import TYPE_CHECKING

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily

logger = init_logger(__name__)

GROUP_SIZES = (32, 64, 128)
# Attribute of a layer that is only planned, on whatever machine is at hand.
_PLANNED = "hybrid_w4a16_planned_for"

# The model under construction; a process may load several, one after the other.
_accepted: set[str] = set()
_ready: dict[str, int] = {}
_declined: dict[str, str] = {}
_reasons_logged: set[str] = set()


def accept(
    layer: "RoutedExperts",
    prefix: str,
    bits: int,
    group_size: int | tuple[int, int],
    unsupported: str | None = None,
) -> bool:
    """Whether the routed experts of ``prefix`` go hybrid.

    Args:
        layer: the layer under construction; its ``moe_config`` is complete.
        prefix: the layer's name.
        bits, group_size: of the layer's weights.
        unsupported: what the format's own hook found to be in the way, if anything.

    Raises ``ValueError`` with the reason where a decline is not allowed
    (``VLLM_HYBRID_W4A16_MOE=require``), and where only the tensor parallel size is in
    the way.
    """
    reason = unsupported or incompatibility_reason(layer, bits, group_size)
    if reason is None:
        _declined.pop(prefix, None)
        _accepted.add(prefix)
        return True
    _accepted.discard(prefix)
    _declined[prefix] = reason
    if isinstance(reason, TensorParallelMisfit):
        raise ValueError(
            f"MoE layer {prefix}: {reason}, or {switch.NAME}=0 for vLLM's own way"
        )
    if switch.value() == "require":
        raise ValueError(
            f"{switch.NAME}=require, but MoE layer {prefix} is declined: {reason}"
        )
    if reason not in _reasons_logged:
        _reasons_logged.add(reason)
        logger.warning(
            "HybridW4A16 MoE: layer %s goes vLLM's own way: %s (said once per reason)",
            prefix,
            reason,
        )
    return False


def incompatibility_reason(
    layer: "RoutedExperts", bits: int, group_size: int | tuple[int, int]
) -> str | None:
    """Why the layer cannot go hybrid, or ``None``."""
    # first what needs neither the device nor a complete layer
    if bits != 4:
        return f"{bits}-bit weights, supported: 4"
    if group_size not in GROUP_SIZES:
        return f"group size {group_size}, supported: {GROUP_SIZES}"
    # local imports: they need a platform, which plugins must not settle
    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
        HybridW4A16MoEExperts,
    )
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
        DeviceFamily,
        device_family,
    )

    config = layer.moe_config
    family = getattr(layer, _PLANNED, None) or device_family()
    if not isinstance(family, DeviceFamily):
        return family
    if switch.value() == "auto":
        if family.opt_in:
            return f"on {family.name} it is opt-in, set {switch.NAME}=1"
        if config.moe_backend != "auto":
            return f"--moe-backend {config.moe_backend} was asked for"
    misfit = tensor_parallel_misfit(config, group_size)
    if misfit is not None:
        return misfit
    for name, size in (
        ("hidden size", config.hidden_dim),
        ("intermediate size per partition", config.intermediate_size_per_partition),
    ):
        if size % group_size:
            return f"{name} {size} is not a multiple of the group size {group_size}"
    if config.in_dtype not in (torch.float16, torch.bfloat16):
        return f"activations in {config.in_dtype}, supported: fp16 and bf16"
    if not HybridW4A16MoEExperts._supports_activation(config.activation):
        return f"activation {config.activation.value!r}"
    parallel = config.moe_parallel_config
    if not HybridW4A16MoEExperts._supports_parallel_config(parallel):
        return (
            f"all-to-all backend {parallel.all2all_backend}, supported: "
            "allgather_reducescatter"
        )
    if parallel.dp_size > 1 and not can_gather_tokens():
        return (
            "data parallel: vLLM cannot gather tokens of several ranks on this device"
        )
    if config.has_bias:
        return "experts have a bias"
    if config.is_lora_enabled:
        return "LoRA is enabled"
    if parallel.enable_eplb:
        return "expert load balancing (EPLB) is enabled"
    return None


def plan_for(layer: "RoutedExperts", family: "DeviceFamily | str") -> None:
    """Let the decision on ``layer`` be about this device, not the one at hand.

    ``family``: or the reason why there is none.
    """
    setattr(layer, _PLANNED, family)


def can_gather_tokens() -> bool:
    """Whether vLLM's communicator on this platform has what data parallelism needs.

    That of the CPU in vLLM 0.32 and 0.33 has not: any MoE model, quantized or not,
    ends in ``NotImplementedError`` there.
    """
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    own = resolve_obj_by_qualname(current_platform.get_device_communicator_cls())
    return all(
        getattr(own, name) is not getattr(DeviceCommunicatorBase, name)
        for name in ("all_gatherv", "reduce_scatterv")
    )


class TensorParallelMisfit(str):
    """A reason that another tensor parallel size would take away."""


def tensor_parallel_misfit(
    config: "FusedMoEConfig", group_size: int | tuple[int, int]
) -> TensorParallelMisfit | None:
    """What to say where ranks get parts of a group, but another number would not."""
    parallel = config.moe_parallel_config
    size, ranks = config.intermediate_size, parallel.tp_size
    if ranks == 1 or not isinstance(group_size, int) or group_size < 1:
        return None
    groups = size // group_size
    if size % group_size or groups % ranks == 0:
        return None
    fits = [str(n) for n in range(1, groups + 1) if groups % n == 0]
    # without expert parallelism vLLM cuts experts over the ranks of both
    kind = "tensor times data parallel" if parallel.dp_size > 1 else "tensor parallel"
    return TensorParallelMisfit(
        f"{kind} size {ranks} cuts the experts' intermediate size {size} into "
        f"{size / ranks:g} per rank, not a multiple of the group size {group_size}; "
        f"sizes that work: {', '.join(fits)}; or --enable-expert-parallel"
    )


def declined_because(prefix: str) -> str | None:
    """Why layer ``prefix`` was declined, ``None`` if it was not."""
    return _declined.get(prefix)


def new_model() -> None:
    """Forget the layers of the model before."""
    _accepted.clear()
    _ready.clear()
    _declined.clear()


def report_ready(prefix: str, padding_bytes: int) -> None:
    """Count the layer as ready to run; after a model's last one, log the summary.

    padding_bytes: what its weights take beyond the checkpoint's.
    """
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
        DeviceFamily,
        device_family,
    )

    if prefix not in _accepted:  # summed up already; its weights were loaded anew
        return
    _ready[prefix] = padding_bytes
    if not _accepted <= _ready.keys():
        return
    family = device_family()
    assert isinstance(family, DeviceFamily)
    logger.info(
        "HybridW4A16 MoE: %d/%d layers (decode: %s, prefill: %s), %d declined",
        len(_accepted),
        len(_accepted) + len(_declined),
        family.decode,
        family.prefill,
        len(_declined),
    )
    padding = sum(_ready.values())
    if padding:
        logger.info("HybridW4A16 MoE: %.1f MiB of padded rows", padding / 2**20)
    new_model()
