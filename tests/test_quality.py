# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""quality.py: its dequantization, its scores and its arithmetic."""

import inspect
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .support.int4_formats import FORMATS
from .support.reference_model import ReferenceModel

CHECKOUT = Path(__file__).resolve().parents[1]
CHECKPOINT = CHECKOUT / "demo/int4-autoround-g128"


@pytest.fixture
def tool(monkeypatch):
    """The script as a module."""
    import quality

    return quality


def write_linear(folder, name, symmetric, extra=None):
    """Write a checkpoint of one linear and return its weight.

    [N, K] = [16, 128], group size 32.
    """
    form = FORMATS[name]
    stored = form.random_linear(np.random.default_rng(0), 16, 128, 32, symmetric)
    tensors = {f"model.up_proj.{k}": torch.from_numpy(v) for k, v in stored.items()}
    tensors["model.norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    folder.mkdir()
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    config = {"quantization_config": form.config(32, symmetric, [])}
    (folder / "config.json").write_text(json.dumps(config))
    return form.dequantize(stored)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_checkpoint(tool, name, symmetric, tmp_path):
    expected = write_linear(tmp_path / "int4", name, symmetric)
    dense = tool.dequantize_checkpoint(tmp_path / "int4", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    assert sorted(tensors) == ["model.norm.weight", "model.up_proj.weight"]
    weight = tensors["model.up_proj.weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.from_numpy(expected).float())
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


def test_what_cannot_be_dequantized_is_an_error(tool, tmp_path):
    order = {"model.up_proj.g_idx": torch.arange(128).flip(0) // 32}
    write_linear(tmp_path / "int4", "gptq", True, order)
    with pytest.raises(ValueError, match="model.up_proj: .*activation order"):
        tool.dequantize_checkpoint(tmp_path / "int4", tmp_path / "a")
    config = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "int4/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no reference for quant_method 'fp8'"):
        tool.dequantize_checkpoint(tmp_path / "int4", tmp_path / "b")


def test_scores_are_those_of_the_reference(tool, tmp_path):
    reference = ReferenceModel(CHECKPOINT)
    source = inspect.getsource(textwrap)
    tokens = reference.tokenizer.encode(source, verbose=False)[:200]
    dense = tool.dequantize_checkpoint(CHECKPOINT, tmp_path / "dense")
    ((logprobs, first),) = tool.transformers_scores(str(dense), [tokens])
    expected = reference.text_logprobs(tokens)
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)
    choices = reference.logprobs(tokens)[:-1].argmax(1)
    assert (torch.tensor(first) == choices).float().mean() > 0.99


def test_arithmetic(tool):
    halves, quarters = [math.log(0.5)] * 2, [math.log(0.25)] * 2
    scores = {
        "hybrid": [(quarters, [7, 8])],
        "dequantized": [(halves, [7, 9]), ([0.0] * 3, [0, 5, 6])],
    }
    result = tool.compare(scores, [[5, 7]], 1)
    assert result["perplexity"] == {
        "hybrid": pytest.approx(4),
        "dequantized": pytest.approx(2),
    }
    found = result["against"]["dequantized"]
    assert found["mean_difference_nats"] == pytest.approx(-math.log(2))
    assert found["mean_absolute_difference_nats"] == pytest.approx(math.log(2))
    assert found["same_first_choice"] == found["greedy_agreement"] == 0.5
    assert (found["greedy_tokens"], found["identical_completions"]) == (2, 0)
    assert "50.00% of 2 tokens, 0 of 1 completions whole" in tool.as_text(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", __file__], "nowhere holds no config.json"),
        ([str(CHECKPOINT), "nothing.txt"], "no text file or folder nothing.txt"),
        ([str(CHECKPOINT), __file__, "--prompt=600"], "2 <= --prompt < --window"),
    ],
)
def test_bad_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.parse_arguments(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_text_shorter_than_a_window(tool, tmp_path, capsys):
    (tmp_path / "text").write_text("import os\n")
    assert tool.main([str(CHECKPOINT), str(tmp_path / "text")]) == 1
    assert "has fewer tokens than a window of 512" in capsys.readouterr().err


def test_figures_of_heads():
    """Computed by hand: two positions, one with a different first token."""

    from benchmarks.quality_bench import heads

    reference = torch.log_softmax(torch.randn(2, 30), 1)
    other = reference.clone()
    first = reference.argmax(1)
    other[1] = torch.log_softmax(torch.randn(30), 0)
    changed = first.clone()
    changed[1] = (first[1] + 1) % 30
    figures = heads._Figures()
    given = torch.tensor([3, 4])
    figures.add(reference, first, other, changed, given, [5, 9])
    found = figures.summary()
    assert found["other_first_tokens"] == 1
    kl = (reference[1].exp() * (reference[1] - other[1])).sum() / 2
    assert found["kl_nats"] == pytest.approx(float(kl), abs=1e-6)
    mean = (other[0, 3] + other[1, 4]) / 2
    assert found["perplexity"] == pytest.approx(float((-mean).exp()), rel=1e-5)
    assert found["rescored_rows"] == {"mean": 7, "p99": 9, "largest": 9}
    result = {
        "positions": 2,
        "reference": "16-bit",
        "heads": {"int4_rescored": found},
    }
    assert "1 (50.000%)" in "\n".join(heads.as_lines(result))
