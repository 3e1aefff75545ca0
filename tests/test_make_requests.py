# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""benchmarks/make_requests.py: requests with lengths like those of conversations."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import make_requests

DEMO = Path(__file__).resolve().parents[1] / "demo/int4-autoround-g128"


def made(path, *arguments):
    words = [str(DEMO), str(path), "--count", "200", *arguments]
    assert make_requests.main(words) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lengths_and_prompts(tmp_path):
    rows = made(tmp_path / "a", "--longest", "300")
    assert rows == made(tmp_path / "b", "--longest", "300")
    assert rows != made(tmp_path / "c", "--longest", "300", "--seed", "1")
    assert len(rows) == 200
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for row in rows[:20]:
        assert len(tokenizer(row["prompt"]).input_ids) == row["input_tokens"]
    outputs = sorted(row["output_tokens"] for row in rows)
    assert outputs[0] >= make_requests.SHORTEST and outputs[-1] == 300
    assert 90 < outputs[100] < 190  # the median
    assert outputs[20] < 65 and outputs[180] == 300  # the tails


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_requests.main([str(DEMO), str(tmp_path / "a"), "--count", "0"])
    assert "--count is at least 1" in capsys.readouterr().err
