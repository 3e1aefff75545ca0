# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``tune`` with simulated timings: what it chooses, writes and looks up again."""

import argparse
import dataclasses
import functools
import json
import math
import random
from pathlib import Path

import pytest
import torch

# Binds device_family before a test replaces it.
import vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe  # noqa: F401
from vllm import envs
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    MoEShape,
    Tile,
)
from vllm.plugins.hybrid_w4a16 import (
    cli,
    explain_checkpoint,
    random_layers,
    tune_bench,
    tune_command,
    tune_search,
    tune_shape,
)
from vllm.plugins.hybrid_w4a16.tune_search import Measured, choose

BUNDLED = Path(__file__).resolve().parents[2] / "demo/int4-autoround-g128"
# No shipped entry of sm_90 is near it.
SHAPE = MoEShape(128, 8, 1024, 768, 128, "bf16")
GPU = dataclasses.replace(devices.PLANNED["cuda"], name="sm_90", cu_count=132)


@pytest.fixture(autouse=True)
def own_config_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path))
    assert str(tmp_path) == envs.VLLM_CONFIG_ROOT
    tuning.forget()
    yield
    tuning.forget()


def sampler(times, noise=0.002, seed=0):
    """Samples of simulated candidates; ``times`` may depend on the call count."""
    rng = random.Random(seed)

    def sample(candidate, count):
        us = times[candidate] if isinstance(times, dict) else times(candidate)
        return [us * rng.gauss(1, noise) for _ in range(count)]

    return sample


def test_the_fastest_candidate_wins():
    choice = choose(None, [1, 2, 3], sampler({None: 10, 1: 9, 2: 7, 3: 8}))
    assert choice.winner == 2 and choice.us == choice.fastest_us
    assert choice.us == pytest.approx(7, 0.01)
    assert choice.current_us == pytest.approx(10, 0.01)


def test_a_gain_within_the_noise_does_not_count():
    sample = sampler({None: 10, 1: 9.7}, noise=0.08)
    assert choose(None, [1], sample).winner is None
    assert choose(None, [1], sampler({None: 10, 1: 9.95})).winner is None
    assert choose(None, [1], sampler({None: 10, 1: 9.7})).winner == 1


def test_a_gain_counts_although_the_clock_falls_meanwhile():
    """As measured on an H200: in the first pass all times grow by 6%."""
    taken = 0

    def sample(candidate, count):
        nonlocal taken
        taken += count
        clock = 1 if taken <= 12 else 1.06
        return [{None: 73.1, 1: 69.1, 2: 72.8}[candidate] * clock] * count

    assert choose(None, [1], sample).winner == 1
    taken = 0
    assert choose(None, [2], sample).winner is None


def test_a_machine_that_slows_down_makes_no_winner():
    """Later samples are slower; alternating in both orders cancels that out."""
    calls = []

    def times(candidate):
        calls.append(candidate)
        return 10 * (1 + len(calls) / 200)

    sample = sampler(times)
    assert choose("now", list(range(20)), sample).winner == "now"


def test_no_candidate_is_no_error():
    assert choose(None, [], sampler({None: 3.0})).winner is None


# Sizes of a plan on a logarithmic scale, on which simulated costs are smooth.
def sizes(op, plan):
    kernel, waves, third, fourth = plan
    if op == "down":
        waves //= third
    return kernel, [math.log2(max(1, value)) for value in (waves, third, fourth)]


def made_up_cost(op, seed, rough=0.0):
    """A valley per kernel, oblique to the axes; some plans are rejected."""
    rng = random.Random(seed)
    floor = {kernel: rng.uniform(10, 14) for kernel in range(4)}
    centre = {kernel: [rng.uniform(0, 4) for _ in range(3)] for kernel in range(4)}
    lean = {kernel: [rng.uniform(-0.9, 0.9) for _ in range(3)] for kernel in range(4)}

    def cost(plan):
        kernel, at = sizes(op, plan)
        if kernel == 2 and at[0] + at[2] > 7:  # as if shared memory were short
            return None
        x, y, z = (a - c for a, c in zip(at, centre[kernel], strict=True))
        xy, yz, xz = lean[kernel]
        bowl = x * x + y * y + z * z + 2 * (xy * x * y + yz * y * z + xz * x * z) / 1.5
        bump = rough * random.Random(str((seed, plan))).uniform(0, 1)
        return floor[kernel] * (1 + 0.08 * max(bowl, 0) + bump)

    return cost


