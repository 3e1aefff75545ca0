# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Decides which MoE layers take the hybrid path, and logs the decision.

A method asks ``consider`` before it looks at a layer's recipe and ``accept`` after. A
layer that is declined falls back to vLLM's MoE path, with one log line per distinct
reason; one line sums up each model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    GROUP_SIZES,
    shard_group_size,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily

logger = init_logger(__name__)

# Attribute of a layer that is only planned, on whatever machine is at hand.
_PLANNED = "hybrid_w4a16_planned_for"
# What the decision reads of a layer's ``moe_config``.
_CONFIG_FIELDS = (
    "activation",
    "has_bias",
    "hidden_dim",
    "in_dtype",
    "intermediate_size",
    "intermediate_size_per_partition",
    "is_lora_enabled",
    "moe_backend",
    "moe_parallel_config",
)


BACKEND = "hybrid_w4a16"
"""The value of ``--moe-backend`` that asks for the hybrid path."""


class Mode(NamedTuple):
    """How firmly the hybrid path was asked for, and what log and errors say of it."""

    asked_for: bool
    """By name, not as the default; a ``Misfit`` is an error."""
    required: bool
    """A layer that is declined is an error."""
    setting: str
    """The setting in force."""
    way_out: str
    """The setting that leaves the layer to vLLM."""
    # fork: begin overlay
    opt_in: str
    """The setting that asks for the path on devices where it is not the default."""
    # fork: end


def mode_of_moe_backend() -> Mode:
    """``--moe-backend hybrid_w4a16`` requires the path, ``auto`` allows it."""
    vllm_config = get_current_vllm_config_or_none()
    backend = "auto" if vllm_config is None else vllm_config.kernel_config.moe_backend
    asked_for = backend == BACKEND
    return Mode(
        asked_for,
        asked_for,
        f"--moe-backend {backend}",
        "another --moe-backend",
        # fork: begin overlay
        f"--moe-backend {BACKEND}",
        # fork: end
    )


mode: Callable[[], Mode] = mode_of_moe_backend
"""Asked for every layer."""
# fork: begin overlay
# The plugin puts its environment variable in place of it.
# fork: end


class Misfit(str):
    """A reason that lies in the checkpoint or the deployment, not in what the path
    supports: an error where the path was asked for."""


