# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``explain``: byte counts match files and loaded layers, verdicts the decision."""

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_device,
    hybrid_w4a16_router,
    hybrid_w4a16_shared_expert,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.models import ModelRegistry
from vllm.plugins.hybrid_w4a16 import cli, explain_checkpoint, explain_runners
from vllm.plugins.hybrid_w4a16.explain import as_text, explain
from vllm.plugins.hybrid_w4a16.explain_checkpoint import CheckpointError
from vllm.plugins.hybrid_w4a16.hooks import apply_hooks

from ..support import tiny_models
from ..support.int4_formats import FORMATS
from ..support.moe_layers import LAYER_NAME, Checkpoint, Shape, make_layer, quant_config
from ..support.mtp_checkpoints import make_mtp_checkpoint
from ..support.qwen35_checkpoints import (
    TINY_TEXT,
    TINY_VISION,
    make_checkpoint,
    tiny_tensors,
    write_sparse,
)

CHECKOUT = Path(__file__).resolve().parents[2]
BUNDLED = CHECKOUT / "demo/int4-autoround-g128"
STAND_INS = CHECKOUT / "tests/support/stand_ins"


@pytest.fixture(autouse=True)
def default_switch(monkeypatch):
    monkeypatch.delenv(switch.NAME, raising=False)


@pytest.fixture(autouse=True)
def vision_models_can_be_imported(monkeypatch):
    """With a stand-in where torchvision is not installed.

    vLLM imports a model that it has not seen before in a process of its own.
    """
    monkeypatch.setattr(sys, "path", [*sys.path, str(STAND_INS)])
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(STAND_INS)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def tiny(tmp_path):
    return make_checkpoint(tmp_path / "tiny", TINY_TEXT, TINY_VISION, 3_000_000)


def parts(report, key="token_bytes"):
    return {part["name"]: part[key] for part in report["parts"]}


def only_group(report):
    (group,) = report["expert_layers"]
    return group


