# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The benchmark of whole tokens: attribution of GPU time, arguments, a tiny model."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .support.matrix import STAND_INS

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/benchmark_token.py"
# (name, start, duration, stream): the end of a step and the whole of the next one. The
# shared expert runs on stream 7 while router and experts run on stream 8.
STEP = [
    ("nvjet_head", 0, 10, 7),
    ("_gumbel_sample_kernel", 10, 2, 7),
    ("void marlin::Marlin<256>", 12, 8, 7),
    ("flash::FlashAttnFwd", 20, 6, 7),
    ("nvjet_router", 26, 4, 8),
    ("vllm::moe::topkGating<8>", 30, 2, 8),
    ("fused_moe_kernel", 32, 8, 8),
    ("nvjet_up", 28, 8, 7),
    ("silu_and_mul", 36, 2, 7),
    ("nvjet_down", 38, 6, 7),
    ("rms_norm_kernel", 44, 1, 7),
    ("unheard_of", 45, 2, 7),
    ("nvjet_head", 47, 10, 7),
    ("_gumbel_sample_kernel", 57, 2, 7),
]
# us and launches from the end of the first head to the end of the second
EXPECTED = {
    "sampling, inputs": (2, 1),
    "dense linears": (8, 1),
    "attention, GDN": (6, 1),
    "router": (2 + 2 / 2 + 2 / 2, 2),  # 26..28 alone, 28..32 beside the shared expert
    "routed experts": (8 / 2, 1),  # 32..40 beside it
    "shared expert": (2 / 2 + 2 / 2 + 8 / 2 + 4, 3),  # 40..44 alone
    "norms": (1, 1),
    "rest": (2, 1),
    "head": (10, 1),
}


@pytest.fixture
def write_trace(tmp_path):
    def write(rows):
        events = [{"ph": "M", "name": "process_name"}]
        events += [
            {"cat": "kernel", "name": n, "ts": t, "dur": d, "args": {"stream": s}}
            for n, t, d, s in rows
        ]
        file = tmp_path / "trace.json.gz"
        with gzip.open(file, "wt") as stream:
            json.dump({"traceEvents": events}, stream)
        return file

    return write


def test_time_by_part(write_trace):
    from token_bench.parts import attribute, read_trace

    kernels = read_trace(write_trace(STEP))
    found = attribute(kernels, steps=99)
    us = {name: part["us"] for name, part in found["parts"].items()}
    assert us == pytest.approx({name: us for name, (us, _) in EXPECTED.items()})
    launches = {name: part["launches"] for name, part in found["parts"].items()}
    assert launches == {name: count for name, (_, count) in EXPECTED.items()}
    assert found["rest"] == {"unheard_of": {"us": 2, "launches": 1}}
    assert found["steps"] == 1
    assert found["busy_us"] == pytest.approx(57 - 10)
    assert found["step_us"] == 57 - 10
    assert found["launches"] == 12
    # one step of two, where the second head is a draft's
    later = [(name, t + 100, d, s) for name, t, d, s in STEP]
    drafted = attribute(read_trace(write_trace(STEP + later)), steps=2)
    assert (drafted["steps"], drafted["launches"]) == (1, 12 + 2)
    # without heads the trace is taken as a whole
    middle = attribute(kernels[1:12], steps=2)
    assert (middle["steps"], middle["launches"]) == (2, 5.5)
    assert middle["busy_us"] == pytest.approx((47 - 10) / 2)


def test_kernels_of_the_rescored_head_and_split_gemms():
    from token_bench.parts import Kernel, classify

    names = {
        "wvSplitK_int_qkv": "dense linears",
        "triton_poi_fused_0": "attention, GDN",
        "_causal_conv1d_update_kernel": "attention, GDN",
        "triton_per_fused_silu_1": "norms",
        "wvSplitK_int_out": "dense linears",
        "moe_router_topk_bf16": "router",
        "moe_int4_gate_up_bf16": "routed experts",
        "moe_int4_down_bf16": "routed experts",
        "cublas::gemv2T_dot_kernel": "shared expert",
        "cublas::reduce_1Block_kernel": "shared expert",
        "sigmoid_kernel_cuda": "shared expert",
        "BinaryFunctor<MulFunctor>": "shared expert",
        "wvSplitK_int_head": "head",
        "rescore_largest_bf16": "head",
        "Memcpy DtoH (Device -> Pinned)": "sampling, inputs",
        "Memcpy DtoD (Device -> Device)": "rest",
    }
    kernels = [Kernel(name, i, 1, 0) for i, name in enumerate(names)]
    assert dict(zip(names, classify(kernels), strict=True)) == names


def test_kernels_of_a_prompt():
    from token_bench.parts import Kernel, classify

    names = [
        ("dequantize_int_g", "dense linears"),
        ("nvjet_tst_128x64", "dense linears"),
        ("_causal_conv1d_fwd_kernel", "attention, GDN"),
        ("chunk_scaled_dot_kkt_fwd_kernel", "attention, GDN"),
        ("moe_int4_prefill_to_planes", "dense linears"),
        ("moe_int4_prefill_down", "dense linears"),
        ("rms_norm_kernel", "norms"),
        ("moe_int4_tiled_down_bf16", "dense linears"),
        ("moe_align_block_size_kernel", "routed experts"),
        ("moe_int4_prefill_to_planes", "routed experts"),
        ("moe_int4_prefill_gate_up", "routed experts"),
        ("moe_int4_tiled_down_bf16", "routed experts"),
        ("moe_int4_prefill_sum", "routed experts"),
    ]
    kernels = [Kernel(name, i, 1, 0) for i, (name, _) in enumerate(names)]
    assert classify(kernels) == [part for _, part in names]


