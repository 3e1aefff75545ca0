# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The Triton prefill kernels against float64.

On a GPU the randomized sweep runs there. Elsewhere ``test_in_the_interpreter`` runs a
short sweep in a separate process that sets ``TRITON_INTERPRET=1`` before anything
imports Triton. Inputs are new in every run. A failure prints its seed, which
HYBRID_W4A16_TEST_SEED reproduces.

A family of cases shares the compiled kernels, since compiling takes far longer than
running. A family is one test, so many workers help (``pytest -n 8``).
"""

import itertools
import os
import random
import re
import secrets
import subprocess
import sys

import pytest
import torch

# fork: begin overlay
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

# fork: end
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    MoEShape,
    PrefillTiles,
    Tile,
    Tuned,
)

from . import test_moe_int4_ops as sweep  # for its float64 reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FAMILIES = 24 if ON_GPU else 12
CASES = 21 if ON_GPU else 2  # of each family
SEED = int(os.environ.get("HYBRID_W4A16_TEST_SEED", secrets.randbits(32)))

needs_triton = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="no GPU: see test_in_the_interpreter"
)
if ON_GPU or INTERPRETED:
    from vllm.model_executor.layers.fused_moe.experts import (
        hybrid_w4a16_triton as prefill,
    )
if INTERPRETED:
    from ..support import triton_interpreter

    triton_interpreter.support_bf16()


def align(ids: torch.Tensor, block_m: int, num_experts: int, expert_map):
    """vLLM's ``moe_align_block_size`` in plain torch, with more room."""
    sorted_ids, expert_ids = [], []
    for expert in range(num_experts):
        pairs = (ids.flatten() == expert).nonzero().flatten().tolist()
        pairs += [ids.numel()] * (-len(pairs) % block_m)
        sorted_ids += pairs
        local = expert if expert_map is None else int(expert_map[expert])
        expert_ids += [local] * (len(pairs) // block_m)
    padded = len(sorted_ids)
    # The rest of the buffer is garbage.
    sorted_ids += [7] * (2 * block_m)
    expert_ids += [0, 10**6]
    lists = sorted_ids, expert_ids, [padded]
    tensors = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in lists)
    return prefill.Blocks(*tensors)


FORMATS = list(
    itertools.product([torch.float16, torch.bfloat16], [32, 64, 128], [False, True])
)
TILES = [
    PrefillTiles(Tile(16, 64, 4, 3), Tile(16, 128, 4, 3)),
    PrefillTiles(Tile(32, 32, 4, 1), Tile(32, 64, 4, 2)),
    PrefillTiles(Tile(64, 64, 8, 2), Tile(64, 32, 4, 1)),
]
NATURAL_TILES = [
    PrefillTiles(Tile(16, 64, 4, 1, "natural"), Tile(16, 128, 4, 1, "natural")),
    PrefillTiles(Tile(64, 128, 8, 1, "natural"), Tile(64, 64, 4, 1, "natural")),
    # The two orders together: gate_up writes in the order that down reads.
    PrefillTiles(Tile(32, 128, 8, 1, "natural"), Tile(32, 64, 4, 1)),
    PrefillTiles(Tile(32, 64, 4, 1), Tile(32, 256, 8, 1, "natural")),
]


class Family:
    """The properties that kernels are compiled for."""

    def __init__(self, number: int) -> None:
        rng = random.Random(f"{SEED} {number}")
        self.dtype, self.group, self.zeros = FORMATS[number % len(FORMATS)]
        # cases alternate between them
        self.tiles = rng.choice(TILES), rng.choice(NATURAL_TILES)
        self.weighted = rng.random() < 0.8
        self.activation = sweep.ACTIVATIONS[rng.choice(list(sweep.ACTIVATIONS))]
        groups = (768 if ON_GPU else 256) // self.group
        self.sizes = [
            (self.group * rng.randint(1, groups), self.group * rng.randint(1, groups))
            for _ in range(2)
        ]
        self.pad13, self.pad2 = rng.choice([0, 32]), rng.choice([0, 4])
        self.gap = rng.choice([0, 0, 8])
        self.ids = rng.choice([torch.int32, torch.int64])
        self.text = f"HYBRID_W4A16_TEST_SEED={SEED} family {number} {vars(self)}"