@pytest.mark.parametrize("matrix_units", [True, False])
@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_the_search_comes_within_three_percent_of_the_sweep(op, matrix_units):
    """Over 60 simulated devices, with a bump of up to 1% on every plan."""
    families = tune_search.plan_families(op, matrix_units)
    shares = []
    for seed in range(60):
        cost = made_up_cost(op, seed, rough=0.01)
        searched, swept = Measured(cost), Measured(cost)
        found = tune_search.search(families, searched)[0]
        best = tune_search.sweep(families, swept)[0]
        assert cost(found) <= 1.03 * cost(best), (seed, found, best)
        shares.append(len(searched.times) / len(swept.times))
    if matrix_units:
        assert sum(shares) / len(shares) < 0.45


@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_the_search_visits_all_neighbours_of_what_it_finds(op):
    families = tune_search.plan_families(op, True)
    for seed in range(20):
        measured = Measured(made_up_cost(op, seed, rough=0.3))
        found = tune_search.search(families, measured)[0]
        for family in families:
            for point in family.points():
                if family.plan(point) == found:
                    along, across = family.neighbours(point)
                    plans = {family.plan(near) for near in along + across}
                    assert plans and plans <= set(measured.times)


def test_an_optimum_behind_a_hill_is_found_along_an_axis_or_in_the_sibling():
    """Many pairs per pass and few are fast, those between are not; kernel 3 is faster
    than 2 at one point only."""
    families = tune_search.plan_families("down", True)

    def cost(plan):
        kernel, waves, slices, slots = plan
        if kernel < 2:
            return 100.0
        if plan == (3, 12, 1, 8):
            return 8.0
        hill = {1: 0, 2: 3, 3: 6, 4: 6, 8: -1}[slots]
        return 10 + hill + abs(waves // slices - 12) / 4 + slices + 3 * (kernel == 3)

    assert tune_search.search(families, Measured(cost))[0] == (3, 12, 1, 8)


def test_a_fast_plan_that_stands_alone_is_found():
    """As MiniMax-M2's gate_up with 2 tokens on an H200: 8 slots are fast for one wave,
    the plans around it are slower than another kernel's."""
    families = tune_search.plan_families("gate_up", True)

    def cost(plan):
        kernel, waves, slots, tiles = plan
        if kernel < 2:
            return 28.3 + abs(waves - 3) / 2
        alone = plan == (2, 1, 8, 1)
        return 27.5 if alone else 33.3 + tiles + waves / 100

    assert tune_search.search(families, Measured(cost))[0] == (2, 1, 8, 1)


def test_an_optimum_off_the_axes_is_found():
    """A diagonal ridge: from most of its points no step along one axis goes down."""
    families = tune_search.plan_families("gate_up", True)

    def cost(plan):
        kernel, (waves, slots, tiles) = sizes("gate_up", plan)
        if kernel != 2:
            return 100.0
        return 10 + 40 * abs(waves - slots) + 40 * abs(slots - tiles) + (4 - waves)

    found = tune_search.search(families, Measured(cost))[0]
    assert found == (2, 16, 16, 16)


def test_where_every_plan_is_refused_the_search_finds_none():
    families = tune_search.plan_families("down", True)
    assert tune_search.search(families, Measured(lambda plan: None)) == []


class MadeUpBench:
    """Plan (0, 4, ...) is best for few tokens, (2, ...) for many; prefill from 20."""

    def __init__(self):
        self.asked = []

    def families(self, op):
        return [
            tune_search.Family(((4,),), lambda waves: (0, waves, 0, 0)),
            tune_search.Family(((16,), (1, 2)), lambda *last: (2, 8, *last)),
        ]

    def is_right(self, op, tokens, plan):
        self.asked.append((op, tokens))
        return plan[-1] != 2

    def sample_decode(self, op, tokens):
        return sampler(functools.partial(self.cost, tokens))

    def cost(self, tokens, plan):
        best = (0, 4, 0, 0) if tokens < 8 else (2, 8, 16, 1)
        return tokens * (0.8 if plan == best else 1.0)

    def sample_pair(self, tokens):
        return sampler(lambda plans: sum(self.cost(tokens, plan) for plan in plans))

    def drop_graphs(self):
        pass

    def tile_candidates(self, op, block_m, tokens):
        return [Tile(block_m, 64, 4, 3), Tile(block_m, 128, 8, 2)]

    def sample_tile(self, op, tokens):
        best = Tile(64 if tokens > 500 else 16, 128, 8, 2)
        return sampler(lambda tile: 50.0 if tile == best else 60.0)

    def sample_whole(self, tokens, plans, tiles):
        self.plans = plans
        return sampler(lambda kind: 40.0 if kind == "prefill" else 2.0 * tokens)


class Quiet:
    def __init__(self):
        self.said = []

    def step(self, name):
        pass

    def say(self, text):
        self.said.append(text)


def tuner(bench, save=lambda entry: None, **options):
    current = tuning.lookup("sm_90", 132, SHAPE)
    return tune_shape.Tuner(bench, current, 132, "made up", save, Quiet(), **options)


def save(entry):
    tuning.write_owner_entry("sm_90", entry)


def test_what_is_measured_is_what_is_looked_up():
    before = tuning.lookup("sm_90", 132, SHAPE)
    assert before.origin == "rule" and before.decode_plans(1) == (None, None)
    tuner(MadeUpBench(), save).run(decode=True, prefill=True)
    tuning.forget()
    tuned = tuning.lookup("sm_90", 132, SHAPE)
    assert tuned.origin == "owner" and tuned.exact
    few, many = (0, 4, 0, 0), (2, 8, 16, 1)
    assert tuned.decode_plans(1) == (few, few)
    assert tuned.decode_plans(5) == (few, few)  # as 6 tokens
    assert tuned.decode_plans(7) == (many, many)  # as 8
    assert tuned.decode_plans(33) == (None, None)  # more than were measured
    assert tuned.prefill_from == 24  # 2 us * 20 is not faster than 40
    assert tuned.prefill_tiles(64 * 8).gate_up == Tile(16, 128, 8, 2)
    assert tuned.prefill_tiles(4096 * 8).down == Tile(64, 128, 8, 2)


class MissedBench(MadeUpBench):
    """The best plan is one that the search does not reach."""

    def families(self, op):
        return tune_search.plan_families(op, True)

    def is_right(self, op, tokens, plan):
        return True

    def sample_decode(self, op, tokens):
        return sampler(lambda plan: self.cost(tokens, plan), noise=1e-6)

    def cost(self, tokens, plan):
        return 9.0 if plan in ((2, 16, 16, 24), (3, 16, 8, 8)) else 10.0


def test_a_full_sweep_says_how_far_the_search_is_behind(capsys):
    full = tuner(MissedBench(), decode_tokens=(2,), full=True)
    entry = full.run(decode=True, prefill=False)
    (row,) = entry["decode"]
    assert row["gate_up"] == [2, 16, 16, 24]  # the table gets the faster one
    assert row["gate_up_search_behind"] == pytest.approx(1 / 9, 0.01)
    tried, every = row["gate_up_searched"]
    assert tried < every == 2 * 8 + 8 * 6 * 9 + 8 * 7
    assert "the search 11.1% behind the fastest of 504" in full.progress.said[0]
    share, where = tune_shape.farthest_behind([entry])
    assert share == pytest.approx(1 / 9, 0.01) and "2 tokens, 128 experts" in where
    assert tune_shape.farthest_behind([]) is None


class SlowTogether(MadeUpBench):
    """gate_up's best plan leaves no room for down's start."""

    def sample_pair(self, tokens):
        def both(plans):
            return sum(self.cost(tokens, plan) for plan in plans) + 5 * bool(plans[0])

        return sampler(both)


def test_a_plan_that_slows_the_other_launch_is_not_kept():
    found = tuner(SlowTogether(), decode_tokens=(4,)).run(decode=True, prefill=False)
    (row,) = found["decode"]
    assert row["gate_up"] is None and row["down"] == [0, 4, 0, 0]
    assert row["gate_up_us"] == pytest.approx(3.2, 0.02)
    assert row["both_us"] == pytest.approx(7.2, 0.02)
    assert row["both_rule_us"] == pytest.approx(8.0, 0.02)


def test_an_interruption_keeps_what_is_done():
    bench = MadeUpBench()
    is_right = bench.is_right

    def interrupted(op, tokens, plan):
        if tokens == 4:
            raise KeyboardInterrupt
        return is_right(op, tokens, plan)

    bench.is_right = interrupted
    with pytest.raises(KeyboardInterrupt):
        tuner(bench, save).run(decode=True, prefill=True)
    tuning.forget()
    tuned = tuning.lookup("sm_90", 132, SHAPE)
    assert tuned.origin == "owner" and list(tuned.decode) == [1, 2, 3]
    assert tuned.prefill_from == tuning.prefill_from(
        "sm_90", SHAPE.experts, SHAPE.top_k
    )
    assert tuned.prefill_tiles(512)  # the shipped table's


def entry(shape=SHAPE, **other):
    return {
        **tuning.shape_fields(shape),
        "compute_units": 132,
        "kernel_version": tuning.KERNEL_VERSION,
        "source": "made up",
        "prefill_from": 40,
        "decode": [{"tokens": 4, "gate_up": [0, 2, 0, 0], "down": None}],
        "rows": [],
    } | other


def test_entries_of_other_devices_and_kernels_are_not_used():
    for other in ({"compute_units": 78}, {"kernel_version": 0}):
        tuning.write_owner_entry("sm_90", entry(**other))
        tuning.forget()
        assert tuning.lookup("sm_90", 132, SHAPE).origin == "rule"


def test_the_nearest_shape_counts_and_far_ones_do_not():
    near = dataclasses.replace(SHAPE, intermediate=896)
    far = dataclasses.replace(SHAPE, hidden=4096, intermediate=14336)
    tuning.write_owner_entry("sm_90", entry())
    tuning.write_owner_entry("sm_90", entry(near, prefill_from=44))
    tuning.forget()
    for shape, begin in ((SHAPE, 40), (near, 44)):
        assert tuning.lookup("sm_90", 132, shape).prefill_from == begin
    between = tuning.lookup("sm_90", 132, dataclasses.replace(SHAPE, intermediate=1024))
    assert between.prefill_from == 44 and not between.exact
    assert tuning.lookup("sm_90", 132, far).origin == "rule"


def test_measuring_again_replaces_the_entry():
    tuning.write_owner_entry("sm_90", entry())
    path = tuning.write_owner_entry("sm_90", entry(prefill_from=50))
    assert [e["prefill_from"] for e in json.loads(path.read_text())["shapes"]] == [50]


@pytest.mark.parametrize("text", ["", "{}", '{"shapes": [{"experts": 3}]}', "[1]"])
def test_a_broken_table_is_said_and_not_used(text, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path = tuning.owner_table("sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuning.lookup("sm_90", 132, SHAPE).origin == "rule"
    assert "is not a tuning table" in caplog.text and str(path) in caplog.text


def test_the_rule_of_where_prefill_begins_has_no_cliff():
    begins = [tuning.prefill_from("rdna", experts, 8) for experts in range(8, 513)]
    assert begins == sorted(begins)
    # one more expert needs as many more tokens as give one expert that many rows
    assert all(b - a <= 2 for a, b in zip(begins, begins[1:], strict=False))
    assert begins[0] < begins[-1]


def test_where_prefill_begins_depends_on_the_pairs_on_cuda():
    begins = [tuning.prefill_from("sm_90", 128, top_k) for top_k in (1, 2, 4, 8, 10)]
    assert begins == [65, 64, 32, 16, 13]


def test_one_line_says_which_table_is_used():
    assert tuning.used_text() is None
    tuning.write_owner_entry("sm_90", entry())
    tuning.lookup("sm_90", 132, SHAPE)
    tuning.lookup("sm_90", 132, dataclasses.replace(SHAPE, hidden=8192))
    text = tuning.used_text()
    assert text.startswith("tuning of 2 shapes: 1 from ") and "1 by rule" in text
    assert str(tuning.owner_table("sm_90")) in text


def command(capsys, *arguments):
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_on_the_cpu_there_is_nothing_to_tune(capsys):
    status, out, _ = command(capsys, "--shape", "128,8,1024,768,128")
    assert status == 0 and "nothing to tune" in out


def test_the_command_loads_the_kernels_measures_and_writes(monkeypatch, capsys):
    calls = []

    def bench(shape, cu_count, pool, shared):
        calls.append((shape.experts, cu_count, pool, shared))
        return MadeUpBench()

    monkeypatch.setattr(devices, "device_family", lambda: GPU)
    monkeypatch.setattr(devices, "load_kernels", lambda family: calls.append(family))
    monkeypatch.setattr(tune_command.torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(tune_command, "GpuBench", bench)
    words = ["--only", "decode", "--full", "--tokens", "2,1"]
    status, out, err = command(capsys, "--shape", "128,8,1024,768,128", *words)
    assert status == 0 and calls == [GPU, (128, 132, None, 0)]
    assert "the search is at most 0." in out and "written: " in out
    assert "1 tokens: gate_up" in err
    (entry,) = tuning.owner_entries("sm_90")
    assert [row["tokens"] for row in entry["decode"]] == [1, 2]
    assert "tune on made up" in entry["source"]


def test_a_shared_expert_has_entries_of_its_own(monkeypatch, capsys):
    """Only decode of up to 8 tokens runs with it; the two do not replace each other."""
    seen = []

    def bench(shape, cu_count, pool, shared):
        seen.append(shared)
        return MadeUpBench()

    monkeypatch.setattr(devices, "device_family", lambda: GPU)
    monkeypatch.setattr(devices, "load_kernels", lambda family: None)
    monkeypatch.setattr(tune_command.torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(tune_command, "GpuBench", bench)
    with_shared = "128,8,1024,768,128,512"
    for shape, only in (("128,8,1024,768,128", "decode"), (with_shared, "prefill")):
        assert command(capsys, "--shape", shape, "--only", only)[0] == 0
    assert seen == [0]
    words = ["--tokens", "1,8,16", "--only", "decode"]
    status, out, _ = command(capsys, "--shape", with_shared, *words)
    assert status == 0 and seen == [0, 512]
    status, _, err = command(capsys, "--shape", with_shared, "--tokens", "16,32")
    assert status == 0 and seen == [0, 512] and "left out: decode takes up to 8" in err
    alone, shared = tuning.owner_entries("sm_90")
    assert alone["shared"] == 0 and shared["shared"] == 512
    assert [row["tokens"] for row in shared["decode"]] == [1, 8]
    tuning.forget()
    for size, tokens, exact in ((0, 32, True), (512, 8, True), (640, 8, False)):
        shape = dataclasses.replace(SHAPE, shared=size)
        tuned = tuning.lookup("sm_90", 132, shape)
        assert tuned.exact == exact and max(tuned.decode) == tokens
    far = dataclasses.replace(SHAPE, shared=4096)
    assert tuning.lookup("sm_90", 132, far).origin == "rule"


def test_a_checkpoint_with_a_shared_expert_gives_two_shapes():
    checkpoint = explain_checkpoint.read_checkpoint(str(BUNDLED))

    def of(**entries):
        return dataclasses.replace(checkpoint, config={**checkpoint.config, **entries})

    assert checkpoint.shared_expert_size == 0
    assert of(n_shared_experts=2, moe_intermediate_size=32).shared_expert_size == 64
    made = of(shared_expert_intermediate_size=64)
    arguments = argparse.Namespace(shape=[], dtype=None, tp=1)
    alone, shared = tune_command.shapes_of(arguments, [made], GPU)
    assert shared == dataclasses.replace(alone, shared=64) and alone.shared == 0


def test_the_launches_that_are_timed_compute_the_shared_expert():
    """The bench on the CPU, whose ops take no plan."""
    shape = random_layers.LayerShape(4, 2, 128, 64, 32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    bench = object.__new__(tune_bench.GpuBench)
    bench.shape, bench.cu_count, bench.buffers = shape, 1, {}
    bench.layers = [random_layers.random_layer(shape, generator)]
    sizes = ((48, 128), (128, 24), (128,))
    up, down, gate = (torch.randn(s, generator=generator).bfloat16() for s in sizes)
    bench.shared = [(up, down, gate)]
    ids, weights = random_layers.random_routing(3, shape, generator)
    x = torch.randn(3, 128, generator=generator).bfloat16() / 12
    middle = torch.zeros(6, 64).bfloat16()
    bench.inputs = {3: [(x, ids, weights, middle)] * tune_bench.BATCHES}
    bench.launch("gate_up", 3, 0, None, middle)
    out = torch.zeros(3, 128).bfloat16()
    bench.launch("down", 3, 0, None, out, middle)
    a, b = (x.float() @ up.float().T).chunk(2, 1)
    factors = (x.float() @ gate.float()).sigmoid()[:, None]
    expected = factors * ((torch.nn.functional.silu(a) * b) @ down.float().T)
    written = bench.buffers[3][2].float()
    assert (written - expected).norm() < 0.02 * expected.norm()
    assert out.abs().sum() > 0


def test_show_prints_tables_and_choice(monkeypatch, capsys):
    monkeypatch.setattr(devices, "device_family", lambda: GPU)
    tuning.write_owner_entry("sm_90", entry())
    tuning.write_owner_entry("sm_90", entry(compute_units=78))
    status, out, _ = command(capsys, "--show", "--shape", "128,8,1024,768,128")
    assert status == 0
    assert f"owner    {tuning.owner_table('sm_90')} (2 shapes, 0 linears)" in out
    assert "not used" in out and "made up" in out
    assert "from owner\n  prefill from 40 tokens on" in out
    assert "up to 4 tokens: gate_up, down [0, 2, 0, 0], rule" in out


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ("1,2,3", "five or six numbers"),
        ("8,9,256,128,64", "top-9 of 8"),
        ("8,2,256,128,48", "group size 48"),
        ("8,2,250,128,64", "not multiples of 64"),
    ],
)
def test_bad_shapes_are_explained(shape, why, capsys):
    status, _, err = command(capsys, "--shape", shape)
    assert status == 2 and why in err


def test_shapes_come_from_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(devices, "device_family", lambda: GPU)
    status, out, _ = command(capsys, "--show", str(BUNDLED))
    assert status == 0 and "experts, top-" in out


def test_candidates_fit_what_the_ops_accept():
    """Limits of csrc/rocm/plan.h and geometry.h."""

    def plans(op, matrix_units):
        for family in tune_search.plan_families(op, matrix_units):
            yield from family.plans()

    for matrix_units in (True, False):
        for kernel, waves, slots, row_tiles in plans("gate_up", matrix_units):
            assert waves <= (16 if kernel == 2 else 8)
            assert (slots > 0) == (kernel == 2) and slots <= 16
            assert (row_tiles > 0) == (kernel in (2, 3))
            assert row_tiles <= (16 if kernel == 3 else 1024)
        for kernel, waves, k_slices, slots in plans("down", matrix_units):
            assert waves <= 16 and waves % k_slices == 0
            assert (slots > 0) == (kernel >= 2) and slots <= 8
    for op in ("gate_up", "down"):
        assert {kernel for kernel, *_ in plans(op, True)} == {0, 1, 2, 3}
        assert {kernel for kernel, *_ in plans(op, False)} == {0, 1}


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,,2"])
def test_bad_numbers_of_tokens_are_explained(text, capsys):
    status, _, err = command(capsys, "--shape", "8,2,256,128,64", "--tokens", text)
    assert status == 2 and "numbers above 0" in err


def test_log_lines_are_back_after_an_error(capsys):
    import logging

    before = logging.root.manager.disable
    assert command(capsys, "--shape", "1,2,3")[0] == 2
    assert logging.root.manager.disable == before
