# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checkpoints that other tools wrote (``tests/fixtures``), layer by layer.

``HYBRID_W4A16_CHECKPOINTS`` adds checkpoint folders (Qwen3-MoE), separated by colons.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    CONFIG_CLASSES,
    Checkpoint,
    Shape,
    make_layer,
    random_routing,
    relative_error,
    run_layer,
)
from ..support.reference_model import read_safetensors

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
BUNDLED = sorted(path for path in FIXTURES.iterdir() if path.is_dir())
OTHERS = [
    Path(path)
    for path in os.environ.get("HYBRID_W4A16_CHECKPOINTS", "").split(":")
    if path
]


class RealCheckpoint(Checkpoint):
    """One layer of a checkpoint folder."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        quantization = self.config["quantization_config"]
        method = quantization["quant_method"]
        default = {"auto-round": "auto_round:auto_gptq"}.get(method, method)
        self.format = FORMATS[
            quantization.get(
                "packing_format", quantization.get("checkpoint_format", default)
            )
        ]
        self.symmetric = self._recipe(quantization).get("symmetric") is not False
        self.name = f"model.layers.{layer}.mlp.experts"
        stored = read_safetensors(folder / "model.safetensors")
        experts = self.config.get("num_experts") or self.config["num_local_experts"]
        self.experts = [
            {
                projection: {
                    name.rpartition(".")[2]: np.array(array)
                    for name, array in stored.items()
                    if name.startswith(f"{self.name}.{expert}.{projection}.")
                    and not name.endswith(".g_idx")  # vLLM drops them too
                }
                for projection in ("gate_proj", "up_proj", "down_proj")
            }
            for expert in range(experts)
        ]
        self.shape = Shape(
            experts,
            self.config["num_experts_per_tok"],
            self.config["hidden_size"],
            self.config["moe_intermediate_size"],
        )
        self.quant_config = CONFIG_CLASSES[method].from_config(quantization)

    @staticmethod
    def _recipe(quantization: dict) -> dict:
        groups = quantization.get("config_groups")
        if groups:
            return groups["group_0"]["weights"]
        return {"symmetric": quantization["sym"]}

    def weights(self) -> np.ndarray:
        """Return all of the layer's dequantized weights in one row."""
        return np.concatenate(
            [
                self.format.dequantize(linear).ravel()
                for expert in self.experts
                for linear in expert.values()
            ]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("folder", BUNDLED + OTHERS, ids=lambda folder: folder.name)
def test_layer_against_float64(folder, dtype):
    checkpoint = RealCheckpoint(folder, layer=0)
    layer = make_layer(
        checkpoint.shape, checkpoint.quant_config, dtype, name=checkpoint.name
    )
    assert isinstance(layer.quant_method, HybridW4A16MoEMethod)
    assert layer.quant_method.symmetric == checkpoint.symmetric
    checkpoint.load_into(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, checkpoint.shape.hidden, generator=generator).to(dtype)
    weights, ids = random_routing(7, checkpoint.shape)
    expected = checkpoint.forward(x, weights, ids)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(run_layer(layer, x, weights, ids), expected) < tolerance


def test_the_tools_mean_the_same_weights():
    """All tools quantized one model, so the weights differ only by the quantization."""
    weights = {folder.name: RealCheckpoint(folder, 0).weights() for folder in BUNDLED}
    assert len(weights) == 7
    for one, other in itertools.combinations(weights, 2):
        difference = np.linalg.norm(weights[one] - weights[other])
        relative = difference / np.linalg.norm(weights[one])
        # Rounding to int4 gives a difference of 0.08 to 0.12 each, GPTQ's 0.16 from
        # those. A wrong order of K or N would give 1.4.
        assert relative < 0.2, (one, other)
