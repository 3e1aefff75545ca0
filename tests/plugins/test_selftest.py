# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``selftest`` passes with correct kernels, and names a kernel that is broken."""

import dataclasses
import json
import re
import time

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as dense_ops
from vllm.plugins.hybrid_w4a16 import (
    cli,
    random_layers,
    selftest_cases,
    selftest_group,
    selftest_router,
    selftest_run,
)


@pytest.fixture(autouse=True)
def two_small_shapes(monkeypatch):
    monkeypatch.setattr(selftest_run, "SIZES", ((6, 2, 384, 128), (4, 3, 256, 128)))
    monkeypatch.setattr(selftest_run, "COVER_TOKENS", (1, 3))
    monkeypatch.setattr(selftest_run, "TOKENS", (1, 9))
    monkeypatch.setattr(selftest_cases, "TOKENS", (1, 9))
    monkeypatch.setattr(selftest_run, "RUNS", 3)
    monkeypatch.setattr(selftest_group, "RUNS", 3)
    monkeypatch.setattr(selftest_router, "SIZES", ((160, 8),))
    monkeypatch.setattr(random_layers, "GROUP_SIZES", (64,))


@pytest.fixture
def one_isa(monkeypatch):
    info = ops.build_info() | {"cpu": ops.build_info()["cpu"][:1]}
    monkeypatch.setattr(ops, "build_info", lambda: info)


def result(capsys, *arguments):
    status = cli.main(["selftest", *arguments])
    return status, capsys.readouterr().out


def break_op(monkeypatch, name, spoil):
    """Apply ``spoil(output)`` to what op ``name`` wrote."""
    whole = f"fused_moe_wvSplitK_int4_{name}"
    spoil_output(monkeypatch, ops, whole, spoil)


def spoil_output(monkeypatch, module, name, spoil):
    original = getattr(module, name)

    def broken(a, w, scales, c, *rest, **named):
        original(a, w, scales, c, *rest, **named)
        spoil(c)

    monkeypatch.setattr(module, name, broken)


def test_sound_kernels_pass(monkeypatch, capsys):
    loaded = []
    load = devices.load_kernels
    monkeypatch.setattr(
        devices, "load_kernels", lambda family: (loaded.append(family), load(family))
    )
    status, out = result(capsys, "--json")
    report = json.loads(out)
    assert status == 0 and report["ok"] and report["keep_serving"] is None
    assert loaded == [devices.device_family()]
    groups = {group["name"]: group for group in report["groups"]}
    for op in ("gate_up", "down", "gemm"):
        for isa in ops.build_info()["cpu"]:
            group = groups[f"{op} {isa}"]
            assert group["rounds"] == group["planned"] == 8
            assert group["cases"] == 16 and group["repeated"] == 4
            assert 0 < group["error"] < group["tolerance"]
            if op != "gemm":
                same, rows = group["alone"]
                assert 0 < same <= rows == 32
                assert (group["alone_difference"] > 0) == (same < rows)
                assert group["alone_difference"] < 0.02
    for isa in ops.build_info()["cpu"]:
        dense, rescore = groups[f"dense {isa}"], groups[f"rescore {isa}"]
        assert dense["rounds"] == 2 * 6 and dense["cases"] == 18
        assert rescore["rounds"] == 2 * 6 and rescore["cases"] == 12
        assert dense["repeated"] == rescore["repeated"] == 6
        shared = groups[f"shared expert {isa}"]
        assert shared["rounds"] == 2 * 8 and shared["cases"] == 8 * 2 * 3
        assert shared["repeated"] == 8 and 0 < shared["error"] < shared["tolerance"]
        router = groups[f"router {isa}"]
        assert router["rounds"] == 6 + 8 + 3 and router["cases"] == (6 + 8) * 2
        assert router["repeated"] == 3 and router["alone"] == [3 * 8, 3 * 8]
        assert 0 < router["error"] < router["tolerance"]
    assert {f"repacking {format.name}" for format in selftest_run.PACKINGS} <= set(
        groups
    )


