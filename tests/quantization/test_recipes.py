# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checkpoints whose layers differ, and formats that are not supported."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_awq as awq,
)
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_compressed_tensors as compressed_tensors,
)
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_gptq as gptq,
)
from vllm.model_executor.layers.quantization import inc_moe
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme

from ..support.moe_layers import (
    CONFIG_CLASSES,
    LAYER_NAME,
    Shape,
    fresh_gate_records,
    is_opt_in,
    make_layer,
    quant_config,
)

AUTOROUND = ["auto_round:auto_gptq", "auto_round:auto_awq"]
EXPERT = LAYER_NAME.replace(".", r"\.")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def fresh_gate(monkeypatch):
    fresh_gate_records(monkeypatch)


class Declined(Exception):
    """Raised where vLLM's own path would handle the layer."""


@pytest.fixture
def left_to_vllm(monkeypatch):
    """Return whether a config's layer is left to vLLM, whose own methods are stubs."""

    def stock(*args, **kwargs):
        raise Declined

    for method in (
        AutoGPTQMoEMethod,
        AutoAWQMoEMethod,
        CompressedTensorsWNA16MoEMethod,
    ):
        monkeypatch.setattr(method, "__init__", stock)
    platform = type("Platform", (), {"__getattr__": stock})
    monkeypatch.setattr(inc_wna16_scheme, "current_platform", platform())

    def ask(config, **kwargs) -> bool:
        try:
            method = method_of(config, **kwargs)
        except Exception as error:  # noqa: BLE001 from vLLM, which has no kernel
            return switch.NAME not in str(error)
        return not isinstance(method, HybridW4A16MoEMethod)

    return ask


by_default = pytest.mark.skipif(is_opt_in(), reason="opt-in on this device")


def every_expert(recipe, projections=PROJECTIONS, experts=8):
    return {
        f"{LAYER_NAME}.{e}.{projection}": recipe
        for e in range(experts)
        for projection in projections
    }


def method_of(config, **kwargs):
    return make_layer(Shape(), config, **kwargs).quant_method


BITS_8 = {"bits": 8, "group_size": 64, "sym": True}
BITS_16 = {"bits": 16, "data_type": "fp"}
SPELLINGS = {
    "layer": lambda recipe: {LAYER_NAME: recipe},
    "each expert": every_expert,
    "regex on the layer": lambda recipe: {r".*layers\.3\.mlp\.experts.*": recipe},
    "regex on experts": lambda recipe: {rf"{EXPERT}\.\d+\.(gate|up|down)_proj": recipe},
}


@pytest.mark.parametrize("format", AUTOROUND)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_autoround_16_bit_experts_stay_16_bit(format, spelling, caplog):
    config = quant_config(format, extra_config=SPELLINGS[spelling](BITS_16))
    assert type(method_of(config)) is UnquantizedFusedMoEMethod
    other = method_of(config, name="model.layers.4.mlp.experts")
    assert isinstance(other, HybridW4A16MoEMethod)
    assert "HybridW4A16" not in caplog.text, "16-bit layers must not be logged"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_autoround_8_bit_experts_fall_back_to_vllm(spelling, monkeypatch, caplog):
    reached = []
    if not hasattr(inc_wna16_scheme, "_resolve_gptq_moe"):
        pytest.skip("this vLLM chooses its own method elsewhere")
    stand_in = type(
        "Platform",
        (),
        {"is_cpu": staticmethod(bool), "is_cuda": staticmethod(bool)},
    )
    monkeypatch.setattr(inc_wna16_scheme, "current_platform", stand_in)

    def resolve(layer, layer_config):
        reached.append(layer_config)
        return UnquantizedFusedMoEMethod(layer.moe_config)

    monkeypatch.setattr(inc_wna16_scheme, "_resolve_gptq_moe", resolve)
    config = quant_config(
        "auto_round:auto_gptq", extra_config=SPELLINGS[spelling](BITS_8)
    )
    method_of(config)
    assert [(seen.bits, seen.group_size) for seen in reached] == [(8, 64)]
    assert "8-bit weights, supported: 4" in caplog.text


