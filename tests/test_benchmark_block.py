# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The benchmark of a MoE block: what it asks for, and its outputs on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/benchmark_block.py"


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_asks_for_a_gpu():
    ended = subprocess.run([sys.executable, SCRIPT], capture_output=True, timeout=300)
    assert ended.returncode == 2
    assert b"there is no GPU" in ended.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
def test_options_agree(tmp_path):
    file = tmp_path / "block.json"
    command = [sys.executable, SCRIPT, "--shapes", "qwen3.5-35b-a3b", "--layers", "2"]
    command += ["--tokens", "1", "4", "--json", file]
    subprocess.run(command, check=True, timeout=300)
    rows = json.loads(file.read_text())["us"]
    assert [row["tokens"] for row in rows] == [1, 4]
    assert all(row["difference"] < 0.01 and row["ours"] > 0 for row in rows)