def test_rows_in_a_batch_that_are_not_those_alone(one_isa, monkeypatch, capsys):
    """An observation, but an error in vLLM's batch-invariant mode."""

    def spoil(c):
        if len(c) == 24:  # three pairs for each of 8 tokens
            c[3:6] *= 1 + 2**-6

    break_op(monkeypatch, "gate_up", spoil)
    status, out = result(capsys)
    (line,) = (x for x in out.splitlines() if x.startswith("ok  gate_up"))
    assert status == 0 and re.search(
        r"\d\d/32 rows .*\(largest difference 1\.[4-9]e-02 of the row\)", line
    )
    monkeypatch.setattr(ops, "row_invariant", lambda: True)
    status, out = result(capsys)
    assert status == 1 and "rows have other bits in a batch than alone" in out


def test_all_rows_are_the_same_alone_where_vllm_asks_for_it(capsys):
    ops.set_row_invariant(True)
    try:
        status, out = result(capsys, "--json")
    finally:
        ops.set_row_invariant(False)
    assert status == 0
    for group in json.loads(out)["groups"]:
        same, rows = group["alone"]
        assert same == rows
        assert rows > 0 or not group["name"].startswith(("gate_up", "down", "dense"))


def test_every_kernel_runs_before_any_repeats(one_isa):
    """Even a busy machine, which runs out of time early, has run all of them."""
    names = []
    family = devices.device_family()
    isas = ops.build_info()["cpu"]
    test = selftest_run.Selftest(
        "cpu", family, isas, 0, time.monotonic() + 600, names.append
    )
    repeated: list[int] = []
    same_bits = test._same_bits
    test._same_bits = lambda *a, **k: (repeated.append(len(names)), same_bits(*a, **k))
    test.run()
    first = names[: repeated[0] - 1]
    isa = isas[0]
    formats = 4  # fp16, bf16, symmetric or not, one group size
    for op in ("gate_up", "down", "gemm"):
        assert first.count(f"{op} {isa}") == formats
    assert first.count(f"dense {isa}") == first.count(f"rescore {isa}") == 6
    assert first.count(f"shared expert {isa}") == 8
    assert first.count(f"router {isa}") == 6 + 8
    assert len(names) == test.steps()


@pytest.mark.parametrize("op", ["gate_up", "down", "gemm"])
def test_one_wrong_element_is_named(op, one_isa, monkeypatch, capsys):
    def spoil(c):
        if len(c) >= 3:
            c[2, 5] += 1.0

    break_op(monkeypatch, op, spoil)
    status, out = result(capsys)
    assert status == 1
    failures = [line for line in out.splitlines() if line.startswith("FAILED")]
    beside = [line for line in failures if line.startswith("FAILED: shared expert")]
    assert len(beside) == (op != "gemm")
    assert all("routed experts beside a shared one: first" in line for line in beside)
    failures = [line for line in failures if line not in beside]
    assert failures and all(f"moe_int4_{op}_" in line for line in failures)
    assert all("first wrong element [2, 5]" in line for line in failures)
    assert all("6 experts, top-2, 384 x 128, g64" in line for line in failures)
    assert "VLLM_HYBRID_W4A16_MOE=0" in out.splitlines()[-1]
    assert f"ok  {'down' if op != 'down' else 'gate_up'}" in out


def test_a_wrong_product_of_the_dense_op_is_named(one_isa, monkeypatch, capsys):
    spoil_output(monkeypatch, dense_ops, "wvSplitK_int_g", lambda c: c[-1, 7].add_(1.0))
    status, out = result(capsys)
    assert status == 1
    failure = "wvSplitK_int_g_bf16_b4_g64_sym, 1 rows, 344 x 896: first wrong element"
    assert f"FAILED: dense {ops.build_info()['cpu'][0]}: {failure} [0, 7]" in out
    assert "ok  rescore" in out and "ok  gate_up" in out


