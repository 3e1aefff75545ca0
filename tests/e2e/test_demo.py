# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The demo script: what it prints, its exit status, and that no process stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import demo

TIMEOUT_S = 600.0
# A server whose parent was killed is told so, and nobody waits for its end.
KILLED_GRACE_S = 60.0
SUMMARY = "HybridW4A16 MoE: {} layers (decode: A, prefill: B), {} declined\n"
DECLINED = "HybridW4A16 MoE: layer x goes vLLM's own way: why (said once per reason)\n"


def server_processes(log: Path) -> list[int]:
    """Ids of the processes that have ``log`` open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [os.readlink(fd) for fd in folder.iterdir()]
        except OSError:  # ended meanwhile, or somebody else's
            continue
        if str(log) in targets:
            found.append(int(folder.parent.name))
    return found


@contextmanager
def running_demo(log: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo script in a process of its own, told to end if it has not."""
    with subprocess.Popen(
        [sys.executable, demo.__file__, f"--log={log}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # not kill(): it has a server to stop


@pytest.mark.e2e
def test_serves_completes_and_stops(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with running_demo(log) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output + errors
    assert demo.PROMPT in output
    assert f"{demo.MAX_TOKENS} tokens, " in output
    assert "6 of 6 on the hybrid int4 path" in output
    assert "decode     C++ " in output
    assert "prefill    C++ " in output
    assert not server_processes(log)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "when", "status"),
    [
        (signal.SIGINT, "API server process is up", 130),
        (signal.SIGTERM, "API server process is up", 130),
        (signal.SIGKILL, "engine process is up", -signal.SIGKILL),
    ],
)
def test_interrupted_start_leaves_no_process(
    tmp_path: Path, number: signal.Signals, when: str, status: int
) -> None:
    log = tmp_path / "server.log"
    with running_demo(log) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if when in line:
                break
        assert server_processes(log)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == status
    deadline = time.monotonic() + (KILLED_GRACE_S if number == signal.SIGKILL else 0)
    while server_processes(log) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not server_processes(log)


@pytest.mark.e2e
def test_failure_names_the_step_and_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with running_demo(log, f"--model={tmp_path}") as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert f"FAILED      vllm serve {tmp_path}" in errors
    assert "why         the server exited with status 1: " in errors
    assert not server_processes(log)


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