@dataclass
class _Model:
    """The decisions on one model's layers."""

    config: object = None
    """vLLM's ``ModelConfig``, which tells a draft model from its target."""
    accepted: set[str] = field(default_factory=set)
    ready: dict[str, int] = field(default_factory=dict)
    """Bytes of padding by layer."""
    declined: dict[str, str] = field(default_factory=dict)
    """Reason by layer."""
    # fork: begin token
    linears: int = 0
    """Dense int4 linears on ``HybridW4A16LinearKernel``."""
    other_linears: dict[str, int] = field(default_factory=dict)
    """Dense int4 linears on vLLM's kernels, by reason."""
    fused: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the kernels also compute ("shared expert", "router"): how, by layer."""
    not_fused: dict[str, dict[str, str]] = field(default_factory=dict)
    """What of that vLLM computes: the reason by layer."""
    # fork: end


# The model under construction; a process may load several, one after the other.
_model = _Model()
_reasons_logged: set[str] = set()


def consider(layer: "RoutedExperts", prefix: str) -> bool:
    """Whether the routed experts of ``prefix`` may go hybrid, whatever their recipe.

    Records and logs a decline. Raises ``ValueError`` with the reason where the path is
    required (``Mode``).
    """
    reason = incompatibility_reason(layer)
    return reason is None or decline(prefix, reason)


def accept(
    layer: "RoutedExperts",
    prefix: str,
    bits: int,
    group_size: int | tuple[int, int],
    unsupported: str | None = None,
) -> bool:
    """Whether the routed experts of ``prefix`` go hybrid.

    Args:
        layer: the layer under construction.
        prefix: the layer's name.
        bits, group_size: of the layer's weights.
        unsupported: what the format's own check found to be in the way, if anything.

    Raises ``ValueError`` as ``decline`` does.
    """
    reason = unsupported or incompatibility_reason(layer, bits, group_size)
    if reason is not None:
        return decline(prefix, reason)
    model = _under_construction()
    model.declined.pop(prefix, None)
    model.accepted.add(prefix)
    return True


def decline(prefix: str, reason: str) -> bool:
    """Leave layer ``prefix`` to vLLM; returns ``False``.

    Raises ``ValueError`` with the reason where the path is required, for a ``Misfit``
    also where it is asked for.
    """
    asked_for, required, setting, way_out = mode()[:4]
    model = _under_construction()
    model.accepted.discard(prefix)
    model.declined[prefix] = reason
    if isinstance(reason, Misfit) and asked_for:
        raise ValueError(
            f"MoE layer {prefix}: {reason}, or {way_out} for vLLM's own MoE path"
        )
    if required:
        raise ValueError(f"{setting}, but MoE layer {prefix} is declined: {reason}")
    if reason not in _reasons_logged:
        _reasons_logged.add(reason)
        logger.warning(
            "HybridW4A16 MoE: layer %s falls back to vLLM's MoE path: %s "
            "(logged once per reason)",
            prefix,
            reason,
        )
    if not model.accepted and _is_last_layer(prefix):
        _sum_up()
    return False


class HasMoEConfig(Protocol):
    """A layer, as far as the decision reads it."""

    @property
    def moe_config(self) -> "FusedMoEConfig": ...


def incompatibility_reason(
    layer: HasMoEConfig,
    bits: int | None = None,
    group_size: int | tuple[int, int] | None = None,
) -> str | None:
    """Why the layer cannot go hybrid, or ``None``.

    Cheap checks come first: the layer is not read before the recipe and the device have
    passed. ``bits`` and ``group_size`` are ``None`` where the recipe is not
    known yet; then only the rest is checked.
    """
    if bits is not None and bits != 4:
        return f"{bits}-bit weights, supported: 4"
    if group_size is not None and group_size not in GROUP_SIZES:
        return f"group size {group_size}, supported: {GROUP_SIZES}"
    # local imports: these modules load the MoE layers
    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
        HybridW4A16MoEExperts,
    )
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
        DeviceFamily,
        device_family,
    )

    family = getattr(layer, _PLANNED, None) or device_family()
    if not isinstance(family, DeviceFamily):
        return family
    asked_for = mode().asked_for
    # fork: begin overlay
    if family.opt_in and not asked_for:
        return f"on {family.name} it is opt-in, set {mode().opt_in}"
    # fork: end
    config: Any = getattr(layer, "moe_config", None)
    missing = [name for name in _CONFIG_FIELDS if not hasattr(config, name)]
    if missing:
        return f"the layer's moe_config has no {', '.join(missing)}"
    if not asked_for and config.moe_backend not in ("auto", BACKEND):
        return f"--moe-backend {config.moe_backend} was asked for"
    if isinstance(group_size, int):
        misfit = tensor_parallel_misfit(config, group_size)
        if misfit is not None:
            return misfit
        for name, size in (
            ("hidden size", config.hidden_dim),
            ("intermediate size", config.intermediate_size),
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
    """Decide on ``layer`` for this device instead of the one at hand.

    ``family`` may be the reason why there is no device.
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


