# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""MoE layers with a shared expert, as vLLM builds them: which run in our launches."""

import dataclasses
import logging
import re
import types

import numpy as np
import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_shared_expert
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    MAX_TOKENS,
    FusingSharedExperts,
)
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    DEVICE,
    Checkpoint,
    become_the_only_rank,
    fresh_gate_records,
    inc_config,
    quant_config,
    ready_workspace,
    relative_error,
)
from ..support.moe_runners import (
    FORMAT,
    NAME,
    SHAPE,
    Calls,
    building,
    check_one_graph,
    make_experts,
)

INTER = 72  # of the shared expert


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    become_the_only_rank(tmp_path)
    ready_workspace()


class Scaled(Qwen2MoeMLP):
    """As the other shared experts, but for a factor that no attribute shows."""

    def forward(self, x):
        return 2 * super().forward(x)


@dataclasses.dataclass(frozen=True)
class Int4:
    """A shared expert that the checkpoint has in int4."""

    format: str
    group_size: int
    symmetric: bool = True

    def config(self):
        return quant_config(self.format, self.group_size, self.symmetric)

    def load(self, module):
        rng = np.random.default_rng(1)
        for linear, shards in ((module.gate_up_proj, (0, 1)), (module.down_proj, ())):
            n = linear.output_size // (len(shards) or 1)
            for shard in shards or (None,):
                tensors = FORMATS[self.format].random_linear(
                    rng, n, linear.input_size, self.group_size, self.symmetric
                )
                for suffix, array in tensors.items():
                    parameter = getattr(linear, suffix)
                    where = () if shard is None else (shard,)
                    parameter.weight_loader(parameter, torch.from_numpy(array), *where)


@dataclasses.dataclass(frozen=True)
class AtLoad:
    """A shared expert in 16 bits that is quantized at load."""

    scheme: str

    def config(self):
        keep = {".*shared_expert.*": {"bits": 16, "data_type": "fp"}}
        config = inc_config(SHAPE.group_size, extra_config=keep)
        config.packed_modules_mapping = {}
        config.online_quantization_config = OnlineQuantizationConfig(
            QuantizationConfigArgs(targets={"*shared_expert*": self.scheme})
        )
        return config

    def load(self, module):
        for linear, shards in ((module.gate_up_proj, (0, 1)), (module.down_proj, ())):
            n = linear.output_size // (len(shards) or 1)
            for shard in shards or (None,):
                weight = torch.randn(n, linear.input_size) * linear.input_size**-0.5
                where = () if shard is None else (shard,)
                linear.weight.weight_loader(linear.weight, weight.to(DEVICE), *where)


def make_runner(
    shared=Qwen2MoeMLP, gated=True, change=None, quantized=None, inter=INTER
):
    """A layer with loaded weights, and its configuration.

    change: called with the shared expert before the layer is built. quantized:
    ``Int4``, ``AtLoad`` or, for 16 bits, ``None``. inter: size of the shared expert.
    """
    config = VllmConfig()
    object.__setattr__(
        config, "model_config", types.SimpleNamespace(dtype=torch.bfloat16)
    )
    options = {
        "quant_config": None if quantized is None else quantized.config(),
        "reduce_results": False,
        "prefix": f"{NAME}.shared_expert",
    }
    with building(config):
        if gated:
            options["expert_gate"] = ReplicatedLinear(
                SHAPE.hidden, 1, bias=False, prefix=f"{NAME}.gate"
            )
        module = shared(SHAPE.hidden, inter, "silu", **options)
        if change is not None:
            change(module)
        runner = make_experts(renormalize=True, shared_experts=module)
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            if name.endswith(".weight") and not parameter.is_meta:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        if quantized is not None:
            quantized.load(module)
        for linear in module.modules():  # before the experts, as the loader does
            method = getattr(linear, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(linear)
    with set_current_vllm_config(config):
        Checkpoint(SHAPE, format=FORMAT).load_into(runner.routed_experts)
    return runner, config


def forward(runner, config, tokens, function=None):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, SHAPE.hidden, generator=generator).to(torch.bfloat16)
    logits = torch.randn(tokens, SHAPE.experts, generator=generator)
    x, logits = x.to(DEVICE), logits.to(DEVICE, torch.bfloat16)
    with set_forward_context(None, config), torch.inference_mode():
        return (function or runner)(x, logits).cpu()


@pytest.mark.parametrize(
    ("shared", "gated", "options", "dtypes"),
    [
        (Qwen2MoeMLP, True, {}, {torch.bfloat16}),
        (DeepseekV2MLP, False, {}, {torch.bfloat16}),
        (
            Qwen2MoeMLP,
            True,
            {"quantized": Int4("auto_round:auto_gptq", 32), "inter": 96},
            {torch.int32},
        ),
        (
            DeepseekV2MLP,
            False,
            {"quantized": Int4("compressed-tensors", 128, False), "inter": 256},
            {torch.int32},
        ),
        (
            Qwen2MoeMLP,
            True,
            {"quantized": AtLoad("int8_g32"), "inter": 96},
            {torch.uint8},
        ),
        (
            Qwen2MoeMLP,
            True,
            {"quantized": AtLoad("int4_g32"), "inter": 96},
            {torch.int32},
        ),
    ],
    ids=["16 bits", "16 bits, no gate", "AutoRound", "zero points", "int8", "int4"],
)
def test_few_tokens_run_in_our_launches(shared, gated, options, dtypes):
    runner, config = make_runner(shared, gated, **options)
    ours = runner.shared_experts
    linears = ours.module.gate_up_proj, ours.module.down_proj
    if "quantized" in options:
        assert {ops.dense_parameters(linear)[0].dtype for linear in linears} == dtypes
    else:
        assert {linear.weight.dtype for linear in linears} == dtypes
    assert isinstance(ours, FusingSharedExperts) and ours.fused_up_to == MAX_TOKENS
    calls = Calls(ours.module)
    for tokens in (1, 3, MAX_TOKENS, MAX_TOKENS + 1, 40):
        before = calls.count
        got = forward(runner, config, tokens)
        assert calls.count - before == (tokens > MAX_TOKENS)
        ours.fused_up_to = 0  # vLLM's way
        expected = forward(runner, config, tokens)
        ours.fused_up_to = MAX_TOKENS
        assert relative_error(got, expected) < 8e-3
        assert torch.equal(got, forward(runner, config, tokens))
    shared_part = forward(ours.module, config, 3, lambda x, _: ours.module(x))
    assert shared_part.norm() > 0.1 * got.norm(), "the shared expert hardly counts"


