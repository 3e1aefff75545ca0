# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Speculative decoding with a Qwen3.5-MoE's own MTP layer, as published checkpoints
have it. On a GPU machine the engines run on the GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.matrix import STAND_INS
from ..support.mtp_checkpoints import make_mtp_checkpoint
from ..support.mtp_worker import MARK, NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.e2e

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900.0
# A draft is verified in a batch of several tokens, where sums may round differently.
# Logits are bf16: near 8 their last place is 0.03, and two of them can move.
TIE = 0.07

EAGER = {
    "eager": {"drafts": 0, "eager": True},
    "eager, 3 drafts": {"drafts": 3, "eager": True},
}
LONG = {
    **EAGER,
    "eager, 1 draft": {"drafts": 1, "eager": True},
    "eager, 2 drafts": {"drafts": 2, "eager": True},
    "compiled": {"drafts": 0, "eager": False},
    "compiled, 1 draft": {"drafts": 1, "eager": False},
    "compiled, 2 drafts": {"drafts": 2, "eager": False},
    "compiled, 3 drafts": {"drafts": 3, "eager": False},
}


def run_engines(checkpoint, engines):
    """What mtp_worker prints for ``engines``, by name."""
    environment = dict(os.environ)
    if importlib.util.find_spec("torchvision") is None:
        path = [str(STAND_INS), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.mtp_worker",
            checkpoint,
            json.dumps(engines),
        ],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    answers = [json.loads(line.removeprefix(MARK)) for line in lines]
    return {answer["name"]: answer for answer in answers}


def first_difference(plain, drafted):
    """The position at which the tokens part, and how much likelier the plain one is.

    ``None`` if they do not. The plain engine lists its likeliest tokens; another one is
    not a tie.
    """
    pairs = enumerate(zip(plain["tokens"], drafted["tokens"], strict=True))
    for place, (a, b) in pairs:
        if a != b:
            seen = plain["logprobs"][place]
            return place, seen[str(a)] - seen.get(str(b), float("-inf"))
    return None


def check(found):
    """Tokens with drafts are those without, up to proven ties."""
    for name, answer in found.items():
        plain = found[name.partition(",")[0]]["answers"]
        parted = [
            first_difference(a, b)
            for a, b in zip(plain, answer["answers"], strict=True)
        ]
        print(name, answer["counters"], [p for p in parted if p])
        assert all(p is None or 0 <= p[1] <= TIE for p in parted), (name, parted)
        assert parted.count(None) > PROMPTS // 2, (name, parted)
        if "draft" not in name:
            continue
        counters = answer["counters"]
        drafts, accepted = counters["num_draft_tokens"], counters["num_accepted_tokens"]
        assert 0.05 * drafts < accepted < 0.95 * drafts, counters
        # every step gives one token beside the accepted drafts, except at the end
        steps = counters["num_drafts"]
        assert steps + accepted >= 0.9 * PROMPTS * (NEW_TOKENS - 1), counters


def test_drafts_of_an_int4_layer(tmp_path):
    found = run_engines(make_mtp_checkpoint(tmp_path), EAGER)
    check(found)
    facts = found["eager, 3 drafts"]["drafter"]
    assert facts["method"] == "INCHybridW4A16MoEMethod"
    assert facts["weights_of_the_file"]


@pytest.mark.nightly
def test_one_to_three_drafts_eager_and_compiled(tmp_path):
    check(run_engines(make_mtp_checkpoint(tmp_path), LONG))


@pytest.mark.nightly
def test_drafts_of_a_16_bit_layer(tmp_path):
    """The recipe of the checkpoint leaves all of ``mtp`` in 16 bits."""
    found = run_engines(make_mtp_checkpoint(tmp_path, int4_experts=False), EAGER)
    check(found)
    method = found["eager, 3 drafts"]["drafter"]["method"]
    assert method == "UnquantizedFusedMoEMethod"
