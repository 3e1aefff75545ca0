# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which layers are hybrid, which are declined, and what the log says about them."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.inc_moe import INCHybridW4A16MoEMethod

from ..support.moe_layers import (
    DEVICE,
    LAYER_NAME,
    Checkpoint,
    Shape,
    fresh_gate_records,
    inc_config,
    is_opt_in,
    make_layer,
)


@pytest.fixture(autouse=True)
def fresh_gate(monkeypatch):
    """An empty record for each test, and log lines that caplog captures."""
    fresh_gate_records(monkeypatch)


EPLB = dataclasses.replace(FusedMoEParallelConfig.make_no_parallel(), enable_eplb=True)


def data_parallel(backend="allgather_reducescatter", ep=True):
    return dataclasses.replace(
        FusedMoEParallelConfig.make_no_parallel(),
        dp_size=2,
        ep_size=2 if ep else 1,
        use_ep=ep,
        all2all_backend=backend,
    )


PASSTHROUGH = dataclasses.replace(
    FusedMoEParallelConfig.make_no_parallel(), all2all_backend="passthrough"
)

# The difference from an accepted layer, and the reason that names it.
DECLINED = {
    "bits": ({"bits": 8}, {}, "8-bit weights, supported: 4"),
    "group size": (
        {"group_size": 16},
        {},
        r"group size 16, supported: \(32, 64, 128\)",
    ),
    "one group per row": ({"group_size": -1}, {}, "group size -1, supported"),
    "hidden size": (
        {},
        {"hidden_dim": 288},
        "hidden size 288 is not a multiple of the group size 64",
    ),
    "intermediate size": (
        {},
        {"intermediate_size": 96},
        "intermediate size 96 is not a multiple of the group size 64",
    ),
    "activation dtype": ({}, {"in_dtype": torch.float32}, "activations in torch.float"),
    "activation": ({}, {"activation": MoEActivation.RELU2}, "activation 'relu2'"),
    "interleaved gate and up": (
        {},
        {"activation": MoEActivation.SWIGLUOAI},
        "activation 'swigluoai'",
    ),
    "bias": ({}, {"has_bias": True}, "experts have a bias"),
    "LoRA": ({}, {"is_lora_enabled": True}, "LoRA is enabled"),
    "EPLB": ({}, {"moe_parallel_config": EPLB}, "EPLB.* is enabled"),
    "batched experts": (
        {},
        {"moe_parallel_config": data_parallel("deepep_low_latency")},
        "all-to-all backend deepep_low_latency, supported: allgather_reducescatter",
    ),
    "other weights": (
        {},
        {"moe_parallel_config": data_parallel("moonep")},
        "all-to-all backend moonep, supported: allgather_reducescatter",
    ),
    "experts dispatch": (
        {},
        {"moe_parallel_config": PASSTHROUGH},
        "all-to-all backend passthrough, supported: allgather_reducescatter",
    ),
}
if not hasattr(FusedMoEParallelConfig, "use_passthrough_all2all"):
    del DECLINED["experts dispatch"]  # vLLM 0.30 and 0.31 have no such backend


def decline_kwargs(case):
    quant, moe, reason = DECLINED[case]
    return inc_config(**quant), moe, reason


class Declined(Exception):
    """Raised where vLLM's own path would handle the layer."""


@pytest.fixture
def stock_path(monkeypatch):
    """Stop where the factory's own body takes over, which is not under test."""
    from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme

    class Platform:
        def __getattr__(self, name):  # the first attribute read depends on the release
            raise Declined

    monkeypatch.setattr(inc_wna16_scheme, "current_platform", Platform())


@pytest.mark.parametrize("case", DECLINED)
def test_declined_layer_falls_back_and_the_log_says_why(case, stock_path, caplog):
    config, moe, reason = decline_kwargs(case)
    for _ in range(2):
        with caplog.at_level(logging.INFO), pytest.raises(Declined):
            make_layer(Shape(), config, **moe)
    lines = [r.getMessage() for r in caplog.records if "HybridW4A16" in r.getMessage()]
    assert len(lines) == 1, "one line per reason"
    assert lines[0].startswith(
        f"HybridW4A16 MoE: layer {LAYER_NAME} falls back to vLLM's MoE path: "
    )
    assert re.search(reason, lines[0])


@pytest.mark.parametrize("case", DECLINED)
def test_declined_layer_is_an_error_under_require(case, stock_path, monkeypatch):
    monkeypatch.setenv(switch.NAME, "require")
    config, moe, reason = decline_kwargs(case)
    message = f"{switch.NAME}=require, but MoE layer {LAYER_NAME} is declined: .*"
    with pytest.raises(ValueError, match=message + reason):
        make_layer(Shape(), config, **moe)


by_default = pytest.mark.skipif(is_opt_in(), reason="opt-in on this device")


@pytest.mark.parametrize(
    "value", [pytest.param("auto", marks=by_default), "1", "require"]
)
def test_supported_layer_is_accepted(value, monkeypatch, caplog):
    monkeypatch.setenv(switch.NAME, value)
    layer = make_layer(Shape(), inc_config())
    assert type(layer.quant_method) is INCHybridW4A16MoEMethod
    assert "falls back" not in caplog.text