class PrefillStep:
    """One experts call on random data, and its float64 result."""

    def __init__(self, family: Family, case: int = 0) -> None:
        rng = random.Random(SEED + case)
        torch.manual_seed(SEED + case)
        dtype, group = family.dtype, family.group
        hidden, inter = family.sizes[case % len(family.sizes)]
        count = rng.randint(1, 9)
        top_k = rng.randint(1, 5)
        tokens = rng.randint(1, 80 if ON_GPU else 20)
        self.global_experts = count + rng.choice([0, 0, 3])
        shape13, shape2 = (count, 2 * inter, hidden), (count, hidden, inter)
        w13 = sweep.Experts(*shape13, group, dtype, family.zeros, family.pad13)
        w2 = sweep.Experts(*shape2, group, dtype, family.zeros, family.pad2)
        a = torch.randn(tokens, hidden).to(dtype)
        expert_map = None
        if self.global_experts > count:
            places = torch.randperm(self.global_experts)[:count]
            expert_map = torch.full((self.global_experts,), -1, dtype=torch.int32)
            expert_map[places] = torch.arange(count, dtype=torch.int32)
        # Few experts, many picks: some experts get none, and a token may pick one
        # twice.
        ids = torch.randint(0, self.global_experts, (tokens, top_k))
        weights = torch.rand(tokens, top_k) if family.weighted else None
        act = sweep.activation(*family.activation)
        local = sweep.local_experts(ids, expert_map, count)
        self.expected = torch.zeros(tokens, hidden, dtype=torch.float64)
        for expert in range(count):
            rows, slots = (local == expert).nonzero(as_tuple=True)
            h = act(a[rows].double() @ w13.dense[expert].T)
            y = h.to(dtype).double() @ w2.dense[expert].T
            if weights is not None:
                y *= weights[rows, slots, None].double()
            self.expected.index_add_(0, rows, y)

        self.tiles, gap = family.tiles[case % 2], family.gap
        self.a = sweep.strided_copy(sweep.odd_rows(a, gap), DEVICE)
        self.out = sweep.Output(tokens, hidden, dtype, DEVICE, gap)
        self.ids = ids.to(family.ids).to(DEVICE)
        self.weights = None if weights is None else weights.to(DEVICE)
        self.map = None if expert_map is None else expert_map.to(DEVICE)
        self.w13 = prefill.Int4Matrix(*w13.args(DEVICE), group)
        self.w2 = prefill.Int4Matrix(*w2.args(DEVICE), group)
        self.activation = prefill.Activation(*family.activation)
        sizes = tokens, top_k, hidden, inter
        elements = prefill.Workspace.elements(*sizes)
        self.buffer = sweep.Output(1, elements, dtype, DEVICE, 0)
        self.workspace = prefill.Workspace.split(self.buffer.view, *sizes)
        self.blocks = align(
            ids, self.tiles.down.block_m, self.global_experts, expert_map
        )
        self.text = (
            f"{family.text} case {case}: experts {count} of {self.global_experts} "
            f"tokens {tokens} top-{top_k} hidden {hidden} intermediate {inter}"
        )

    def run(self) -> None:
        prefill.prefill_experts(
            self.a,
            self.w13,
            self.w2,
            self.out.view,
            self.workspace,
            self.ids,
            self.weights,
            self.map,
            self.blocks,
            self.activation,
            self.tiles,
        )


@needs_triton
@pytest.mark.parametrize("number", range(FAMILIES))
def test_against_float64(number):
    family = Family(number)
    for case in range(number * CASES, (number + 1) * CASES):
        step = PrefillStep(family, case)
        step.run()
        sweep.check(step.out, step.expected, step.text)
        step.buffer.check_surroundings()


