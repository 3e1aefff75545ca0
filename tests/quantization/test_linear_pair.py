# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Two int4 linears of one input in one launch, as in a Gated DeltaNet layer."""

from collections import Counter

import pytest
import torch

from vllm._aiter_ops import rocm_aiter_ops
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16_pair import (
    FIRST,
    SECOND,
    pair_of,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ..support.moe_layers import DEVICE
from .test_linear import INPUTS, TOLERANCE, Linear, every_format

pytestmark = pytest.mark.usefixtures("one_process", "linear_kernel_asked_for")

ABOVE = "model.layers.0.linear_attn"
OF_FIRST, OF_SECOND = (64, 72), (16, 8)  # rows of their projections


@pytest.fixture
def launches(monkeypatch):
    """Counts the products."""
    counts, multiply = Counter(), hybrid_w4a16_dense_linear.multiply

    def counted(*arguments):
        counts["products"] += 1
        return multiply(*arguments)

    monkeypatch.setattr(hybrid_w4a16_dense_linear, "multiply", counted)
    return counts


def first_of(format="auto_round:auto_gptq", symmetric=True, *options, **more):
    more = {"has_bias": False, "prefix": f"{ABOVE}.{FIRST}", **more}
    return Linear(format, symmetric, *options, seed=1, sizes=OF_FIRST, **more)


def second_of(format="auto_round:auto_gptq", symmetric=True, *options, **more):
    more = {"has_bias": False, "prefix": f"{ABOVE}.{SECOND}", **more}
    return Linear(format, symmetric, *options, seed=2, sizes=OF_SECOND, **more)


def inputs(rows, dtype=torch.bfloat16):
    return torch.randn(rows, INPUTS, device=DEVICE).to(dtype)


def assert_right(first, second, x):
    y, _ = first.layer(x)
    z, _ = second.layer(x)
    assert first.error_of(y, x) < TOLERANCE[x.dtype]
    assert second.error_of(z, x) < TOLERANCE[x.dtype]


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_products_in_one_launch(format, symmetric, dtype, launches):
    first = first_of(format, symmetric, 64, dtype)
    second = second_of(format, symmetric, 64, dtype)
    assert pair_of(first.layer) is pair_of(second.layer) is not None
    for count, rows in enumerate((1, 5, 40), start=1):
        assert_right(first, second, inputs(rows, dtype))
        assert launches["products"] == count


@every_format
def test_weights_are_held_once(format, symmetric):
    first, second = first_of(format, symmetric), second_of(format, symmetric)
    held = {}
    for linear in (first, second):
        for name, parameter in linear.layer.named_parameters():
            if name != "weight_shape":
                storage = parameter.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    rows, groups = sum(OF_FIRST) + sum(OF_SECOND), INPUTS // 64
    expected = rows * INPUTS // 2 + 2 * rows * groups
    assert sum(held.values()) == expected + (0 if symmetric else rows * groups // 2)


def test_another_input_is_multiplied_by_itself(launches):
    """Two threads may run the model on two parts of a batch."""
    first, second = first_of(), second_of()
    x, other = inputs(3), inputs(3)
    first.layer(x)
    z, _ = second.layer(other)
    assert second.error_of(z, other) < TOLERANCE[x.dtype]
    z, _ = second.layer(x)  # what the first linear left is gone
    assert second.error_of(z, x) < TOLERANCE[x.dtype]
    assert launches["products"] == 3


@every_format
def test_weights_are_reloaded_in_place(format, symmetric, launches):
    first, second = first_of(format, symmetric), second_of(format, symmetric)
    model = torch.nn.ModuleList([first.layer, second.layer])
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    initialize_layerwise_reload(model)
    first.load(seed=3)
    second.load(seed=4)
    finalize_layerwise_reload(model, None)
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert_right(first, second, inputs(5))
    assert launches["products"] == 1


def test_parameters_that_were_replaced_are_used(launches):
    first, second = first_of(), second_of()
    for linear in (first, second):
        scales = torch.nn.Parameter(2 * linear.layer.scales, requires_grad=False)
        linear.layer.scales = scales
        linear.dense *= 2
    assert_right(first, second, inputs(2))
    assert launches["products"] == 2


@pytest.mark.parametrize(
    ("of_first", "of_second"),
    [
        ({"has_bias": True}, {}),
        ({}, {"has_bias": True}),
        ({}, {"group_size": 32}),
        ({}, {"dtype": torch.float16}),
        ({"prefix": f"{ABOVE}.in_proj_qkv"}, {}),
        ({}, {"prefix": f"model.layers.1.linear_attn.{SECOND}"}),
    ],
    ids=["bias", "bias of second", "groups", "dtype", "name", "layer"],
)
def test_others_stay_apart(of_first, of_second, launches):
    first, second = first_of(**of_first), second_of(**of_second)
    assert pair_of(first.layer) is pair_of(second.layer) is None
    assert first.error(2) < TOLERANCE[first.dtype]
    assert second.error(2) < TOLERANCE[second.dtype]
    assert launches["products"] == 2


def test_aiter_gets_products_of_their_own(monkeypatch):
    monkeypatch.setattr(
        rocm_aiter_ops, "are_gdn_triton_kernels_available", lambda: True
    )
    first, second = first_of(), second_of()
    assert pair_of(first.layer) is pair_of(second.layer) is None


def test_a_second_that_comes_first_stays_apart():
    second, first = second_of(), first_of()
    assert pair_of(first.layer) is pair_of(second.layer) is None
    assert pair_of(second_of().layer) is pair_of(first.layer) is not None


@pytest.mark.skipif(DEVICE != "cpu", reason="an opaque op hides the rows on GPUs")
def test_compiles_into_one_call_for_any_number_of_rows():
    first, second = first_of(), second_of()
    calls = []

    def backend(graph, _):
        calls.append(sum("wvSplitK_int_g" in str(n.target) for n in graph.graph.nodes))
        return graph

    def both(x):
        return first.layer(x)[0], second.layer(x)[0]

    x = inputs(40)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compiler.reset()
    compiled = torch.compile(both, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (x, x[:17], x[:5]):
            for mine, expected in zip(compiled(rows), both(rows), strict=True):
                assert torch.equal(mine, expected)
    assert calls == [1]
