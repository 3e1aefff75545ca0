# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which method class vLLM's factories return, for a grid of layer configurations.

    python -m tests.plugins.fork_grid

prints JSON, {case: class or error}, for the vLLM that this Python imports.
"""

import itertools
import json
import os
from collections.abc import Iterator

import torch

SWITCH = "VLLM_HYBRID_W4A16_MOE"
VALUES = (None, "auto", "0", "1", "require")
# cases that are also run under other values than the default
UNDER_EVERY_VALUE = ("plain", "8 bits", "hidden size", "backend")
# what differs from a layer that goes hybrid: of the checkpoint, of the layer
CASES: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {}),
    "group 32": ({"group_size": 32}, {}),
    "group 128": ({"group_size": 128}, {}),
    "group 16": ({"group_size": 16}, {}),
    "one group": ({"group_size": -1}, {}),
    "asymmetric": ({"sym": False}, {}),
    "8 bits": ({"bits": 8}, {}),
    "2 bits": ({"bits": 2}, {}),
    "activation order": ({"desc_act": True}, {}),
    "fp16": ({}, {"in_dtype": torch.float16}),
    "fp32": ({}, {"in_dtype": torch.float32}),
    "hidden size": ({}, {"hidden_dim": 288}),
    "backend": ({}, {"moe_backend": "triton"}),
    "bias": ({}, {"has_bias": True}),
    "LoRA": ({}, {"is_lora_enabled": True}),
}


def quant_configs(bits=4, group_size=64, sym=True, desc_act=False) -> Iterator[tuple]:
    """(format, vLLM's name of its method, its config) for the formats with hooks."""
    common = {"bits": bits, "group_size": group_size, "sym": sym}
    for packing in ("auto_round:auto_gptq", "auto_round:auto_awq"):
        config = {
            **common,
            "quant_method": "auto-round",
            "data_type": "int",
            "packing_format": packing,
        }
        yield packing, "inc", config
    gptq = {**common, "quant_method": "gptq", "desc_act": desc_act, "lm_head": False}
    yield "gptq", "auto_gptq", gptq
    awq = {
        "bits": bits,
        "group_size": group_size,
        "zero_point": True,
        "quant_method": "awq",
        "version": "gemm",
    }
    yield "awq", "auto_awq", awq
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "group" if group_size > 0 else "channel",
        "group_size": group_size if group_size > 0 else None,
        "actorder": "group" if desc_act else None,
    }
    tensors = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [],
    }
    yield "compressed-tensors", "compressed-tensors", tensors


def outcome(method: str, config: dict, moe: dict) -> str:
    """Name of the layer's method class, or the error that came instead."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    from ..support.moe_layers import Shape, make_layer

    try:
        quant_config = get_quantization_config(method).from_config(config)
        layer = make_layer(Shape(), quant_config, **moe)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return type(layer.quant_method).__qualname__


def grid() -> dict[str, str]:
    results = {}
    for value, (case, (quant, moe)) in itertools.product(VALUES, CASES.items()):
        if value is not None and case not in UNDER_EVERY_VALUE:
            continue
        os.environ.pop(SWITCH, None)
        if value is not None:
            os.environ[SWITCH] = value
        for name, method, config in quant_configs(**quant):
            results[f"{SWITCH}={value}, {name}, {case}"] = outcome(method, config, moe)
    return results


if __name__ == "__main__":
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    print(json.dumps(grid()))