# fork: begin lm_head
@needs_triton
@pytest.mark.parametrize("number", range(6 if INTERPRETED else FAMILIES))
def test_dense_against_float64(number):
    """Without sorted pairs: one expert, every row in its place."""
    family = Family(number)
    rng = random.Random(SEED + number)
    torch.manual_seed(SEED + number)
    k, n = family.sizes[0][0], 8 * rng.randint(1, 20)
    rows = rng.randint(1, 100)
    weights = sweep.Experts(1, n, k, family.group, family.dtype, family.zeros, 4)
    a = torch.randn(rows, k).to(family.dtype)
    words, scales, zeros = (None if t is None else t[0] for t in weights.args(DEVICE))
    x = sweep.strided_copy(sweep.odd_rows(a, family.gap), DEVICE)
    tiles = [family.tiles[number % 2].down]
    # fork: end
    # fork: begin overlay
    if ops.has_tiled():
        tiles += [
            Tile(t, 64 * (1 + number % 2), 2, 2, "tiled") for t in (8, 16, 32, 64)
        ]
    # fork: end
    # fork: begin lm_head
    expected = a.double() @ weights.dense[0].T
    for tile in tiles:
        y = prefill.dense(x, words, scales, zeros, family.group, tile)
        error = (y.cpu().double() - expected).norm() / expected.norm()
        assert error < sweep.TOLERANCE[family.dtype], (family.text, tile, rows, n, k)


@needs_triton
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("number", range(3 if INTERPRETED else FAMILIES))
def test_dequantized_weights_are_exact(number, bits, monkeypatch):
    """Each is rounded once; torch's GEMM then multiplies with a part at a time."""
    from vllm.model_executor.layers.quantization import (
        hybrid_w4a16_dense_linear,
        hybrid_w4a16_dense_ops,
        hybrid_w4a16_dense_triton,
    )

    family = Family(number)
    rng = random.Random(SEED + number)
    torch.manual_seed(SEED + number)
    k, n, rows = family.sizes[0][0], 8 * rng.randint(1, 20), rng.randint(17, 100)
    if bits == 4:
        experts = sweep.Experts(1, n, k, family.group, family.dtype, family.zeros, 4)
        w, s, z = (None if t is None else t[0] for t in experts.args(DEVICE))
        dense = experts.dense[0]
    else:
        weight = torch.randn(n, k, device=DEVICE).to(family.dtype)
        w, s, _ = hybrid_w4a16_dense_ops.quantize(weight, 8, family.group)
        z, dense = None, hybrid_w4a16_dense_ops.dequantize(w, s, 8)
    made = hybrid_w4a16_dense_triton.dequantize(w, s, z, bits, family.group)
    assert torch.equal(made.cpu(), dense.float().cpu().to(family.dtype)), family.text

    module = hybrid_w4a16_dense_linear
    monkeypatch.setattr(module, "dequantize_from", lambda name: rows)
    monkeypatch.setattr(module, "_AT_ONCE", 24 * k)  # the last part is smaller
    monkeypatch.setattr(prefill, "dense", None)
    x = sweep.strided_copy(
        sweep.odd_rows(torch.randn(rows, k).to(family.dtype), family.gap), DEVICE
    )
    y = module._multiply_on_gpu(x, w, s, z, 1, family.group, bits, "sm_90")
    expected = x.cpu().double() @ dense.double().cpu().T
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error < sweep.TOLERANCE[family.dtype], family.text


# fork: end
# fork: begin token
@needs_triton
def test_a_gpu_takes_many_rows_of_a_dense_linear_to_triton():
    """Few go to the skinny GEMM."""
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear

    weights = sweep.Experts(1, 72, 256, 128, torch.bfloat16, True)
    w, s, z = (t[0] for t in weights.args(DEVICE))
    for rows in (16, 17):
        x = torch.randn(rows, 256).bfloat16().to(DEVICE)
        y = hybrid_w4a16_dense_linear._multiply_on_gpu(x, w, s, z, 1, 128, 4, "gfx1151")
        expected = x.cpu().double() @ weights.dense[0].T
        error = (y.cpu().double() - expected).norm() / expected.norm()
        assert error < sweep.TOLERANCE[torch.bfloat16], rows


