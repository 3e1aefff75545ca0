# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Layers with the sizes and names of published models, with few experts each."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.models.utils import WeightsMapper

from ..support.moe_layers import (
    Checkpoint,
    Shape,
    make_layer,
    quant_config,
    random_routing,
    relative_error,
    run_layer,
)

# Hidden and intermediate size of an expert, group size, and a format.
SIZES = {
    "Qwen3-30B-A3B": (2048, 768, 128, "auto_round:auto_gptq"),
    "Qwen3.5-35B-A3B": (2048, 512, 128, "auto_round:auto_awq"),
    "Mixtral-8x7B, 8 ranks": (4096, 1792, 128, "compressed-tensors"),
    "GLM-4.5-Air": (4096, 1408, 128, "awq"),
    "MiniMax-M2": (3072, 1536, 128, "compressed-tensors"),
    "like gpt-oss, groups of 64": (2880, 2880, 64, "auto_round:auto_gptq"),
    "like gpt-oss, groups of 32": (2880, 1440, 32, "compressed-tensors"),
}


@pytest.mark.parametrize("model", SIZES)
def test_sizes(model):
    hidden, intermediate, group_size, format = SIZES[model]
    shape = Shape(1, 1, hidden, intermediate, group_size)
    layer = make_layer(shape, quant_config(format, group_size, False))
    assert isinstance(layer.quant_method, HybridW4A16MoEMethod)
    checkpoint = Checkpoint(shape, False, format=format)
    checkpoint.load_into(layer)
    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.bfloat16)
    weights, ids = random_routing(2, shape)
    expected = checkpoint.forward(x, weights, ids)
    assert relative_error(run_layer(layer, x, weights, ids), expected) < 8e-3


@pytest.mark.parametrize(
    ("group_size", "moe", "reason"),
    [
        (128, {}, "hidden size 2880 is not a multiple of the group size 128"),
        (64, {"has_bias": True}, "experts have a bias"),
        (64, {"activation": MoEActivation.SWIGLUOAI}, "activation 'swigluoai'"),
    ],
)
def test_what_keeps_gpt_oss_out(group_size, moe, reason, monkeypatch):
    """Group 128, expert biases, gate and up rows interleaved: each is declined."""
    monkeypatch.setenv(switch.NAME, "require")
    config = quant_config("auto_round:auto_gptq", group_size)
    with pytest.raises(ValueError, match=reason):
        make_layer(Shape(2, 1, 2880, 2880, group_size), config, **moe)


# The structure of published AutoRound checkpoints of Qwen3.5-MoE: a text model inside a
# vision-language model, int4 experts, everything else 16-bit.
QWEN35 = "model.language_model.layers"
QWEN35_EXTRA = {
    f"{QWEN35}.{layer}.{name}": {"bits": 16, "data_type": "fp"}
    for layer in range(4)
    for name in (
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_a",
        "linear_attn.out_proj",
        "mlp.gate",
        "mlp.shared_expert_gate",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
    )
}
# The name mapping of vLLM's Qwen3.5 model class, whose import needs torchvision.
QWEN35_MAPPER = WeightsMapper(
    orig_to_new_prefix={
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
)


@pytest.mark.parametrize("format", ["auto_round:auto_gptq", "auto_round:auto_awq"])
def test_qwen35_names(format):
    config = quant_config(
        format,
        128,
        True,
        extra_config=dict(QWEN35_EXTRA),
        block_name_to_quantize="model.language_model.layers",
    )
    config.apply_vllm_mapper(QWEN35_MAPPER)
    name = "language_model.model.layers.3.mlp.experts"
    shape = Shape(8, 2, 256, 128, 128)
    layer = make_layer(shape, config, name=name)
    assert isinstance(layer.quant_method, HybridW4A16MoEMethod)
    checkpoint = Checkpoint(shape, format=format)
    checkpoint.load_into(layer)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.bfloat16)
    weights, ids = random_routing(3, shape)
    expected = checkpoint.forward(x, weights, ids)
    assert relative_error(run_layer(layer, x, weights, ids), expected) < 8e-3

    linear = LinearBase.__new__(LinearBase)
    for other in ("mlp.gate", "mlp.shared_expert.down_proj", "linear_attn.out_proj"):
        method = config.get_quant_method(
            linear, f"language_model.model.layers.3.{other}"
        )
        assert type(method).__name__ == "UnquantizedLinearMethod"


def test_qwen35_with_one_layer_of_16_bit_experts():
    experts = {
        f"{QWEN35}.2.mlp.experts.{expert}.{projection}": {
            "bits": 16,
            "data_type": "fp",
        }
        for expert in range(8)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    config = quant_config(
        "auto_round:auto_gptq", 64, True, extra_config=QWEN35_EXTRA | experts
    )
    config.apply_vllm_mapper(QWEN35_MAPPER)
    kinds = [
        type(
            make_layer(
                Shape(), config, name=f"language_model.model.layers.{layer}.mlp.experts"
            ).quant_method
        )
        for layer in range(4)
    ]
    assert kinds[2] is UnquantizedFusedMoEMethod
    assert all(issubclass(kinds[i], HybridW4A16MoEMethod) for i in (0, 1, 3))
