# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""benchmark_moe.py on tiny shapes: its output, its argument checks, its error handling.

These tests assert nothing about speed.
"""

import json
import time

import numpy as np
import pytest
import torch

SHAPE = "8:2:256:128"
ROW_KEYS = {
    "shape",
    "tokens",
    "backend",
    "dtype",
    "group_size",
    "us",
    "gbps",
    "pct_read",
    "ratio_to_hybrid",
}


@pytest.fixture
def moe_bench(monkeypatch):
    """The package, with ceilings and caches so small that a run takes seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main() may overwrite it
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    import moe_bench.ceilings
    import moe_bench.run

    monkeypatch.setattr(moe_bench.ceilings, "CPU_BYTES", 1 << 22)
    monkeypatch.setattr(moe_bench.ceilings, "GPU_BYTES", 1 << 30)
    monkeypatch.setattr(moe_bench.ceilings, "PASSES", 1)
    monkeypatch.setattr(moe_bench.timing, "WARM_UP_SECONDS", 0)
    # no second table, because the ceilings of such small buffers are not stable
    monkeypatch.setattr(moe_bench.run, "CEILING_NOISE", float("inf"))
    monkeypatch.setattr(moe_bench.machine, "cache_bytes", lambda device: 1 << 18)
    threads = torch.get_num_threads()
    yield moe_bench
    torch.set_num_threads(threads)


@pytest.fixture
def main(moe_bench):
    import benchmark_moe

    return benchmark_moe.main


def hybrid_runs() -> bool:
    try:
        import vllm.model_executor.layers.fused_moe.hybrid_w4a16_device as device
    except ImportError:
        return False
    return isinstance(device.device_family(), device.DeviceFamily)


def check_rows(result: dict, moe_bench) -> None:
    """Check that derived numbers follow from the measured ones."""
    shape = moe_bench.shapes.parse_shape(SHAPE)
    hybrid = {
        (row["tokens"], row["routing"], row["group_size"]): row["us"]
        for row in result["rows"]
        if row["backend"] == "hybrid"
    }
    for row in result["rows"]:
        assert row.keys() >= ROW_KEYS
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        picked_bytes = row["distinct_experts"] * shape.int4_bytes(row["group_size"])
        assert row["gbps"] == pytest.approx(picked_bytes / row["us"] / 1e3)
        read = result["ceilings"]["read_gbps"]
        assert row["pct_read"] == pytest.approx(100 * row["gbps"] / read)
        if row["read_now_gbps"] is None:
            assert result["machine"]["device"] != "cpu" and row["pct_read_now"] is None
        else:
            now = 100 * row["gbps"] / row["read_now_gbps"]
            assert row["pct_read_now"] == pytest.approx(now)
        bound = moe_bench.backends.BACKENDS[row["backend"]].max_error
        assert 0 < row["rel_error"] <= bound
        cell = row["tokens"], row["routing"], row["group_size"]
        of_hybrid = hybrid.get(cell)
        ratio = None if of_hybrid is None else pytest.approx(row["us"] / of_hybrid)
        assert row["ratio_to_hybrid"] == ratio


