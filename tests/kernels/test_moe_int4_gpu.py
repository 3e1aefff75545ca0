# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Tests of the int4 MoE ops that need a GPU; skipped without one.

A decode step (gate_up, then down), eager and replayed from a graph, against float64 on
inputs that are new in every run (a failure prints its seed, HYBRID_W4A16_TEST_SEED
reproduces it); long reductions; other streams; an architecture without code.
"""

import os
import random
import secrets

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

from . import test_moe_int4_ops as sweep  # for its float64 reference

SEED = int(os.environ.get("HYBRID_W4A16_TEST_SEED", secrets.randbits(32)))
GPU = ops.load_error() is None and bool({"hip", "cuda"} & set(ops.build_info()))

pytestmark = pytest.mark.skipif(
    not (GPU and torch.cuda.is_available()), reason="no GPU that the ops are built for"
)


class DecodeStep:
    """One experts call on random data: its inputs, its ops, its float64 result."""

    def __init__(
        self, seed, tokens, group, top_k=None, hidden=None, inter=None, count=None
    ):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        dtype = rng.choice([torch.float16, torch.bfloat16])
        zeros = rng.random() < 0.5
        hidden = hidden or group * rng.randint(1, 1024 // group)
        inter = inter or group * rng.randint(1, 256 // group)
        count = count or rng.randint(1, 12)
        top_k = top_k or rng.randint(1, 16)
        shape13, shape2 = (count, 2 * inter, hidden), (count, hidden, inter)
        w13 = sweep.Experts(*shape13, group, dtype, zeros, rng.choice([0, 32]))
        w2 = sweep.Experts(*shape2, group, dtype, zeros, rng.choice([0, 4]))
        a = torch.randn(tokens, hidden).to(dtype)
        # Few experts and many picks: tokens share experts, and pick some twice.
        ids = torch.randint(-1, count, (tokens, top_k))
        weights = torch.rand(tokens, top_k)
        name, *parameters = sweep.ACTIVATIONS[rng.choice(list(sweep.ACTIVATIONS))]

        pairs = [(m, t) for m in range(tokens) for t in range(top_k) if ids[m, t] >= 0]
        h = torch.full((tokens, top_k, inter), float("nan"), dtype=torch.float64)
        self.expected_c = torch.zeros(tokens, hidden, dtype=torch.float64)
        act = sweep.activation(name, *parameters)
        for m, t in pairs:
            h[m, t] = act(w13.dense[ids[m, t]] @ a[m].double())
            y = w2.dense[ids[m, t]] @ h[m, t].to(dtype).double()
            self.expected_c[m] += weights[m, t].double() * y
        self.expected_h = h.view(tokens * top_k, inter)

        gap = rng.choice([0, 0, 1, 8])
        self.h = sweep.Output(tokens * top_k, inter, dtype, "cuda", 0)
        self.c = sweep.Output(tokens, hidden, dtype, "cuda", gap)
        self.a = sweep.strided_copy(sweep.odd_rows(a, gap), "cuda")
        self.ids = ids.to(rng.choice([torch.int32, torch.int64])).cuda()
        self.weights = weights.cuda()
        self.w13, self.w2 = w13.args("cuda"), w2.args("cuda")
        self.activation, self.group = (name, parameters), group

    def run(self, gate_up_plan=None, down_plan=None):
        (w13, s13, z13), (w2, s2, z2) = self.w13, self.w2
        h, c, name, parameters = self.h.view, self.c.view, *self.activation
        ops.fused_moe_wvSplitK_int4_gate_up(
            *(self.a, w13, s13, h, self.ids, name, 132, self.group, z13, None),
            *parameters,
            plan=gate_up_plan,
        )
        ops.fused_moe_wvSplitK_int4_down(
            *(h, w2, s2, c, self.ids, self.weights, 132, self.group, z2),
            plan=down_plan,
        )

    def poison(self):
        self.h.view.fill_(float("nan"))
        self.c.view.fill_(float("nan"))

    def check(self, context):
        sweep.check(self.h, self.expected_h, f"{context}, gate_up")
        sweep.check(self.c, self.expected_c, f"{context}, down")


def replay(step):
    """Return the bits that a graph of the step writes on its second replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for _ in range(2):
        step.poison()
        graph.replay()
    torch.cuda.synchronize()
    return step.c.flat.view(torch.int16).clone()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("draw", range(8))