def test_trace_without_kernels_is_rejected(write_trace):
    from token_bench.parts import read_trace

    with pytest.raises(ValueError, match="expected GPU kernels, found none"):
        read_trace(write_trace([]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_random_int4_has_mean_zero(dtype):
    from token_bench.random_weights import random_int4

    words = torch.zeros(64, 512, dtype=dtype)
    random_int4(words)
    shifts = range(0, 8 * dtype.itemsize, 4)
    nibbles = torch.stack([(words >> shift) & 15 for shift in shifts])
    counts = nibbles.flatten().long().bincount(minlength=16)
    assert counts[0] == 0 and counts[1:].min() > nibbles.numel() / 18
    assert abs(nibbles.float().mean() - 8) < 0.05


def test_ratios_are_to_the_peer():
    from token_bench.report import decode_row, load_row, prefill_row, time_table

    def turn(ms, tokens=1.0):
        return {"ms": ms, "tokens": tokens, "distinct": 1.0}

    turns = {"a": [turn([2.0, 2.0]), turn([2.0])], "b": [turn([9.0, 3.0, 3.0])]}
    result = {
        "decode": [decode_row(name, 1, found) for name, found in turns.items()],
        "prefill": [prefill_row("a", 16, [5.0])],
        "load": [
            load_row(name, 4, [{**found, "requests": 4.0, "first_ms": [7.0]}])
            for name, found in (
                ("a", {"ms": [2.0], "tokens_per_s": 300.0}),
                ("b", {"ms": [3.0], "tokens_per_s": 200.0}),
            )
        ],
    }
    lines = time_table(["a", "b"], "b", result)
    assert lines[1].split("TPOT, batch 1")[1].split() == [
        *("2.00", "(2.00-2.00)", "1.50x"),
        *("3.00", "(3.00-7.80)", "1.00x"),
    ]
    assert lines[2].split("TTFT, prompt 16")[1].split() == ["5.00", "(5.00-5.00)", "-"]
    assert lines[3].split("step, load 4")[1].split()[:3] == [
        *("2.00", "(2.00-2.00)", "1.50x")
    ]
    assert lines[4].split("tokens/s, load 4")[1].split() == [
        *("300", "1.50x", "200", "1.00x")
    ]
    # two tokens per step of 2 ms
    assert decode_row("c", 1, [turn([2.0, 2.0], tokens=2.0)])["ms"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--settings marlin", "'marlin' is not one of hybrid, hybrid+int4_rescored,"),
        ("--settings hybrid,hybrid", "--settings: names repeat: hybrid,hybrid"),
        ("--batch 1,0", "--batch: '0' is not a positive number"),
        ("--prompt x", "--prompt: 'x' is not a positive number"),
        ("--load 4,x", "--load: 'x' is not a positive number"),
        ("--tokens 8", "--tokens: expected more than 8"),
        ("--layers 0", "--layers: 0 is not a positive number"),
        ("--tensor-parallel 9999", "--tensor-parallel: 9999 exceeds the "),
        ("--model qwen3-30b-a3b --speculative 1", "qwen3-30b-a3b has no MTP layer"),
        ("--trace", "--trace: there is no GPU"),
        ("--engine [1]", "--engine: expected a JSON object, got [1]"),
        ("--json no/such/f.json", "--json: the folder of no/such/f.json does not"),
    ],
)
def test_bad_arguments_are_rejected(monkeypatch, capsys, arguments, message):
    import benchmark_token

    monkeypatch.setattr(benchmark_token, "find_device", lambda: "cpu")
    with pytest.raises(SystemExit) as stop:
        benchmark_token.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_tiny_models(tmp_path):
    """Both models; if one setting fails, the others are measured all the same."""
    paths = [str(STAND_INS), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    for model, drafts in (("qwen3.5-35b-a3b", 1), ("qwen3-30b-a3b", 0)):
        file = tmp_path / f"{model}.json"
        command = [sys.executable, SCRIPT, "--model", model, "--tiny", "--eager"]
        command += ["--batch", "1,3", "--prompt", "16", "--context", "8"]
        command += ["--tokens", "24", "--repeats", "2", "--speculative", str(drafts)]
        command += ["--load", "4"]
        command += ["--together", "--timeout", "300", "--json", file, "--out", tmp_path]
        done = subprocess.run(
            [*command, "--settings", "hybrid,hybrid+int4_rescored,stock"],
            env={**os.environ, "PYTHONPATH": path, "VLLM_CPU_INT4_W4A8": "0"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        result = json.loads(file.read_text())
        # stock vLLM has int4 experts on CPUs with AMX
        assert done.returncode == bool(result["failures"]), done.stdout + done.stderr
        assert set(result["failures"]) <= {"stock"}
        for name in ("hybrid", "hybrid+int4_rescored"):
            rows = [row for row in result["decode"] if row["setting"] == name]
            assert [row["batch"] for row in rows] == [1, 3]
            assert all(row["ms_p10"] <= row["ms"] <= row["ms_p90"] for row in rows)
            # every token of a model with random weights is another one
            assert all(row["distinct_tokens"] > 0.5 for row in rows)
            (prefill,) = (row for row in result["prefill"] if row["setting"] == name)
            assert prefill["samples"] == 6
            (load,) = (row for row in result["load"] if row["setting"] == name)
            # a request misses the step in which its predecessor's end is seen
            assert 3 < load["requests_per_step"] <= 4
            assert load["tokens_per_s"] > 0 and load["first_ms"]["ms"] > 0
        (log,) = (s["log"] for s in result["settings"] if s["name"] == "hybrid")
        assert any("HybridW4A16 MoE: 4/4 layers" in line for line in log)