@by_default
def test_explicit_moe_backend_wins_over_auto(stock_path, caplog):
    with pytest.raises(Declined):
        make_layer(Shape(), inc_config(), moe_backend="triton")
    assert "--moe-backend triton was asked for" in caplog.text


@pytest.mark.parametrize("value", ["1", "require"])
def test_explicit_switch_wins_over_moe_backend(value, monkeypatch):
    monkeypatch.setenv(switch.NAME, value)
    layer = make_layer(Shape(), inc_config(), moe_backend="triton")
    assert type(layer.quant_method) is INCHybridW4A16MoEMethod


@pytest.mark.parametrize("ep", [True, False], ids=["ep", "tp"])
def test_data_parallel_where_tokens_can_be_gathered(ep, monkeypatch):
    """vLLM's CPU communicator cannot gather tokens: any MoE model fails there."""
    monkeypatch.setenv(switch.NAME, "require")
    moe = {"moe_parallel_config": data_parallel(ep=ep)}
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="data parallel: vLLM cannot gather"):
            make_layer(Shape(), inc_config(), **moe)
        monkeypatch.setattr(oracle, "can_gather_tokens", lambda: True)
    layer = make_layer(Shape(), inc_config(), **moe)
    assert type(layer.quant_method) is INCHybridW4A16MoEMethod


def test_ranks_of_data_parallelism_cut_experts_too(monkeypatch):
    monkeypatch.setenv(switch.NAME, "1")
    monkeypatch.setattr(oracle, "can_gather_tokens", lambda: True)
    parallel = dataclasses.replace(data_parallel(ep=False), tp_size=8)
    message = "tensor times data parallel size 8 cuts .*sizes that work: 1, 2, 4; or"
    with pytest.raises(ValueError, match=message):
        make_layer(Shape(), inc_config(), moe_parallel_config=parallel)


def test_missing_op_library_is_a_reason(stock_path, monkeypatch, caplog):
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

    monkeypatch.setattr(ops, "load_error", lambda: "the op library X does not exist")
    with pytest.raises(Declined):
        make_layer(Shape(), inc_config())
    assert "the op library X does not exist" in caplog.text


def test_16_bit_experts_of_a_mixed_recipe_are_not_our_business(caplog):
    config = inc_config(extra_config={LAYER_NAME: {"bits": 16, "data_type": "fp"}})
    layer = make_layer(Shape(), config)
    assert type(layer.quant_method) is UnquantizedFusedMoEMethod
    assert "HybridW4A16" not in caplog.text


@pytest.fixture
def built_by_vllm(monkeypatch):
    """Pretend that vLLM builds layers of a model with ``depth`` decoder layers."""

    def build(depth: int) -> None:
        model = SimpleNamespace(get_layers_start_end_indices=lambda _: (0, depth))
        config = SimpleNamespace(model_config=model, parallel_config=None)
        monkeypatch.setattr(oracle, "get_current_vllm_config_or_none", lambda: config)

    return build


def summaries(caplog) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [
        line for line in lines if re.match(r"HybridW4A16 MoE: \d+/\d+ layers", line)
    ]


def test_summary_of_a_model_that_is_declined_altogether(
    built_by_vllm, stock_path, caplog
):
    built_by_vllm(depth=3)
    for index in range(3):
        with caplog.at_level(logging.INFO), pytest.raises(Declined):
            name = f"model.layers.{index}.mlp.experts"
            make_layer(Shape(), inc_config(bits=8), name=name)
    assert summaries(caplog) == ["HybridW4A16 MoE: 0/3 layers, 3 declined"]


def test_draft_model_beside_a_declined_target_has_its_own_summary(
    built_by_vllm, stock_path, caplog
):
    built_by_vllm(depth=9)  # its last layer has no experts
    for index in range(2):
        with pytest.raises(Declined):
            name = f"model.layers.{index}.mlp.experts"
            make_layer(Shape(), inc_config(bits=8), name=name)
    built_by_vllm(depth=1)
    with caplog.at_level(logging.INFO):
        draft = make_layer(Shape(), inc_config(), name="mtp.layers.0.mlp.experts")
        Checkpoint(Shape()).load_into(draft)
    target, own = summaries(caplog)
    assert target == "HybridW4A16 MoE: 0/2 layers, 2 declined"
    assert own.startswith("HybridW4A16 MoE: 1/1 layers (decode: ")


@pytest.mark.parametrize("attributes", [(), ("in_dtype", "activation")])
def test_stand_in_layer_is_declined_not_an_error(attributes, monkeypatch):
    """Layers like those in vLLM's tests: ``__new__`` and an empty ``moe_config``."""
    monkeypatch.setenv(switch.NAME, "1")
    layer = object.__new__(RoutedExperts)
    object.__setattr__(layer, "moe_config", SimpleNamespace())
    for name in attributes:
        setattr(layer.moe_config, name, None)
    assert not oracle.consider(layer, LAYER_NAME)
    assert "moe_config has no " in oracle.declined_because(LAYER_NAME)


