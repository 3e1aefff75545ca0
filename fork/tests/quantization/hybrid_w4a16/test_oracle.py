# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The WNA16 oracle and HYBRID_W4A16: choice, reasons, weight conversion.

No kernel runs: a device of the family is put in the place of the one at hand.
"""

import dataclasses

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.kernel import KernelConfig
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_wna16,
    int_wna16,
)
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.moe_wna16 import MoeWNA16Config
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static
from vllm.platforms import current_platform

GFX1151 = DeviceFamily("gfx1151", "HIP wvSplitK", "Triton", 40, "rdna")
EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 4, 256, 128, 64


@pytest.fixture
def rdna(monkeypatch):
    """The decision sees a gfx1151; the oracle lists its backends for GPUs."""
    monkeypatch.setattr(hybrid_w4a16_device, "device_family", lambda: GFX1151)
    monkeypatch.setattr(
        HybridW4A16MoEExperts, "_supports_current_device", staticmethod(lambda: True)
    )
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


def moe_config(**changes) -> FusedMoEConfig:
    return FusedMoEConfig(
        **{
            "num_experts": EXPERTS,
            "experts_per_token": 2,
            "hidden_dim": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "num_logical_experts": EXPERTS,
            "activation": MoEActivation.SILU,
            "device": "cpu",
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
            "in_dtype": torch.bfloat16,
            **changes,
        }
    )


def gptq(**changes) -> AutoGPTQConfig:
    arguments = {
        "weight_bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "is_sym": True,
        "lm_head_quantized": False,
        "dynamic": {},
        "full_config": {},
    }
    return AutoGPTQConfig(**{**arguments, **changes})


def awq(**full_config) -> AutoAWQConfig:
    return AutoAWQConfig(4, GROUP, True, False, [], full_config)


def tensors(**changes) -> QuantizationArgs:
    arguments = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
    }
    return QuantizationArgs(**{**arguments, **changes})


def moe_wna16(**changes) -> MoeWNA16Config:
    arguments = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    return MoeWNA16Config.from_config({**arguments, **changes})


CONFIGS = {"gptq": gptq, "awq": awq, "tensors": tensors, "moe_wna16": moe_wna16}


def select(quant_config, backend="auto", **changes):
    config = moe_config(moe_backend=backend, **changes)
    vllm_config = VllmConfig(kernel_config=KernelConfig(moe_backend=backend))
    with set_current_vllm_config(vllm_config):
        return int_wna16.select_wna16_moe_backend(
            config, kInt4Static, quant_config, may_have_zp=False, may_have_bias=True
        )


@pytest.mark.parametrize("backend", ["auto", "hybrid_w4a16"])
@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_oracle_picks_it(rdna, make, backend):
    assert select(make(), backend) == (
        WNA16MoEBackend.HYBRID_W4A16,
        HybridW4A16MoEExperts,
    )


def test_it_is_the_first_choice(rdna):
    assert int_wna16._get_priority_backends()[0] == WNA16MoEBackend.HYBRID_W4A16
    assert int_wna16.map_wna16_backend("hybrid_w4a16") == WNA16MoEBackend.HYBRID_W4A16


REASONS = [
    (gptq, {"weight_bits": 8}, {}, "8-bit weights, supported: 4"),
    (gptq, {"group_size": 16}, {}, r"group size 16, supported: \(32, 64, 128\)"),
    (
        gptq,
        {"full_config": {"checkpoint_format": "marlin"}},
        {},
        "checkpoint_format is 'marlin', supported: 'gptq', 'gptq_v2'",
    ),
    (awq, {"version": "gemv"}, {}, "AWQ version 'gemv', supported: 'gemm'"),
    (
        tensors,
        {"strategy": "channel", "group_size": None},
        {},
        "strategy is '.*channel.*', supported: 'group'",
    ),
    (tensors, {"actorder": "group"}, {}, "actorder 'group'"),
    (gptq, {}, {"hidden_dim": 288}, "hidden size 288 is not a multiple of the group"),
    (gptq, {}, {"in_dtype": torch.float32}, "activations in torch.float32"),
    (gptq, {}, {"activation": MoEActivation.SWIGLUOAI}, "activation 'swigluoai'"),
    (gptq, {}, {"has_bias": True}, "experts have a bias"),
    (gptq, {}, {"is_lora_enabled": True}, "LoRA is enabled"),
]


@pytest.mark.parametrize("make,quant,moe,reason", REASONS)
def test_a_layer_that_does_not_fit_is_declined_with_the_reason(
    rdna, make, quant, moe, reason
):
    with pytest.raises(ValueError, match=f"HYBRID_W4A16.*since {reason}"):
        select(make(**quant), "hybrid_w4a16", **moe)


def test_shards_that_cut_a_group_are_declined(rdna):
    parallel = dataclasses.replace(
        FusedMoEParallelConfig.make_no_parallel(), tp_size=4, tp_rank=0
    )
    with pytest.raises(ValueError, match="since .*(tensor parallel|per partition)"):
        select(gptq(), "hybrid_w4a16", moe_parallel_config=parallel)


def test_another_device_is_declined(monkeypatch):
    family = "the op library holds no kernels for gfx942"
    monkeypatch.setattr(hybrid_w4a16_device, "device_family", lambda: family)
    with pytest.raises(ValueError, match=f"since {family}"):
        select(gptq(), "hybrid_w4a16")
    assert hybrid_w4a16_wna16.incompatibility_reason(moe_config(), gptq()) == family


def test_another_moe_backend_leaves_it_out(rdna):
    with pytest.raises(ValueError, match="'EMULATION' does not support"):
        select(gptq(), "emulation")


# --------------------------------------------------------------- weight conversion
def words_along(values: torch.Tensor, dim: int, order=range(8)) -> torch.Tensor:
    """int4 values to int32 words of eight neighbours along ``dim``."""
    parts = values.movedim(dim, -1).unflatten(-1, (-1, 8)).to(torch.int64)
    words = sum(parts[..., v] << (4 * i) for i, v in enumerate(order))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.movedim(-1, dim)


class Weights:
    """Random int4 weights of one projection, and what the kernels shall read."""

    def __init__(self, n: int, k: int):
        self.q = torch.randint(0, 16, (EXPERTS, n, k))
        self.zeros = torch.randint(1, 16, (EXPERTS, n, k // GROUP))
        self.scales = torch.rand(EXPERTS, n, k // GROUP).bfloat16()

    def packed(self) -> torch.Tensor:
        return words_along(self.q, 2, (0, 2, 4, 6, 1, 3, 5, 7))

    def packed_zeros(self) -> torch.Tensor:
        return words_along(self.zeros, 1)

    def as_rows(self):
        return words_along(self.q, 2), self.scales, words_along(self.zeros, 1)

    def as_awq(self):
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        by_k = words_along(self.q.transpose(1, 2), 2, order)
        zeros = words_along(self.zeros.transpose(1, 2), 2, order)
        return by_k, self.scales.transpose(1, 2).contiguous(), zeros

    def as_bytes(self):
        pairs = self.q.unflatten(2, (-1, 2))
        rows = self.zeros.unflatten(1, (-1, 2))
        return (
            (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8),
            self.scales,
            (rows[:, :, 0] | rows[:, :, 1] << 4).to(torch.uint8),
        )


# name: config, form, whether it has zero points
CONVERSIONS = {
    "gptq": (gptq(), Weights.as_rows, False),
    "awq": (awq(), Weights.as_awq, True),
    "compressed-tensors": (tensors(symmetric=False), Weights.as_rows, True),
    "moe_wna16": (moe_wna16(sym=False), Weights.as_bytes, True),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_weights_of_each_method_are_converted(name):
    torch.manual_seed(0)
    quant_config, stored, zeros = CONVERSIONS[name]
    w13, w2 = Weights(2 * INTERMEDIATE, HIDDEN), Weights(HIDDEN, INTERMEDIATE)
    (q13, s13, z13), (q2, s2, z2) = stored(w13), stored(w2)
    converted = int_wna16.convert_to_wna16_moe_kernel_format(
        WNA16MoEBackend.HYBRID_W4A16,
        torch.nn.Module(),
        quant_config,
        None,
        *(q13, q2, s13, s2, z13, z2),
    )
    assert converted is not None
    expected = (
        *(w13.packed(), w2.packed(), w13.scales, w2.scales),
        *(w13.packed_zeros(), w2.packed_zeros()),
    )
    count = 6 if zeros else 4
    for got, wanted in zip(converted[:count], expected, strict=False):
        assert got is not None
        assert torch.equal(got, wanted)
    assert all(tensor is None for tensor in converted[count:])


def test_symmetric_checkpoints_have_no_zero_points_and_no_bias():
    weights = Weights(2 * INTERMEDIATE, HIDDEN)
    q, s, z = weights.as_rows()
    bias = torch.zeros(EXPERTS, 2 * INTERMEDIATE)

    def convert(bias):
        return hybrid_w4a16_wna16.convert_weights(gptq(), q, q, s, s, z, z, bias, None)

    assert convert(bias)[4:] == (None,) * 6
    bias[1, 3] = 0.5
    with pytest.raises(ValueError, match="w13_bias is not zero"):
        convert(bias)


def test_experts_take_standard_activations():
    assert (
        HybridW4A16MoEExperts.activation_format()
        == mk.FusedMoEActivationFormat.Standard
    )