@pytest.mark.parametrize(
    ("op", "spoil", "why"),
    [
        ("gate_up", lambda shared: shared.c[-1, 7].add_(1.0), "element [0, 7]"),
        ("gate_up", lambda shared: shared.factors.add_(0.01), "sigmoid is off by 0.01"),
        ("down", lambda shared: shared.c[-1, 7].add_(1.0), "element [0, 7]"),
    ],
)
def test_a_wrong_shared_expert_is_named(op, spoil, why, one_isa, monkeypatch, capsys):
    name = f"fused_moe_wvSplitK_int4_{op}"
    original = getattr(ops, name)

    def broken(*rest, shared=None, **named):
        if shared is None:
            return original(*rest, **named)
        original(*rest, shared=shared, **named)
        if shared.scales is not None:  # 16 bits are right
            spoil(shared)

    monkeypatch.setattr(ops, name, broken)
    status, out = result(capsys)
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert status == 1 and len(failed) == 1 and why in failed[0]
    assert f"shared expert {ops.build_info()['cpu'][0]}: {op}, bf16, 4" in failed[0]


def route_wrongly(monkeypatch, output, spoil):
    """Apply ``spoil`` to what the router's op wrote into argument ``output``."""
    original = hybrid_w4a16_router.fused_moe_router_topk

    def broken(*arguments):
        original(*arguments)
        spoil(arguments[output])

    monkeypatch.setattr(hybrid_w4a16_router, "fused_moe_router_topk", broken)


def swap_first_two(x):
    x[-1, :2] = x[-1, :2].flip(0)


def other_half(ids):
    ids.add_(80).remainder_(160)


@pytest.mark.parametrize(
    ("output", "spoil", "why"),
    [
        (2, lambda x: x[-1, 7].add_(1.0), "logits: first wrong element [0, 7] is "),
        (2, lambda x: x[-1, 7].fill_(float("nan")), "logits: first wrong element [0, "),
        (3, lambda x: x[-1, 1].mul_(1 + 1e-5), "weights: first wrong element [0, 1] "),
        (3, lambda x: len(x) > 1 and x[1].mul_(1 + 2**-23), "other results in a batch"),
        (4, swap_first_two, "ids: first wrong element [0, 0] is "),
        (4, other_half, "(another expert has a larger score; 8 of 8 are wrong)"),
        (4, lambda x: x[-1, 2].fill_(160), "ids: first wrong element [0, 2] is 160, "),
        (4, lambda x: x[-1, 2].copy_(x[-1, 1]), "selected twice"),
        (4, lambda x: x[:, 0].clamp_(min=0), " is 0, expected -1 (the token is padd"),
        (4, lambda x: x.as_strided((1,), (1,), 0).zero_(), "64 elements before the"),
        (5, lambda x: x.fill_(1), "the counter of blocks is 1 after the call"),
    ],
)
def test_a_wrong_router_is_found(output, spoil, why, one_isa, monkeypatch):
    route_wrongly(monkeypatch, output, spoil)
    isas = ops.build_info()["cpu"]
    test = selftest_run.Selftest(
        "cpu", devices.device_family(), isas, 0, time.monotonic() + 600
    )
    for repeats in (False, True):
        test._router_all(repeats)
    (group,) = test.groups.values()
    assert why in group.failure
    assert group.failure.startswith(
        "moe_router_topk_bf16_w16, bf16 logits, 160 experts, "
    )


