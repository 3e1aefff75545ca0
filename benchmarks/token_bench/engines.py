# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The benchmark's side of the engines: starts them, asks them, ends them."""

import contextlib
import multiprocessing
import re
import time
from typing import Any

import psutil

from token_bench.worker import Job, serve

END_S = 20.0  # for an engine to end by itself


class EngineError(RuntimeError):
    """The engine did not start, failed, or did not answer in time."""


class EngineProcess:
    """A process of ``worker.serve``; it begins to load at once."""

    def __init__(self, job: Job, timeout_s: float) -> None:
        """``timeout_s``: seconds until it has to be ready, and for any answer."""
        self.job = job
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(job, child))
        self._process.start()
        child.close()

    def wait_ready(self) -> None:
        """Return once the engine has warmed up. Raises ``EngineError``."""
        loading = time.monotonic() - self._started
        self._receive(max(0.0, self._timeout_s - loading))

    def ask(self, question: str, argument: int) -> Any:
        """The result of a method of ``worker.Engine``. Raises ``EngineError``."""
        try:
            self._pipe.send((question, argument))
        except BrokenPipeError:
            raise EngineError("the process ended") from None
        return self._receive(self._timeout_s)

    def _receive(self, wait_s: float) -> Any:
        try:
            if not self._pipe.poll(wait_s):
                raise EngineError(f"no answer after {self._timeout_s:.0f} s")
            succeeded, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise EngineError("the process ended") from None
        if not succeeded:
            raise EngineError(answer)
        return answer

    def log_lines(self) -> list[str]:
        """What vLLM logged about the kernels it uses, each line once."""
        text = self.job.log.read_text(errors="replace")
        found = re.findall(r"HybridW4A16.*|Using .*(?:Kernel|backend).*", text)
        return list(dict.fromkeys(found))

    def close(self, wait_s: float) -> None:
        """End the process and all of its children; kill what lives after ``wait_s``."""
        family = []
        if self._process.is_alive():
            family = psutil.Process(self._process.pid).children(recursive=True)
            with contextlib.suppress(BrokenPipeError):
                self._pipe.send(None)
            self._process.join(wait_s)
        for process in [*family, self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()
        self._pipe.close()
