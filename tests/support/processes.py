# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Programs under test that must be stopped, and processes that they leave behind."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# Replaces the vllm command.
STAND_IN_VLLM = Path(__file__).with_name("programs") / "vllm.py"


def users_of(path: Path) -> list[int]:
    """Return the ids of the processes that have ``path``, or a file in it, open."""
    return [
        process.pid
        for process in psutil.process_iter(["open_files"])
        if any(
            Path(file.path).is_relative_to(path)
            for file in process.info["open_files"] or ()
        )
    ]


def wait_for_users(path: Path, count: int, timeout_s: float = 60.0) -> list[int]:
    """Return ``users_of`` when there are ``count`` of them, else ``AssertionError``."""
    deadline = time.monotonic() + timeout_s
    while len(users := users_of(path)) != count:
        assert time.monotonic() < deadline, f"{len(users)} processes, expected {count}"
        time.sleep(0.1)
    return users


@contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program with its output in pipes; terminate it if it has not ended."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # not kill(): the program must stop its server