def test_cpu_run_writes_table_and_json(main, moe_bench, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = f"--shapes {SHAPE} --tokens 1,9 --routing few,balanced --threads 1"
    options = ["--repeats", "4", "--group-size", "32,128", "--json", str(file)]
    assert main(arguments.split() + options) == 0

    result = json.loads(file.read_text())
    offered = {"hybrid", "cpu-int4", "llama-cpp", "torch"}
    absent = {entry["backend"] for entry in result["unavailable"]}
    assert all(entry["reason"] for entry in result["unavailable"])
    assert ("hybrid" in absent) == (not hybrid_runs())
    assert "torch" not in absent
    found = [
        (row["backend"], row["tokens"], row["routing"], row["group_size"])
        for row in result["rows"]
    ]
    expected = {
        (backend, tokens, routing, group_size)
        for backend in offered - absent
        for tokens in (1, 9)
        for routing in ("few", "balanced")
        for group_size in (32, 128)
    }
    assert len(found) == len(expected)
    assert set(found) == expected
    check_rows(result, moe_bench)
    distinct = {
        (row["tokens"], row["routing"]): row["distinct_experts"]
        for row in result["rows"]
    }
    assert distinct == {
        (1, "few"): 2,
        (9, "few"): 2,
        (1, "balanced"): 2,
        (9, "balanced"): 8,
    }
    assert result["ceilings"]["copy_gbps"] > 0
    assert result["ceilings"]["read_method"] in result["ceilings"]["methods"]["read"]
    facts = result["machine"]
    assert facts["cpu_threads"] == 1
    assert facts["torch"] == torch.__version__
    assert f"--shapes {SHAPE}" in facts["command"]

    lines = capsys.readouterr().out.splitlines()
    for backend in offered - absent:
        assert sum(f"  {backend}  " in line for line in lines) == 8
    for backend in absent:
        assert any(f"{backend}: does not run here: " in line for line in lines)


def test_better_second_ceiling_counts(main, moe_bench, monkeypatch, tmp_path, capsys):
    def measure(device, threads, earlier=None):
        gbps = 10.0 if earlier is None else 20.0
        return {
            "read_gbps": gbps,
            "copy_gbps": gbps,
            "read_method": "fixed",
            "copy_method": "fixed",
            "methods": {"read": {"fixed": gbps}, "copy": {"fixed": gbps}},
        }

    monkeypatch.setattr(moe_bench.run, "CEILING_NOISE", 1.02)
    monkeypatch.setattr(moe_bench.run.ceilings, "measure_ceilings", measure)
    file = tmp_path / "result.json"
    arguments = f"--shapes {SHAPE} --tokens 1 --backends torch --routing few"
    assert main([*arguments.split(), "--repeats", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["ceilings"]["read_gbps"] == 20.0
    (row,) = result["rows"]
    assert row["pct_read"] == pytest.approx(100 * row["gbps"] / 20.0)
    lines = capsys.readouterr().out.splitlines()
    assert sum("  torch  " in line for line in lines) == 2


def test_second_ceilings_keep_the_better_method(moe_bench, monkeypatch):
    ceilings = moe_bench.ceilings
    reads = iter([{"a": 5.0, "b": 9.0}, {"a": 8.0, "b": 2.0}])
    monkeypatch.setattr(ceilings, "_cpu_reads", lambda threads: next(reads))
    monkeypatch.setattr(ceilings, "_cpu_copies", lambda: {"c": 4.0})
    cpu = torch.device("cpu")
    first = ceilings.measure_ceilings(cpu, 1)
    assert (first["read_gbps"], first["read_method"]) == (9.0, "b")
    second = ceilings.measure_ceilings(cpu, 1, first)
    assert (second["read_gbps"], second["read_method"]) == (9.0, "b")
    assert second["methods"]["read"] == {"a": 8.0, "b": 9.0}
    assert second["copy_gbps"] == 4.0


def test_reads_of_the_moment_take_the_best_method(moe_bench, monkeypatch):
    ceilings = moe_bench.ceilings
    calls = []
    methods = {"slow": lambda: time.sleep(0.05), "fast": lambda: calls.append(1)}
    monkeypatch.setattr(ceilings, "_cpu_read_methods", lambda threads: methods)
    now = ceilings.ReadNow(1)
    now.measure()
    now.measure()
    assert len(calls) == len(now.gbps) == 2
    assert min(now.gbps) > ceilings.CPU_BYTES / 0.05 / 1e9


def test_plot_is_written(main, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.png"
    arguments = f"--shapes {SHAPE} --tokens 1,2 --routing uniform --backends torch"
    assert main([*arguments.split(), "--repeats", "2", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize("group_size", [32, 128])
def test_llama_cpp_gets_the_same_weights(moe_bench, group_size):
    generator = torch.Generator().manual_seed(group_size)
    words = torch.empty(4, 32, dtype=torch.int32)
    words.random_(-(2**31), 2**31, generator=generator)
    scales = torch.rand(4, 256 // group_size, generator=generator).bfloat16()
    blocks = moe_bench.llama_cpp.to_q4_0(words, scales).reshape(4, 8, 18)
    # as ggml defines Q4_0: an fp16 scale; byte j holds weights j and j + 16
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    found = (scale * (nibbles.astype(np.float32) - 8)).reshape(4, 256)
    expected = moe_bench.inputs.dequantize(words, scales.float())
    assert np.array_equal(found, expected.numpy())
    with pytest.raises(ValueError, match="cannot be stored in fp16"):
        moe_bench.llama_cpp.to_q4_0(words, scales * 1e6)


def test_wrong_results_are_reported_and_not_timed(
    main, moe_bench, monkeypatch, tmp_path, capsys
):
    backends = moe_bench.backends.BACKENDS
    right = backends["torch"]

    def build_wrong(case, layer, copies):
        call = right.build(case, layer, copies)
        return lambda index, batch: 1.1 * call(index, batch)

    wrong = moe_bench.backends.Backend(right.devices, 16, 0.03, build_wrong)
    monkeypatch.setitem(backends, "torch", wrong)
    file = tmp_path / "result.json"
    arguments = f"--shapes {SHAPE} --tokens 1,2 --backends torch --json {file}"
    assert main([*arguments.split(), "--repeats", "2"]) == 1
    result = json.loads(file.read_text())
    assert result["rows"] == []
    (entry,) = result["unavailable"]
    assert entry["reason"].startswith(
        "FAILED: ArithmeticError: wrong at 1 tokens: relative error 0.1"
    )
    assert "torch: FAILED: ArithmeticError: wrong at 1 tokens" in (
        capsys.readouterr().out
    )


def test_broken_backend_does_not_stop_the_others(
    main, moe_bench, monkeypatch, tmp_path
):
    def build_broken(case, layer, copies):
        raise RuntimeError("no such kernel")

    broken = moe_bench.backends.Backend(("cpu",), 4, 0.03, build_broken)
    monkeypatch.setitem(moe_bench.backends.BACKENDS, "hybrid", broken)
    file = tmp_path / "result.json"
    arguments = f"--shapes {SHAPE} --tokens 2 --routing few --backends hybrid,torch"
    assert main([*arguments.split(), "--repeats", "2", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert [row["backend"] for row in result["rows"]] == ["torch"]
    assert result["rows"][0]["ratio_to_hybrid"] is None
    (entry,) = result["unavailable"]
    assert entry["backend"] == "hybrid"
    assert entry["reason"] == "FAILED: RuntimeError: no such kernel"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes qwen9", "--shapes: 'qwen9' is none of all, qwen3-30b-a3b, "),
        ("--shapes 4:8:64:64", "top_k 8 exceeds 4 experts"),
        ("--shapes 4:2:64:0", "--shapes: '4:2:64:0' is none of"),
        ("--tokens 1,two", "--tokens: 'two' is not a positive number"),
        ("--tokens 0", "--tokens: '0' is not a positive number"),
        ("--group-size 48", "--group-size: 48 is not one of 32, 64, 128"),
        (
            "--shapes 8:2:256:96 --group-size 64",
            "--group-size: 64 does not divide hidden 256 and intermediate 96",
        ),
        ("--backends fast", "--backends: 'fast' is not one of hybrid, row-invariant, "),
        ("--backends marlin", "--backends: 'marlin' is not one of hybrid, "),
        ("--routing even", "--routing: 'even' is not one of balanced, uniform, "),
        ("--repeats 0", "--repeats: 0 is not a positive number"),
        ("--threads 100000", "--threads: 100000 exceeds the "),
        ("--json no/such/folder.json", "--json: the folder of no/such/folder.json"),
        ("--dtype fp32", "argument --dtype: invalid choice: 'fp32'"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments_are_rejected(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "rocm"])
def test_missing_gpu_is_rejected(main, capsys, device):
    with pytest.raises(SystemExit) as stop:
        main(["--device", device])
    assert stop.value.code == 2
    assert f"--device {device}: torch {torch.__version__} sees no such GPU" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run(main, moe_bench, tmp_path):
    device = "rocm" if torch.version.hip else "cuda"
    file = tmp_path / "result.json"
    arguments = f"--device {device} --shapes 8:2:256:256 --tokens 1,9 --json {file}"
    assert main([*arguments.split(), "--repeats", "2"]) == 0
    result = json.loads(file.read_text())
    absent = {entry["backend"] for entry in result["unavailable"]}
    assert ("hybrid" in absent) == (not hybrid_runs())
    present = {row["backend"] for row in result["rows"]}
    assert present | absent == {"hybrid", "marlin", "triton"}


def test_routings(moe_bench):
    from moe_bench.inputs import ROUTINGS

    shape = moe_bench.shapes.MoEShape("test", 32, 4, 64, 64)
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for name, draw in ROUTINGS.items():
        ids = draw(shape, 400, generator)
        assert ids.shape == (400, 4)
        assert ids.min() >= 0
        assert ids.max() < 32
        ordered = ids.sort(1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all(), (
            "a token picks distinct experts"
        )
        counts[name] = ids.flatten().bincount(minlength=32)
    assert counts["balanced"].tolist() == [50] * 32
    assert sorted(counts["few"].tolist()) == [0] * 28 + [400] * 4
    assert counts["uniform"].min() > 20
    # 1/rank: the most popular expert is drawn far more often than the 32nd
    assert counts["skewed"].max() > 4 * counts["uniform"].max()
    assert counts["skewed"].min() < counts["uniform"].min()


def test_reference_against_plain_loops(moe_bench):
    """The check that guards the benchmark is itself checked, weight by weight."""
    from moe_bench.inputs import Case, make_batches, random_layer
    from moe_bench.reference import checked_rows, reference_rows

    shape = moe_bench.shapes.MoEShape("test", 3, 2, 64, 32)
    case = Case(shape, torch.float16, 32, torch.device("cpu"))
    layer = random_layer(case)
    (batch,) = make_batches(case, "uniform", 10, 1)

    def weight(words, scales, row, k):
        nibble = (int(words[row, k // 8]) >> (4 * (k % 8))) & 15
        return (nibble - 8) * float(scales[row, k // 32])

    def matmul(words, scales, x):
        k_size = 8 * words.shape[1]
        rows = [
            [weight(words, scales, row, k) for k in range(k_size)]
            for row in range(words.shape[0])
        ]
        return torch.tensor(rows, dtype=torch.float64) @ x

    rows = checked_rows(batch).tolist()
    assert len(rows) == 8
    assert (rows[0], rows[-1]) == (0, 9)
    got = reference_rows(layer, batch)
    for result, token in ((got[0], 0), (got[-1], 9)):
        x = batch.x[token].double()
        expected = torch.zeros(64, dtype=torch.float64)
        for expert, router in zip(
            batch.topk_ids[token].tolist(),
            batch.topk_weights[token].tolist(),
            strict=True,
        ):
            y = matmul(layer.w13[expert], layer.s13[expert], x)
            middle = y[:32] / (1 + (-y[:32]).exp()) * y[32:]
            expected += router * matmul(layer.w2[expert], layer.s2[expert], middle)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_rotation_exceeds_the_cache(moe_bench):
    for call_bytes, cache in ((10, 1000), (700, 1000), (5000, 1000)):
        copies = moe_bench.run.copies_to_rotate(call_bytes, cache)
        # between two uses of a copy all the others are read
        assert copies >= 2
        assert (copies - 1) * call_bytes >= 2 * cache


def test_memory_is_shared_by_the_backends(moe_bench):
    share = moe_bench.run.share_memory
    wanted = {"hybrid": 40, "cpu-int4": 40, "torch": 10}
    layer_bytes = {"hybrid": 1, "cpu-int4": 1, "torch": 4}
    assert share(wanted, layer_bytes, 200) == wanted
    half = share(wanted, layer_bytes, 60)
    assert half == {"hybrid": 20, "cpu-int4": 20, "torch": 5}
    # each backend first gets one layer, however large it is
    assert share(wanted, layer_bytes | {"torch": 70}, 80) == {
        "hybrid": 5,
        "cpu-int4": 5,
        "torch": 1,
    }


def test_short_memory_shortens_the_rotation(
    main, moe_bench, monkeypatch, tmp_path, capsys
):
    """Every backend is measured, with as many layers as fit."""
    shape = moe_bench.shapes.parse_shape(SHAPE)
    layer_bytes = shape.num_experts * shape.expert_weights * 2
    available = int(3.5 * layer_bytes / moe_bench.run.MEMORY_SHARE)
    monkeypatch.setattr(moe_bench.machine, "available_bytes", lambda device: available)
    file = tmp_path / "result.json"
    arguments = f"--shape {SHAPE} --tokens 1 --routing few --backends torch --layers 9"
    assert main([*arguments.split(), "--repeats", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert (row["layers_rotated"], row["layers_wanted"]) == (3, 9)
    assert "torch: 3 layers, " in (out := capsys.readouterr().out)
    assert "9 were wanted and memory holds no more" in out

    monkeypatch.setattr(moe_bench.machine, "available_bytes", lambda device: 1 << 10)
    assert main([*arguments.split(), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["rows"] == []
    assert "one layer takes 0.0 GiB" in result["unavailable"][0]["reason"]


def test_all_shapes(moe_bench):
    shapes = moe_bench.shapes
    assert shapes.parse_shapes("all") == list(shapes.SHAPES.values())
    names = "qwen3-30b-a3b,mixtral-8x7b"
    assert [shape.name for shape in shapes.parse_shapes(names)] == names.split(",")
