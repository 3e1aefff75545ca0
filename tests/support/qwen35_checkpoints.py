# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checkpoint folders with the layout of an AutoRound int4 Qwen3.5-MoE, without weights.

Names and shapes of everything but the routed experts come from transformers' own model
class, built without memory. The files have the real size but are sparse: a header, then
a hole.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

GROUP_SIZE = 128
BLOCKS = "model.language_model.layers"
_SHARD_BYTES = 5 * 10**9
_ITEM_BYTES = {"I32": 4, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_ATTENTION = ".*(linear_attn|self_attn).*"

Tensor = tuple[str, tuple[int, ...], str]
"""Name, shape, and dtype as safetensors spells it."""

TINY_TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 3072,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
TINY_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
}


def make_checkpoint(
    folder: Path,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    int4_attention: bool = False,
    int4_shared: bool = False,
    tensors: Iterable[Tensor] | None = None,
) -> Path:
    """Write config.json, sparse safetensors files and their index; returns ``folder``.

    text, vision: differences from transformers' defaults, which are the sizes of
    Qwen3.5-35B-A3B. int4_attention: the attention and GDN projections are int4 too, as
    in the published checkpoint. int4_shared: so are the shared experts. tensors:
    replaces the model's own.
    """
    model_config = Qwen3_5MoeConfig(text_config=text or {}, vision_config=vision or {})
    folder.mkdir(parents=True)
    config = _config_json(model_config)
    if tensors is None:
        tensors = _tensors(model_config)
    if int4_attention:
        del config["quantization_config"]["extra_config"][_ATTENTION]
        tensors = _with_int4(tensors, r"(in_proj_\w+|out_proj|[qkvo]_proj)")
    if int4_shared:
        tensors = _with_int4(tensors, r"shared_expert\.\w+_proj")
    (folder / "config.json").write_text(json.dumps(config))
    _write_shards(folder, list(tensors), shard_bytes)
    return folder


def tiny_tensors() -> list[Tensor]:
    """The tensors of the checkpoint of ``TINY_TEXT`` and ``TINY_VISION``."""
    config = Qwen3_5MoeConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    return list(_tensors(config))


def _config_json(model_config: Qwen3_5MoeConfig) -> dict[str, Any]:
    config = model_config.to_dict()
    config["architectures"] = ["Qwen3_5MoeForConditionalGeneration"]
    config["text_config"] |= {"dtype": "bfloat16", "mamba_ssm_dtype": "float32"}
    depth = model_config.text_config.num_hidden_layers
    unquantized = ["gate", "shared_expert_gate"] + [
        f"shared_expert.{name}_proj" for name in ("gate", "up", "down")
    ]
    config["quantization_config"] = {
        "autoround_version": "0.16.1",
        "bits": 4,
        "block_name_to_quantize": BLOCKS,
        "data_type": "int",
        "extra_config": {
            f"{BLOCKS}.{layer}.mlp.{name}": {"bits": 16, "data_type": "float"}
            for layer in range(depth)
            for name in unquantized
        }
        | {_ATTENTION: {"bits": 16, "data_type": "float"}},
        "group_size": GROUP_SIZE,
        "packing_format": "auto_round:auto_gptq",
        "quant_method": "auto-round",
        "sym": True,
    }
    return config


def _tensors(model_config: Qwen3_5MoeConfig) -> Iterator[Tensor]:
    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(model_config)
    text = model_config.text_config
    for name, parameter in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert in range(text.num_experts):
                prefix = name.replace("gate_up_proj", str(expert))
                yield from _int4_expert(
                    prefix, text.hidden_size, text.moe_intermediate_size
                )
        elif not name.endswith("mlp.experts.down_proj"):
            dtype = (
                "F32" if name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"
            )
            yield name, tuple(parameter.shape), dtype
    yield from _draft_layer(text.hidden_size, text.moe_intermediate_size, text)


def _with_int4(tensors: Iterable[Tensor], names: str) -> Iterator[Tensor]:
    linear = re.compile(rf"\.{names}\.weight$")
    for name, shape, dtype in tensors:
        if BLOCKS in name and linear.search(name):
            yield from _int4_linear(name.removesuffix(".weight"), *shape)
        else:
            yield name, shape, dtype


def _int4_linear(prefix: str, n: int, k: int) -> Iterator[Tensor]:
    groups = k // GROUP_SIZE
    yield f"{prefix}.qweight", (k // 8, n), "I32"
    yield f"{prefix}.qzeros", (groups, n // 8), "I32"
    yield f"{prefix}.scales", (groups, n), "F16"


def _int4_expert(prefix: str, hidden: int, intermediate: int) -> Iterator[Tensor]:
    for linear, n, k in (
        ("gate_proj", intermediate, hidden),
        ("up_proj", intermediate, hidden),
        ("down_proj", hidden, intermediate),
    ):
        yield from _int4_linear(f"{prefix}.{linear}", n, k)


def _draft_layer(hidden: int, intermediate: int, text: Any) -> Iterator[Tensor]:
    """Part of the multi-token-prediction layer that such checkpoints include."""
    yield "mtp.fc.weight", (hidden, 2 * hidden), "BF16"
    experts = "mtp.layers.0.mlp.experts"
    shape = (text.num_experts, 2 * intermediate, hidden)
    yield f"{experts}.gate_up_proj", shape, "BF16"
    yield f"{experts}.down_proj", (text.num_experts, hidden, intermediate), "BF16"


def _nbytes(tensor: Tensor) -> int:
    return torch.Size(tensor[1]).numel() * _ITEM_BYTES[tensor[2]]


def _write_shards(folder: Path, tensors: list[Tensor], shard_bytes: int) -> None:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + _nbytes(tensor) > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_sparse(folder / file, shard)
        weight_map |= {name: file for name, _, _ in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file whose tensors are a hole in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        name, shape, dtype = tensor
        end = offset + _nbytes(tensor)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + offset)
