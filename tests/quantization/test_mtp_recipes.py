# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What AutoRound's config says of the multi-token-prediction (MTP) layer is honoured.

AutoRound lists the layer's blocks beside the decoder's, and its 16-bit linears by name.
"""

import pytest

from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)

from ..support.moe_layers import Shape, make_layer, quant_config

LAYER = "mtp.layers.0"
DECODER = "model.language_model.layers"
BF16 = {"bits": 16, "data_type": "fp"}
AS_PUBLISHED = {
    "mtp.fc": BF16,
    f"{LAYER}.mlp.gate": BF16,
    f"{LAYER}.mlp.shared_expert_gate": BF16,
    **{
        f"{LAYER}.mlp.shared_expert.{name}_proj": BF16
        for name in ("gate", "up", "down")
    },
}
EXPERTS = {
    f"{LAYER}.mlp.experts.{expert}.{name}_proj": BF16
    for expert in range(Shape.experts)
    for name in ("gate", "up", "down")
}


def config(extra, blocks=(DECODER, "mtp.layers")):
    return quant_config(
        "auto_round:auto_gptq",
        64,
        True,
        extra_config=dict(extra),
        block_name_to_quantize=list(blocks),
    )


def test_as_published():
    """Experts and attention int4; fc, shared expert and router 16 bits."""
    recipes = config(AS_PUBLISHED)
    layer = make_layer(Shape(), recipes, name=f"{LAYER}.mlp.experts")
    assert isinstance(layer.quant_method, HybridW4A16MoEMethod)
    assert (layer.quant_method.group_size, layer.quant_method.symmetric) == (64, True)
    linear = LinearBase.__new__(LinearBase)
    for name in AS_PUBLISHED:
        method = recipes.get_quant_method(linear, name)
        assert type(method) is UnquantizedLinearMethod, name
    assert recipes.get_layer_config(linear, f"{LAYER}.self_attn.o_proj") == (
        4,
        64,
        True,
    )


@pytest.mark.parametrize(
    ("extra", "blocks"),
    [
        ({".*mtp.*": BF16}, (DECODER, "mtp.layers")),
        (AS_PUBLISHED | EXPERTS, (DECODER, "mtp.layers")),
        ({}, (DECODER,)),
    ],
    ids=["a pattern", "every expert by name", "not among the blocks"],
)
def test_16_bit_experts(extra, blocks):
    recipes = config(extra, blocks)
    draft = make_layer(Shape(), recipes, name=f"{LAYER}.mlp.experts")
    assert type(draft.quant_method) is UnquantizedFusedMoEMethod
    decoder = make_layer(Shape(), recipes, name=f"{DECODER}.0.mlp.experts")
    assert isinstance(decoder.quant_method, HybridW4A16MoEMethod)


def test_another_group_size():
    recipes = config({".*mtp.*experts.*": {"bits": 4, "group_size": 32, "sym": True}})
    layer = make_layer(Shape(), recipes, name=f"{LAYER}.mlp.experts")
    assert isinstance(layer.quant_method, HybridW4A16MoEMethod)
    assert layer.quant_method.group_size == 32