def test_equal_experts_in_the_wrong_order_are_found(one_isa, monkeypatch, capsys):
    """The failure names kernel, shape, element, and the switch that avoids them."""
    equal = torch.arange(128) % 5 == 4  # of the first special case, largest first

    def spoil(ids):
        if ids[0].tolist() == equal.nonzero()[:8, 0].tolist():
            swap_first_two(ids[:1])

    route_wrongly(monkeypatch, 4, spoil)
    status, out = result(capsys)
    case = "128 experts, top-8, softmax renormalized, 1 tokens"
    why = (
        "ids: first wrong element [0, 0] is 9, expected 4 (the lower one of two equal "
        "experts is first; 2 of 8 are wrong)"
    )
    (failed,) = (line for line in out.splitlines() if line.startswith("FAILED"))
    assert status == 1
    assert failed.endswith(f": moe_router_topk_bf16_w16, bf16 logits, {case}: {why}")
    assert "VLLM_HYBRID_W4A16_MOE=0" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda c, before: c.copy_(before), "first wrong element"),  # does nothing
        (
            lambda c, before: c.view(torch.int16)[2].bitwise_xor_(1),
            "first wrong element [2, 0]",  # rescoring must not change it
        ),
    ],
)
def test_wrong_rescoring_is_named(spoil, why, one_isa, monkeypatch, capsys):
    original = dense_ops.wvSplitK_int_g_rescore

    def broken(a, w, errors, c, *rest):
        before = c.clone()
        original(a, w, errors, c, *rest)
        spoil(c, before)

    monkeypatch.setattr(dense_ops, "wvSplitK_int_g_rescore", broken)
    status, out = result(capsys)
    assert status == 1
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and "rescore_bf16, window 0" in failed[0]
    assert why in failed[0]


def test_small_errors_everywhere_are_found(one_isa, monkeypatch, capsys):
    """An error of one part in fifty, with which no single element stands out."""
    break_op(monkeypatch, "down", lambda c: c.mul_(1.02))
    status, out = result(capsys)
    assert status == 1 and "relative error of all 0.02" in out


def test_unwritten_elements_are_found(one_isa, monkeypatch, capsys):
    break_op(monkeypatch, "down", lambda c: c[-1, -1].fill_(float("nan")))
    status, out = result(capsys)
    assert status == 1 and "is nan" in out and "not written" in out


def test_writing_past_the_end_is_found(one_isa, monkeypatch, capsys):
    def spoil(c):
        if c.storage_offset() == selftest_cases.GUARD:
            c.as_strided((1,), (1,), c.storage_offset() + c.numel() + 3).zero_()

    break_op(monkeypatch, "gate_up", spoil)
    status, out = result(capsys)
    assert status == 1 and "wrote 4 elements behind the output" in out


def test_bits_that_change_between_runs_are_found(one_isa, monkeypatch, capsys):
    calls = iter(range(10**6))

    def spoil(c):
        c.view(torch.int16)[0, 0] ^= next(calls) % 2  # the last bit of the mantissa

    break_op(monkeypatch, "gemm", spoil)
    status, out = result(capsys)
    assert status == 1 and "run 2 wrote different bits from the first" in out


def test_a_broken_conversion_is_found(one_isa, monkeypatch, capsys):
    sound = selftest_run.packing.AWQ

    def wrong(words):
        packed = sound.to_exllama(words)
        packed[3, 1] ^= 1 << 7
        return packed

    format = dataclasses.replace(sound, to_exllama=wrong)
    monkeypatch.setattr(selftest_run, "PACKINGS", (format,))
    status, out = result(capsys)
    assert status == 1
    assert "repacking AWQ, weights, 64 x 128, g32: first wrong element [3, " in out


def test_out_of_time_is_said(monkeypatch, capsys):
    left = iter([1] * 12)
    monkeypatch.setattr(
        selftest_run.Selftest, "seconds_left", lambda self: next(left, 0)
    )
    status, out = result(capsys)
    assert status == 0
    assert "(1 of 8 shapes, out of time)" in out and "not run, out of time" in out


def test_nothing_ran_is_no_success(capsys):
    status, out = result(capsys, "--seconds", "0")
    assert status == 1 and "nothing ran" in out


def test_without_kernels_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(devices, "device_family", lambda: "no library here")
    status, out = result(capsys)
    assert status == 1 and out.startswith("NO  no library here")
