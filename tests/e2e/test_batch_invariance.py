# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""vLLM's batch-invariant mode: a request gets the same log-probabilities, to the last
bit, alone and in a batch. Experts, linears and lm_head are all int4."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.invariance_worker import MARK

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]
CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = CHECKOUT / "demo/int4-autoround-g128"


def run_engine(asked_for: str) -> dict:
    """What invariance_worker prints with that value of vLLM's variable."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.invariance_worker", str(DEMO)],
        cwd=CHECKOUT,
        env=os.environ | {"VLLM_BATCH_INVARIANT": asked_for},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (line,) = (x for x in done.stdout.splitlines() if x.startswith(MARK))
    return json.loads(line.removeprefix(MARK))


def test_requests_are_the_same_alone_and_in_a_batch():
    found = run_engine("1")
    assert found["row_invariant"]
    assert found["same"] == found["prompts"]


def test_without_the_mode_they_differ():
    found = run_engine("0")
    assert not found["row_invariant"]
    assert found["same"] < found["prompts"]
