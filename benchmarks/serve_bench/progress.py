# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Progress messages of a tool that starts a server."""

import time

from .vllm_server import VllmServer

# When the text on the left appears in the server's log, show the message on the right.
MILESTONES = {
    "non-default args": "API server process is up",
    "Initializing a V1 LLM engine": "engine process is up",
    "Starting to load model": "worker process is up, loading the weights",
    "HybridW4A16 MoE:": "int4 experts repacked for the hybrid kernels",
    "Loading weights took": "weights are loaded",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "init engine": "engine is warmed up",
}
REPEAT_S = 60.0


class Progress:
    """Prints steps with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.current = ""

    def step(self, text: str) -> None:
        """Begin a step; ``current`` is the step that a failure belongs to."""
        self.current = text
        self.say(text)

    def say(self, text: str) -> None:
        """Print a message with the seconds since the start."""
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", flush=True)


class MilestoneWatch:
    """Turns a growing server log into progress messages.

    Call it while waiting for the server. It prints each milestone once. If none is
    reached for ``REPEAT_S`` seconds, it repeats the last one.
    """

    def __init__(self, server: VllmServer, progress: Progress) -> None:
        self._server = server
        self._progress = progress
        self._pending = dict(MILESTONES)
        self._last = "server process started"
        self._said = time.monotonic()

    def __call__(self) -> None:
        log = self._server.log_text()
        for text in [text for text in self._pending if text in log]:
            self._last = self._pending.pop(text)
            self._say(self._last)
        if time.monotonic() - self._said > REPEAT_S:
            self._say(f"still: {self._last}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._progress.say(f"  {text}")
