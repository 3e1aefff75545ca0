#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times dense int4 linears: our kernel beside vLLM's kernels for the same layer.

Every kernel repacks the same random symmetric weights from GPTQ's layout, and is first
compared with float32. Calls rotate over copies of the weights that exceed the
last-level cache. On the CPU a sample is one call and the kernels alternate; on a GPU a
sample is a replay of a graph, as in benchmark_moe.py. ``--sweep`` adds our kernel for
many rows with every tile that the tuning table may name, and with dequantized weights.
Exit status: 0; 1 if a kernel failed or gave wrong results; 2 for a bad argument.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Outputs and inputs of the different linears of each model.
MODELS = {
    "qwen3.5-35b-a3b": {
        "in_proj_qkvz": (12288, 2048),
        "in_proj_ba": (64, 2048),
        "out_proj, o_proj": (2048, 4096),
        "qkv_proj": (9216, 2048),
    },
    "demo": {"qkv_proj": (512, 256), "o_proj": (256, 256)},
}
OURS = "HybridW4A16LinearKernel"
MAX_ERROR = 0.05  # relative, Frobenius norm: one peer rounds activations to 8 bits
SECONDS = 1.0  # per case, at least; each kernel gets at least 5 samples
MIN_SAMPLES = 5
COLUMNS = "{:17} {:16} {:>6} {:>6} {:>5}  {:28} {:>9} {:>9} {:>7} {:>6}"


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[1, 2, 4, 8, 64, 512]
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=128)
    parser.add_argument("--threads", type=positive, help="of the CPU; default: all")
    parser.add_argument(
        "--sweep", action="store_true", help="time all ways of our kernel on a GPU"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write the results")
    return parser.parse_args(arguments)


def time_calls(
    calls: dict[str, list[Callable[[Any], Any]]], x: Any, repeats: int = 40
) -> dict[str, list[float]]:
    """Microseconds of single calls; the kernels alternate. repeats: on a GPU."""
    if x.device.type != "cpu":
        from moe_bench.timing import time_on_gpu

        def step(copies: list[Callable[[Any], Any]], index: int) -> Any:
            return copies[index % len(copies)](x)

        return time_on_gpu({n: partial(step, c) for n, c in calls.items()}, repeats)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = time.perf_counter() + SECONDS, -1
    while time.perf_counter() < end or turn < MIN_SAMPLES:
        for name, copies in calls.items():
            start = time.perf_counter()
            copies[turn % len(copies)](x)
            if turn >= 0:  # the first call is warm-up
                samples[name].append(1e6 * (time.perf_counter() - start))
        turn += 1
    return samples


def sweep(made: list[Callable[[Any], Any]], x: Any, expected: Any) -> dict[str, Any]:
    """Samples of our kernel on many rows with each tile that gives the right result,
    and with a 16-bit GEMM after dequantizing.

    made: our layers; expected: float32, their result for ``x``.
    """
    from unittest import mock

    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear
    from vllm.model_executor.layers.quantization import (
        hybrid_w4a16_linear_table as table,
    )
    from vllm.plugins.hybrid_w4a16.tune_search import tile_sizes

    found: dict[str, list[float]] = {}
    sizes = [m for m in (8, 16, 32, 64, 128) if m < 2 * len(x) or m == 8]
    tiles: list[Any] = [tile for m in sizes for tile in tile_sizes(m)]
    for tile in [None, *tiles]:
        # the stages matter little, and each takes seconds to compile
        if tile is not None and not tile.tiled and tile.num_stages != 3:
            continue
        if tile is None:
            name = way = table.DEQUANTIZED
        else:
            way = table.TILES
            name = " ".join(map(str, ("tile", *dataclasses.astuple(tile))))
        with (
            mock.patch.object(table, "way", lambda *_, way=way: way),
            mock.patch.object(
                hybrid_w4a16_dense_linear, "dense_tile", lambda *_, tile=tile: tile
            ),
        ):
            try:
                y = made[0](x).float()
            except Exception as failure:  # noqa: BLE001  # too large for the device
                print(f"{name}: {type(failure).__name__}", file=sys.stderr)
                continue
            if float((y - expected).norm() / expected.norm()) < MAX_ERROR:
                found |= time_calls({name: made}, x, 8)
            else:
                print(f"{name}: wrong result", file=sys.stderr)
    return found


def measure(options: argparse.Namespace, device: str, cache: int, say: Any) -> Any:
    """The rows of the result, and the failures."""
    import torch

    from vllm.model_executor.layers.quantization.hybrid_w4a16_dense_ops import MAX_ROWS
    from vllm.plugins.hybrid_w4a16.random_linears import RandomLinear, kernels_for

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float16
    results, failures = [], []
    for model, linears in ((model, MODELS[model]) for model in options.models):
        for name, (n, k) in linears.items():
            linear = RandomLinear(n, k, options.group_size, dtype, device)
            copies = max(2, min(64, -(-2 * cache // linear.nbytes)))
            dense = linear.dense()
            calls = {}
            for kernel in kernels_for(linear.config):
                try:
                    made = [linear.build(kernel)[0] for _ in range(copies)]
                    x = torch.randn(3, k).to(dtype)
                    expected = x.float() @ dense.T
                    y = made[-1](x.to(device)).cpu().float()
                    error = float((y - expected).norm() / expected.norm())
                    if not error < MAX_ERROR:
                        raise RuntimeError(f"relative error {error:.3g}")
                    calls[kernel.__name__] = made
                except Exception as failure:  # noqa: BLE001  # the others continue
                    failures.append(f"{kernel.__name__}, {model} {name}: {failure}")
            for rows in options.rows:
                x = torch.randn(rows, k, device=device).to(dtype)
                samples = time_calls(calls, x)
                if options.sweep and OURS in calls and rows > MAX_ROWS:
                    expected = x.float() @ dense.to(x.device).T
                    samples |= sweep(calls[OURS], x, expected)
                ours = statistics.median(samples[OURS]) if OURS in samples else None
                for kernel_name, us in samples.items():
                    median = statistics.median(us)
                    row = {
                        "model": model,
                        "linear": name,
                        "outputs": n,
                        "inputs": k,
                        "rows": rows,
                        "kernel": kernel_name,
                        "us": median,
                        "us_p10": sorted(us)[len(us) // 10],
                        "gbps": linear.nbytes / median / 1e3,
                        "ratio_to_hybrid": None if ours is None else median / ours,
                        "samples": len(us),
                    }
                    results.append(row)
                    say(row)
    return results, failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = parse(arguments)
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_HYBRID_W4A16_MOE"] = os.environ["VLLM_HYBRID_W4A16_LINEAR"] = "1"
    import torch
    from moe_bench import ceilings, machine
    from moe_bench.vllm_experts import vllm_config

    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.plugins.hybrid_w4a16.random_linears import one_rank

    load_general_plugins()
    device = "cpu" if current_platform.is_cpu() else "cuda"
    if options.sweep and device == "cpu":
        print("--sweep: expected a GPU, whose tuning table has tiles", file=sys.stderr)
        return 2
    threads = options.threads or len(os.sched_getaffinity(0))

    def say(row: dict[str, Any]) -> None:
        ratio = row["ratio_to_hybrid"]
        cells = [row[c] for c in ("model", "linear", "outputs", "inputs", "rows")]
        numbers = [f"{row[c]:.1f}" for c in ("us", "us_p10", "gbps")]
        ratio = "" if ratio is None else f"{ratio:.2f}"
        print(COLUMNS.format(*cells, row["kernel"], *numbers, ratio), flush=True)

    with torch.inference_mode(), vllm_config(), one_rank():
        found = ceilings.measure_ceilings(torch.device(device), threads)
        facts = machine.describe(device, threads)
        print(
            f"read ceiling {found['read_gbps']:.1f} GB/s, load {facts['load_average']}"
        )
        heads = ("us", "p10", "GB/s", "ratio")
        print(COLUMNS.format("model", "linear", "N", "K", "rows", "kernel", *heads))
        if device == "cpu":
            torch.set_num_threads(threads)  # last: importing vLLM sets it too
        rows, failures = measure(options, device, facts["cache_bytes"], say)
    for failure in failures:
        print(f"FAILED: {failure}")
    if options.json is not None:
        document = {"machine": facts, "ceilings": found, "rows": rows}
        text = json.dumps({**document, "failures": failures}, indent=1)
        options.json.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
