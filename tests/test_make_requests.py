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
    return json.loads(path.read_text())


def test_lengths_and_prompts(tmp_path):
    rows = made(tmp_path / "a", "--longest", "300")
    assert rows == made(tmp_path / "b", "--longest", "300")
    assert rows != made(tmp_path / "c", "--longest", "300", "--seed", "1")
    assert len(rows) == 200
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for row in rows[:20]:
        asked, said = (turn["value"] for turn in row["conversations"])
        assert len(tokenizer(asked).input_ids) == row["input_tokens"]
        assert len(tokenizer(said).input_ids) == row["output_tokens"]
    outputs = sorted(row["output_tokens"] for row in rows)
    assert outputs[0] >= 2 and 295 < outputs[-1] < 306
    assert 90 < outputs[100] < 190  # the median
    assert outputs[20] < 65 and outputs[180] > 295  # the tails


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_requests.main([str(DEMO), str(tmp_path / "a"), "--count", "0"])
    assert "--count is at least 1" in capsys.readouterr().err
