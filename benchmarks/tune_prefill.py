#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Measure the tiles of the Triton prefill GEMMs on the GPU at hand.

For every shape and number of tokens both GEMMs are timed with all tiles of a grid, and
the best pair that shares a block of activations makes a row of
``configs/hybrid_w4a16``. ``--write`` replaces this device's table;
``prefill_from`` is left as it is: it follows from
``benchmark_moe.py --backends decode,prefill --tokens 1,2,4,8,12,16,24,32,48,64``.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from moe_bench import timing
from moe_bench.arguments import DTYPES, GROUP_SIZES
from moe_bench.inputs import Batch, Case, Int4Layer, make_batches, random_layer
from moe_bench.shapes import parse_shape

# Launches of a graph, and replays of it per number
CALLS = 8
REPLAYS = 5
# Batches with routings of their own that a graph goes through
BATCHES = 4


def grid(block_ms: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Tiles worth a try; a thread holds at most 64 sums of one projection."""
    for block_m, block_n, warps, stages in itertools.product(
        block_ms, (32, 64, 128), (2, 4, 8), (2, 3, 4)
    ):
        sums = block_m * block_n // (32 * warps)
        if 8 <= sums <= 64:
            yield block_m, block_n, warps, stages


class Gemms:
    """Both GEMMs of a layer, launched as prefill launches them."""

    def __init__(self, case: Case, layer: Int4Layer) -> None:
        from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_triton

        self.kernels = hybrid_w4a16_triton
        self.case = case
        matrix = hybrid_w4a16_triton.Int4Matrix
        # any order of the nibbles takes the same time
        self.w13 = matrix(layer.w13, layer.s13, None, case.group_size)
        self.w2 = matrix(layer.w2, layer.s2, None, case.group_size)

    def workspace(self, tokens: int):
        shape = self.case.shape
        sizes = tokens, shape.top_k, shape.hidden, shape.intermediate
        elements = self.kernels.Workspace.elements(*sizes)
        options = {"dtype": self.case.dtype, "device": self.case.device}
        return self.kernels.Workspace.split(torch.randn(elements, **options), *sizes)

    def gate_up(self, workspace, blocks, tile) -> None:
        silu = self.kernels.Activation("silu", 1.0, 0.0, None)
        top_k = self.case.shape.top_k
        planes, middle = workspace.planes, workspace.middle
        self.kernels.gate_up(planes, self.w13, middle, blocks, top_k, silu, tile)

    def down(self, workspace, blocks, tile, weights) -> None:
        out = workspace.down_out
        self.kernels.down(workspace.middle, self.w2, out, blocks, weights, tile)


def compile_tile(shape_text: str, dtype: str, group_size: int, tile_text) -> str | None:
    """Compile both kernels into Triton's cache on disk; returns what went wrong."""
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import Tile

    shape = parse_shape(shape_text)
    one = type(shape)("one expert", 1, 1, shape.hidden, shape.intermediate)
    case = Case(one, getattr(torch, DTYPES[dtype]), group_size, torch.device("cuda"))
    gemms = Gemms(case, random_layer(case))
    # 16 pairs of which no block is here: compiled as for real, but nothing runs
    ids = torch.zeros(128, dtype=torch.int32, device="cuda")
    blocks = gemms.kernels.Blocks(ids, ids[:1] - 1, ids[:1])
    workspace = gemms.workspace(16)
    tile = Tile(*tile_text)
    try:
        gemms.gate_up(workspace, blocks, tile)
        gemms.down(workspace, blocks, tile, workspace.middle[:, :1].float())
        torch.cuda.synchronize()
    except Exception as error:  # a tile too large for this device
        return f"{tile}: {type(error).__name__}: {str(error)[:200]}"
    return None


def time_us(launch: Callable[[int], None]) -> float:
    """Median microseconds of a launch, within a graph."""
    graph = timing.capture(launch, CALLS)
    return statistics.median(timing.replay(graph, REPLAYS, CALLS))


class Tuner:
    """Times the grid on one shape after another."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            DeviceFamily,
            device_family,
        )

        family = device_family()
        if not isinstance(family, DeviceFamily) or family.tuning is None:
            raise SystemExit(f"tune_prefill.py: error: no prefill here: {family}")
        self.args = args
        self.family = family.tuning
        self.arch = family.name
        self.unusable: set[tuple[int, ...]] = set()
        self.log: list[dict] = []

    def compile_all(self) -> None:
        tiles = list(grid([16, 32, 64, 128]))
        print(f"compiling {len(tiles)} tiles", flush=True)
        context = multiprocessing.get_context("spawn")
        workers = max(1, min(len(os.sched_getaffinity(0)) - 2, 14))
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            fixed = self.args.shapes[0], self.args.dtype, self.args.group_size
            results = [pool.submit(compile_tile, *fixed, tile) for tile in tiles]
            for tile, result in zip(tiles, results, strict=True):
                if reason := result.result():
                    print(f"  {reason}", flush=True)
                    self.unusable.add(tile)

    def tune(self, shape_text: str) -> list[dict]:
        shape = parse_shape(shape_text)
        dtype = getattr(torch, DTYPES[self.args.dtype])
        case = Case(shape, dtype, self.args.group_size, torch.device("cuda"))
        gemms = Gemms(case, random_layer(case))
        return [self.tune_tokens(case, gemms, tokens) for tokens in self.args.tokens]

    def tune_tokens(self, case: Case, gemms: Gemms, tokens: int) -> dict:
        shape = case.shape
        rows_per_expert = tokens * shape.top_k / shape.num_experts
        batches = make_batches(case, "uniform", tokens, BATCHES)
        # a block far larger than what an expert gets is padding only
        block_ms = [m for m in (16, 32, 64, 128) if m == 16 or m < 4 * rows_per_expert]
        best = min(
            (self.tune_block(case, gemms, batches, block_m) for block_m in block_ms),
            key=lambda row: row["us"],
        )
        print(f"{shape.name} {tokens}: {json.dumps(best)}", flush=True)
        us = best.pop("us")
        self.log.append({"shape": shape.name, "tokens": tokens, "us": us, **best})
        return {
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "rows_per_expert": round(rows_per_expert, 3),
            **best,
        }

    def tune_block(
        self, case: Case, gemms: Gemms, batches: list[Batch], block_m: int
    ) -> dict:
        """The best tiles of both GEMMs for one ``block_m``."""
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
            Tile,
        )
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import (
            moe_align_block_size,
        )

        num_experts = case.shape.num_experts
        blocks = [
            gemms.kernels.Blocks(
                *moe_align_block_size(batch.topk_ids, block_m, num_experts)
            )
            for batch in batches
        ]
        workspace = gemms.workspace(batches[0].x.shape[0])
        weights = batches[0].topk_weights
        times: dict[str, list] = {"gate_up": [], "down": []}
        for sizes in grid([block_m]):
            if sizes in self.unusable:
                continue
            tile = Tile(*sizes)
            launches = {
                "gate_up": lambda i, t=tile: gemms.gate_up(
                    workspace, blocks[i % BATCHES], t
                ),
                "down": lambda i, t=tile: gemms.down(
                    workspace, blocks[i % BATCHES], t, weights
                ),
            }
            for name, launch in launches.items():
                times[name].append((time_us(launch), list(sizes[1:])))
        gate_up, down = min(times["gate_up"]), min(times["down"])
        us = gate_up[0] + down[0]
        return {"us": us, "block_m": block_m, "gate_up": gate_up[1], "down": down[1]}


def format_table(table: dict) -> str:
    """JSON with a line per measured case."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    rest = "".join(
        f" {json.dumps(key)}: {json.dumps(value)},\n"
        for key, value in table.items()
        if key != "rows"
    )
    return f'{{\n{rest} "rows": [\n{rows}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="qwen3-30b-a3b,qwen3.5-35b-a3b")
    parser.add_argument("--tokens", default="16,64,256,1024,4096")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    parser.add_argument("--json", type=pathlib.Path, help="write the entry here")
    parser.add_argument("--write", action="store_true", help="update the table")
    args = parser.parse_args()
    args.shapes = args.shapes.split(",")
    args.tokens = [int(tokens) for tokens in args.tokens.split(",")]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    tuner = Tuner(args)
    tuner.compile_all()
    rows = [row for shape in args.shapes for row in tuner.tune(shape)]
    device = torch.cuda.get_device_name()
    source = (
        f"tune_prefill.py --dtype {args.dtype} --group-size {args.group_size} on "
        f"{device}, {datetime.date.today()}"
    )

    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning

    path = hybrid_w4a16_tuning.TABLES / f"{tuner.arch}.json"
    entry = {**hybrid_w4a16_tuning.table(tuner.family), "source": source, "rows": rows}
    print(json.dumps(entry))
    if args.json is not None:
        args.json.write_text(json.dumps({**entry, "log": tuner.log}, indent=1) + "\n")
    if args.write:
        path.write_text(format_table(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