@pytest.mark.parametrize("format", AUTOROUND)
def test_autoround_overrides_that_stay_int4_are_honoured(format):
    recipe = {"bits": 4, "group_size": 32, "sym": False}
    config = quant_config(format, extra_config=every_expert(recipe))
    method = method_of(config)
    assert isinstance(method, HybridW4A16MoEMethod)
    assert (method.group_size, method.symmetric) == (32, False)


@pytest.mark.parametrize(
    "key",
    ["gate_proj", "5.up_proj", "experts.5.up_proj", "layers.3.mlp.experts.5.up_proj"],
)
def test_autoround_names_that_end_like_an_expert(key, monkeypatch):
    monkeypatch.setenv(switch.NAME, "1")
    config = quant_config("auto_round:auto_gptq", extra_config={key: BITS_8})
    with pytest.raises(ValueError, match="have to be quantized alike"):
        method_of(config)


@pytest.mark.parametrize(
    "key",
    ["layers.4.mlp.experts.5.up_proj", "model.layers.3.mlp.gate", "lm_head", "gate"],
)
def test_autoround_names_of_others(key):
    config = quant_config("auto_round:auto_gptq", extra_config={key: BITS_8})
    assert isinstance(method_of(config), HybridW4A16MoEMethod)


def test_autoround_leaves_gate_shared_experts_and_head_alone():
    names = ("mlp.gate", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate")
    extra = {f"model.layers.3.{name}": BITS_16 for name in names}
    extra["lm_head"] = BITS_16
    config = quant_config("auto_round:auto_gptq", extra_config=extra)
    method = method_of(config)
    assert isinstance(method, HybridW4A16MoEMethod)
    linear = LinearBase.__new__(LinearBase)
    for name in names:
        own = config.get_quant_method(linear, f"model.layers.3.{name}")
        assert type(own).__name__ == "UnquantizedLinearMethod"


MIXED = {
    "auto_round:auto_gptq": {
        "extra_config": {f"{LAYER_NAME}.5.down_proj": {"bits": 8}}
    },
    "auto_round:auto_awq": {
        "extra_config": {rf"{EXPERT}\.5\.down.*": {"bits": 16, "data_type": "fp"}}
    },
    "gptq": {"dynamic": {rf"+:{EXPERT}\.5\.down_proj": {"bits": 8}}},
    "gptq_v2": {"dynamic": {rf"-:{EXPERT}\.5\.down_proj": {}}},
    "awq": {"modules_to_not_convert": ["experts.5.down_proj"]},
    "compressed-tensors": {"ignore": [f"{LAYER_NAME}.5.down_proj"]},
}


@pytest.mark.parametrize("format", MIXED)
def test_experts_of_a_layer_that_differ_are_an_error_if_asked_for(format, monkeypatch):
    monkeypatch.setenv(switch.NAME, "1")
    config = quant_config(format, **MIXED[format])
    message = (
        rf"MoE layer {LAYER_NAME}: the experts of a layer have to be quantized alike, "
        "but "
        rf"{LAYER_NAME}.0.gate_proj is .* and {LAYER_NAME}.5.down_proj is "
    )
    with pytest.raises(ValueError, match=message):
        method_of(config)


@by_default
@pytest.mark.parametrize("format", MIXED)
def test_experts_of_a_layer_that_differ_are_left_to_vllm_by_default(
    format, left_to_vllm
):
    assert left_to_vllm(quant_config(format, **MIXED[format]))
    reason = oracle.declined_because(LAYER_NAME)
    assert "have to be quantized alike" in reason


SKIPPED = {
    "gptq": [
        {"dynamic": {r"-:.*\.3\.mlp\.experts.*": {}}},
        {"dynamic": {r"-:.*\.3\.mlp\.experts\.\d+\..*": {}}},
        {"modules_in_block_to_quantize": [["self_attn.q_proj", "layers.4.mlp"]]},
    ],
    "awq": [
        {"modules_to_not_convert": ["layers.3.mlp.experts"]},
        {"modules_to_not_convert": list(every_expert(None))},
    ],
    "compressed-tensors": [
        {"ignore": [r"re:.*layers\.3\.mlp\.experts.*"]},
        {"ignore": list(every_expert(None))},
    ],
}


@pytest.mark.parametrize(
    ("format", "overrides"),
    [(format, case) for format, cases in SKIPPED.items() for case in cases],
)
def test_16_bit_experts_of_the_other_formats(format, overrides, caplog):
    config = quant_config(format, **overrides)
    assert type(method_of(config)) is UnquantizedFusedMoEMethod
    other = method_of(config, name="model.layers.4.mlp.experts")
    assert isinstance(other, HybridW4A16MoEMethod)
    assert "HybridW4A16" not in caplog.text


@pytest.mark.parametrize("format", MIXED)
def test_recipes_are_not_looked_up_on_an_opt_in_device(
    format, left_to_vllm, monkeypatch
):
    """Under auto nothing changes on such a device, not even what vLLM ignores."""
    monkeypatch.setenv(switch.NAME, "auto")
    monkeypatch.setattr(devices, "device_family", lambda: devices.PLANNED["cuda"])
    for module in (inc_moe, gptq, awq, compressed_tensors):
        monkeypatch.delattr(module, "uniform_recipe")
    for overrides in (MIXED[format], *SKIPPED.get(format, ())):
        assert left_to_vllm(quant_config(format, **overrides))
        reason = oracle.declined_because(LAYER_NAME)
        assert reason is None or reason == f"on cuda it is opt-in, set {switch.NAME}=1"


@pytest.mark.parametrize(
    "pattern", [r"+:.*mlp\.experts.*", r".*\.experts\.\d+\..*_proj", ".*_proj"]
)
def test_gptq_8_bit_experts_fall_back_to_vllm(pattern, caplog, monkeypatch):
    seen = []

    class Stock(AutoGPTQMoEMethod):
        def __init__(self, quant_config, moe):
            seen.append(quant_config.weight_bits)
            raise Declined

    monkeypatch.setattr(
        "vllm.model_executor.layers.quantization.auto_gptq.AutoGPTQMoEMethod", Stock
    )
    config = quant_config("gptq", dynamic={pattern: {"bits": 8}})
    with pytest.raises(Declined):
        method_of(config)
    assert seen == [8]
    assert "8-bit weights, supported: 4" in caplog.text


REASONS = {
    "gptq packing": (
        "gptq",
        {"checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin', supported: 'gptq', 'gptq_v2'",
    ),
    "gptq group": ("gptq", {"group_size": -1}, "group size -1, supported"),
    "awq version": (
        "awq",
        {"version": "GEMV"},
        "AWQ version 'gemv', supported: 'gemm'",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_declined_with_the_reason(case, monkeypatch, caplog):
    format, overrides, reason = REASONS[case]

    def stock(*args, **kwargs):
        raise Declined

    for method in (AutoGPTQMoEMethod, AutoAWQMoEMethod):
        monkeypatch.setattr(method, "__init__", stock)
    config = quant_config(format, **overrides)
    with pytest.raises(Declined):
        method_of(config)
    assert reason in caplog.text
    monkeypatch.setenv(switch.NAME, "require")
    with pytest.raises(ValueError, match=f"{LAYER_NAME} is declined: {reason[:20]}"):
        method_of(config)


def scheme(**weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {"config_groups": {"group_0": group}}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
CT_REASONS = {
    "bits": (
        scheme(**INT4 | {"num_bits": 8}, strategy="group", group_size=64),
        "8-bit weights, supported: 4",
    ),
    "strategy": (scheme(**INT4, strategy="channel"), "strategy is 'channel'"),
    "group": (scheme(**INT4, strategy="group", group_size=256), "group size 256, supp"),
}


@pytest.mark.parametrize("case", CT_REASONS)
def test_compressed_tensors_declined_with_the_reason(case, monkeypatch, caplog):
    overrides, reason = CT_REASONS[case]

    def stock(*args, **kwargs):
        raise Declined

    monkeypatch.setattr(CompressedTensorsWNA16MoEMethod, "__init__", stock)
    config = quant_config("compressed-tensors", **overrides)
    with pytest.raises(Declined):
        method_of(config)
    assert reason in caplog.text


@pytest.mark.parametrize("order", [None, "static", "weight"])
def test_compressed_tensors_static_activation_order_is_taken(order):
    overrides = scheme(**INT4, strategy="group", group_size=64, actorder=order)
    config = quant_config("compressed-tensors", **overrides)
    assert isinstance(method_of(config), HybridW4A16MoEMethod)


@pytest.mark.parametrize(
    ("format", "overrides", "message"),
    [
        ("gptq", {"desc_act": True}, "desc_act=True"),
        (
            "compressed-tensors",
            scheme(**INT4, strategy="group", group_size=64, actorder="group"),
            "actorder=.*'group'",
        ),
    ],
)
def test_activation_order_is_refused_by_vllm_itself(format, overrides, message):
    with pytest.raises(ValueError, match=message):
        quant_config(format, **overrides)


def test_activation_order_is_declined_where_vllm_lets_it_through(monkeypatch):
    monkeypatch.setenv(switch.NAME, "require")
    gptq = quant_config("gptq")
    gptq.desc_act = True
    with pytest.raises(ValueError, match="declined: desc_act"):
        method_of(gptq)
    tensors = quant_config("compressed-tensors")
    tensors.target_scheme_map["Linear"]["weights"].actorder = "group"
    with pytest.raises(ValueError, match="declined: actorder 'group'"):
        method_of(tensors)


def test_compressed_tensors_in_another_format_is_declined(monkeypatch):
    monkeypatch.setenv(switch.NAME, "require")
    config = quant_config("compressed-tensors")
    config.target_scheme_map["Linear"]["format"] = "int-quantized"
    with pytest.raises(ValueError, match="declined: format is 'int-quantized'"):
        method_of(config)


def test_gptq_asymmetric_is_refused_by_vllm_itself():
    with pytest.raises(ValueError, match="bits=4, sym=False"):
        quant_config("gptq", 64, False)


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_other_layers_fall_through(format):
    config = quant_config(format)
    assert config.get_quant_method(torch.nn.Linear(8, 8), "model.norm") is None
    assert type(config) in CONFIG_CLASSES.values()


@pytest.mark.parametrize(
    "format", ["auto_round:auto_gptq", "gptq", "compressed-tensors"]
)
@pytest.mark.parametrize(
    ("intermediate", "ranks", "per_rank", "fits"),
    [
        (384, 8, "48", "1, 2, 3, 4, 6, 12"),
        (192, 4, "48", "1, 2, 3, 6"),
        (768, 16, "48", "1, 2, 3, 4, 6, 8, 12, 24"),
    ],
)
def test_tensor_parallel_size_without_a_group_size_is_an_error_if_asked_for(
    format, intermediate, ranks, per_rank, fits, monkeypatch
):
    monkeypatch.setenv(switch.NAME, "1")
    message = (
        f"MoE layer {LAYER_NAME}: tensor parallel size {ranks} cuts the experts' "
        f"intermediate size {intermediate} into {per_rank} per rank, not a multiple of "
        f"32; sizes that work: {fits}; or --enable-expert-parallel, or "
        f"{switch.NAME}=0"
    )
    shape = Shape(intermediate=intermediate)
    with pytest.raises(ValueError, match=message):
        make_layer(shape, quant_config(format), tp=(ranks, 0))
    works = int(fits.split(", ")[1])
    method = make_layer(shape, quant_config(format), tp=(works, 0)).quant_method
    assert isinstance(method, HybridW4A16MoEMethod)


@by_default
@pytest.mark.parametrize(
    "format", ["auto_round:auto_gptq", "gptq", "awq", "compressed-tensors"]
)
def test_tensor_parallel_size_without_a_group_size_is_left_to_vllm(
    format, left_to_vllm
):
    config = quant_config(format)
    assert left_to_vllm(config, intermediate_size=384, tp=(8, 0))
    assert "tensor parallel size 8 cuts" in oracle.declined_because(LAYER_NAME)