def tensor_parallel_misfit(config: "FusedMoEConfig", group_size: int) -> Misfit | None:
    """Why a rank's shard has no group size, where another number of ranks would work.

    Shards that cut a group get smaller groups (``shard_group_size``).
    """
    parallel = config.moe_parallel_config
    size, ranks = config.intermediate_size, parallel.tp_size

    def fits(ranks: int) -> bool:
        shard = shard_group_size(group_size, size // ranks)
        return size % ranks == 0 and shard in GROUP_SIZES

    if size % group_size or fits(ranks):
        return None
    sizes = [str(n) for n in range(1, size // GROUP_SIZES[0] + 1) if fits(n)]
    # without expert parallelism vLLM cuts experts over the ranks of both
    kind = "tensor times data parallel" if parallel.dp_size > 1 else "tensor parallel"
    return Misfit(
        f"{kind} size {ranks} cuts the experts' intermediate size {size} into "
        f"{size / ranks:g} per rank, not a multiple of {GROUP_SIZES[0]}; "
        f"sizes that work: {', '.join(sizes)}; or --enable-expert-parallel"
    )


def declined_because(prefix: str) -> str | None:
    """Why layer ``prefix`` was declined, ``None`` if it was not."""
    return _model.declined.get(prefix)


def new_model() -> None:
    """Forget the layers of the previous model."""
    global _model
    _model = _Model(_model.config)


def begins_model(prefix: str) -> bool:
    """Whether layer ``prefix`` is the first one of its model that becomes ready."""
    return prefix in _model.accepted and not _model.ready


def report_ready(prefix: str, padding_bytes: int) -> None:
    """Count the layer as ready to run; after a model's last one, log the summary.

    padding_bytes: what its weights take beyond the checkpoint's.
    """
    if prefix not in _model.accepted:  # summed up already; its weights were reloaded
        return
    _model.ready[prefix] = padding_bytes
    if _model.accepted <= _model.ready.keys():
        _sum_up()


# fork: begin token
def count_linear() -> None:
    """Count a dense int4 linear that was built with ``HybridW4A16LinearKernel``."""
    _under_construction().linears += 1


def count_other_linear(reason: str) -> None:
    """Count a dense int4 linear that ``HybridW4A16LinearKernel`` left to vLLM."""
    left = _under_construction().other_linears
    left[reason] = left.get(reason, 0) + 1


def report_fused(part: str, prefix: str, how: str) -> None:
    """Say in the summary that the kernels compute a part of layer ``prefix``.

    part: "shared expert" or "router". how: the weights' format, or a limit.
    """
    if prefix in _model.accepted:  # else summed up already; its weights were reloaded
        _model.not_fused.get(part, {}).pop(prefix, None)
        _model.fused.setdefault(part, {})[prefix] = how


def report_not_fused(part: str, prefix: str, reason: str) -> None:
    """Say in the summary why vLLM computes a part of layer ``prefix``."""
    if prefix in _model.accepted:
        _model.not_fused.setdefault(part, {})[prefix] = reason


# fork: end
def _under_construction() -> _Model:
    """The record of the model that vLLM is building now."""
    global _model
    vllm_config = get_current_vllm_config_or_none()
    config = getattr(vllm_config, "model_config", None)
    if config is not _model.config:
        if _model.declined and not _model.accepted:
            _sum_up()
        _model = _Model(config)
    return _model


def _is_last_layer(prefix: str) -> bool:
    """Whether ``prefix`` is in the last decoder layer that this rank builds."""
    vllm_config = get_current_vllm_config_or_none()
    config = getattr(vllm_config, "model_config", None)
    index = re.search(r"\blayers\.(\d+)\.", prefix)
    if config is None or index is None:
        return False
    _, end = config.get_layers_start_end_indices(vllm_config.parallel_config)
    return int(index[1]) == end - 1


def _sum_up() -> None:
    """Log one line about the model, and forget its layers."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
        DeviceFamily,
        device_family,
    )

    accepted, declined = len(_model.accepted), len(_model.declined)
    family = device_family()
    kernels = ""
    if accepted and isinstance(family, DeviceFamily):
        fused = ""
        # fork: begin token
        fused = _fused_text()
        # fork: end
        kernels = f" (decode: {family.decode}{fused}, prefill: {family.prefill})"
    rest = ""
    # fork: begin token
    rest = _rest_text()
    # fork: end
    logger.info(
        "HybridW4A16 MoE: %d/%d layers%s, %d declined%s",
        accepted,
        accepted + declined,
        kernels,
        declined,
        rest,
    )
    tuned = tuning.used_text()
    if tuned is not None:
        logger.info("HybridW4A16 MoE: %s", tuned)
    padding = sum(_model.ready.values())
    if padding:
        logger.info("HybridW4A16 MoE: %.1f MiB of padded rows", padding / 2**20)
    new_model()


# fork: begin token
def _fused_text() -> str:
    """What the kernels compute beside the routed experts."""
    text = ""
    for part, layers in _model.fused.items():
        text += f", {part} fused {'/'.join(dict.fromkeys(layers.values()))}"
        if _model.not_fused.get(part):
            text += f" in {_counted(len(layers), 'layer')}"
    return text


def _rest_text() -> str:
    """The dense linears, and what vLLM computes of a hybrid layer."""
    text = f"; linears: {_model.linears} int4" if _model.linears else ""
    left = []
    for part, layers in _model.not_fused.items():
        for reason in dict.fromkeys(layers.values()):
            count = list(layers.values()).count(reason)
            all_of_them = count == len(_model.accepted)
            some = "" if all_of_them else f" of {_counted(count, 'layer')}"
            left.append(f"{part}{some} ({reason})")
    for reason, count in _model.other_linears.items():
        left.append(f"{_counted(count, 'int4 linear')} ({reason})")
    return f"{text}; left to vLLM: {', '.join(left)}" if left else text


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


# fork: end
