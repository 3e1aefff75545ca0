# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm serve`` as a child process that is always stopped at the end.

Used by serve_compare.py, the demo and the end-to-end tests.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

LOOPBACK = "127.0.0.1"
MODEL_NAME = "demo"

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, enough for small models
    "VLLM_NO_USAGE_STATS": "1",
    # Three processes import all of vLLM one after another: keep compiled bytecode.
    "PYTHONDONTWRITEBYTECODE": "",
}

# Kills the given process group when its standard input closes, which happens when the
# process that started it is gone, even if that was killed.
_WATCHDOG = """
import os, sys, time
sys.stdin.read()
os.killpg(int(sys.argv[1]), 15)
time.sleep(5)
os.killpg(int(sys.argv[1]), 9)
"""

_POLL_S = 0.2
STOP_GRACE_S = 20.0
_KILL_S = 5.0  # for a killed process to disappear
_ERROR_LINE = re.compile(r"(?:^|\s)([\w.]*(?:Error|Exception): .*)")


class ServerError(RuntimeError):
    """The server did not start, or died."""


def free_port() -> int:
    """A loopback TCP port that is free now, chosen by the operating system."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


class VllmServer:
    """Context manager that runs ``vllm serve`` and leaves no process behind.

    The server listens on the loopback interface only. It runs in its own process group,
    which is killed as a whole if the server does not stop when asked to, or if the
    process that started it is killed.
    Args:
        model: checkpoint folder, served under the name ``MODEL_NAME``.
        log: file for everything the server prints; overwritten.
        arguments: further ``vllm serve`` arguments.
        environment: variables to add to this process's own; ``None`` removes one.
        port: TCP port; 0 lets the operating system choose.
        program: the ``vllm`` command; by default the one next to the running Python.

    Raises ``ServerError`` if the command does not exist.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        port: int = 0,
        program: Path | None = None,
    ) -> None:
        self.program = program or Path(sys.executable).with_name("vllm")
        if not self.program.exists():
            raise ServerError(
                f"there is no vllm command at {self.program}: install the project's "
                f"requirements into this Python, or run `make demo`"
            )
        self.port = port or free_port()
        self.log = log
        self._command = [
            str(self.program),
            "serve",
            str(model),
            f"--host={LOOPBACK}",
            f"--port={self.port}",
            f"--served-model-name={MODEL_NAME}",
            *arguments,
        ]
        merged = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        self._environment = {k: v for k, v in merged.items() if v is not None}
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's base URL."""
        return f"http://{LOOPBACK}:{self.port}"

    def __enter__(self) -> "VllmServer":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", _WATCHDOG, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # there may be nothing left to kill
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(
        self, timeout_s: float, on_poll: Callable[[], None] = lambda: None
    ) -> None:
        """Return once the server answers ``/health``.

        Args:
            timeout_s: seconds until ``ServerError``.
            on_poll: called several times a second while waiting.

        Raises ``ServerError``, with the cause found in the log, if the server exits or
        is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            on_poll()
            status = self.exit_status()
            if status is not None:
                raise ServerError(
                    f"the server exited with status {status}{self._why()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {timeout_s:.0f} s{self._why()}")
            time.sleep(_POLL_S)
        on_poll()

    def wait_exit(self, timeout_s: float | None) -> int:
        """Wait until the server exits by itself; returns its exit status.

        Raises ``ServerError`` if it still runs after ``timeout_s`` seconds; ``None``
        waits forever.
        """
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerError(f"still running after {timeout_s:.0f} s") from None

    def exit_status(self) -> int | None:
        """The exit status; ``None`` while the server runs."""
        assert self._process is not None
        return self._process.poll()

    def log_text(self) -> str:
        """Everything the server has printed so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Ask the server to stop, and kill what is left of it after a grace period.

        No process of it is left when this returns.
        """
        if self._process is None:
            return
        family: list[psutil.Process] = []
        if self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
        finally:  # also when a second Ctrl-C ends the wait
            with contextlib.suppress(ProcessLookupError):  # nothing is left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            psutil.wait_procs(family, _KILL_S)
            self._process = None
            if self._watchdog is not None:
                self._watchdog.kill()
                self._watchdog.communicate()

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    def _why(self) -> str:
        # The first error is the cause; later ones are consequences in other processes.
        match = _ERROR_LINE.search(self.log_text())
        return f": {match[1]}" if match else ""
