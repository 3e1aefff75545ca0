# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm serve`` on broken checkpoints, and with another group size and dtype."""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.serve_bench.vllm_server import VllmServer
from tools.demo import SUMMARY

from ..support.api_client import Client
from ..support.checkpoints import WEIGHTS, copy_checkpoint, requantize, save_weights
from ..support.reference_model import ReferenceModel

pytestmark = pytest.mark.e2e

CHECKOUT = Path(__file__).resolve().parents[2]

EXIT_TIMEOUT_S = 600.0
START_TIMEOUT_S = 600.0


def log_of_failing_load(name: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Return the output of a process that cannot load ``folder``."""
    cases = json.dumps({name: [str(folder), {}]})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.load_worker", cases],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith(f"=== {name}: failed\n"), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_switched_off_is_stock_vllm(checkpoint: Path) -> None:
    logs = {
        "off": log_of_failing_load("off", checkpoint, {"VLLM_HYBRID_W4A16_MOE": "0"}),
        "not loaded": log_of_failing_load("not", checkpoint, {"VLLM_PLUGINS": ""}),
    }
    chosen = {name: re.findall(r"\] (Using .*)", log) for name, log in logs.items()}
    assert chosen["off"] == chosen["not loaded"] != []
    assert "HybridW4A16" not in logs["not loaded"]
    for log in logs.values():
        assert not SUMMARY.search(log), "no layer is taken"
        # Stock vLLM 0.32 does not load the checkpoint's experts on a CPU.
        assert "no parameter 'w2_qweight'" in log


def test_truncated_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    truncated = copy_checkpoint(checkpoint, tmp_path / "truncated")
    with (truncated / WEIGHTS).open("r+b") as file:
        file.truncate(6_000_000)
    log = log_of_failing_load("truncated", truncated, {})
    assert "SafetensorError" in log
    assert "incomplete metadata, file not fully covered" in log


def test_server_does_not_come_up_on_a_broken_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    asymmetric = copy_checkpoint(checkpoint, tmp_path / "asymmetric")
    tensors = load_file(asymmetric / WEIGHTS)
    zeros = tensors["model.layers.2.mlp.experts.5.down_proj.qzeros"]
    zeros[1, 3] ^= 0x10  # the second nibble: 6 instead of 7
    save_weights(tensors, asymmetric)
    with VllmServer(
        asymmetric,
        tmp_path / "server.log",
        ["--enforce-eager"],
        {"VLLM_HYBRID_W4A16_MOE": None},
    ) as server:
        assert server.wait_exit(EXIT_TIMEOUT_S) != 0
        log = server.log_text()
    assert re.search(
        r"ValueError: model\.layers\.2\.mlp\.experts\.5\.down_proj\.qzeros "
        r"holds 0x77777767",
        log,
    )


def test_group_32_in_fp16(checkpoint: Path, tmp_path: Path) -> None:
    folder = requantize(checkpoint, tmp_path / "g32", group_size=32)
    reference = ReferenceModel(folder)
    source = inspect.getsource(textwrap)
    tokens = reference.tokenizer.encode(source, verbose=False)[:512]
    with VllmServer(
        folder,
        tmp_path / "server.log",
        ["--dtype=float16", "--enforce-eager"],
        {"VLLM_HYBRID_W4A16_MOE": "require"},
    ) as server:
        server.wait_ready(START_TIMEOUT_S)
        served = torch.tensor(Client(server).text_logprobs(tokens))
        assert [found[:2] for found in SUMMARY.findall(server.log_text())] == [
            ("6", "6")
        ]
    difference = served - reference.text_logprobs(tokens)
    print(f"absolute difference {difference.abs().mean():.5f} nats")
    # fp16 has 8 times the precision of bf16; see test_serving.
    assert difference.abs().mean() < 0.005
