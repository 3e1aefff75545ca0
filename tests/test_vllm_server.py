# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``VllmServer``: starting, waiting, failing and stopping, with a stand-in for vLLM.

tests/e2e starts and stops real servers.
"""

import signal
import sys
import time
from pathlib import Path

import pytest
from serve_bench import progress, vllm_server
from serve_bench.progress import MilestoneWatch, Progress
from serve_bench.vllm_server import ServerError, VllmServer

from .support.processes import STAND_IN_VLLM, running, users_of, wait_for_users

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
READY_S = 60.0


@pytest.fixture
def log(tmp_path):
    return tmp_path / "server.log"


def stand_in(log: Path, behaviour: str = "") -> VllmServer:
    environment = {"STAND_IN": behaviour}
    return VllmServer("model", log, [], environment, program=STAND_IN_VLLM)


def test_ready_then_stopped_with_its_children(log):
    with stand_in(log) as server:
        server.wait_ready(READY_S)
        assert len(wait_for_users(log, 2)) == 2
        assert server.exit_status() is None
    assert not users_of(log)


def test_what_does_not_stop_is_killed(log, monkeypatch):
    monkeypatch.setattr(vllm_server, "STOP_GRACE_S", 0.5)
    with stand_in(log, "stubborn") as server:
        server.wait_ready(READY_S)
        wait_for_users(log, 2)
    assert not users_of(log)


def test_a_second_interrupt_kills(log, monkeypatch):
    """Ctrl-C while the server is stopping leaves nothing behind either."""
    with pytest.raises(KeyboardInterrupt), stand_in(log, "stubborn") as server:
        server.wait_ready(READY_S)
        wait_for_users(log, 2)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    assert not users_of(log)


def test_first_error_is_the_cause(log):
    with (
        pytest.raises(ServerError, match="status 1: ValueError: the first error is"),
        stand_in(log, "broken") as server,
    ):
        server.wait_ready(READY_S)


def test_waiting_ends(log):
    with (
        pytest.raises(ServerError, match="not ready after 2 s"),
        stand_in(log, "silent") as server,
    ):
        server.wait_ready(2)
    assert not users_of(log)


def test_exit_is_waited_for(log):
    with stand_in(log, "broken") as server:
        assert server.wait_exit(READY_S) == 1
    with stand_in(log) as server, pytest.raises(ServerError, match="still running"):
        server.wait_exit(0.1)


def test_a_missing_command_is_named(log, tmp_path):
    with pytest.raises(ServerError, match="no vllm command at .*nothing-here"):
        VllmServer("model", log, program=tmp_path / "nothing-here")


PARENT = """
import sys, time
from pathlib import Path
from serve_bench.vllm_server import VllmServer
with VllmServer("model", Path(sys.argv[1]), program=Path(sys.argv[2])) as server:
    server.wait_ready(60)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_parent_that_is_killed(log):
    command = [sys.executable, "-c", PARENT, str(log), str(STAND_IN_VLLM)]
    with running(command, cwd=BENCHMARKS) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        wait_for_users(log, 2)
        parent.kill()
        parent.wait()
    wait_for_users(log, 0)


def test_milestones_are_said_once_and_repeated_when_nothing_comes(
    log, capsys, monkeypatch
):
    class Server:
        text = ""

        def log_text(self) -> str:
            return self.text

    server = Server()
    watch = MilestoneWatch(server, Progress())  # type: ignore[arg-type]
    watch()
    assert capsys.readouterr().out == ""
    server.text = "INFO non-default args: x\nINFO something else\n"
    watch()
    watch()
    assert capsys.readouterr().out.endswith(" s]   API server process is up\n")
    monkeypatch.setattr(progress, "REPEAT_S", 0.0)
    time.sleep(0.01)
    watch()
    assert capsys.readouterr().out.endswith(" s]   still: API server process is up\n")
