# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""serve_compare.py: its commands, its statistics and its cleanup.

These tests assert nothing about speed.
"""

import argparse
import json
import os
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace

import pytest
import serve_compare

from .support.processes import STAND_IN_VLLM, running, users_of, wait_for_users

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "benchmarks/serve_compare.py"
CHECKPOINT = CHECKOUT / "demo/int4-autoround-g128"
TIMEOUT_S = 600.0


@pytest.fixture
def tool():
    """The script as a module."""
    return serve_compare


def test_variants(tool):
    parse = tool.parse_variant
    hybrid = parse("hybrid", "m")
    assert hybrid.environment == {"VLLM_HYBRID_W4A16_MOE": "require"}
    assert (hybrid.model, hybrid.arguments) == ("m", ())
    marlin = parse("marlin=--dtype 'float16' A_B=x=y", "m")
    assert marlin.environment == {"VLLM_HYBRID_W4A16_MOE": "0", "A_B": "x=y"}
    assert marlin.arguments == ("--moe-backend", "marlin", "--dtype", "float16")
    own = parse('own=--model=other --override {"a=1":2}', None)
    assert (own.model, own.environment) == ("other", {})
    assert own.arguments == ("--override", "{a=1:2}")


def test_presets_of_the_lm_head_are_what_vllm_takes():

    from benchmarks.serve_bench.cases import PRESETS
    from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
        SCHEMES,
    )

    for name in SCHEMES:
        environment, (option, value) = PRESETS[f"hybrid-{name}"]
        assert option == "--quantization-config"
        assert json.loads(value) == {"targets": {"lm_head": name}}
        assert environment == PRESETS["hybrid"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o/m", "--variant", "fast"], "neither a preset"),
        (["o/m", "--variant", "a b=x"], "is not a name"),
        (["o/m", "--variant", "a=--model"], "--model needs a checkpoint"),
        (["--variant", "stock"], "no checkpoint"),
        (["o/m", "--variant", "stock", "--variant", "stock"], "names repeat"),
        (["o/m", "--mode", "lazy"], "'lazy' is none of eager, compiled"),
        (["o/m", "--lengths", "100"], "'100' is not INPUT:OUTPUT"),
        (["o/m", "--lengths", "0:5"], "'0:5' is not INPUT:OUTPUT"),
        (["o/m", "--lengths", "5:5@0"], "'5:5@0' is not INPUT:OUTPUT"),
        (["o/m", "--most-prompts", "0"], "--most-prompts is at least 1"),
        (["o/m", "--concurrency", "1,x"], "is not a list of counts"),
        (["o/m", "--image", "640"], "is not WIDTHxHEIGHT"),
        (["o/m", "--repeats", "0"], "--repeats is at least 1"),
        (["nowhere"], "checkpoint nowhere: there is no such folder, and it is not"),
        (["no/such/folder"], "checkpoint no/such/folder: there is no such folder"),
        ([str(SCRIPT)], "serve_compare.py: expected a folder, got a file"),
        ([str(SCRIPT.parent)], "benchmarks: no config.json in this folder"),
        (["o/m", "--variant", "a=--model=/x"], "checkpoint /x: there is no such"),
        (["o/m", "--out", str(SCRIPT / "x")], "x: Not a directory"),
    ],
)
def test_bad_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.parse_arguments(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults_are_the_published_comparison(tool):
    options = tool.parse_arguments(["o/m"])
    assert [v.name for v in options.variants] == ["stock", "hybrid"]
    assert [str(point) for point in options.points] == ["100/128 x1"]
    assert options.modes == ["eager"] and options.size is None


@pytest.mark.parametrize("image", [None, (640, 480)], ids=["text", "image"])
def test_bench_command_is_one_that_vllm_takes(tool, image, tmp_path):
    point = tool.Point(100, 128, 4)
    words = tool.load.command(
        Path("vllm"),
        "http://127.0.0.1:9",
        "tok",
        point,
        12,
        1,
        image,
        tmp_path / "r.json",
    )
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(words[3:])
    assert (args.num_prompts, args.max_concurrency) == (12, 4)
    assert (args.random_input_len, args.random_output_len) == (100, 128)
    assert args.ignore_eos and args.save_result
    if image:
        assert args.random_mm_bucket_config == {(480, 640, 1): 1.0}  # height first
        assert args.random_mm_limit_mm_per_prompt == {"image": 1, "video": 0}


def write_requests(folder):
    rows = [(10, 20), (31, 40)]
    path = folder / "requests.json"
    requests = [{"input_tokens": i, "output_tokens": o} for i, o in rows]
    path.write_text(json.dumps(requests))
    return path


def test_requests_from_a_file(tool, tmp_path):
    path = write_requests(tmp_path)
    options = tool.parse_arguments(
        ["o/m", "--requests", str(path), "--concurrency", "4"]
    )
    (point,) = options.points
    assert str(point) == "20/30 x4"
    words = tool.load.command(
        Path("vllm"), "http://x:9", "tok", point, 12, 1, None, tmp_path / "r", path
    )
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(words[3:])
    assert (args.dataset_name, args.dataset_path) == ("sharegpt", str(path))
    assert args.disable_shuffle
    assert (args.num_prompts, args.max_concurrency) == (12, 4)


def test_lengths_with_a_number_of_requests_and_a_file(tool, tmp_path):
    path = write_requests(tmp_path)
    options = tool.parse_arguments(
        ["o/m", "--requests", str(path), "--concurrency", "4,8"]
        + ["--lengths", "128:8@1,512:8"]
    )
    points = ["128/8 x1", "512/8 x4", "512/8 x8", "20/30 x4", "20/30 x8"]
    assert [str(point) for point in options.points] == points
    assert [point.from_file for point in options.points] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(("concurrency", "count"), [(1, 15), (16, 100), (64, 128)])
def test_prompts_per_point_are_limited(tool, concurrency, count, tmp_path, monkeypatch):
    options = tool.parse_arguments(
        ["o/m", "--prompts=15", "--most-prompts=100", f"--out={tmp_path}"]
    )
    monkeypatch.setattr(tool.load, "drive", lambda words, *rest: words)
    server = SimpleNamespace(program=Path("vllm"), url="http://x:9")
    comparison = tool.Comparison(options, None)
    words = comparison.drive(
        server, options.variants[0], tool.Point(100, 128, concurrency)
    )
    assert words[words.index("--num-prompts") + 1] == str(count)


@pytest.mark.parametrize("text", ["", "[]", "[{}]", "no json"])
def test_a_file_without_requests_is_named(tool, tmp_path, text, capsys):
    path = tmp_path / "requests.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        tool.parse_arguments(["o/m", "--requests", str(path)])
    assert f"--requests {path}: expected a JSON list" in capsys.readouterr().err


def sample(variant, number, rate, **changes):
    return {
        "variant": variant,
        "mode": "eager",
        "round": number,
        "input_len": 100,
        "output_len": 128,
        "concurrency": 1,
        "ttft_ms": 50.0,
        "tpot_ms": 1000 / rate,
        "itl_p50_ms": 1.0,
        "itl_p99_ms": 2.0,
        "output_tokens_per_s": rate,
        "ttft_mean_ms": 50.0,
        "tpot_mean_ms": 1000 / rate,
        **changes,
    }


SAMPLES = [
    sample("stock", 0, 20.0),
    sample("hybrid", 0, 30.0),
    sample("hybrid", 1, 20.0),
    sample("stock", 1, 10.0),
    sample("stock", 2, 20.0),
    sample("hybrid", 2, 36.0),
    sample("hybrid", 2, 90.0, concurrency=4),  # the baseline has no such sample
]


def test_columns_of_drafts_and_percentiles(tool):
    """They are there where a variant has them, and empty for the others."""
    drafting = {"accepted_drafts_pct": 41.5, "tpot_p99_ms": 70.25}
    samples = [sample("plain", 0, 20.0), sample("ngram", 0, 30.0, **drafting)]
    header, _, *rows = tool.report._table(tool.summarize(samples, "plain"))
    assert "TPOT p99 ms | drafts accepted %" in header and "TTFT p99" not in header
    assert "| - | - | 1.00 |" in rows[0] and "| 70.25 | 41.5 | 1.50 |" in rows[1]


def test_ratios_are_formed_within_rounds(tool):
    stock, hybrid, alone = tool.summarize(SAMPLES, "stock")
    assert (stock["variant"], hybrid["variant"]) == ("stock", "hybrid")
    assert stock["output_tokens_per_s"] == {"median": 20.0, "min": 10.0, "max": 20.0}
    assert stock["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert hybrid["ratio"] == {"median": 1.8, "min": 1.5, "max": 2.0}
    assert (hybrid["rounds"], alone["concurrency"]) == (3, 4)
    assert alone["ratio"] is None


def make_result(tool, tmp_path):
    options = tool.parse_arguments([str(CHECKPOINT), "--out", str(tmp_path)])
    comparison = tool.Comparison(options, tool.Progress())
    comparison.samples = SAMPLES
    comparison.failures = {"triton, eager": "no such backend"}
    comparison.moe_log["hybrid"] = ["HybridW4A16 MoE: 6/6 layers"]
    comparison.facts = {
        "machine": {
            "cpu": "a CPU",
            "cpu_threads": 2,
            "vllm": "vllm 0.32.0",
            "torch": "2.13.0",
            "packages": {"triton": None},
            "commit": "0123456789abcdef",
            "dirty": True,
            "date": "2026-01-01",
        },
        "rooflines": {
            str(CHECKPOINT): {"bandwidth_gbps": 30.0, "token_bytes": {"164": 3e8}}
        },
    }
    return comparison


def test_written_results(tool, tmp_path):
    make_result(tool, tmp_path).write()
    text = (tmp_path / "serve.md").read_text()
    assert "| hybrid | eager | 100/128 | 1 | 50.0 | 33.33 (27.78 to 50.00) " in text
    assert "| 30.0 (20.0 to 36.0) | 1.80 (1.50 to 2.00) |" in text
    assert "Not measured on AMD hardware." in text
    assert "Median (least to largest) of 3 rounds, each with servers of its own" in text
    assert "`triton, eager` did not run: no such backend" in text
    assert "`hybrid`: HybridW4A16 MoE: 6/6 layers" in text
    assert "0123456789ab with changes" in text
    written = json.loads((tmp_path / "serve.json").read_text())
    assert written["samples"] == SAMPLES
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_names_every_variant(tool, tmp_path):
    """Including one that did not run, and one that did not run in every mode."""
    variants = ["--variant=stock", "--variant=triton", "--variant=hybrid"]
    options = tool.parse_arguments([str(CHECKPOINT), f"--out={tmp_path}", *variants])
    comparison = tool.Comparison(options, tool.Progress())
    comparison.facts = make_result(tool, tmp_path).facts
    comparison.samples = SAMPLES
    why = "no such backend"
    comparison.failures = {"triton, eager": why, "triton, compiled": why}
    comparison.failures["hybrid, compiled"] = why
    (legend,) = tool.report.draw(comparison.result()).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[-3:] == [
        "stock",
        "triton (did not run)",
        "hybrid (did not run: compiled)",
    ]


def test_an_interrupted_run_says_how_many_rounds_it_has(tool, tmp_path):
    comparison = make_result(tool, tmp_path)
    comparison.options.together = True
    comparison.samples = [s for s in SAMPLES if s["round"] == 0]
    comparison.write()
    text = (tmp_path / "serve.md").read_text()
    assert "of 1 round, all on the same servers, started together" in text


def test_rocm_results_do_not_disclaim(tool, tmp_path):
    comparison = make_result(tool, tmp_path)
    comparison.facts["machine"] |= {"hip": "7.1", "gpu": "Radeon 8060S"}
    comparison.write()
    text = (tmp_path / "serve.md").read_text()
    assert "Radeon 8060S" in text and "Not measured" not in text


def test_only_harmless_variables_are_recorded(tool, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SOMETHING", "x")
    found = tool.facts.switches()
    assert found["HIP_VISIBLE_DEVICES"] == "0"
    assert "VLLM_API_KEY" not in found and "SOMETHING" not in found


def running_script(out: Path, *arguments: str) -> AbstractContextManager[Popen[str]]:
    """Run the script on the bundled checkpoint."""
    command = [sys.executable, str(SCRIPT), str(CHECKPOINT), f"--out={out}"]
    return running([*command, *arguments])


SHORT = ["--lengths=16:8", "--prompts=2", "--warmups=1", "--repeats=1"]


@pytest.mark.e2e
@pytest.mark.nightly
def test_real_comparison(tmp_path):
    variants = ["--variant=hybrid", "--variant=bad=--no-such-option"]
    with running_script(tmp_path, *SHORT, *variants, "--bandwidth=30") as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output + errors  # because of the second
    assert "int4 experts repacked for the hybrid kernels" in output
    result = json.loads((tmp_path / "serve.json").read_text())
    assert list(result["failures"]) == ["bad, eager"]
    (row,) = result["summary"]
    assert (row["variant"], row["ratio"]["median"]) == ("hybrid", 1.0)
    assert row["output_tokens_per_s"]["median"] > 0 < row["tpot_ms"]["median"]
    (hybrid, _) = result["variants"]
    assert "6/6 layers (decode: " in hybrid["moe_log"][0]
    assert result["rooflines"][str(CHECKPOINT)]["token_bytes"]["20"] > 4e6
    assert all(check["ok"] for check in result["doctor"])
    assert not users_of(tmp_path)


@pytest.fixture
def stand_in(tool, monkeypatch, tmp_path):
    """``main`` on a stand-in for vLLM, with invented facts about the machine."""
    facts = {**make_result(tool, tmp_path).facts, "rooflines": {}}
    monkeypatch.setattr(tool.facts, "gather", lambda *_: facts)
    monkeypatch.setattr(tool.signal, "signal", lambda number, handler: None)
    arguments = [str(CHECKPOINT), f"--out={tmp_path}", f"--vllm={STAND_IN_VLLM}"]
    return lambda *more: tool.main([*arguments, *SHORT, *more])


@pytest.mark.parametrize("together", [(), ("--together",)], ids=["apart", "together"])
def test_one_that_fails_leaves_the_others(stand_in, together, tmp_path, capsys):
    variants = ["--variant=hybrid", "--variant=bad=--broken", "--variant=stock"]
    assert stand_in(*variants, *together, "--repeats=2") == 1
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "serve.json").read_text())
    assert list(result["failures"]) == ["bad, eager"]
    assert [row["variant"] for row in result["summary"]] == ["hybrid", "stock"]
    order = [sample["variant"] for sample in result["samples"]]
    assert order == ["hybrid", "stock", "stock", "hybrid"]
    assert "FAILED: bad, eager: the server exited with status 1: ValueError" in output
    assert "engine process is up" in output
    assert "non-default args" not in output, "milestones, not the server's log"
    assert not users_of(tmp_path)


def test_servers_side_by_side_take_turns_at_each_point(stand_in, tmp_path):
    variants = ["--variant=hybrid", "--variant=stock"]
    assert stand_in(*variants, "--together", "--lengths=16:8,32:8", "--repeats=2") == 0
    samples = json.loads((tmp_path / "serve.json").read_text())["samples"]
    there, back = ["hybrid", "stock"] * 2, ["stock", "hybrid"] * 2
    assert [sample["variant"] for sample in samples] == there + back
    assert [sample["input_len"] for sample in samples] == [16, 16, 32, 32] * 2


INTERRUPTED = """
import sys, serve_compare
serve_compare.facts.gather = lambda *_: {}
sys.exit(serve_compare.main())
"""


def test_ctrl_c_is_answered_at_once_and_leaves_no_server_behind(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(CHECKPOINT), f"--out={tmp_path}"]
    command += [f"--vllm={STAND_IN_VLLM}", "--variant=hybrid"]
    environment = {**os.environ, "STAND_IN": "silent,stubborn"}  # takes all the time
    with running(command, cwd=SCRIPT.parent, env=environment) as process:
        wait_for_users(tmp_path / "hybrid-eager-1.log", 2)
        assert process.stdout is not None and process.stderr is not None
        while "engine process is up" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "interrupted, stopping the servers\n"
        assert process.poll() is None and users_of(tmp_path), "it says so before"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert errors.endswith("the servers are stopped\n")
    assert not users_of(tmp_path)
