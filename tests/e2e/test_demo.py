# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The demo script: its output, its exit status, and that no process is left behind."""

import os
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from tools import demo

from ..support.processes import STAND_IN_VLLM, running, users_of, wait_for_users

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0
SUMMARY = "HybridW4A16 MoE: {} layers (decode: A, prefill: B), {} declined\n"
DECLINED = "HybridW4A16 MoE: layer x falls back to vLLM's MoE path: why\n"


def running_demo(log: Path, *arguments: str) -> AbstractContextManager[Popen[str]]:
    """Run the demo script in a separate process."""
    command = [sys.executable, "-m", "tools.demo", f"--log={log}", *arguments]
    return running(command, cwd=CHECKOUT)


@pytest.mark.e2e
def test_serves_completes_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "server.log"
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    with running_demo(log) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output + errors
    assert demo.PROMPT in output
    assert f"{demo.MAX_TOKENS} tokens, " in output
    assert "6 of 6 on the hybrid int4 path" in output
    assert "decode     C++ " in output
    assert "prefill    C++ " in output
    assert not users_of(log)
    if torch.version.cuda is None and len(os.sched_getaffinity(0)) == 2:
        assert "core ids=[0, 1]" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_no_process(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "silent")
    log = tmp_path / "server.log"
    with running_demo(log, f"--vllm={STAND_IN_VLLM}") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "engine process is up" in line:
                break
        wait_for_users(log, 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "interrupted, the server is stopped" in errors
    assert not users_of(log)


def test_failure_names_the_step_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "broken")
    log = tmp_path / "server.log"
    with running_demo(log, f"--vllm={STAND_IN_VLLM}", "--model=any") as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "FAILED      vllm serve any" in errors
    assert (
        "why         the server exited with status 1: ValueError: the first" in errors
    )
    assert not users_of(log)


def test_small_cpus_compute_with_all_cores() -> None:
    assert demo.cpu_threads(2, {}) == {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    assert demo.cpu_threads(16, {}) == {}
    for chosen in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"):
        assert demo.cpu_threads(2, {chosen: "1"}) == {}


@pytest.mark.parametrize(
    ("log", "hybrid", "said"),
    [
        (SUMMARY.format("6/6", 0), True, "6 of 6 on the hybrid int4 path"),
        (DECLINED + SUMMARY.format("5/6", 1), False, "declined   layer x"),
        (DECLINED, False, "none on the hybrid int4 path"),
        ("", False, "none on the hybrid int4 path"),
    ],
)
def test_says_which_layers_are_hybrid(
    log: str, hybrid: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.show_method(log) is hybrid
    assert said in capsys.readouterr().out
