# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The dense benchmark: a short run, and what it does with a bad argument."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import benchmark_linear

SCRIPT = Path(benchmark_linear.__file__)


def test_a_bad_argument_ends_it(capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark_linear.parse(["--rows", "0"])
    assert exit.value.code == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err


def test_a_cpu_has_no_tiles(capsys):
    assert benchmark_linear.main(["--models", "demo", "--sweep"]) == 2
    assert "--sweep: expected a GPU" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_short_run(tmp_path):
    """Every kernel that takes the layers is right and timed."""
    file = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--models", "demo", "--rows", "1", "9"]
    subprocess.run([*command, "--json", file], check=True)
    result = json.loads(file.read_text())
    assert result["failures"] == []
    cases = {(row["linear"], row["rows"]) for row in result["rows"]}
    assert cases == {(n, m) for n in ("qkv_proj", "o_proj") for m in (1, 9)}
    ours = [row for row in result["rows"] if row["kernel"] == benchmark_linear.OURS]
    assert len(ours) == len(cases)
    assert all(row["ratio_to_hybrid"] == 1 and row["samples"] >= 5 for row in ours)
