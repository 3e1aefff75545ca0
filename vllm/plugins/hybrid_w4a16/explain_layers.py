# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The routed-experts layers of a checkpoint, and whether each would go hybrid.

Bits, group size and bytes of a layer are derived from the stored tensors. The decision
comes from vLLM's own quantization config with our hooks applied, so it is the one that
``vllm serve`` takes.
"""

import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    shard_group_size,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.plugins.hybrid_w4a16 import hooks

from .explain_checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorInfo,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
        HybridW4A16MoEMethod,
    )

EXPERT_TENSOR = re.compile(
    r"^(?P<layer>(?:.*\.)?layers\.(?P<index>\d+)\..*?\bexperts)\.(?P<rest>.+)$"
)
_ONE_EXPERT = re.compile(r"(?P<expert>\d+)\.(?P<linear>\w+)\.\w+")
# Tensors by the last part of their names, for all int4 formats.
_WORDS = ("qweight", "weight_packed")
_SCALES = ("scales", "weight_scale")
_SCALE_DTYPES = ("F16", "BF16", "F32")
ZEROS = ("qzeros", "weight_zero_point")
UNREAD = ("g_idx", "weight_shape", "weight_g_idx")
"""Suffixes of tensors that no kernel reads while decoding."""

_GATE_NAMES = ("gate_proj", "w1")
_UP_NAMES = ("up_proj", "w3")
_DOWN_NAMES = ("down_proj", "w2")
# vLLM's names of quantizations that checkpoints name differently.
_VLLM_QUANTIZATION = {"auto-round": "inc"}


@dataclass(frozen=True)
class ExpertsLayer:
    """A stored routed-experts layer, and the path that serving takes for it."""

    index: int
    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    bits: int
    group_size: int | None
    """``None`` for weights that have no scales."""
    symmetric: bool
    stored_bytes: int
    loaded_bytes: int
    """After loading: weights, scales, and zero points unless all are 8."""
    hybrid: bool
    reason: str | None
    """Why the layer is not hybrid."""
    down_group_size: int | None = None
    """Of down_proj on a rank of a hybrid layer; see ``shard_group_size``."""
    error: bool = False
    """Whether serving stops with the reason instead of falling back to vLLM's path."""


def expert_layers(
    checkpoint: Checkpoint, tp_size: int, family: DeviceFamily | str
) -> list[ExpertsLayer]:
    """The decoder's routed-experts layers in order, empty for a dense model.

    ``family``: the device to plan for, or why there is none.

    Raises ``CheckpointError`` when the tensors do not fit the config.
    """
    by_layer = _tensors_by_layer(checkpoint, drafts=False)
    stored = [
        _stored_layer(checkpoint, index, name, tensors)
        for (index, name), tensors in sorted(by_layer.items())
    ]
    return _decide(checkpoint, stored, by_layer, tp_size, family)


def draft_layers(
    checkpoint: Checkpoint, tp_size: int, family: DeviceFamily | str
) -> list[ExpertsLayer]:
    """The routed-experts layers of multi-token prediction, as ``expert_layers``.

    vLLM loads them only to speculate, so layers that do not fit the config are no
    error: they are left out.
    """
    by_layer = _tensors_by_layer(checkpoint, drafts=True)
    stored = []
    for (index, name), tensors in sorted(by_layer.items()):
        with contextlib.suppress(CheckpointError):
            stored.append(_stored_layer(checkpoint, index, name, tensors))
    return _decide(checkpoint, stored, by_layer, tp_size, family)


def _tensors_by_layer(
    checkpoint: Checkpoint, drafts: bool
) -> dict[tuple[int, str], list[TensorInfo]]:
    """The tensors of the routed experts by index and name of the layer."""
    depth = checkpoint.value("num_hidden_layers", "n_layer", "num_layers")
    by_layer: dict[tuple[int, str], list[TensorInfo]] = defaultdict(list)
    for tensor in checkpoint.tensors:
        found = EXPERT_TENSOR.match(tensor.name)
        if found is None:
            continue
        index = int(found["index"])
        if is_decoder(tensor.name, index, depth) != drafts:
            by_layer[index, found["layer"]].append(tensor)
    return by_layer


def is_decoder(name: str, index: int, depth: int) -> bool:
    """Whether a layer belongs to the decoder rather than to the draft layers."""
    return index < depth and not re.match(r"(?:.*\.)?mtp\.", name)


def suffix(name: str) -> str:
    """The last component of a tensor's name, such as "qweight"."""
    return name.rpartition(".")[2]


def _numel(tensors: Iterable[TensorInfo], suffixes: tuple[str, ...]) -> int:
    return sum(tensor.numel for tensor in tensors if suffix(tensor.name) in suffixes)


