# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What becomes of layers in vLLM, for a grid of configurations.

    python -m tests.plugins.fork_grid

prints JSON, {case: [experts class or error, why they are not hybrid]}, for the vLLM
that this Python imports: with the overlay's hooks, or with the series' backend in the
oracle. "required" is ``VLLM_HYBRID_W4A16_MOE=require`` with the one and
``--moe-backend hybrid_w4a16`` with the other.
"""

import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

SWITCH = "VLLM_HYBRID_W4A16_MOE"
# cases that are also run where the path is required
ALSO_REQUIRED = ("plain", "8 bits", "hidden size", "fp32", "LoRA", "Marlin's sizes")
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
    "Marlin's sizes": ({"group_size": 32}, {"hidden_dim": 288}),
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


IN_TREE = "vllm.model_executor.layers.fused_moe.oracle.hybrid_w4a16_wna16"
# How overlay, oracle and AutoRound's method say why a required path is not taken.
DECLINED = re.compile(r"declined: (.*)|HYBRID_W4A16' does not support .* since (.*)\.")


def record_reasons() -> list[str]:
    """A list that reasons of the backend in the oracle go to, in a tree with one."""
    reasons: list[str] = []
    if importlib.util.find_spec(IN_TREE) is None:
        return reasons
    backend = importlib.import_module(IN_TREE)
    asked = backend.incompatibility_reason

    def incompatibility_reason(moe_config, quant_config):
        reason = asked(moe_config, quant_config)
        if reason is not None:
            reasons.append(reason)
        return reason

    backend.incompatibility_reason = incompatibility_reason
    return reasons


def layers() -> ModuleType:
    """``moe_layers`` of this project, or the series' in a tree that has it."""
    if importlib.util.find_spec(IN_TREE) is None:
        return importlib.import_module("tests.support.moe_layers")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parents[1] / "tests/quantization/hybrid_w4a16"
    package = ModuleType("series_tests")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module("series_tests.moe_layers")


def outcome(
    method: str, config: dict, moe: dict, required: bool, reasons: list[str]
) -> list[str | None]:
    """The class of a layer's experts, or the error that came instead, and why they are
    not hybrid.
    """
    from vllm.config import VllmConfig
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
    from vllm.model_executor.layers.quantization import get_quantization_config

    moe_layers = layers()
    in_tree = importlib.util.find_spec(IN_TREE) is not None
    backend = "hybrid_w4a16" if required and in_tree else "auto"
    moe = {"moe_backend": backend, **moe}
    vllm_config = VllmConfig(kernel_config=KernelConfig(moe_backend=backend))
    moe_layers.VllmConfig = lambda: vllm_config
    oracle._model = oracle._Model()
    reasons.clear()
    try:
        quant_config = get_quantization_config(method).from_config(config)
        layer = moe_layers.make_layer(moe_layers.Shape(), quant_config, **moe)
    except Exception as error:
        if found := DECLINED.search(str(error)):
            return ["declined", found[1] or found[2]]
        experts = f"{type(error).__name__}: {error}"
    else:
        quant_method = layer.quant_method
        if hasattr(quant_method, "packing"):  # a HybridW4A16MoEMethod
            return ["HybridW4A16MoEExperts", None]
        chosen = getattr(quant_method, "experts_cls", None) or type(quant_method)
        experts = chosen.__name__
    reason = oracle.declined_because(moe_layers.LAYER_NAME)
    if reason is None and reasons:
        reason = reasons[-1]
    if moe["moe_backend"] not in ("auto", "hybrid_w4a16"):
        reason = None  # the oracle asks the backend that was named alone
    return [experts, None if experts == "HybridW4A16MoEExperts" else reason]


def grid() -> dict[str, list[str | None]]:
    results = {}
    reasons = record_reasons()
    for required, (case, (quant, moe)) in itertools.product(
        (False, True), CASES.items()
    ):
        if required and case not in ALSO_REQUIRED:
            continue
        os.environ[SWITCH] = "require" if required else "auto"
        for name, method, config in quant_configs(**quant):
            key = f"{name}, {case}{', required' if required else ''}"
            results[key] = outcome(method, config, moe, required, reasons)
    return results


if __name__ == "__main__":
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    print(json.dumps(grid()))