def test_one_compiled_graph_serves_any_number_of_tokens():
    runner, config = make_runner()
    ours = runner.shared_experts
    check_one_graph(
        runner,
        lambda tokens, function: forward(runner, config, tokens, function),
        Calls(ours.module),
        MAX_TOKENS,
    )


def with_gelu(module):
    module.act_fn = GeluAndMul()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared": Scaled}, "Scaled computes another function"),
        ({"change": with_gelu}, r"its form is unknown \(Qwen2MoeMLP\)"),
        (
            {"quantized": Int4("auto_round:auto_gptq", 32), "inter": 96},
            r"its weights are quantized \(INCLinearMethod\)",
        ),
    ],
    ids=["another function", "gelu", "int4 on vLLM's kernel"],
)
def test_others_are_left_to_vllm(options, reason, monkeypatch, caplog):
    fresh_gate_records(monkeypatch)
    monkeypatch.setenv("VLLM_HYBRID_W4A16_LINEAR", "0")
    with caplog.at_level(logging.INFO):
        runner, config = make_runner(**options)
    (line,) = {m for m in caplog.messages if "1/1 layers" in m}
    assert re.search(rf"0 declined; left to vLLM: .*shared expert \({reason}\)", line)
    assert "shared expert fused" not in line
    ours = runner.shared_experts
    assert not isinstance(ours, FusingSharedExperts) or ours.fused_up_to == 0


def test_batch_invariant_mode_is_left_to_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    runner, _ = make_runner()
    assert not isinstance(runner.shared_experts, FusingSharedExperts)


def test_odd_sizes_are_left_to_vllm():
    """The ops read 8 weights at a time."""
    runner, config = make_runner(inter=76)
    assert runner.shared_experts.fused_up_to == 0
    assert forward(runner, config, 2).isfinite().all()


@pytest.mark.parametrize(("most_bytes", "tokens"), [(1 << 30, MAX_TOKENS), (1000, 2)])
def test_the_tuning_table_limits_large_weights(most_bytes, tokens, monkeypatch, caplog):
    fresh_gate_records(monkeypatch)
    entry = {"bytes": most_bytes, "tokens": 2}
    family = DeviceFamily("x", "x", "x", 1, tuning="x")
    module = hybrid_w4a16_shared_expert
    monkeypatch.setattr(module, "device_family", lambda: family)
    monkeypatch.setattr(module, "table", lambda name: {"shared_expert": entry})
    with caplog.at_level(logging.INFO):
        runner, _ = make_runner()
    assert runner.shared_experts.fused_up_to == tokens
    (line,) = {m for m in caplog.messages if "1/1 layers" in m}
    assert f", shared expert fused bfloat16 up to {tokens} tokens, prefill: " in line


def test_no_tokens_are_taken_over_where_the_limit_is_0(monkeypatch):
    """As an experiment sets it before weights are loaded."""
    monkeypatch.setattr(hybrid_w4a16_shared_expert, "MAX_TOKENS", 0)
    runner, config = make_runner()
    calls = Calls(runner.shared_experts.module)
    assert forward(runner, config, 1).isfinite().all() and calls.count == 1


@pytest.mark.parametrize("fused_up_to", [MAX_TOKENS, 0])
def test_calls_with_a_shared_expert_have_plans_of_their_own(fused_up_to, monkeypatch):
    runner, config = make_runner()
    runner.shared_experts.fused_up_to = fused_up_to
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    plans = {False: ((1, 2, 0, 0), (1, 3, 1, 0)), True: ((0, 4, 0, 0), None)}
    for name, pair in (("tuned", plans[False]), ("tuned_with_shared", plans[True])):
        tuned = types.SimpleNamespace(decode_plans=lambda tokens, pair=pair: pair)
        monkeypatch.setattr(experts, name, tuned)
    seen = []
    for name in ("gate_up", "down"):
        op = getattr(ops, f"fused_moe_wvSplitK_int4_{name}")

        def recording(*args, op=op, plan=None, **kwargs):
            seen.append(plan)
            return op(*args, **kwargs)  # the CPU's takes no plan

        monkeypatch.setattr(ops, f"fused_moe_wvSplitK_int4_{name}", recording)
    forward(runner, config, 3)
    assert seen == list(plans[fused_up_to > 0])


def test_the_plans_are_looked_up_by_the_size_of_the_shared_expert(monkeypatch):
    runner, _ = make_runner()
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    assert experts.tuned_with_shared is None  # a CPU has no plans
    monkeypatch.setenv("VLLM_CONFIG_ROOT", "/nowhere")
    shape = tuning.MoEShape(8, 2, 256, 128, 64, "bf16")
    monkeypatch.setattr(experts, "tuned", tuning.lookup("sm_90", 132, shape))
    runner.shared_experts.prepare(experts)
    assert experts.tuned_with_shared.shape == dataclasses.replace(shape, shared=INTER)
