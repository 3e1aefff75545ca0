# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Messages of ``make`` before it starts to build."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_SRC"}
    return subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_fork_asks_for_the_sources_before_anything_is_built():
    without = dry_run("fork")
    assert without.returncode == 2
    assert "VLLM_SRC is not set: make fork VLLM_SRC=" in without.stderr
    assert "make_venv" not in without.stdout
    folder = dry_run("fork", "VLLM_SRC=/some/where")
    assert folder.returncode == 0
    assert '--vllm-src "/some/where"' in folder.stdout
