# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""MoE layers with a shared expert, as vLLM builds them: which run in our launches."""

import logging
import re

import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    MAX_TOKENS,
    FusingSharedExperts,
)
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP
from vllm.utils.torch_utils import set_default_torch_dtype

from ..support.moe_layers import (
    DEVICE,
    Checkpoint,
    Shape,
    become_the_only_rank,
    fresh_gate_records,
    quant_config,
    ready_workspace,
    relative_error,
)

SHAPE = Shape(8, 2, 256, 128, 64)
INTER = 72  # of the shared expert
FORMAT = "auto_round:auto_gptq"


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    become_the_only_rank(tmp_path)
    ready_workspace()


class Scaled(Qwen2MoeMLP):
    """As the other shared experts, but for a factor that no attribute shows."""

    def forward(self, x):
        return 2 * super().forward(x)


class Calls:
    """Counts the forward passes of a module."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


def make_runner(shared=Qwen2MoeMLP, gated=True, change=None, shared_quantized=False):
    """A layer with loaded weights, and its configuration.

    change: called with the shared expert before the layer is built.
    """
    config = VllmConfig()
    quantization = quant_config(FORMAT, SHAPE.group_size)
    options = {
        "quant_config": quantization if shared_quantized else None,
        "reduce_results": False,
        "prefix": "model.layers.3.mlp.shared_expert",
    }
    with (
        set_current_vllm_config(config),
        torch.device(DEVICE),
        set_default_torch_dtype(torch.bfloat16),
    ):
        if gated:
            options["expert_gate"] = ReplicatedLinear(
                SHAPE.hidden, 1, bias=False, prefix="model.layers.3.mlp.gate"
            )
        inter = SHAPE.intermediate if shared_quantized else INTER
        module = shared(SHAPE.hidden, inter, "silu", **options)
        if change is not None:
            change(module)
        runner = FusedMoEFactory(
            num_experts=SHAPE.experts,
            top_k=SHAPE.top_k,
            hidden_size=SHAPE.hidden,
            intermediate_size=SHAPE.intermediate,
            params_dtype=torch.bfloat16,
            renormalize=True,
            quant_config=quantization,
            prefix="model.layers.3.mlp.experts",
            shared_experts=module,
        )
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            if name.endswith(".weight"):
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        for linear in module.modules():  # before the experts, as the loader does
            method = getattr(linear, "quant_method", None)
            if method is not None and not shared_quantized:
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
    ("shared", "gated"),
    [(Qwen2MoeMLP, True), (DeepseekV2MLP, False)],
    ids=["Qwen2-MoE, gate", "DeepSeek, no gate"],
)
def test_few_tokens_run_in_our_launches(shared, gated):
    runner, config = make_runner(shared, gated)
    ours = runner.shared_experts
    assert isinstance(ours, FusingSharedExperts) and ours.fused_up_to == MAX_TOKENS
    calls = Calls(ours.module)
    for tokens in (1, 3, MAX_TOKENS, MAX_TOKENS + 1, 40):
        before = calls.count
        got = forward(runner, config, tokens)
        assert calls.count - before == (tokens > MAX_TOKENS)
        ours.fused_up_to = 0  # vLLM's way
        expected = forward(runner, config, tokens)
        ours.fused_up_to = MAX_TOKENS
        assert relative_error(got, expected) < 6e-3
        assert torch.equal(got, forward(runner, config, tokens))
    shared_part = forward(ours.module, config, 3, lambda x, _: ours.module(x))
    assert shared_part.norm() > 0.1 * got.norm(), "the shared expert hardly counts"


def test_one_compiled_graph_serves_any_number_of_tokens():
    runner, config = make_runner()
    ours = runner.shared_experts
    calls = Calls(ours.module)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(runner.forward, backend=backend, dynamic=True)
    for tokens in (2, 3, MAX_TOKENS + 1, 40):
        before = calls.count
        got = forward(runner, config, tokens, compiled)
        assert calls.count - before == (tokens > MAX_TOKENS)
        assert relative_error(got, forward(runner, config, tokens)) < 6e-3
    assert len(graphs) == 1


def with_gelu(module):
    module.act_fn = GeluAndMul()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared": Scaled}, "Scaled computes another function"),
        ({"change": with_gelu}, r"its form is unknown \(Qwen2MoeMLP\)"),
        ({"shared_quantized": True}, "its weights are quantized"),
    ],
    ids=["another function", "gelu", "int4"],
)
def test_others_are_left_to_vllm(options, reason, monkeypatch, caplog):
    fresh_gate_records(monkeypatch)
    with caplog.at_level(logging.INFO):
        runner, config = make_runner(**options)
    (line,) = [r.message for r in caplog.records if "shared experts" in r.message]
    assert line.startswith("HybridW4A16 MoE: shared experts stay with vLLM: ")
    assert re.search(reason, line)
    ours = runner.shared_experts
    assert not isinstance(ours, FusingSharedExperts) or ours.fused_up_to == 0


def test_batch_invariant_mode_is_left_to_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    runner, _ = make_runner()
    assert not isinstance(runner.shared_experts, FusingSharedExperts)


def test_odd_sizes_are_left_to_vllm(monkeypatch):
    """The ops read 8 weights at a time."""
    monkeypatch.setattr(f"{__name__}.INTER", 76)
    runner, config = make_runner()
    assert runner.shared_experts.fused_up_to == 0
    assert forward(runner, config, 2).isfinite().all()
