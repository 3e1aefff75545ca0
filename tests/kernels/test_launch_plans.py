# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The rule in csrc/rocm/plan.h that selects launch plans by shape.

On a fine grid of shapes, the bytes that the rule expects a call to read must not jump
when a token or a column is added. The plans that it selects for RDNA run on the host.
"""

import dataclasses
import functools
import itertools
import math
import platform
import subprocess
import sys

import pytest

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning

from ..support.kernels_on_host import BF16, BUILD, check, run
from .test_moe_int4_on_host import EIGHTS, PAIRS, Maker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs the host build"),
]
# (top_k, experts, hidden, intermediate)
SHAPES = {
    "qwen3-30b-a3b": (8, 128, 2048, 768),
    "qwen3.5-35b-a3b": (8, 256, 2048, 512),
    "qwen3-next-80b-a3b": (10, 512, 2048, 512),
    "glm-4.5-air": (8, 128, 4096, 1408),
    "minimax-m2": (8, 256, 3072, 1536),
    "mixtral-8x7b": (2, 8, 4096, 14336),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """The rule's facts about a device, and the host program that represents it."""

    mma: bool
    compute_units: int
    lds_bytes: int
    table: str

    def most_tokens(self, top_k, experts):
        """Most tokens of decode; prefill handles more."""
        return tuning.prefill_from(self.table, experts, top_k) - 1


H100 = Device(True, 132, 232448, "sm_90")
GFX1151 = Device(False, 40, 65536, "rdna")


