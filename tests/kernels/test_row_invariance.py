# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Row invariance: a row has the same bits alone and in a batch of any size.

On the device at hand, with every instruction set of a CPU. The GPU kernels also run on
the host (test_row_invariance_on_host.py).
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_moe as experts
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear as linear
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as dense_ops
from vllm.platforms import current_platform
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape
from vllm.plugins.hybrid_w4a16.selftest_cases import Case, DecodeOps, DenseCase

DEVICE = current_platform.device_type
DTYPES = (torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128)
ISAS = ops.build_info().get("cpu", ("",)) if DEVICE == "cpu" else ("",)
FEW = (1, 2, 3, 5, 8, 13, 33)


def short(*values):
    """Whether CI runs these values of dtype, group size and a flag."""
    return values in ((torch.float16, 64, True), (torch.bfloat16, 128, False))


GRID = [
    pytest.param(*v, marks=() if short(*v) else pytest.mark.nightly)
    for v in itertools.product(DTYPES, GROUPS, (True, False))
]


@pytest.fixture
def family():
    found = devices.device_family()
    assert isinstance(found, devices.DeviceFamily), found
    devices.load_kernels(found)
    return found


@pytest.fixture
def row_invariant():
    ops.set_row_invariant(True)
    yield
    ops.set_row_invariant(False)


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param:
        torch.ops._rocm_C.hybrid_w4a16_cpu_isa(request.param)
    yield request.param
    if request.param:
        torch.ops._rocm_C.hybrid_w4a16_cpu_isa("")


def bits(t):
    return t.contiguous().view(torch.int16)


def rows_that_differ(case, op, launch, sizes):
    """Rows of batches of ``sizes`` tokens whose bits differ from those alone."""
    columns, per_token = case.expected[op].shape[1], case.rows(op, 1)

    def call(first, tokens):
        c = torch.zeros(
            per_token * tokens, columns, dtype=case.shape.dtype, device=DEVICE
        )
        launch(case, c, first, tokens)
        return c

    alone = torch.cat([call(token, 1) for token in range(max(sizes))])
    return sum(
        int((bits(call(0, size)) != bits(alone[: per_token * size])).any(1).sum())
        for size in sizes
    )


@pytest.mark.parametrize(("dtype", "group_size", "symmetric"), GRID)
@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_moe_rows(op, dtype, group_size, symmetric, isa, family, row_invariant):
    shape = LayerShape(4, 3, 384, 256, group_size, dtype, symmetric)
    case = Case.make(shape, 0, 0).to(DEVICE)
    launch = getattr(DecodeOps(family.cu_count), op)
    assert rows_that_differ(case, op, launch, FEW) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_moe_rows_in_every_batch(op, family, row_invariant):
    """1 to 33 tokens, a shape with a real layer's number of experts."""
    shape = LayerShape(128, 8, 1024, 256, 128, torch.bfloat16, True)
    case = Case.make(shape, 0, 0).to(DEVICE)
    launch = getattr(DecodeOps(family.cu_count), op)
    assert rows_that_differ(case, op, launch, range(1, 34)) == 0


def test_without_it_rows_differ(family):
    """The tests above would notice: it is not how the kernels are anyway."""
    op = "down"
    shape = LayerShape(4, 3, 384, 256, 128, torch.bfloat16, True)
    case = Case.make(shape, 0, 0).to(DEVICE)
    launch = getattr(DecodeOps(family.cu_count), op)
    assert rows_that_differ(case, op, launch, FEW) > 0


@pytest.mark.parametrize(("dtype", "group_size", "symmetric"), GRID)
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_dense_rows(
    dtype, group_size, symmetric, weight_bits, isa, family, row_invariant
):
    """The lm_head's op, and linears for more rows than it takes at a time on a GPU."""
    symmetric = symmetric or weight_bits == 8
    generator = torch.Generator().manual_seed(0)
    case = DenseCase.make(dtype, weight_bits, symmetric, group_size, generator)
    case = case.to(DEVICE)
    linear.register_gpu_op()
    x = torch.randn(40, case.x.shape[1], generator=generator).to(dtype).to(DEVICE)

    def multiply(rows):
        return linear.multiply(
            rows,
            case.words,
            case.scales,
            case.zero_points,
            weight_bits,
            group_size,
            family,
        )

    alone = torch.cat([multiply(row) for row in x.split(1)])
    for size in (2, 3, 7, 13, 16, 40):
        assert torch.equal(bits(multiply(x[:size])), bits(alone[:size])), size


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescored_rows(dtype, isa, family, row_invariant):
    """The rescored lm_head: what is computed again depends on the row alone."""
    generator = torch.Generator().manual_seed(0)
    k, n = 256, 2000
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype).to(DEVICE)
    packed, scales, errors = dense_ops.quantize(weight, 4, 128)
    x = torch.randn(16, k, generator=generator).to(dtype).to(DEVICE)

    def logits(rows):
        c = torch.zeros(len(rows), n, dtype=dtype, device=DEVICE)
        dense_ops.wvSplitK_int_g(rows, packed, scales, c, family.cu_count, 128, 4)
        partials = torch.zeros(len(rows), 2 * dense_ops.PARTS, device=DEVICE)
        dense_ops.wvSplitK_int_g_rescore(rows, weight, errors, c, partials, 1.0, 7.0)
        return c

    alone = torch.cat([logits(row) for row in x.split(1)])
    for size in (2, 5, 16):
        assert torch.equal(bits(logits(x[:size])), bits(alone[:size])), size


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's kernels")
def test_one_cpu_kernel_for_any_number_of_rows(isa, row_invariant):
    (only,) = ops.cpu_kernels(128, torch.bfloat16)
    assert only[1] == 1
    ops.set_row_invariant(False)
    assert only[0].removesuffix("_few") == ops.cpu_kernels(128, torch.bfloat16)[0][0]


@pytest.mark.parametrize("on", [True, False])
def test_gpu_experts_use_neither_tables_nor_prefill(on, monkeypatch):
    """A GPU's tables and its prefill kernel depend on the number of tokens."""
    family = devices.PLANNED["gfx1151"]
    monkeypatch.setattr(experts, "device_family", lambda: family)
    monkeypatch.setattr(experts, "load_kernels", lambda family: None)
    monkeypatch.setattr(ops, "row_invariant", lambda: on)
    config = SimpleNamespace(
        num_experts=128,
        experts_per_token=8,
        hidden_dim=2048,
        intermediate_size_per_partition=768,
        in_dtype=torch.bfloat16,
        moe_parallel_config=None,
    )
    monkeypatch.setattr(
        experts.mk.FusedMoEExpertsModular, "__init__", lambda self, *args: None
    )
    layer = experts.HybridW4A16MoEExperts(config, SimpleNamespace(block_shape=[0, 128]))
    assert (layer.tuned is None, layer.prefill_from is None) == (on, on)
    assert layer._is_prefill(4096) != on


def test_vllm_asks_for_it():
    assert experts.HybridW4A16MoEExperts._supports_batch_invariance()
