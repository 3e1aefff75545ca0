# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The dense int4 linears of a checkpoint, and whether each would use our kernel.

Projections that vLLM merges into one layer count as one linear. The answer comes from
the check that ``HybridW4A16LinearKernel`` itself uses.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    incompatibility_reason,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.scalar_type import scalar_types

from .explain_checkpoint import Checkpoint, TensorInfo
from .explain_layers import EXPERT_TENSOR, ZEROS, is_decoder, is_symmetric, suffix

_LAYER = re.compile(r"(?:^|\.)layers\.(?P<index>\d+)\.")
# vLLM's merged layers, by the names of their projections in a checkpoint.
_MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
# Tensor parallelism shards the inputs of these layers and the outputs of all others.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LinearGroup:
    """Layers with the same name, shape and answer."""

    name: str
    layers: int
    outputs: int
    """On one rank."""
    inputs: int
    """On one rank."""
    group_size: int
    hybrid: bool
    reason: str | None
    """Why not."""
    zero_points: bool


def linears(
    checkpoint: Checkpoint, tp_size: int, family: DeviceFamily | str
) -> dict[tuple[str, str], LinearGroup]:
    """The decoder's dense int4 linears, in order; each is a group of one layer.

    Keys are the names of the module above, as in the checkpoint, and of vLLM's linear:
    ``("model.layers.0.self_attn", "qkv_proj")``. Empty if the config has integer
    weights of any width other than 4 bits: then each layer would need its own width,
    which this function does not look up.

    ``family``: the device to plan for, or the reason why there is none.
    """
    if _bits(checkpoint.quantization or {}) != {4}:
        return {}
    depth = checkpoint.value("num_hidden_layers", "n_layer", "num_layers")
    scales: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
    words: dict[str, TensorInfo] = {}
    with_zeros: set[str] = set()
    for tensor in checkpoint.tensors:
        linear, _, last = tensor.name.rpartition(".")
        found = _LAYER.search(tensor.name)
        if found is None or not is_decoder(tensor.name, int(found["index"]), depth):
            continue
        if EXPERT_TENSOR.match(tensor.name):
            continue
        if last in ("qweight", "weight_packed"):
            words[linear] = tensor
        elif last in ("scales", "weight_scale"):
            above, _, name = linear.rpartition(".")
            scales[above, _MERGED.get(name, name)].append(tensor)
        elif last in ZEROS and not is_symmetric(checkpoint):
            with_zeros.add(linear)
    found_linears: dict[tuple[str, str], LinearGroup] = {}
    for (above, name), parts in scales.items():
        parts = [p for p in parts if p.name.rpartition(".")[0] in words]
        if parts:
            zeros = parts[0].name.rpartition(".")[0] in with_zeros
            found_linears[above, name] = _merged(
                checkpoint, name, parts, words, zeros, tp_size, family
            )
    return found_linears


def grouped(linears: Iterable[LinearGroup]) -> list[LinearGroup]:
    """Layers with the same name, shape and answer as one group."""
    counts: dict[LinearGroup, int] = defaultdict(int)
    for linear in linears:
        counts[linear] += linear.layers
    return [
        LinearGroup(**{**vars(group), "layers": count})
        for group, count in counts.items()
    ]


def _bits(quantization: dict[str, Any]) -> set[Any]:
    """Widths in bits of the integer weights in a quantization config."""
    groups = quantization.get("config_groups", {}).values()
    widths = {(group.get("weights") or {}).get("num_bits") for group in groups}
    widths.add(quantization.get("bits"))
    # 16: layers that AutoRound's extra_config leaves unquantized
    for override in (quantization.get("extra_config") or {}).values():
        widths.add(override.get("bits"))
    return {width for width in widths if width not in (None, 16)}


def _merged(
    checkpoint: Checkpoint,
    name: str,
    scales: list[TensorInfo],
    words: dict[str, TensorInfo],
    zeros: bool,
    tp_size: int,
    family: DeviceFamily | str,
) -> LinearGroup:
    """One of vLLM's layers as a group, with ``layers`` = 1."""
    outputs, inputs, group_size = 0, 0, 0
    for tensor in scales:
        n, groups = tensor.shape
        if suffix(tensor.name) == "scales":  # K first
            n, groups = groups, n
        outputs += n
        inputs = 8 * words[tensor.name.rpartition(".")[0]].numel // n
        group_size = inputs // groups
    full = inputs, outputs
    if name in _ROW_PARALLEL:
        inputs //= tp_size
    else:
        outputs //= tp_size
    reason: str | None
    if isinstance(family, str):
        reason = family
    else:
        config = MPLinearLayerConfig(
            full_weight_shape=full,
            partition_weight_shape=(inputs, outputs),
            weight_type=scalar_types.uint4 if zeros else scalar_types.uint4b8,
            act_type=_dtype(checkpoint),
            group_size=group_size,
            zero_points=zeros,
        )
        reason = incompatibility_reason(config, family)
    hybrid = reason is None
    return LinearGroup(name, 1, outputs, inputs, group_size, hybrid, reason, zeros)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The activation dtype, unless the server sets another."""
    name = checkpoint.value("torch_dtype", "dtype", default="bfloat16")
    return _DTYPES.get(str(name), torch.bfloat16)
