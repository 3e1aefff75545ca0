# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The int4 linear kernel: what it takes, and its product against float64."""

import pytest
import torch

from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    HybridW4A16LinearKernel,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from .moe_layers import become_the_only_rank

K, N, GROUP = 256, 64, 64


def config(**changes) -> MPLinearLayerConfig:
    arguments = {
        "full_weight_shape": (K, N),
        "partition_weight_shape": (K, N),
        "weight_type": scalar_types.uint4b8,
        "act_type": torch.bfloat16,
        "group_size": GROUP,
        "zero_points": False,
    }
    return MPLinearLayerConfig(**{**arguments, **changes})


def test_it_is_the_cpus_first_choice():
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU][0] is HybridW4A16LinearKernel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_size": 16}, "group size 16"),
        ({"act_type": torch.float32}, "activations in torch.float32"),
        ({"weight_type": scalar_types.uint8b128}, "weights of type"),
        ({"partition_weight_shape": (K, 60)}, "output size 60"),
    ],
)
def test_layers_that_do_not_fit_are_declined(changes, reason):
    fits, found = HybridW4A16LinearKernel.can_implement(config(**changes))
    assert not fits and found is not None and reason in found


def make_linear(rows, name="linear"):
    """A loaded layer with its kernel, and its weights."""
    q = torch.randint(0, 16, (rows, K))
    scales = torch.rand(rows, K // GROUP).to(torch.float16)
    words = sum(q.unflatten(1, (-1, 8))[..., i] << (4 * i) for i in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    layer = torch.nn.Module()
    layer.prefix, layer.bias = f"model.layers.0.linear_attn.{name}", None
    names = {"input_dim": 1, "output_dim": 0, "weight_loader": lambda *_: None}
    layer.w = PackedvLLMParameter(data=words, packed_dim=1, packed_factor=8, **names)
    layer.s = GroupQuantScaleParameter(data=scales, **names)
    kernel = HybridW4A16LinearKernel(
        config(act_type=torch.float16), w_q_param_name="w", w_s_param_name="s"
    )
    kernel.process_weights_after_loading(layer)
    return layer, kernel, (q - 8).double() * scales.double().repeat_interleave(GROUP, 1)


def assert_product(product, x, dense):
    expected = x.double() @ dense.T
    assert (product.double() - expected).norm() < 2e-3 * expected.norm()


def test_product(tmp_path):
    become_the_only_rank(tmp_path)
    torch.manual_seed(0)
    layer, kernel, dense = make_linear(N)
    x = torch.randn(3, K).half()
    assert_product(kernel.apply_weights(layer, x), x, dense)
