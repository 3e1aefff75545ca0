# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""MoE layers whose runner holds the gate: which route tokens in one launch."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_router import (
    MAX_TOKENS,
    FusedRouter,
)
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.plugins.hybrid_w4a16.explain import explain

from ..support.matrix import MAX_TIE
from ..support.moe_layers import (
    DEVICE,
    Checkpoint,
    become_the_only_rank,
    fresh_gate_records,
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
from ..support.tiny_models import Recipe, make_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]
STAND_INS = CHECKOUT / "tests/support/stand_ins"


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    become_the_only_rank(tmp_path)


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch):
    monkeypatch.setattr(hybrid_w4a16_router, "ON_CPU", True)


def make_runner(gate=GateLinear, gate_options=None, held=True, **options):
    """A layer with loaded weights, its gate, and its configuration.

    held: whether the runner holds the gate. options: of the factory.
    """
    config = VllmConfig()
    with building(config):
        made = gate(
            SHAPE.hidden,
            SHAPE.experts,
            prefix=f"{NAME}.gate",
            **({"bias": False} | (gate_options or {})),
        )
        runner = make_experts(
            gate=made if held else None, **({"renormalize": True} | options)
        )
        torch.manual_seed(0)
        made.weight.data.normal_(std=2 * SHAPE.hidden**-0.5)
        made.quant_method.process_weights_after_loading(made)
        Checkpoint(SHAPE, format=FORMAT).load_into(runner.routed_experts)
    return runner, made, config


def fused(runner):
    return runner.routed_experts.quant_method.fused_router


def forward(runner, config, tokens, function=None):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, SHAPE.hidden, generator=generator, device="cpu")
    x = x.bfloat16().to(DEVICE)
    with set_forward_context(None, config), torch.inference_mode():
        return (function or runner)(x, x).cpu()


@pytest.mark.parametrize(
    ("gate", "options"),
    [
        (GateLinear, {}),
        (ReplicatedLinear, {}),
        (GateLinear, {"params_dtype": torch.float32, "out_dtype": torch.float32}),
        (GateLinear, {"out_dtype": torch.float32}),
    ],
    ids=["bf16", "linear", "fp32", "fp32 logits"],
)
@pytest.mark.parametrize("renormalize", [True, False], ids=["norm", "raw"])
def test_few_tokens_are_routed_in_one_launch(gate, options, renormalize):
    runner, made, config = make_runner(gate, options, renormalize=renormalize)
    router = fused(runner)
    assert router.fused_up_to == MAX_TOKENS
    calls = Calls(made)
    for tokens in (1, 3, MAX_TOKENS, MAX_TOKENS + 1, 40):
        before = calls.count
        got = forward(runner, config, tokens)
        assert calls.count - before == (tokens > MAX_TOKENS)
        router.fused_up_to = 0  # vLLM's way
        expected = forward(runner, config, tokens)
        router.fused_up_to = MAX_TOKENS
        # vLLM's router for the CPU rounds weights to bf16
        assert relative_error(got, expected) < 8e-3
        assert torch.equal(got, forward(runner, config, tokens))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's runner is one opaque op")
def test_one_compiled_graph_serves_any_number_of_tokens():
    runner, made, config = make_runner()
    check_one_graph(
        runner,
        lambda tokens, function: forward(runner, config, tokens, function),
        Calls(made),
        MAX_TOKENS,
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_correction_bias_scale_and_capture(scoring):
    """What vLLM's router on GPUs has beyond the CPU's, with the rest of its steps."""
    _, gate, config = make_runner()
    bias = torch.linspace(1, -1, SHAPE.experts).to(DEVICE)
    router = FusedTopKBiasRouter(
        3, SHAPE.experts, bias, True, 2.5, scoring_func=scoring
    )
    runner = SimpleNamespace(
        layer_name=NAME,
        gate=gate,
        router=router,
        moe_config=SimpleNamespace(in_dtype=torch.bfloat16),
        register_buffer=lambda name, t, persistent: setattr(runner, name, t),
    )
    FusedRouter(runner).prepare(SimpleNamespace(cu_count=40))
    captured = []
    router.set_capture_fn(captured.append)
    x = torch.randn(5, SHAPE.hidden).bfloat16().to(DEVICE)
    with set_forward_context(None, config), torch.inference_mode():
        placeholder, _ = runner.gate(x)
        weights, ids = router.select_experts(x, placeholder, torch.int64)
        logits = gate(x)[0].float().cpu()
    assert isinstance(router, BaseRouter) and ids.dtype == torch.int64
    assert torch.equal(captured[0].cpu(), ids.cpu().int())
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    order = (scores + bias.cpu()).topk(3).indices
    assert torch.equal(ids.cpu(), order)
    expected = scores.gather(1, order)
    expected *= 2.5 / expected.sum(1, keepdim=True)
    torch.testing.assert_close(weights.cpu(), expected, rtol=0.02, atol=0)


def test_weights_that_are_loaded_again():
    runner, made, config = make_runner()
    before = forward(runner, config, 2)
    made.weight.data.copy_(made.weight.flip(0))
    counter = runner.router_arrived.fill_(7)
    del runner.router_arrived  # as vLLM does before it reloads weights
    fused(runner).prepare(None)
    assert runner.router_arrived is counter and counter.item() == 0
    after = forward(runner, config, 2)
    fused(runner).fused_up_to = 0
    assert relative_error(after, forward(runner, config, 2)) < 8e-3
    assert relative_error(after, before) > 0.1


def custom(**arguments):
    return torch.topk(arguments["gating_output"].float(), arguments["topk"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"held": False}, "the model applies the gate outside of vLLM's MoE runner"),
        ({"gate_options": {"bias": True}}, "the gate has a bias"),
        (
            {"custom_routing_function": custom},
            "(they are a function of the model|form is unknown .CustomRoutingRouter)",
        ),
        (
            {
                "use_grouped_topk": True,
                "num_expert_group": 4,
                "topk_group": 2,
            },
            "they select groups of experts",
        ),
    ],
    ids=["outside", "bias", "custom", "groups"],
)
def test_others_are_left_to_vllm(options, reason, monkeypatch, caplog):
    fresh_gate_records(monkeypatch)
    with caplog.at_level(logging.INFO):
        runner, _, config = make_runner(**options)
    (line,) = {m for m in caplog.messages if "1/1 layers" in m}
    pattern = rf", 0 declined; left to vLLM: router \(.*{reason}.*\)$"
    assert re.search(pattern, line), line
    assert "router fused" not in line
    assert fused(runner) is None


