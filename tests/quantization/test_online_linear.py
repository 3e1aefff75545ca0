# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""16-bit linears that are quantized at load: products, memory, refusals.

Layers are vLLM's own, as in an int4 checkpoint that leaves its shared expert in 16
bits.
"""

import types

import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import SCHEMES
from vllm.model_executor.layers.quantization.hybrid_w4a16_online_linear import (
    HybridW4A16OnlineLinearMethod,
)
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from ..support.moe_layers import (
    DEVICE,
    inc_config,
    relative_error,
)

PREFIX = "model.layers.0.mlp.shared_expert.gate_up_proj"
SIZES = (48, 40)
NAMES = [name for name, scheme in SCHEMES.items() if not scheme.rescored]
pytestmark = pytest.mark.usefixtures("one_process")

# What rounding costs, relative to the product of the 16-bit weights.
LOSS = {8: 0.01, 4: 0.15}


def make_linear(
    name, inputs=256, dtype=torch.bfloat16, skipped=True, target="*shared*"
):
    """A layer of an AutoRound checkpoint; ``skipped``: which keeps it in 16 bits."""
    extra = {"extra_config": {".*shared_expert.*": {"bits": 16, "data_type": "fp"}}}
    quantization = inc_config(128, **(extra if skipped else {}))
    quantization.packed_modules_mapping = {}
    quantization.online_quantization_config = OnlineQuantizationConfig(
        QuantizationConfigArgs(targets={target: name})
    )
    config = VllmConfig()
    object.__setattr__(config, "model_config", types.SimpleNamespace(dtype=dtype))
    with set_current_vllm_config(config), torch.device(DEVICE):
        return MergedColumnParallelLinear(
            inputs,
            list(SIZES),
            bias=False,
            params_dtype=dtype,
            quant_config=quantization,
            prefix=PREFIX,
        )


def load(layer, weight):
    """As vLLM does; the last part starts the quantization."""
    for shard, part in enumerate(weight.split(SIZES)):
        layer.weight.weight_loader(layer.weight, part.to(DEVICE), shard)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_and_memory(name, dtype):
    layer = make_linear(name, dtype=dtype)
    assert isinstance(layer.quant_method, HybridW4A16OnlineLinearMethod)
    weight = (torch.randn(sum(SIZES), 256) / 16).to(dtype)
    load(layer, weight)
    scheme = SCHEMES[name]
    for shape in ((1,), (2, 3), (40,)):
        x = torch.randn(*shape, 256).to(dtype)
        y, _ = layer(x.to(DEVICE))
        assert y.shape == (*shape, sum(SIZES)) and y.dtype == dtype
        exact = x.double() @ weight.double().T
        assert 0 < relative_error(y.cpu(), exact) < LOSS[scheme.bits]
    kept = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert kept == weight.numel() * scheme.bytes_per_weight()


def test_a_layer_that_no_target_names_stays_as_it_is():
    layer = make_linear("int8_g32", target="*lm_head*")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_weights_that_are_not_finite_are_refused():
    layer = make_linear("int8_g32")
    weight = torch.randn(sum(SIZES), 256).bfloat16()
    weight[7, 3] = float("inf")
    with pytest.raises(ValueError, match=f"{PREFIX}.weight: expected finite values"):
        load(layer, weight)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "int4_g128", "inputs": 192}, "192 is not a multiple of the group"),
        ({"name": "int8_g32", "dtype": torch.float32}, "weights in torch.float32"),
        # the second message is that of vLLM 0.31, which refuses before we can
        (
            {"name": "int8_g32", "skipped": False},
            "the checkpoint quantizes it already|already selected by the checkpoint",
        ),
        ({"name": "int4_rescored"}, "does not define a QuantSpec"),
    ],
)
def test_what_cannot_be_quantized(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        make_linear(**options)
    assert PREFIX in str(error.value)