def test_decode_step(tokens, group, draw):
    seed = SEED + 1000 * draw + 10 * group + tokens
    step = DecodeStep(seed, tokens, group)
    step.run()
    step.check(f"seed {seed}, eager")
    eager = step.c.flat.view(torch.int16).clone()
    assert torch.equal(replay(step), eager), f"seed {seed}: a replay writes other bits"
    step.check(f"seed {seed}, replayed")


@pytest.mark.parametrize("tokens", [1, 5, 11])
def test_longest_reductions(tokens):
    step = DecodeStep(SEED + tokens, tokens, 128, 2, 16384, 128, count=2)
    step.run()
    step.check(f"seed {SEED + tokens}, hidden 16384")
    step = DecodeStep(SEED + tokens, tokens, 32, 2, 64, 16384, count=2)
    step.run()
    step.check(f"seed {SEED + tokens}, inter 16384")


@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 24, 64, 70])
@pytest.mark.parametrize("draw", range(4))
def test_tokens_that_share_experts(tokens, draw):
    seed = SEED + 1000 * draw + tokens
    step = DecodeStep(seed, tokens, 64, 3, 1024, 256, count=5 + 20 * draw)
    step.run()
    step.check(f"seed {seed}, eager")
    eager = step.c.flat.view(torch.int16).clone()
    assert torch.equal(replay(step), eager), f"seed {seed}: a replay writes other bits"


@pytest.mark.skipif("cuda" not in ops.build_info() if GPU else True, reason="no CUDA")
@pytest.mark.parametrize("tokens", [1, 5, 17, 70])
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ([0, 3, 0, 0], [0, 6, 2, 0]),
        ([1, 4, 0, 0], [1, 4, 1, 0]),
        ([3, 4, 0, 3], [1, 4, 1, 0]),
        ([2, 4, 8, 2], [2, 6, 1, 8]),
        ([2, 2, 16, 1], [3, 8, 4, 5]),
        ([2, 3, 1, 3], [3, 2, 1, 1]),
    ],
)
def test_every_plan_gives_the_same_result(tokens, gate_up, down):
    step = DecodeStep(SEED + tokens, tokens, 32, 4, 1024, 512, count=16)
    # some kernels need aligned rows
    step.a = step.a.clone(memory_format=torch.contiguous_format)
    step.h = sweep.Output(*step.h.shape, step.a.dtype, "cuda", gap=0, guard=64)
    step.run(gate_up, down)
    step.check(f"seed {SEED + tokens}, plans {gate_up} and {down}")


@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_large_and_many_experts(tokens):
    step = DecodeStep(SEED + tokens, tokens, 128, 2, 4096, 14336, count=2)
    step.run()
    step.check(f"seed {SEED + tokens}, 4096 x 14336")
    step = DecodeStep(SEED + tokens, tokens, 32, 10, 256, 64, count=512)
    step.run()
    step.check(f"seed {SEED + tokens}, 512 experts")


def test_runs_on_the_current_stream():
    step = DecodeStep(SEED, 3, 64)
    real = step.a.clone()
    step.a.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on another stream would finish during this
        step.a.copy_(real)
        step.run()
    stream.synchronize()
    step.check(f"seed {SEED}")


def test_build_info_names_this_device():
    major, minor = torch.cuda.get_device_capability()
    built = ops.build_info()
    if "hip" in built:
        name = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
        assert name in built["hip"]
    else:
        same_major = [a for a in built["cuda"] if a.startswith(f"sm_{major}")]
        assert same_major or any(a.startswith("compute_") for a in built["cuda"])
