# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Layers of every format on the CPU, through vLLM's own methods, against float64."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
)
from vllm.platforms import current_platform

from .moe_layers import (
    Checkpoint,
    Shape,
    make_layer,
    quant_config,
    random_routing,
    relative_error,
    run_layer,
)

# format, symmetric; vLLM's configs refuse GPTQ with zero points
FORMATS = (
    ("auto_round:auto_gptq", True),
    ("auto_round:auto_gptq", False),
    ("auto_round:auto_awq", True),
    ("auto_round:auto_awq", False),
    ("gptq", True),
    ("gptq_v2", True),
    ("awq", True),
    ("awq", False),
    ("compressed-tensors", True),
    ("compressed-tensors", False),
)
pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu() or not isinstance(device_family(), DeviceFamily),
    reason="not a CPU build with the int4 MoE ops",
)


@pytest.mark.parametrize("format,symmetric", FORMATS)
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(hidden=288, intermediate=96, group_size=32)], ids=str
)
def test_layer(format, symmetric, shape):
    torch.manual_seed(0)
    config = quant_config(format, shape.group_size, symmetric)
    layer = make_layer(shape, config)
    checkpoint = Checkpoint(shape, symmetric, format=format)
    checkpoint.load_into(layer)
    assert isinstance(
        layer.quant_method.moe_kernel.fused_experts, HybridW4A16MoEExperts
    )
    x = torch.randn(5, shape.hidden).bfloat16()
    weights, ids = random_routing(5, shape)
    expected = checkpoint.forward(x, weights, ids)
    assert relative_error(run_layer(layer, x, weights, ids), expected) < 8e-3