def _nbytes(tensors: Iterable[TensorInfo], suffixes: tuple[str, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors if suffix(tensor.name) in suffixes)


def _stored_layer(
    checkpoint: Checkpoint, index: int, name: str, tensors: list[TensorInfo]
) -> ExpertsLayer:
    hidden = checkpoint.value("hidden_size")
    intermediate = checkpoint.value("moe_intermediate_size", "intermediate_size")
    num_experts = checkpoint.value(
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    )
    weights = 3 * num_experts * hidden * intermediate
    words, scales = _numel(tensors, _WORDS), _numel(tensors, _SCALES)
    stored = sum(tensor.nbytes for tensor in tensors)
    zeros, unread = _nbytes(tensors, ZEROS), _nbytes(tensors, UNREAD)
    if words:
        bits, left = divmod(32 * words, weights)
    else:
        bits, left = divmod(8 * stored, weights)
        left = 0 if bits else weights  # the bytes may include biases and scales
    if left or (words and (not scales or weights % scales)):
        raise CheckpointError(
            f"{checkpoint.name}: {name} holds {words} packed words and {scales} "
            f"scales, which do not fit {num_experts} experts of 3 x {hidden} x "
            f"{intermediate} weights (config.json)"
        )
    symmetric = _is_symmetric(checkpoint.quantization or {}) or not zeros
    return ExpertsLayer(
        index=index,
        name=name,
        num_experts=num_experts,
        top_k=checkpoint.value(
            "num_experts_per_tok",
            "num_experts_per_token",
            "experts_per_token",
            "top_k_experts",
            "moe_topk",
            "moe_k",
        ),
        hidden=hidden,
        intermediate=intermediate,
        bits=bits,
        group_size=weights // scales if words else None,
        symmetric=symmetric,
        stored_bytes=stored,
        loaded_bytes=stored - unread - (zeros if symmetric else 0),
        hybrid=False,
        reason=None,
    )


def _is_symmetric(quantization: dict[str, Any]) -> bool:
    """Whether every zero point is 8, stored or not (GPTQ and AutoRound: ``sym``, AWQ:
    ``zero_point``). compressed-tensors then stores none."""
    if "zero_point" in quantization:
        return not quantization["zero_point"]
    return quantization.get("sym", False)


def is_symmetric(checkpoint: Checkpoint) -> bool:
    """Whether serving ignores the zero points that the checkpoint may store."""
    return _is_symmetric(checkpoint.quantization or {})


def _decide(
    checkpoint: Checkpoint,
    layers: list[ExpertsLayer],
    by_layer: dict[tuple[int, str], list[TensorInfo]],
    tp_size: int,
    family: DeviceFamily | str,
) -> list[ExpertsLayer]:
    """The layers with ``hybrid`` and ``reason`` filled in."""
    if not layers:
        return []
    if layers[0].intermediate % tp_size:
        raise CheckpointError(
            f"--tp {tp_size} does not divide the experts' intermediate size "
            f"{layers[0].intermediate}"
        )
    if checkpoint.quantization is None:
        reason = f"{layers[0].bits}-bit weights, the checkpoint is not quantized"
        return [replace(layer, reason=reason) for layer in layers]
    hooks.apply_hooks()
    try:
        config = _vllm_config(checkpoint.quantization)
    except (ValueError, AssertionError) as error:
        method = checkpoint.quantization.get("quant_method")
        reason = f"vLLM's {method} does not take the quantization config: {error}"
        return [replace(layer, reason=reason) for layer in layers]
    oracle.new_model()
    decided = []
    for layer in layers:
        experts = _stand_in(
            checkpoint, layer, by_layer[layer.index, layer.name], tp_size
        )
        oracle.plan_for(experts, family)
        tensors = by_layer[layer.index, layer.name]
        why, refused = _verdict(config, experts, layer, tensors)
        layer = replace(layer, hybrid=why is None, reason=why, error=refused)
        decided.append(_regrouped(layer, tp_size) if layer.hybrid else layer)
    return decided


def _regrouped(layer: ExpertsLayer, tp_size: int) -> ExpertsLayer:
    """A hybrid layer with the scales that loading repeats where shards cut groups."""
    assert layer.group_size is not None
    group = shard_group_size(layer.group_size, layer.intermediate // tp_size)
    down = layer.num_experts * layer.hidden * layer.intermediate
    more = down // group - down // layer.group_size
    half_bytes = 4 if layer.symmetric else 5  # a scale, a zero point
    loaded = layer.loaded_bytes + more * half_bytes // 2
    return replace(layer, down_group_size=group, loaded_bytes=loaded)


def _vllm_config(quantization: dict[str, Any]) -> Any:
    """vLLM's object for a checkpoint's quantization config."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    method = quantization.get("quant_method")
    if not method:
        raise ValueError("it has no quant_method")
    config_class = get_quantization_config(_VLLM_QUANTIZATION.get(method, method))
    return config_class.from_config(dict(quantization))


def _verdict(
    config: Any,
    experts: "RoutedExperts",
    layer: ExpertsLayer,
    tensors: list[TensorInfo],
) -> tuple[str | None, bool]:
    """Ask the hooked factory why the layer does not go hybrid, and whether serving
    stops there. ``(None, False)``: the layer goes hybrid, and its tensors fit."""
    from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
        HybridW4A16MoEMethod,
    )

    if switch.value() == "0":
        return f"{switch.NAME}=0", False
    method, failure = None, None
    # vLLM's own methods may need a device that this machine does not have.
    try:
        method = config.get_quant_method(experts, layer.name)
    except Exception as error:  # noqa: BLE001
        failure = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(method, HybridW4A16MoEMethod):
        refusal = _misfit(method, experts, layer, tensors)
        return refusal, refusal is not None
    reason = (
        oracle.declined_because(layer.name)
        or (f"{layer.bits}-bit weights, not quantized" if layer.bits == 16 else None)
        or (
            f"no hybrid method for it, and vLLM's own fails here: {failure}"
            if failure
            else None
        )
        or f"there is no hybrid method for {config.get_name()}, vLLM's own is "
        f"{type(method).__name__}"
    )
    return reason, failure is not None and switch.NAME in failure


def _misfit(
    method: "HybridW4A16MoEMethod",
    experts: "RoutedExperts",
    layer: ExpertsLayer,
    tensors: list[TensorInfo],
) -> str | None:
    """The first tensor that loading would reject, and why."""
    packing = method.packing
    stored = {tensor.name: tensor for tensor in tensors}
    for tensor in tensors:
        found = _one_expert(tensor)
        if found and int(found["expert"]) >= layer.num_experts:
            return f"{tensor.name}: the config has {layer.num_experts} experts"
    sizes = {
        experts.ckpt_gate_proj_name: (layer.intermediate, layer.hidden),
        experts.ckpt_up_proj_name: (layer.intermediate, layer.hidden),
        experts.ckpt_down_proj_name: (layer.hidden, layer.intermediate),
    }
    for projection, (n, k) in sizes.items():
        shapes = packing.shapes(n, k, method.group_size)
        if method.symmetric and not packing.symmetric_zeros:
            del shapes[packing.zeros]
        for expert, suffix in itertools.product(range(layer.num_experts), shapes):
            name = f"{layer.name}.{expert}.{projection}.{suffix}"
            if name not in stored:
                return f"{name} is not in the checkpoint"
            if stored[name].shape != shapes[suffix]:
                return (
                    f"{name} has shape {stored[name].shape}, expected "
                    f"{shapes[suffix]} ({packing.name}, group size {method.group_size})"
                )
            dtypes = _SCALE_DTYPES if suffix == packing.scales else ("I32",)
            if stored[name].dtype not in dtypes:
                return f"{name} is {stored[name].dtype}, expected {' or '.join(dtypes)}"
    return None


def _stand_in(
    checkpoint: Checkpoint,
    layer: ExpertsLayer,
    tensors: list[TensorInfo],
    tp_size: int,
) -> "RoutedExperts":
    """A ``RoutedExperts`` without weights, but with what method factories read."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    experts.layer_name = layer.name
    experts.moe_config = _moe_config(checkpoint, layer, tensors, tp_size)
    experts.activation = experts.moe_config.activation
    experts.hidden_size = layer.hidden
    experts.intermediate_size_per_partition = layer.intermediate // tp_size
    experts.apply_router_weight_on_input = False
    linears = {m["linear"] for t in tensors if (m := _one_expert(t))}
    for attribute, names in (
        ("ckpt_gate_proj_name", _GATE_NAMES),
        ("ckpt_up_proj_name", _UP_NAMES),
        ("ckpt_down_proj_name", _DOWN_NAMES),
    ):
        found = next((name for name in names if name in linears), names[0])
        setattr(experts, attribute, found)
    return experts


def _one_expert(tensor: TensorInfo) -> re.Match[str] | None:
    found = EXPERT_TENSOR.match(tensor.name)
    return found and _ONE_EXPERT.fullmatch(found["rest"])


def _moe_config(
    checkpoint: Checkpoint,
    layer: ExpertsLayer,
    tensors: list[TensorInfo],
    tp_size: int,
) -> "FusedMoEConfig":
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    name = checkpoint.value("hidden_act", "hidden_activation", default="silu")
    try:
        activation = MoEActivation.from_str(name)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None
    if checkpoint.value("model_type", default="") == "gpt_oss":
        activation = MoEActivation.SWIGLUOAI  # its config.json says silu
    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), tp_size=tp_size)
    return FusedMoEConfig(
        num_experts=layer.num_experts,
        experts_per_token=layer.top_k,
        hidden_dim=layer.hidden,
        intermediate_size=layer.intermediate,
        num_local_experts=layer.num_experts,
        num_logical_experts=layer.num_experts,
        activation=activation,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=activation_dtype(checkpoint),
        has_bias=any("bias" in suffix(tensor.name) for tensor in tensors),
    )


def activation_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """fp16 where the config says so, else bf16, as vLLM picks for the rest."""
    named = checkpoint.value("dtype", "torch_dtype", default="bfloat16")
    return torch.float16 if named == "float16" else torch.bfloat16
