# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``tune`` of dense int4 linears: measurements, the owner's table, what it decides."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vllm.model_executor.kernels.linear.mixed_precision import hybrid_w4a16 as linear
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear as dense
from vllm.model_executor.layers.quantization import hybrid_w4a16_linear_table as table
from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
    LinearShape,
)
from vllm.plugins.hybrid_w4a16 import (
    cli,
    explain_checkpoint,
    random_linears,
    tune_command,
    tune_linear,
)

BUNDLED = Path(__file__).resolve().parents[2] / "demo/int4-autoround-g128"
GFX1151 = devices.PLANNED["gfx1151"]
SHAPE = LinearShape(1024, 512, 128, False, "bf16")


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path))
    switch.register()
    assert not isinstance(devices.device_family(), str)  # loads the op library
    for name in (switch.NAME, switch.LINEAR_NAME):
        monkeypatch.delenv(name, raising=False)
    table.forget()
    yield
    table.forget()


class MadeUpBench:
    """Times by rule; ``wrong``: numbers of rows for which our results are wrong."""

    def __init__(self, few=1.0, many=1.0, wrong=(), peer="StockKernel", **other):
        self.few, self.many, self.wrong, self.peer = few, many, wrong, peer
        self.skinny_up_to = other.get("skinny_up_to", 16)

    def ways(self, rows):
        if rows in self.wrong:
            return []
        if rows <= 16:
            return [table.SKINNY, table.TILES]
        return [table.TILES, table.DEQUANTIZED]

    def runs_peer(self, rows):
        return self.peer is not None

    def sample(self, rows):
        us = {
            table.SKINNY: 10 * self.few,
            table.TILES: max(rows, 11) * self.many,
            table.DEQUANTIZED: (100 + rows / 2) * self.many,
            tune_linear.PEER: 12 if rows <= 16 else min(rows, 100 + rows / 2),
        }
        if rows > self.skinny_up_to:
            us[table.SKINNY] *= 3
        return lambda way, count: [us[way]] * count


class Quiet:
    def step(self, name):
        pass

    def say(self, text):
        pass


def measure(bench, shape=SHAPE, units=GFX1151.cu_count, numbers=tune_linear.ROWS):
    def save(entry):
        table.write("gfx1151", entry)

    return tune_linear.tune_linear(
        bench, shape, units, "made up", save, Quiet(), numbers
    )


def decision(shape=SHAPE):
    config = random_linears.RandomLinear(
        shape.outputs, shape.inputs, shape.group_size, torch.bfloat16, "cpu"
    ).config
    return linear.incompatibility_reason(config, GFX1151)


def test_a_linear_runs_on_our_kernel_where_it_was_measured_to_be_faster():
    assert "not compared with vLLM's RDNA kernel yet" in decision()
    assert f"set {switch.LINEAR_NAME}=1" in decision()
    entry = measure(MadeUpBench())
    assert [row["rows"] for row in entry["rows"]] == list(tune_linear.ROWS)
    assert {row["way"] for row in entry["rows"]} == {
        table.SKINNY,
        table.TILES,
        table.DEQUANTIZED,
    }
    assert decision() is None
    other = dataclasses.replace(SHAPE, outputs=2048)
    assert "not compared" in decision(other)


@pytest.mark.parametrize(
    ("bench", "why"),
    [
        (
            MadeUpBench(few=1.5, many=1.5),
            "StockKernel was faster in `tune`: 48 against 60 us",
        ),
        (MadeUpBench(many=1.2), "StockKernel was faster in `tune` for 64 rows"),
        (MadeUpBench(many=1.05), None),
        (MadeUpBench(few=9, peer=None), None),
        (MadeUpBench(wrong=(2,)), "its results were wrong in `tune` for 2 rows"),
    ],
)
def test_why_not(bench, why):
    measure(bench)
    found = decision()
    assert found is None if why is None else why in found