def change_config(folder, **changes):
    """Set entries of config.json; ``text_config__x`` sets x in nested text_config."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        entry = config
        for step in path:
            entry = entry[step]
        entry[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_full_size_qwen35_checkpoint(tmp_path):
    folder = make_checkpoint(tmp_path / "35b")
    report = explain(str(folder), device="gfx1151")
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert on_disk > 20e9
    stored = sum(parts(report, "stored_bytes").values())
    assert report["file_bytes"] == pytest.approx(on_disk, rel=1e-3)
    assert stored == pytest.approx(on_disk, rel=1e-3)

    group = only_group(report)
    assert group["index"] == list(range(40))
    assert (group["num_experts"], group["top_k"]) == (256, 8)
    assert (group["hidden"], group["intermediate"]) == (2048, 512)
    assert (group["bits"], group["group_size"]) == (4, 128)
    assert (group["hybrid"], group["reason"]) == (True, None)
    assert (report["hybrid_layers"], report["declined_layers"]) == (40, 0)
    assert report["device"]["decode"] == "HIP wvSplitK"

    # computed by hand from the model's published sizes
    expert = 3 * 2048 * 512
    loaded = expert // 2 + expert // 128 * 2  # nibbles and 16-bit scales
    linear = 2048 * (8192 + 4096 + 32 + 32 + 4096) + 8192 * 4  # qkv, z, b, a, out, conv
    full = 2048 * (8192 + 512 + 512 + 4096)  # q with its gate, k, v, o
    moved = parts(report)
    assert moved["routed experts"] == 40 * 8 * loaded
    assert moved["shared experts"] == 40 * (expert + 2048) * 2
    assert moved["router"] == 40 * 256 * 2048 * 2
    assert moved["lm_head"] == 248320 * 2048 * 2
    assert moved["attention"] == pytest.approx((30 * linear + 10 * full) * 2, rel=1e-4)
    assert moved["KV cache, 164 tokens"] == 10 * 164 * 2 * 2 * 256 * 2
    state = 32 * 128 * 128 * 4 + 3 * 8192 * 2  # recurrent in fp32, convolution
    assert moved["linear attention state"] == 30 * 2 * state
    assert moved["vision and audio"] == moved["draft layers (MTP)"] == 0
    assert group["stored_bytes"] == 40 * 256 * (loaded + expert // 128 // 2)

    assert report["token_bytes"] == pytest.approx(sum(moved.values()))
    rate = report["roofline_tokens_per_s"]
    assert rate == pytest.approx(212e9 / report["token_bytes"])


def test_int4_shared_experts(tmp_path, monkeypatch):
    """They run in the experts' launches where our kernel takes their linears."""
    folder = make_checkpoint(
        tmp_path / "35b",
        int4_attention=True,
        int4_shared=True,
        text={"num_hidden_layers": 4},
    )
    report = explain(str(folder), device="gfx1151")
    shared = report["shared_experts"]
    assert (shared["layers"], shared["fused"]) == (4, 0)
    assert shared["reason"].startswith(
        "quantized, not compared with vLLM's RDNA kernel"
    )
    monkeypatch.setenv(switch.LINEAR_NAME, "1")
    report = explain(str(folder), device="gfx1151")
    assert report["shared_experts"] == {"layers": 4, "fused": 4, "reason": None}
    assert report["launches"] == {
        "routed experts": 8,
        "router": 4,
        "shared experts": 0,
        "attention": 3 * 2 + 2,  # two linears of a GDN layer share a launch
    }
    monkeypatch.setattr(
        hybrid_w4a16_shared_expert, "_misfit_of_module", lambda module: "of the moon"
    )
    report = explain(str(folder), device="gfx1151")
    assert report["shared_experts"] == {
        "layers": 4,
        "fused": 0,
        "reason": "of the moon",
    }
    assert report["launches"]["shared experts"] == 2 * 4  # gate_up and down
    assert sum(g["layers"] for g in report["linears"]) == 3 * 3 + 2 + 2 * 4


def test_published_qwen35_checkpoint(tmp_path, monkeypatch):
    """Intel/Qwen3.5-35B-A3B-int4-AutoRound: int4 attention, bf16 shared experts."""
    folder = make_checkpoint(tmp_path / "35b", int4_attention=True)
    report = explain(str(folder), device="gfx1151")
    megabytes = {name: count / 1e6 for name, count in parts(report).items()}
    for name, expected in {
        "lm_head": 1017,
        "routed experts": 519,
        "attention": 521 + 141,  # GDN and full attention
        "shared experts": 252,
        "linear attention state": 126,
        "router": 42,
    }.items():
        assert megabytes[name] == pytest.approx(expected, abs=3), name
    assert report["token_bytes"] / 1e6 == pytest.approx(2622, rel=2e-3)
    linears = {
        (g["name"], g["outputs"], g["inputs"]): g["layers"] for g in report["linears"]
    }
    assert linears == {
        ("in_proj_qkvz", 12288, 2048): 30,
        ("in_proj_ba", 64, 2048): 30,
        ("out_proj", 2048, 4096): 30,
        ("qkv_proj", 9216, 2048): 10,
        ("o_proj", 2048, 4096): 10,
    }
    ours = {"routed experts": 80, "router": 40, "shared experts": 0}
    assert report["launches"] == ours
    monkeypatch.setenv(switch.LINEAR_NAME, "1")
    report = explain(str(folder), device="gfx1151")
    assert report["launches"] == ours | {"attention": 80}
    text = as_text(report)
    assert "launches    200 per token by this project; not counted: vLLM's" in text
    assert report["shared_experts"] == {"layers": 40, "fused": 40, "reason": None}
    assert "shared experts: 40 of 40 fused into the routed experts' launches" in text
    assert report["routers"] == report["shared_experts"] | {"most_tokens": 8}
    assert "routers: 40 of 40 fused with their top-k, up to 8 tokens" in text
    columns = {
        re.split(r"  +", line)[0]: re.split(r"  +", line)[-2:]
        for line in text.splitlines()
    }
    assert columns["routed experts"] == ["80", "2"]
    assert columns["router"] == ["40", "1"]
    assert columns["shared experts"] == ["0", "0"]
    assert columns["attention"] == ["80", "2"]  # one more linear shares a launch
    assert columns["lm_head"] == ["-", "-"]
    assert columns["total"] == ["200", "-"]
    half = {g["name"]: g for g in explain(str(folder), 2, device="cpu")["linears"]}
    assert (half["qkv_proj"]["outputs"], half["qkv_proj"]["inputs"]) == (4608, 2048)
    assert (half["o_proj"]["outputs"], half["o_proj"]["inputs"]) == (2048, 2048)
    assert report["bandwidth_gbps"] == 212
    assert report["roofline_tokens_per_s"] == pytest.approx(81, abs=0.5)


SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}
OUTSIDE = "the model applies the gate outside of vLLM's MoE runner"
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
# architecture, entries of config.json, and what is in the way of a router's launch
ROUTERS = {
    "Qwen3MoeForCausalLM": ({"num_experts": 8}, None),
    "Glm4MoeForCausalLM": ({"n_routed_experts": 8, "head_dim": 64}, OUTSIDE),
    "MiniMaxM2ForCausalLM": (
        {"num_local_experts": 8, "rotary_dim": 32, "scoring_func": "sigmoid"},
        OUTSIDE,
    ),
    "MixtralForCausalLM": ({"num_local_experts": 8}, OUTSIDE),
    "DeepseekV3ForCausalLM": (
        DEEPSEEK | {"n_group": 4, "topk_group": 2},
        "they select groups of experts",
    ),
    "DeepseekV2ForCausalLM": (
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        None,
    ),
}
MODEL_TYPES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}


def runners_of(config, tp_size=1, device="gfx1151"):
    checkpoint = explain_checkpoint.Checkpoint("made up", config, [], 0)
    family = hybrid_w4a16_device.PLANNED[device]
    return explain_runners.moe_runners(checkpoint, tp_size, family)


@pytest.mark.parametrize("architecture", ROUTERS)
def test_routers_are_those_of_vllms_models(architecture):
    """Built from the config alone, for a device that is not at hand."""
    changes, reason = ROUTERS[architecture]
    config = SIZES | changes
    config |= {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
    }
    for tp_size in (1, 2):
        runners = runners_of(config, tp_size)
        assert isinstance(runners, dict) and len(runners) in (2, 3), runners
        for runner in runners.values():
            assert hybrid_w4a16_router.planned_misfit(runner, False) == reason
            shared = runner.shared_experts
            if shared is not None:
                assert hybrid_w4a16_shared_expert.planned_misfit(runner) is None
                assert shared._layer.down_proj.weight.shape == (256, 128 // tp_size)


def test_routers_of_a_checkpoint(tmp_path, monkeypatch):
    """A dense first layer; the gate is the model's own."""
    recipe = tiny_models.Recipe("glm4_moe", "auto_round:auto_gptq")
    folder = tiny_models.make_checkpoint(recipe, tmp_path)
    report = explain(str(folder), device="gfx1151")
    assert report["routers"] == {
        "layers": 1,
        "fused": 0,
        "reason": OUTSIDE,
        "most_tokens": None,
    }
    assert "router" not in report["launches"]
    assert f"routers: 0 of 1 fused; left to vLLM: {OUTSIDE}" in as_text(report)


def test_routers_are_decided_by_the_code_that_serves(monkeypatch):
    def decline(router):
        return "of the moon"

    report = explain(str(BUNDLED), device="gfx1151")
    assert (report["routers"]["fused"], report["launches"]["router"]) == (6, 6)
    assert explain(str(BUNDLED), device="cpu")["routers"]["reason"].startswith("on the")
    monkeypatch.setattr(hybrid_w4a16_router, "MAX_TOKENS", 5)
    assert explain(str(BUNDLED), device="gfx1151")["routers"]["most_tokens"] == 5
    monkeypatch.setattr(hybrid_w4a16_router, "_misfit_of_router", decline)
    report = explain(str(BUNDLED), device="gfx1151")
    assert report["routers"]["reason"] == "of the moon"
    assert report["launches"] == {"routed experts": 12}


def test_a_model_that_vllm_cannot_build(tiny):
    """Experts and bytes are the checkpoint's; routers and shared experts are not."""
    change_config(tiny, architectures=["NobodysForCausalLM"])
    report = explain(str(tiny), device="gfx1151")
    assert report["launches"] == {"routed experts": 8}
    for kind in ("routers", "shared_experts"):
        assert (report[kind]["layers"], report[kind]["fused"]) == (4, 0)
        assert report[kind]["reason"].startswith("vLLM cannot build the model here: ")
    assert report["model_error"] == report["routers"]["reason"]
    line = f"shared experts and routers: unknown, {report['model_error']}"
    assert line in as_text(report)


def test_the_module_that_a_model_lacks_is_named(tiny, monkeypatch):
    def no_module():
        raise ModuleNotFoundError("No module named 'nothing'")

    name = "Qwen3_5MoeForConditionalGeneration"
    monkeypatch.setitem(
        ModelRegistry.models, name, SimpleNamespace(load_model_cls=no_module)
    )
    error = explain(str(tiny), device="gfx1151")["model_error"]
    assert error == "vLLM cannot build the model here: No module named 'nothing'"


def test_building_a_model_leaves_nothing_behind():
    before = dict(os.environ)
    rotary = dict(_ROPE_DICT)
    ranks = parallel_state._TP
    config = json.loads((BUNDLED / "config.json").read_text())
    assert len(runners_of(config)) == 6
    assert dict(os.environ) == before and rotary == _ROPE_DICT
    assert parallel_state._TP is ranks


# vLLM's GPTQ rejects checkpoints with zero points.
@pytest.mark.parametrize(
    ("format", "symmetric"),
    [
        (format, symmetric)
        for format in FORMATS
        for symmetric in (True, False)
        if symmetric or not format.startswith("gptq")
    ],
)
def test_loaded_bytes_are_those_of_the_loaded_layer(format, symmetric, tmp_path):
    shape = Shape()
    checkpoint = Checkpoint(shape, symmetric, format=format)
    tensors = {f"{LAYER_NAME}.{name}": t for name, t in checkpoint.tensors()}
    tensors["model.embed_tokens.weight"] = torch.zeros(64, 256, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_attention_heads": 4,
        "hidden_act": "silu",
        "vocab_size": 64,
        "torch_dtype": "bfloat16",
        "quantization_config": FORMATS[format].config(64, symmetric, []),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = explain(str(tmp_path))
    group = only_group(report)
    assert (group["bits"], group["group_size"]) == (4, 64)
    assert (group["symmetric"], group["hybrid"]) == (symmetric, True)
    assert report["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size

    apply_hooks()
    layer = make_layer(shape, quant_config(format, 64, symmetric))
    checkpoint.load_into(layer)
    held = sum(p.nbytes for name, p in layer.named_parameters() if name.startswith("w"))
    assert group["loaded_bytes"] == held
    assert parts(report)["routed experts"] == held * shape.top_k / shape.experts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config__bits": 8}, "8-bit weights, supported: 4"),
        ({"quantization_config__group_size": 16}, "group size 16, supported"),
        ({"quantization_config__bits": 9}, "vLLM's auto-round does not take"),
        ({"text_config__hidden_act": "relu2"}, "activation 'relu2'"),
        ({"quantization_config__quant_method": "experts_int8"}, "no hybrid method"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_declined_layers_say_why(tiny, changes, reason):
    change_config(tiny, **changes)
    report = explain(str(tiny))
    assert (report["hybrid_layers"], report["declined_layers"]) == (0, 4)
    assert re.search(reason, only_group(report)["reason"])


def test_verdict_is_the_gates_own(tiny, monkeypatch):
    def decline(layer, bits=None, group_size=None):
        return "of the moon" if ".1." in layer.layer_name else None

    monkeypatch.setattr(oracle, "incompatibility_reason", decline)
    report = explain(str(tiny))
    taken, declined = report["expert_layers"]
    assert (taken["index"], taken["reason"]) == ([0, 2, 3], None)
    assert (declined["index"], declined["reason"]) == ([1], "of the moon")


@pytest.mark.parametrize(
    ("device", "value", "hybrid"),
    [
        ("gfx1151", "auto", True),
        ("cpu", "auto", True),
        ("cuda", "auto", False),
        ("cuda", "1", True),
        ("gfx1151", "0", False),
        ("gfx1151", "require", True),
    ],
)
def test_device_and_switch(tiny, device, value, hybrid, monkeypatch):
    monkeypatch.setenv(switch.NAME, value)
    report = explain(str(tiny), device=device)
    assert only_group(report)["hybrid"] is hybrid
    assert report["device"]["assumed"]


def test_require_reports_declined_layers(tiny, monkeypatch):
    monkeypatch.setenv(switch.NAME, "require")
    change_config(tiny, quantization_config__bits=8)
    assert only_group(explain(str(tiny)))["reason"] == "8-bit weights, supported: 4"


EXPERT_3 = "model.language_model.layers.1.mlp.experts.3"


def retype(tensors, name, shape=None, dtype=None):
    return [
        (n, shape or s, dtype or d) if n == name else (n, s, d) for n, s, d in tensors
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: retype(t, f"{EXPERT_3}.up_proj.qweight", dtype="F32"),
            r"3\.up_proj\.qweight is F32, expected I32",
        ),
        (
            lambda t: retype(t, f"{EXPERT_3}.up_proj.scales", dtype="F64"),
            r"3\.up_proj\.scales is F64, expected F16 or BF16 or F32",
        ),
        (
            lambda t: retype(t, f"{EXPERT_3}.up_proj.qweight", shape=(64, 64)),
            r"3\.up_proj\.qweight has shape \(64, 64\), expected \(32, 128\) \(GPTQ",
        ),
        (
            lambda t: [x for x in t if x[0] != f"{EXPERT_3}.down_proj.qzeros"],
            r"3\.down_proj\.qzeros is not in the checkpoint",
        ),
        (
            lambda t: [*t, (f"{EXPERT_3}3.up_proj.g_idx", (128,), "I32")],
            r"33\.up_proj\.g_idx: the config has 8 experts",
        ),
    ],
    ids=["words", "dtype", "shape", "missing", "too many"],
)
def test_tensors_that_serving_refuses(tmp_path, change, reason, capsys):
    tensors = change(tiny_tensors())
    folder = make_checkpoint(tmp_path / "tiny", TINY_TEXT, TINY_VISION, tensors=tensors)
    report = explain(str(folder), device="gfx1151")
    assert (report["hybrid_layers"], report["refused_layers"]) == (3, 1)
    (refused,) = (group for group in report["expert_layers"] if group["error"])
    assert refused["index"] == [1] and re.search(reason, refused["reason"])
    assert cli.main(["explain", str(folder), "--device=gfx1151"]) == 0
    assert "  error: model.language_model.layers.1." in capsys.readouterr().out


def test_group_size_of_the_config_is_compared_with_the_tensors(tiny):
    change_config(tiny, quantization_config__group_size=32)
    group = explain(str(tiny), device="gfx1151")["expert_layers"][0]
    assert group["error"]
    assert "expected (8, 128) (GPTQ, group size 32)" in group["reason"]


@pytest.mark.parametrize(("value", "error"), [("auto", False), ("1", True)])
def test_tensor_parallel_size_without_a_group_size(tiny, value, error, monkeypatch):
    monkeypatch.setenv(switch.NAME, value)
    group = only_group(explain(str(tiny), tp_size=8, device="gfx1151"))
    assert (group["hybrid"], group["error"]) == (False, error)
    assert "tensor parallel size 8 cuts" in group["reason"]


def test_shards_that_cut_groups(tiny):
    whole = only_group(explain(str(tiny), device="gfx1151"))
    report = explain(str(tiny), tp_size=2, device="gfx1151")
    group = only_group(report)
    assert group["hybrid"] and group["down_group_size"] == 64
    scales = whole["num_experts"] * whole["hidden"] * whole["intermediate"] // 128
    layers = len(whole["index"])
    assert group["loaded_bytes"] - whole["loaded_bytes"] == 2 * scales * layers
    assert "scales of down_proj are repeated for groups of 64" in as_text(report)


def test_tensor_parallel_shares(tiny):
    change_config(tiny, quantization_config__group_size=32)
    whole, half = explain(str(tiny)), explain(str(tiny), tp_size=2)
    one, two = parts(whole), parts(half)
    for name in ("routed experts", "lm_head", "linear attention state"):
        assert two[name] == one[name] / 2
    for name in ("router", "norms and others"):
        assert two[name] == one[name]
    # two key/value heads on four ranks: each rank holds one
    four = parts(explain(str(tiny), tp_size=4))
    assert four["KV cache, 164 tokens"] == one["KV cache, 164 tokens"] / 2
    with pytest.raises(CheckpointError, match="--tp 3 does not divide"):
        explain(str(tiny), tp_size=3)


def test_context_and_bandwidth(tiny):
    short, long = (explain(str(tiny), bandwidth=100, context=n) for n in (10, 1000))
    assert parts(long)["KV cache, 1000 tokens"] == (
        100 * parts(short)["KV cache, 10 tokens"]
    )
    assert long["roofline_tokens_per_s"] == pytest.approx(100e9 / long["token_bytes"])


@pytest.mark.parametrize(
    ("device", "reason"),
    [("gfx1151", "not compared with vLLM's RDNA kernel"), ("cuda", "on cuda it is")],
)
def test_linears_say_why_they_stay_with_vllm(device, reason, monkeypatch):
    monkeypatch.delenv(switch.LINEAR_NAME, raising=False)
    report = explain(str(BUNDLED), device=device)
    for group in report["linears"]:
        assert (group["layers"], group["hybrid"]) == (6, False)
        assert group["reason"].startswith(reason)
        assert f"vLLM's kernel: {group['reason']}" in as_text(report)
    names = sorted(group["name"] for group in report["linears"])
    assert names == ["o_proj", "qkv_proj"]


@pytest.mark.parametrize(("format", "symmetric"), [("awq", False), ("gptq", True)])
def test_linears_of_other_formats(format, symmetric, tmp_path, monkeypatch):
    monkeypatch.setenv(switch.LINEAR_NAME, "1")
    folder = tiny_models.make_checkpoint(
        tiny_models.Recipe("qwen3_moe", format, symmetric, 64, int4_attention=True),
        tmp_path,
    )
    report = explain(str(folder), device="cpu")
    sizes = [(g["name"], g["outputs"], g["inputs"]) for g in report["linears"]]
    assert sorted(sizes) == [("o_proj", 256, 256), ("qkv_proj", 512, 256)]
    assert {g["group_size"] for g in report["linears"]} == {64}
    assert all(g["hybrid"] and g["layers"] == 2 for g in report["linears"])
    change_config(folder, quantization_config__bits=8)
    assert explain(str(folder), device="cpu")["linears"] == []


def test_bundled_checkpoint_reads_its_embedding_as_lm_head(capsys):
    assert cli.main(["explain", str(BUNDLED), "--device=gfx1151"]) == 0
    text = capsys.readouterr().out
    assert "0-5            16, top-4  256 x 256  4     128" in text
    assert "hybrid" in text
    report = explain(str(BUNDLED))
    assert parts(report)["lm_head"] == parts(report, "stored_bytes")["embedding"]
    assert report["file_bytes"] == (BUNDLED / "model.safetensors").stat().st_size


def test_lm_head_options(capsys):
    """Computed by hand: 3072 x 256 weights, tied to the embedding."""
    report = explain(str(BUNDLED), bandwidth=100)
    weights = 3072 * 256
    options = {option["name"]: option for option in report["heads"]}
    assert options["16-bit"] == {
        "name": "16-bit",
        "token_bytes": weights * 2,
        "memory_bytes": 0,
    }
    assert options["int8_g32"]["token_bytes"] == weights * (1 + 2 / 32)
    assert options["int4_rescored"]["token_bytes"] == weights * (0.5 + 2 / 128)
    assert options["int4_rescored"]["memory_bytes"] == weights * (0.5 + 2 / 128)
    assert cli.main(["explain", str(BUNDLED), "--device=gfx1151"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("lm_head as"))
    assert [line.split()[0] for line in lines[at + 1 : at + 6]] == list(options)


def test_16_bit_experts(tiny):
    experts = "model.language_model.layers.3.mlp.experts"
    write_sparse(
        tiny / "model.safetensors",
        [
            (f"{experts}.gate_up_proj", (8, 256, 256), "BF16"),
            (f"{experts}.down_proj", (8, 256, 128), "BF16"),
        ],
    )
    (tiny / "model.safetensors.index.json").unlink()
    for file in tiny.glob("model-*.safetensors"):
        file.unlink()
    recipe = {".*experts.*": {"bits": 16, "data_type": "fp"}}
    change_config(tiny, quantization_config__extra_config=recipe)
    group = only_group(explain(str(tiny)))
    assert group["reason"] == "16-bit weights, not quantized"
    assert group["loaded_bytes"] == 8 * 3 * 256 * 128 * 2
    change_config(tiny, quantization_config=None)
    group = only_group(explain(str(tiny)))
    assert group["reason"] == "16-bit weights, the checkpoint is not quantized"


def broken(tiny, case):
    shard = sorted(tiny.glob("*.safetensors"))[1]
    if case == "truncated":
        os.truncate(shard, shard.stat().st_size - 100)
    elif case == "no safetensors":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif case == "missing":
        shard.unlink()
    elif case == "no config":
        (tiny / "config.json").unlink()
    elif case == "not JSON":
        (tiny / "config.json").write_text("{")
    elif case == "other sizes":
        change_config(tiny, text_config__moe_intermediate_size=192)
    elif case == "no experts entry":
        change_config(tiny, text_config__num_experts=None)
    elif case == "unknown layer type":
        change_config(tiny, text_config__layer_types=["conv"] * 4)
    elif case == "no weights":
        for file in tiny.glob("*.safetensors*"):
            file.unlink()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "its header says .* the download is incomplete"),
        ("no safetensors", "is not a safetensors file"),
        ("missing", "cannot read .*safetensors: No such file"),
        ("no config", "holds no config.json"),
        ("not JSON", "config.json: not valid JSON"),
        ("other sizes", "do not fit 8 experts of 3 x 256 x 192 weights"),
        ("no experts entry", "config.json has none of num_experts"),
        ("unknown layer type", "layer type 'conv'"),
        ("no weights", "holds no safetensors files"),
    ],
)
def test_broken_checkpoints(tiny, case, message, capsys):
    broken(tiny, case)
    with pytest.raises(CheckpointError, match=message):
        explain(str(tiny))
    assert cli.main(["explain", str(tiny)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")


def test_wrong_switch_is_an_error(tiny, monkeypatch, capsys):
    monkeypatch.setenv(switch.NAME, "maybe")
    assert cli.main(["explain", str(tiny)]) == 1
    assert "'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tp=0"], ["--bandwidth=0"], ["--device=tpu"]])
