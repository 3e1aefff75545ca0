# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Converts an int4 checkpoint to an unquantized one, by an independent implementation.

This module shares no code with the implementation that it is the reference for. A
stored linear is q [N, K] (0..15) with scales and zero points [N, K/G]; its weight is
(q - zero) * scale.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "scales", "qzeros", "g_idx")
_CT_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores a linear."""

    words: str
    dequantize: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    """Converts stored tensors, by suffix, to float32 [N, K]."""


def unpack(
    words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))
) -> torch.Tensor:
    """int32 [R, C] to int32 [R, 8*C]: nibble i is neighbour ``order[i]``."""
    nibbles = torch.stack(
        [(words >> 4 * order.index(j)) & 15 for j in range(8)], dim=-1
    )
    return nibbles.flatten(1)


def _weight(q: torch.Tensor, zero: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """q [N, K], zero and scales [N, K/G] to float32 [N, K]."""
    group = q.shape[1] // scales.shape[1]
    centred = (q - zero.repeat_interleave(group, 1)).float()
    return centred * scales.float().repeat_interleave(group, 1)


def _gptq(zero_offset: int) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    def dequantize(stored: dict[str, torch.Tensor]) -> torch.Tensor:
        q = unpack(stored["qweight"].T.contiguous())
        zero = (unpack(stored["qzeros"]).T + zero_offset) % 16
        if "g_idx" in stored:
            groups = torch.arange(q.shape[1]) // (q.shape[1] // zero.shape[1])
            if not torch.equal(stored["g_idx"].long(), groups):
                raise ValueError("groups follow the activation order (desc_act)")
        return _weight(q, zero, stored["scales"].T)

    return dequantize


def _awq(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    q = unpack(stored["qweight"], _AWQ_ORDER).T
    zero = unpack(stored["qzeros"], _AWQ_ORDER).T
    return _weight(q, zero, stored["scales"].T)


def _compressed_tensors(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    q = unpack(stored["weight_packed"])
    scales = stored["weight_scale"]
    if "weight_zero_point" in stored:
        zero = unpack(stored["weight_zero_point"].T.contiguous()).T
    else:
        zero = torch.full(scales.shape, 8)
    return _weight(q, zero, scales)


def format_of(config: dict[str, Any]) -> Format:
    """The format of a ``quantization_config``; raises ``ValueError`` if unknown."""
    method = config.get("quant_method")
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if method == "auto-round" and packing == "auto_round:auto_gptq":
        return Format("qweight", _gptq(1))
    if method == "gptq":
        v2 = config.get("checkpoint_format") == "gptq_v2"
        return Format("qweight", _gptq(0 if v2 else 1))
    if method == "awq" or (method == "auto-round" and packing == "auto_round:auto_awq"):
        return Format("qweight", _awq)
    if method == "compressed-tensors" and config.get("format") == "pack-quantized":
        return Format("weight_packed", _compressed_tensors)
    raise ValueError(f"no reference for quant_method {method!r}, {packing!r}")


def dequantize_checkpoint(source: Path, target: Path) -> Path:
    """Write the checkpoint folder ``source`` to ``target`` with float32 weights instead
    of int4; returns ``target``.

    Raises ``ValueError`` for a format or a bit width without a reference.
    """
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    if quantization is None:
        raise ValueError(f"{source}: config.json has no quantization_config")
    storage = format_of(quantization)
    target.mkdir(parents=True)
    for file in source.iterdir():
        replaced = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not replaced and "quant" not in file.name:
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config))
    shards = sorted(source.glob("*.safetensors"))
    for shard in shards:
        dense = _dequantize_shard(load_file(shard), storage, str(shard))
        save_file(dense, target / shard.name, {"format": "pt"})
    if len(shards) > 1:
        _write_index(target)
    return target


def _dequantize_shard(
    stored: dict[str, torch.Tensor], storage: Format, origin: str
) -> dict[str, torch.Tensor]:
    dense = {}
    for name, tensor in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == storage.words:
            names = _PARTS if kind == "qweight" else _CT_PARTS
            parts = {
                p: stored[f"{linear}.{p}"] for p in names if f"{linear}.{p}" in stored
            }
            try:
                dense[f"{linear}.weight"] = storage.dequantize(parts).contiguous()
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"{origin}: {linear}: {error}") from error
        elif kind not in (*_PARTS, *_CT_PARTS):
            dense[name] = tensor
    return dense


def _write_index(folder: Path) -> None:
    weight_map = {
        name: file.name
        for file in sorted(folder.glob("*.safetensors"))
        for name in load_file(file)
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
