# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Two int4 linears of one input: one product for both."""

import pytest
import torch

from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16_pair import (
    FIRST,
    SECOND,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear

from .moe_layers import become_the_only_rank
from .test_linear_kernel import K, assert_product, make_linear


@pytest.mark.parametrize("compiled", [False, True])
def test_one_product_for_both(tmp_path, monkeypatch, compiled):
    become_the_only_rank(tmp_path)
    torch.manual_seed(0)
    linears = [make_linear(72, FIRST), make_linear(16, SECOND)]
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
        assert_product(product, x, dense)
    assert calls == [72 + 16]
