# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The router benchmark: a short run on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/benchmark_router.py"


@pytest.mark.nightly
def test_a_short_run(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--layers", "4"]
    command += ["--shapes", "qwen3-30b-a3b", "--tokens", "1", "8", "--json", file]
    subprocess.run(command, check=True, timeout=300)
    rows = json.loads(file.read_text())["us"]
    assert [row["tokens"] for row in rows] == [1, 8]
    for row in rows:
        assert row["ours"] > 0 and row["vllm"] > 0
        assert row["selected"] > 0.8, "of 32 tokens few have equal logits"