@pytest.fixture(scope="module")
def build():
    @functools.cache
    def build(mma, *sources):
        command = [sys.executable, BUILD, *(["--mma"] if mma else []), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return build


@pytest.fixture(scope="module")
def plans(build):
    """plans(device, [(tokens, top_k, experts, hidden, intermediate), ...]): returns the
    rule's gate_up and down plan for each, as plans.cpp prints them."""

    def plans(device, problems):
        program = build(device.mma, BUILD.with_name("plans.cpp"))
        tail = (device.compute_units, device.lds_bytes)
        lines = "".join(" ".join(map(str, (*p, *tail))) + "\n" for p in problems)
        done = subprocess.run([program], input=lines, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [list(map(int, line.split())) for line in done.stdout.splitlines()]
        assert len(rows) == len(problems)
        return [(row[:6], row[6:]) for row in rows]

    return plans


def distinct(tokens, top_k, experts):
    return experts * (1 - (1 - top_k / experts) ** tokens)


def expected_reads(device, problem, kernel, weights):
    """Experts that a call reads, plus the cost of finding sharers, in experts."""
    tokens, top_k, experts = problem[:3]
    if kernel == PAIRS:
        return tokens * top_k
    if kernel == EIGHTS:
        blocks, rest = divmod(tokens, 8)
        reads = blocks * distinct(8, top_k, experts) + distinct(rest, top_k, experts)
        return reads / 0.95
    limit = 0.82 + 0.065 * math.log2(0.5 * weights / 1e6)
    return distinct(tokens, top_k, experts) / min(max(limit, 0.77), 0.96)


def both_reads(device, problem, plan):
    hidden, inter = problem[3:]
    gate_up, down = plan
    return (
        expected_reads(device, problem, gate_up[0], 2 * hidden * inter),
        expected_reads(device, problem, down[0], hidden * inter),
    )


@pytest.mark.parametrize("device", [H100, GFX1151], ids=["sm_90", "gfx1151"])
def test_no_cliff_where_a_token_is_added(device, plans):
    others = [(2, 16, 4096, 6400), (4, 60, 2048, 1408), (6, 64, 2048, 1408)]
    for shape in [*SHAPES.values(), *others]:
        last = device.most_tokens(*shape[:2])
        problems = [(t, *shape) for t in range(1, last + 1)]
        found = plans(device, problems)
        pairs = list(zip(problems, found, strict=True))
        for (before, old), (after, new) in itertools.pairwise(pairs):
            growth = after[0] / before[0]
            for op, (less, more) in enumerate(
                zip(
                    both_reads(device, before, old),
                    both_reads(device, after, new),
                    strict=True,
                )
            ):
                where = f"{shape}, {before[0]} to {after[0]} tokens, op {op}"
                # down's grouped kernels also run for few tokens if there are many tiles
                falls = 0.75 if op == 1 and old[1][0] == PAIRS else 0.97
                assert more >= falls * less, where
                assert more <= 1.06 * growth * less, where
                if old[op][0] != PAIRS and new[op][0] == PAIRS:
                    pytest.fail(f"{where}: back to pairs")


@pytest.mark.parametrize("device", [H100, GFX1151], ids=["sm_90", "gfx1151"])
def test_no_cliff_where_columns_are_added(device, plans):
    for (top_k, experts, hidden, _), t in itertools.product(
        SHAPES.values(), (1, 2, 3, 4, 8, 16)
    ):
        problems = [(t, top_k, experts, hidden, i) for i in range(256, 4097, 32)]
        pairs = list(zip(problems, plans(device, problems), strict=True))
        for (before, old), (after, new) in itertools.pairwise(pairs):
            where = f"{before} to {after}"
            for op, (less, more) in enumerate(
                zip(
                    both_reads(device, before, old),
                    both_reads(device, after, new),
                    strict=True,
                )
            ):
                assert 0.85 <= more / less <= 1.15, f"{where}, op {op}"
                if old[op][0] == new[op][0]:  # as much in flight: waves of the grid
                    assert 0.45 <= new[op][4] / old[op][4] <= 2.2, f"{where}, op {op}"
                assert new[op][5] <= device.lds_bytes, f"{where}, op {op}"


@pytest.mark.parametrize("name", SHAPES)
def test_experts_are_read_once_for_few_tokens_on_rdna(name, plans):
    """At most 5% of the bytes are read again up to 8 tokens, for any shape.

    The exception is down, where the fifth and later tokens of an expert read it again.
    """
    shape = SHAPES[name]
    problems = [(t, *shape) for t in range(1, 9)]
    for problem, plan in zip(problems, plans(GFX1151, problems), strict=True):
        once = distinct(*problem[:3])
        for op in plan:
            reads = problem[0] * shape[0] if op[0] == PAIRS else once
            assert reads <= once / 0.95


# Calls are scaled down to an eighth of hidden, intermediate and compute units, so that
# the rule sees as many tiles per compute unit as in the full call.
RUNS = [
    pytest.param(name, tokens, marks=[] if short else [pytest.mark.nightly])
    for name, tokens in itertools.product(SHAPES, (1, 2, 4, 8, 16))
    for short in [(name, tokens) == ("qwen3-30b-a3b", 2)]
]


@pytest.mark.parametrize(("name", "tokens"), RUNS)
def test_rdna_plans_of_the_rule_run(name, tokens, build):
    top_k, experts, hidden, inter = SHAPES[name]
    hidden, inter = hidden // 8, (inter // 8 + 31) // 32 * 32
    group = next(g for g in (128, 64, 32) if hidden % g == 0 and inter % g == 0)
    calls = []
    for op, n, k in (("gate_up", inter, hidden), ("down", hidden, inter)):
        maker = Maker(False, op, BF16, group, False)
        maker.aligned = True
        case = getattr(maker, op)(tokens, n, k, PAIRS, (top_k, experts))
        del case.fields["plan"]
        case.fields["cu_count"] = GFX1151.compute_units // 8
        calls.append(case)
    outcome = run(build(False), calls)
    check(outcome)
    shares = distinct(tokens, top_k, experts) < 0.95 * tokens * top_k
    for reply in outcome.replies:
        (kernel,) = set(reply["kernels"].decode().split())  # one launch per order
        assert kernel.endswith("_t8" if shares else "_t1")


@pytest.mark.nightly
@pytest.mark.parametrize("mma", [False, True], ids=["dot products", "mma"])
def test_long_rows_and_many_experts_run(mma, build):
    """Mixtral's k in down, 512 experts with top-10; few rows, with the rule's plan."""
    calls = []
    for op, tokens, n, k, routed in (
        ("gate_up", 3, 24, 4096, (2, 8)),
        ("down", 3, 32, 14336, (2, 8)),
        ("gate_up", 9, 16, 256, (10, 512)),
        ("down", 9, 32, 128, (10, 512)),
    ):
        maker = Maker(mma, op, BF16, 128, True)
        maker.aligned = True
        case = getattr(maker, op)(tokens, n, k, PAIRS, routed)
        del case.fields["plan"]
        calls.append(case)
    check(run(build(mma), calls))
