# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Two int4 linears of one input: one product for both."""

import pytest
import torch

from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    HybridW4A16LinearKernel,
)
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16_pair import (
    FIRST,
    SECOND,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

from .moe_layers import become_the_only_rank
from .test_linear_kernel import GROUP, K, config


def make_linear(name, rows):
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


@pytest.mark.parametrize("compiled", [False, True])
def test_one_product_for_both(tmp_path, monkeypatch, compiled):
    become_the_only_rank(tmp_path)
    torch.manual_seed(0)
    linears = [make_linear(FIRST, 72), make_linear(SECOND, 16)]
    calls, multiply = [], hybrid_w4a16_dense_linear.multiply

    def counted(x, weights, *arguments):
        calls.append(weights.shape[0])
        return multiply(x, weights, *arguments)

    monkeypatch.setattr(hybrid_w4a16_dense_linear, "multiply", counted)

    def both(x):
        return [kernel.apply_weights(layer, x) for layer, kernel, _ in linears]

    if compiled:
        both = torch.compile(both, backend="eager", fullgraph=True)
    x = torch.randn(3, K).half()
    for product, (_, _, dense) in zip(both(x), linears, strict=True):
        expected = x.double() @ dense.T
        assert (product.double() - expected).norm() < 2e-3 * expected.norm()
    assert calls == [72 + 16]
