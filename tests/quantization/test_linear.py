# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Dense int4 linears: from each format's tensors to products, and who gets the kernel.

Layers are vLLM's own, built from a checkpoint's config.
"""

import logging

import numpy as np
import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision import hybrid_w4a16
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    HybridW4A16LinearKernel,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import PLANNED
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.scalar_type import scalar_types

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    DEVICE,
    quant_config,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_process", "linear_kernel_asked_for")

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
SIZES = (72, 56)  # rows of two projections in one layer; neither a multiple of 32
INPUTS = 256
PREFIX = "model.layers.0.self_attn.qkv_proj"
# Of a dense linear vLLM takes GPTQ in symmetric form only, and on the CPU no AutoRound
# in AWQ's packing. On CUDA it chooses no kernel for symmetric AWQ.
CASES = [
    ("auto_round:auto_gptq", True),
    ("gptq", True),
    ("gptq_v2", True),
    *([("awq", True)] if torch.version.cuda is None else []),
    ("awq", False),
    ("compressed-tensors", True),
    ("compressed-tensors", False),
]
every_format = pytest.mark.parametrize(
    ("format", "symmetric"),
    CASES,
    ids=[f"{name}-{'sym' if symmetric else 'asym'}" for name, symmetric in CASES],
)


class Linear:
    """A layer, and the random checkpoint that it loads."""

    def __init__(
        self,
        format,
        symmetric,
        group_size=64,
        dtype=torch.bfloat16,
        seed=0,
        *,
        sizes=SIZES,
        prefix=PREFIX,
        has_bias=True,
    ):
        self.format, self.symmetric = FORMATS[format], symmetric
        self.group_size, self.dtype, self.sizes = group_size, dtype, sizes
        config = quant_config(format, group_size, symmetric)
        config.packed_modules_mapping = {}
        if hasattr(config, "modules_in_block_to_quantize"):
            # as vLLM reads it from a checkpoint; 0.31 takes an empty list for "none"
            config.modules_in_block_to_quantize = [prefix]
        with set_current_vllm_config(VllmConfig()), torch.device(DEVICE):
            self.layer = MergedColumnParallelLinear(
                INPUTS,
                list(sizes),
                bias=has_bias,
                params_dtype=dtype,
                quant_config=config,
                prefix=prefix,
            )
        self.model = torch.nn.ModuleDict({"linear": self.layer})
        with torch.device(DEVICE):
            record_metadata_for_reloading(self.model)
        self.load(seed)
        self.process()

    def load(self, seed):
        rng = np.random.default_rng(seed)
        dense = []
        for shard, rows in enumerate(self.sizes):
            tensors = self.format.random_linear(
                rng, rows, INPUTS, self.group_size, self.symmetric
            )
            scales = tensors[self.format.scales].astype(np.float32)
            if self.dtype == torch.bfloat16:  # as the layer rounds them
                scales = torch.from_numpy(scales).bfloat16().float().numpy()
            dense.append(
                self.format.dequantize({**tensors, self.format.scales: scales})
            )
            for suffix, array in tensors.items():
                parameter = getattr(self.layer, suffix)
                parameter.weight_loader(parameter, torch.from_numpy(array), shard)
        self.dense = torch.from_numpy(np.concatenate(dense))
        self.bias = torch.zeros(sum(self.sizes), dtype=self.dtype)
        if self.layer.bias is not None:
            self.bias.copy_(torch.from_numpy(rng.standard_normal(sum(self.sizes))))
            for shard, part in enumerate(self.bias.split(self.sizes)):
                self.layer.bias.weight_loader(self.layer.bias, part, shard)

    def process(self):
        self.layer.quant_method.process_weights_after_loading(self.layer)

    def error(self, *shape):
        x = torch.randn(*shape, INPUTS, device=DEVICE).to(self.dtype)
        y, _ = self.layer(x)
        assert y.shape == (*shape, sum(self.sizes)) and y.dtype == self.dtype
        return self.error_of(y, x)

    def error_of(self, y, x):
        expected = x.cpu().double() @ self.dense.T + self.bias.double()
        return relative_error(y.cpu(), expected)


def kernel_of(layer):
    method = layer.quant_method
    method = getattr(method, "scheme", None) or getattr(layer, "scheme", None) or method
    return getattr(method, "linear_method", method).kernel


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_products_against_float64(format, symmetric, group_size, dtype):
    linear = Linear(format, symmetric, group_size, dtype)
    assert isinstance(kernel_of(linear.layer), HybridW4A16LinearKernel)
    for shape in ((1,), (5,), (2, 3), (40,)):
        assert linear.error(*shape) < TOLERANCE[dtype]
    nothing, _ = linear.layer(torch.empty(0, INPUTS, dtype=dtype, device=DEVICE))
    assert nothing.shape == (0, sum(SIZES))


@every_format
def test_layer_holds_one_copy_of_the_weights(format, symmetric):
    linear = Linear(format, symmetric)
    rows, groups = sum(SIZES), INPUTS // linear.group_size
    expected = rows * INPUTS // 2 + 2 * rows * groups + 2 * rows
    if not symmetric:
        expected += rows * groups // 2
    held = {
        name: parameter.untyped_storage().nbytes()
        for name, parameter in linear.layer.named_parameters()
        if name != "weight_shape"
    }
    assert sum(held.values()) == expected, held


@every_format
def test_weights_are_reloaded(format, symmetric):
    linear = Linear(format, symmetric)
    before = {n: p.data_ptr() for n, p in linear.layer.named_parameters()}
    initialize_layerwise_reload(linear.model)
    linear.load(seed=1)
    finalize_layerwise_reload(linear.model, None)
    after = {n: p.data_ptr() for n, p in linear.layer.named_parameters()}
    assert {n: after[n] for n in before} == before
    assert linear.error(5) < 8e-3


@pytest.mark.skipif(DEVICE != "cpu", reason="an opaque op hides the rows on GPUs")
def test_compiles_for_any_number_of_rows():
    linear = Linear("awq", False)
    compiled = torch.compile(
        linear.layer, backend="eager", fullgraph=True, dynamic=True
    )
    x = torch.randn(40, INPUTS).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    expected, _ = linear.layer(x)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x)[0], expected)
        for rows in (17, 5):
            assert torch.equal(compiled(x[:rows])[0], linear.layer(x[:rows])[0])


def test_the_summary_counts_them(monkeypatch, caplog):
    model = oracle._Model(accepted={"layer"}, ready={"layer": 0})
    monkeypatch.setattr(oracle, "_model", model)
    monkeypatch.setattr(oracle, "_under_construction", lambda: model)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for _ in range(2):
        Linear("gptq", True)
    for changes in ({"group_size": 256}, {"weight_type": scalar_types.uint8b128}):
        assert not HybridW4A16LinearKernel.can_implement(layer_config(**changes))[0]
    with caplog.at_level(logging.INFO):
        oracle._sum_up()
    (line,) = {m for m in caplog.messages if m.startswith("HybridW4A16 MoE: 1/1")}
    assert line.endswith(
        "0 declined; linears: 2 int4; left to vLLM: 1 int4 linear (group size 256, "
        "supported: (32, 64, 128))"
    )


# ------------------------------------------------------------------- who gets it
def layer_config(**changes):
    values = dict(
        full_weight_shape=(2048, 64),
        partition_weight_shape=(2048, 64),
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=128,
        zero_points=False,
    )
    return MPLinearLayerConfig(**values | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"weight_type": scalar_types.uint4, "zero_points": True}, None),
        ({"weight_type": scalar_types.uint8b128}, "weights of type uint8b128"),
        ({"zero_points": True}, "zero points beside the offset of uint4b8"),
        ({"act_type": torch.float32}, "activations in torch.float32"),
        ({"act_type": torch.int8}, "activations in torch.int8"),
        ({"out_type": torch.float32}, "outputs in torch.float32"),
        ({"group_size": -1}, "group size -1, supported"),
        ({"group_size": 256}, "group size 256, supported"),
        ({"partition_weight_shape": (2000, 64)}, "input size 2000 is not a multiple"),
        ({"partition_weight_shape": (2048, 60)}, "output size 60 is not a multiple"),
    ],
)
def test_what_a_layer_has_to_be(changes, reason):
    fits, found = HybridW4A16LinearKernel.can_implement(layer_config(**changes))
    assert fits == (reason is None)
    assert fits or reason in found


def test_an_input_that_does_not_fit_into_shared_memory_is_declined(monkeypatch):
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as device

    config = layer_config(partition_weight_shape=(28672, 64))
    monkeypatch.setattr(device, "device_family", lambda: PLANNED["gfx1151"])
    fits, reason = HybridW4A16LinearKernel.can_implement(config)
    assert not fits and reason == "input size 28672, supported: up to 16384"
    monkeypatch.setattr(device, "device_family", lambda: PLANNED["cpu"])
    assert HybridW4A16LinearKernel.can_implement(config)[0]


@pytest.mark.parametrize(
    ("device", "amx", "moe", "linear", "reason"),
    [
        ("cpu", False, None, None, None),
        ("cpu", False, "0", "1", f"{switch.NAME}=0"),
        ("cpu", False, None, "0", f"{switch.LINEAR_NAME}=0"),
        ("cpu", True, None, None, "vLLM's AMX kernel is faster on prompts"),
        ("cpu", True, None, "1", None),
        ("cuda", False, None, None, f"on cuda it is opt-in, set {switch.NAME}=1"),
        ("cuda", False, "1", None, None),
        ("cuda", False, "require", "0", f"{switch.LINEAR_NAME}=0"),
        ("gfx1151", False, None, None, "not compared with vLLM's RDNA kernel yet"),
        ("gfx1151", False, "1", None, f"set {switch.LINEAR_NAME}=1"),
        ("gfx1151", False, None, "1", None),
    ],
)
def test_where_it_is_wanted(monkeypatch, device, amx, moe, linear, reason):
    for name, value in ((switch.NAME, moe), (switch.LINEAR_NAME, linear)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    found = hybrid_w4a16.incompatibility_reason(layer_config(), PLANNED[device])
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def test_amx_keeps_fp16(monkeypatch):
    """vLLM's AMX kernel is for bf16."""
    monkeypatch.delenv(switch.LINEAR_NAME)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    fp16 = layer_config(act_type=torch.float16)
    assert hybrid_w4a16.incompatibility_reason(fp16, PLANNED["cpu"]) is None


def test_an_unknown_value_is_an_error(monkeypatch):
    monkeypatch.setenv(switch.LINEAR_NAME, "yes")
    with pytest.raises(ValueError, match="invalid value 'yes' for .*: auto, 1, 0"):
        hybrid_w4a16.incompatibility_reason(layer_config(), PLANNED["cpu"])