def test_batch_invariant_mode_is_left_to_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert fused(make_runner()[0]) is None


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_log_says_what_routes(on_cpu, monkeypatch, caplog):
    """On the CPU the router is off by default."""
    fresh_gate_records(monkeypatch)
    monkeypatch.setattr(hybrid_w4a16_router, "ON_CPU", on_cpu)
    with caplog.at_level(logging.INFO):
        runner, _, _ = make_runner()
    (line,) = {m for m in caplog.messages if "1/1 layers" in m}
    if on_cpu or DEVICE != "cpu":
        assert ", router fused up to 8 tokens, prefill: " in line
        assert line.endswith("0 declined")
    else:
        assert fused(runner) is None
        assert line.endswith(
            "left to vLLM: router (on the CPU results would differ from stock vLLM's)"
        )


def test_a_gate_of_odd_size_is_left_to_vllm(monkeypatch):
    """The op reads 8 weights at a time."""
    runner, made, config = make_runner()
    router, weight = fused(runner), made.weight
    router.fused_up_to = 0
    made.weight = torch.nn.Parameter(weight[:, :252].contiguous(), requires_grad=False)
    router.prepare(None)
    assert router.fused_up_to == 0
    made.weight = weight
    assert forward(runner, config, 2).isfinite().all()


@pytest.mark.nightly
@pytest.mark.skipif(DEVICE != "cpu", reason="compares with vLLM's router for the CPU")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", ["qwen3_moe", "qwen3_5_moe"])
def test_tokens_of_a_model(model, eager, tmp_path, monkeypatch):
    """The same greedy tokens with vLLM's router and with the fused one, but for ties.

    vLLM's router for the CPU rounds its weights to 16 bits. ``explain`` counts as the
    log does.
    """
    dtype = "bfloat16" if model == "qwen3_5_moe" else "float16"
    checkpoint = make_checkpoint(Recipe(model, "auto_round:auto_gptq"), tmp_path)
    arguments = {"enforce_eager": eager, "dtype": dtype}
    if model == "qwen3_5_moe":  # there is no tokenizer to place images
        arguments["language_model_only"] = True
    environment = os.environ | {"VLLM_HYBRID_W4A16_MOE": "require"}
    if importlib.util.find_spec("torchvision") is None:
        environment["PYTHONPATH"] = str(STAND_INS)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.router_worker", checkpoint]
        + [json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=CHECKOUT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith('{"vllm"')]
    tokens = json.loads(line)
    for fused_answer, answer in zip(tokens["fused"], tokens["vllm"], strict=True):
        for (mine, _), (other, likely) in zip(fused_answer, answer, strict=True):
            if mine != other:  # a tie, after which the texts differ
                assert likely[str(other)] - likely[str(mine)] <= MAX_TIE[dtype]
                break
    said = done.stdout + done.stderr
    assert said.count("router fused") == 1, "the summary of one of two engines"
    assert said.count("left to vLLM: router (on the CPU results") == 1
    monkeypatch.setattr(sys, "path", [*sys.path, str(STAND_INS)])
    report = explain(str(checkpoint), device="cpu")
    assert (report["routers"]["layers"], report["routers"]["fused"]) == (2, 2)
    shared = report["shared_experts"]["fused"]
    assert shared == (2 if model == "qwen3_5_moe" else 0)
    assert said.count("shared expert fused") == shared  # the summaries of two engines