# fork: end
@needs_triton
def test_same_bits_again():
    step = PrefillStep(Family(0))
    step.run()
    first = step.out.view.clone()
    step.out.view.fill_(float("nan"))
    step.buffer.view.fill_(float("nan"))
    step.run()
    assert torch.equal(first, step.out.view), step.text


@needs_triton
def test_ids_outside_of_the_experts_are_skipped():
    step = PrefillStep(Family(0))
    pairs = torch.full_like(step.workspace.down_out, float("nan"))
    top_k = step.ids.shape[1]
    step.ids[:, 0] = -1
    step.ids[0, :] = step.global_experts
    keep = torch.zeros(step.ids.shape, dtype=torch.bool, device=DEVICE)
    keep[1:, 1:] = True
    step.ids[keep] = 0
    pairs[keep.flatten()] = 1.0
    map_ = None if step.map is None else torch.zeros_like(step.map)
    prefill.sum_pairs(pairs, step.out.view, step.ids, map_, step.global_experts)
    expected = keep.sum(1, keepdim=True).expand(-1, step.out.view.shape[1])
    assert torch.equal(step.out.view.cpu().float(), expected.cpu().float()), top_k


@needs_triton
def test_a_short_workspace_is_refused():
    with pytest.raises(
        ValueError, match="workspace: expected at least 4480 elements, got 99"
    ):
        prefill.Workspace.split(torch.empty(99), 5, 2, 320, 100)


# fork: begin overlay
@pytest.mark.skipif(not INTERPRETED, reason="see test_in_the_interpreter")
@pytest.mark.parametrize("ep", [(1, 0), (2, 1)])
def test_a_layer_takes_prefill_from_the_crossover_on(monkeypatch, ep):
    """A loaded layer that is told it is on a GPU, with ``align`` for sorting."""
    from vllm.plugins import load_general_plugins

    from ..support.moe_layers import (
        Checkpoint,
        Shape,
        inc_config,
        make_layer,
        random_routing,
        relative_error,
        run_layer,
    )

    def sort(ids, block_m, num_experts, expert_map):
        assert (expert_map is not None) == (ep[0] > 1)
        calls.append(ids.shape[0])
        return align(ids, block_m, num_experts, expert_map)

    monkeypatch.setattr(prefill, "sort_pairs", sort)
    load_general_plugins()
    shape = Shape(experts=4)
    checkpoint = Checkpoint(shape)
    layer = make_layer(shape, inc_config(), ep=ep)
    checkpoint.load_into(layer)
    experts = layer.quant_method.moe_kernel.fused_experts
    x = torch.randn(5, shape.hidden, dtype=torch.bfloat16)
    weights, ids = random_routing(5, shape)
    ids[0, 0], ids[1, 1] = -1, shape.experts  # outside: skipped on both paths
    calls: list[int] = []
    decoded = run_layer(layer, x, weights, ids)
    assert not calls
    small = MoEShape(4, shape.top_k, shape.hidden, shape.intermediate, 64, "bf16")
    experts.tuned, experts.prefill_from = Tuned("gfx1151", small, 5, "rule"), 5
    prefilled = run_layer(layer, x, weights, ids)
    assert calls == [5]
    assert relative_error(prefilled, decoded) < sweep.TOLERANCE[torch.bfloat16]
    run_layer(layer, x[:4], weights[:4], ids[:4])
    assert calls == [5]


# fork: end
@pytest.mark.skipif(ON_GPU, reason="the sweep runs on the GPU")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-5000:], run.stderr[-2000:])
    assert run.returncode == 0
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > 12
    # fork: begin overlay
    assert int(passed[1]) == 30
    # fork: end