def test_bad_arguments(arguments, tiny):
    with pytest.raises(SystemExit) as exit:
        cli.main(["explain", str(tiny), *arguments])
    assert exit.value.code == 2


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that is needed to read headers."""

    folder: Path
    sent: dict[str, int]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        file = self.folder / self.path.rpartition("/")[2]
        if not self.path.startswith("/some/model/resolve/main/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        first, last = 0, size - 1
        asked = self.headers.get("range")
        if asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            last = min(last, size - 1)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            with file.open("rb") as stream:
                stream.seek(first)
                self.wfile.write(stream.read(last - first + 1))
            sent = self.sent.get(file.name, 0)
            self.sent[file.name] = sent + last - first + 1

    def log_message(self, *args):
        pass


def test_hub_model_by_its_name_reads_headers_only(tmp_path):
    folder = make_checkpoint(tmp_path / "tiny", TINY_TEXT, TINY_VISION)
    weights = folder / "model-00001-of-00001.safetensors"
    Hub.folder, Hub.sent = folder, {}
    torchvision = importlib.util.find_spec("torchvision")
    path = str(STAND_INS) if Path(torchvision.origin).parent == STAND_INS else ""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = subprocess.run(
            [sys.executable, "-m", cli.__name__, "explain", "some/model", "--json"],
            env=os.environ
            | {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_OFFLINE": "0",
                "PYTHONPATH": path,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    assert run.returncode == 0, run.stderr
    local, remote = explain(str(folder)), json.loads(run.stdout)
    for key in ("expert_layers", "parts", "token_bytes", "routers"):
        assert remote[key] == local[key]
    assert 0 < Hub.sent[weights.name] < 250_000 < weights.stat().st_size / 10


def test_unknown_name_is_an_error(capsys):
    assert cli.main(["explain", "nobody/nothing"]) == 1
    assert "there is no folder nobody/nothing" in capsys.readouterr().err
    assert cli.main(["explain", "no such/folder/here"]) == 1
    assert "neither a folder nor the name" in capsys.readouterr().err


def test_dense_model(tmp_path, capsys):
    write_sparse(
        tmp_path / "model.safetensors",
        [
            ("model.embed_tokens.weight", (512, 64), "BF16"),
            ("model.layers.0.mlp.up_proj.weight", (128, 64), "F32"),
        ],
    )
    config = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["explain", str(tmp_path)]) == 0
    assert "no routed experts" in capsys.readouterr().out
    assert parts(explain(str(tmp_path)))["dense MLP"] == 128 * 64 * 2  # loaded as bf16


@pytest.mark.parametrize("int4", [True, False])
def test_mtp_layer_is_counted(tmp_path, int4):
    """It is listed, and neither its bytes nor its launches are part of a token."""
    folder = make_mtp_checkpoint(tmp_path, int4)
    report = explain(str(folder), device="cpu")
    assert report["hybrid_layers"] == 2
    (draft,) = report["draft_layers"]
    assert (draft["name"], draft["index"]) == ("mtp.layers.0.mlp.experts", [0])
    assert (draft["bits"], draft["hybrid"]) == (4 if int4 else 16, int4)
    assert report["hybrid_draft_layers"] == int(int4)
    assert report["launches"]["routed experts"] == 4
    assert parts(report)["draft layers (MTP)"] == 0
    stored = parts(report, "stored_bytes")["draft layers (MTP)"]
    extra = folder / "model_extra_tensors.safetensors"
    assert stored == pytest.approx(extra.stat().st_size, rel=0.02)
    (line,) = (x for x in as_text(report).splitlines() if x.startswith("draft 0"))
    assert line.endswith("hybrid" if int4 else "16-bit weights, not quantized")