def test_what_was_measured_in_part_or_elsewhere_does_not_count():
    measure(MadeUpBench(), numbers=(1, 2))
    assert "interrupted" in decision()
    measure(MadeUpBench(), numbers=(64,))
    assert "interrupted" in decision()
    measure(MadeUpBench(), numbers=())  # nothing is written
    measure(MadeUpBench(), units=7)
    assert "interrupted" in decision()
    old = measure(MadeUpBench())
    assert decision() is None and len(table.entries("gfx1151")) == 2
    table.write("gfx1151", {**old, "kernel_version": tuning.KERNEL_VERSION - 1})
    assert "not compared" in decision()


def test_rows_are_multiplied_as_measured(monkeypatch):
    """As the nearest number of rows that was measured, else as the tables say."""
    ways = []

    def way(name):
        return lambda x, *_: ways.append(name) or x.new_empty(len(x), SHAPE.outputs)

    monkeypatch.setattr(dense, "multiply_few", way(table.SKINNY))
    monkeypatch.setattr(dense, "multiply_in_tiles", way(table.TILES))
    monkeypatch.setattr(dense, "multiply_dequantized", way(table.DEQUANTIZED))
    w = torch.empty(SHAPE.outputs, SHAPE.inputs // 8, dtype=torch.int32)

    def asked(*numbers, bits=4):
        ways.clear()
        for rows in numbers:
            x = torch.empty(rows, SHAPE.inputs, dtype=torch.bfloat16)
            units = GFX1151.cu_count
            dense._multiply_on_gpu(x, w, w, None, units, 128, bits, "gfx1151")
        return "".join(name[0] for name in ways)

    assert asked(0, 1, 16, 17, 1000) == "ssstt"  # nothing measured
    assert asked(16, 17, bits=8) == "sd"
    measure(MadeUpBench())
    # tiles win at 64 rows, dequantizing at 256, and the bound is at 128
    assert asked(0, 1, 16, 17, 32, 127, 129, 1000) == "sssttt" + "dd"
    assert asked(16, 17, bits=8) == "sd"
    measure(MadeUpBench(skinny_up_to=4))
    assert asked(1, 5, 6, 16, 17) == "ssttt"
    measure(MadeUpBench(), numbers=(8, 64))  # fewer than 8 were not measured
    assert asked(1, 7, 8, 64, 999) == "sss" + "tt"
    monkeypatch.setattr(dense.hybrid_w4a16_ops, "row_invariant", lambda: True)
    assert asked(8, 16, 33) == "ss" + "sss"


@pytest.mark.parametrize(
    ("outputs", "inputs", "rows", "way"),
    [
        (12288, 2048, 8, table.SKINNY),
        (12288, 2048, 14, table.TILES),
        (12288 + 64, 2048, 14, table.TILES),  # a pair in one launch
        (12288, 2048, 500, table.DEQUANTIZED),
        (9216, 2048, 14, None),  # not alike
        (4096, 12288, 8, None),  # not measured
        (4096, 12288, 16, table.TILES),
    ],
)
def test_shipped_linears(outputs, inputs, rows, way):
    assert table.way("sm_90", 132, outputs, inputs, rows) == way
    assert table.way("sm_90", 78, outputs, inputs, rows) is None


def moe_entry():
    shape = tuning.MoEShape(8, 2, 256, 128, 64, "bf16")
    return {
        **tuning.shape_fields(shape),
        "compute_units": 40,
        "kernel_version": tuning.KERNEL_VERSION,
        "source": "made up",
        "prefill_from": 40,
        "decode": [{"tokens": 4, "gate_up": [0, 2, 0, 0], "down": None}],
        "rows": [],
    }


def test_shapes_and_linears_share_a_table():
    tuning.write_owner_entry("gfx1151", moe_entry())
    measure(MadeUpBench())
    measure(MadeUpBench(), dataclasses.replace(SHAPE, inputs=1024))
    tuning.write_owner_entry("gfx1151", moe_entry())
    assert len(table.entries("gfx1151")) == 2
    assert len(tuning.owner_entries("gfx1151")) == 1
    document = json.loads(tuning.owner_table("gfx1151").read_text())
    assert list(document) == ["arch", "shapes", "linears"]


@pytest.mark.parametrize("broken", ["nothing", [{"outputs": 8}], [7]])
def test_broken_linears_are_said_and_not_used(broken, caplog):
    tuning.write_owner_entry("gfx1151", moe_entry())
    path = tuning.owner_table("gfx1151")
    document = json.loads(path.read_text()) | {"linears": broken}
    path.write_text(json.dumps(document))
    assert table.entries("gfx1151") == []
    assert "linears in" in caplog.text and "are not used" in caplog.text
    assert len(tuning.owner_entries("gfx1151")) == 1
    measure(MadeUpBench())  # which replaces them
    assert len(table.entries("gfx1151")) == 1


def command(capsys, *words):
    status = cli.main(["tune", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_measures_shows_and_explains(monkeypatch, capsys):
    def bench(shape, family):
        if shape.inputs > 16384:
            raise ValueError(f"{shape}: input size")
        return MadeUpBench()

    monkeypatch.setattr(devices, "device_family", lambda: GFX1151)
    monkeypatch.setattr(devices, "load_kernels", lambda family: None)
    monkeypatch.setattr(tune_command.torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(tune_command, "GpuLinearBench", bench)
    words = ["--linear", "1024,512,128", "--linear", "64,32768,128"]
    status, out, err = command(capsys, *words)
    assert status == 0 and "written: " in out
    assert "1 rows: skinny 10.0 us (StockKernel 12.0)" in err
    assert "left out: linear 64 x 32768" in err
    assert decision() is None
    status, out, _ = command(capsys, "--show", *words)
    assert status == 0 and "(0 shapes, 1 linears)" in out
    assert "linear 1024 x 512, g128, bf16, sym: vllm-hybrid-w4a16 tune on" in out
    assert "  256 rows: dequantized 228.0 us, StockKernel 228.0 us" in out
    assert "linear 64 x 32768, g128, bf16, sym: not measured" in out
    # --only leaves the other kind out
    assert command(capsys, "--only", "decode", *words)[0] == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,2", "three numbers"),
        ("8,256,48", "group size 48"),
        ("9,256,64", "not multiples of 8 and 64"),
        ("8,250,64", "not multiples of 8 and 64"),
    ],
)
def test_bad_linears_are_explained(text, why, capsys):
    status, _, err = command(capsys, "--linear", text)
    assert status == 2 and why in err


def test_linears_come_from_a_checkpoint():
    arguments = argparse.Namespace(linear=["1024,512,128"], dtype=None, tp=2)
    checkpoint = explain_checkpoint.read_checkpoint(str(BUNDLED))
    found = tune_command.linears_of(arguments, [checkpoint], GFX1151)
    assert found == [
        SHAPE,
        LinearShape(256, 256, 128, False, "bf16"),  # qkv_proj of one of two ranks
        LinearShape(256, 128, 128, False, "bf16"),  # o_proj
    ]


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_bench_multiplies_what_it_says(zero_points, capsys):
    """Both kernels on the CPU, which has them under the same names."""
    shape = dataclasses.replace(SHAPE, outputs=64, zero_points=zero_points)
    family = devices.device_family()
    with random_linears.one_rank():
        made = random_linears.RandomLinear(
            64, 512, 128, torch.bfloat16, "cpu", zero_points
        )
        bench = object.__new__(tune_linear.GpuLinearBench)
        bench.shape, bench.family, bench.inputs, bench.copies = shape, family, {}, 2
        bench.weights = made.dense()
        bench.ours = [bench._build(made) for _ in range(2)]
        assert bench.ways(3) == [table.SKINNY]
        bench.peer, bench.peers = bench._build_peer(made)
        assert bench.peer != "HybridW4A16LinearKernel"
        if not zero_points:  # whose layout differs between checkpoint formats
            assert bench.peer is not None and bench.runs_peer(3)
            ours, peers = (bench.launch(w, 3, 1) for w in ("skinny", "peer"))
            error = (ours - peers).float().norm() / ours.float().norm()
            assert error < 0.05
        bench.weights = -bench.weights
        assert bench.ways(3) == []
        assert "WRONG: skinny, 3 rows, linear 64 x 512" in capsys.readouterr().err