class Untouchable:
    """Fails on any attribute access except the device's."""

    def __getattr__(self, name):
        if name == oracle._PLANNED:
            return devices.PLANNED["cuda"]
        raise AssertionError(f"{name} was read")


@pytest.mark.parametrize(
    ("bits", "group_size"), [(8, 64), (4, 16), (4, 64), (None, None)]
)
def test_nothing_is_read_of_the_layer_before_the_cheap_checks(
    bits, group_size, monkeypatch
):
    monkeypatch.setenv(switch.NAME, "auto")
    reason = oracle.incompatibility_reason(Untouchable(), bits, group_size)
    assert reason and "was read" not in reason


def test_summary_once_the_last_layer_is_ready(stock_path, caplog):
    names = [f"model.layers.{i}.mlp.experts" for i in range(3)]
    layers = [make_layer(Shape(), inc_config(), name=name) for name in names[:2]]
    with pytest.raises(Declined):
        make_layer(Shape(), inc_config(bits=8), name=names[2])
    with caplog.at_level(logging.INFO):
        Checkpoint(Shape()).load_into(layers[0])
        assert "declined" not in caplog.text
        Checkpoint(Shape()).load_into(layers[1])
    (line,) = summaries(caplog)
    assert line.startswith("HybridW4A16 MoE: 2/3 layers (decode: ")
    assert line.endswith(", 1 declined")


def test_summary_of_layers_that_differ_in_what_is_fused(stock_path, caplog):
    names = [f"model.layers.{i}.mlp.experts" for i in range(3)]
    layers = [make_layer(Shape(), inc_config(), name=name) for name in names]
    for name, weight_format in zip(names, ("int4", "int8", "int4"), strict=True):
        oracle.report_fused("shared expert", name, weight_format)
        oracle.report_not_fused("router", name, "no reason")
    oracle.report_fused("router", names[1], "up to 4 tokens")
    oracle.report_fused("router", "another.model.layers.0", "")
    oracle.count_other_linear("too wide")
    with caplog.at_level(logging.INFO):
        for layer in layers:
            Checkpoint(Shape()).load_into(layer)
    (line,) = summaries(caplog)
    assert ", shared expert fused int4/int8, router fused up to 4 tokens in 1 l" in line
    assert line.endswith(
        ", 0 declined; left to vLLM: router of 2 layers (no reason), 1 int4 linear "
        "(too wide)"
    )


def test_each_model_of_a_process_has_its_own_summary(caplog):
    with caplog.at_level(logging.INFO):
        for name in ("model.layers.0.mlp.experts", "mtp.layers.0.mlp.experts") * 2:
            layer = make_layer(Shape(), inc_config(), name=name)
            Checkpoint(Shape()).load_into(layer)
            layer.quant_method.process_weights_after_loading(layer)  # loaded again
    lines = summaries(caplog)
    assert len(lines) == 4
    assert all(": 1/1 layers (" in line for line in lines)


def test_declined_layer_can_be_asked_for_its_reason(stock_path):
    with pytest.raises(Declined):
        make_layer(Shape(), inc_config(bits=8))
    assert oracle.declined_because(LAYER_NAME) == "8-bit weights, supported: 4"
    assert oracle.declined_because("model.layers.4.mlp.experts") is None


def test_padding_is_counted(caplog):
    layer = make_layer(Shape(), inc_config())
    layer.quant_method.padding_bytes = 3 << 19
    with caplog.at_level(logging.INFO):
        Checkpoint(Shape()).load_into(layer)
    assert "HybridW4A16 MoE: 1.5 MiB of padded rows" in caplog.text


def test_summary_of_a_second_model_in_the_same_process(caplog):
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            Checkpoint(Shape()).load_into(make_layer(Shape(), inc_config()))
        assert "HybridW4A16 MoE: 1/1 layers" in caplog.text


def test_the_tuning_table_in_use_is_logged_once(caplog, tmp_path, monkeypatch):
    """As on a GPU, where each layer's experts look their shape up."""
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path))
    tuning.forget()
    tuned = tuning.MoEShape(128, 8, 2048, 768, 128, "bf16")
    entry = {"compute_units": 40, "kernel_version": tuning.KERNEL_VERSION}
    entry |= {"prefill_from": 24, "decode": [], "rows": []}
    path = tuning.write_owner_entry("gfx1151", tuning.shape_fields(tuned) | entry)
    layer = make_layer(Shape(), inc_config())
    for shape in (tuned, dataclasses.replace(tuned, hidden=8192), tuned):
        tuning.lookup("gfx1151", 40, shape)
    with caplog.at_level(logging.INFO):
        Checkpoint(Shape()).load_into(layer)
    tuning.forget()
    (line,) = (r.message for r in caplog.records if "tuning of" in r.message)
    by_rule = 1 if DEVICE == "cpu" else 2  # the layer's own shape
    assert line == (
        f"HybridW4A16 MoE: tuning of {1 + by_rule} shapes: 1 from {path}; "
        f"{by_rule} by rule, "
        "`vllm-hybrid-w4a16 tune` measures"
    )
