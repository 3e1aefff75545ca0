# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 tune``: measure the owner's tuning table on this machine.

For each shape: launch plans of decode by number of tokens, tiles of prefill, and the
number of tokens from which prefill is faster. Every candidate's result is verified
before it is timed. Weights are cold: calls go round more of them than the last-level
cache holds. A candidate replaces what is used now only if it is faster beyond the noise
in both of two passes in which the two take turns. What has been measured is written
after every step, so that Ctrl-C keeps it.

Exit status: 0; 1 when nothing could be measured; 2 for a bad argument; 130 after
Ctrl-C.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    MoEShape,
    Plan,
    PrefillTiles,
    Tile,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.progress import Progress, quiet
from vllm.plugins.hybrid_w4a16.random_layers import DTYPES, LayerShape

DECODE_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFILL_TOKENS = (16, 64, 256, 1024, 4096)
BEGIN_TOKENS = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
# Bytes of weights that calls rotate over: at least so many times the last-level cache,
# 32 MiB on gfx1151 (which torch does not report), and at most MOST_BYTES.
ROTATE_CACHES = 8
LEAST_CACHE = 32 << 20
MOST_BYTES = 6 << 30
CALLS = 24  # launches in a graph
BATCHES = 8  # routings of their own that they go through
SIFT_REPLAYS, FINAL_REPLAYS = 3, 12
FINALISTS = 3
# Least gain that counts, as a share; more where the samples spread more.
LEAST_GAIN = 0.01

Sampler = Callable[[Any, int], list[float]]
"""``sample(candidate, count)``: microseconds per call, ``count`` samples."""


# ---------------------------------------------------------------------- candidates
def gate_up_plans(matrix_units: bool) -> Iterator[Plan]:
    """Plans worth a try: kernel, waves, slots, row_tiles (csrc/rocm/plan.h)."""
    for kernel in (0, 1):
        for waves in (1, 2, 4, 6, 8):
            yield kernel, waves, 0, 0
    if matrix_units:
        for waves, slots, row_tiles in itertools.product(
            (1, 2, 4, 8), (4, 8, 16), (1, 2, 4, 8)
        ):
            yield 2, waves, slots, row_tiles


def down_plans(matrix_units: bool) -> Iterator[Plan]:
    """Likewise: kernel, waves, k_slices, slots."""
    for kernel in (0, 1):
        for waves in (1, 2, 4, 8, 16):
            for k_slices in (1, 2, 4, 8):
                if k_slices <= waves:
                    yield kernel, waves, k_slices, 0
    if matrix_units:
        for kernel, waves, k_slices, slots in itertools.product(
            (2, 3), (4, 8, 12), (1, 2, 4), (4, 8)
        ):
            yield kernel, waves, k_slices, slots


def tile_sizes(block_m: int) -> Iterator[Tile]:
    """Tiles worth a try; a thread holds at most 64 sums of one projection."""
    for block_n, warps, stages in itertools.product(
        (32, 64, 128), (2, 4, 8), stages_here()
    ):
        if 8 <= block_m * block_n // (32 * warps) <= 64:
            yield Tile(block_m, block_n, warps, stages)


def stages_here() -> tuple[int, ...]:
    """More than one crashes in Triton on AMD and gains nothing there."""
    return (1,) if torch.version.hip else (2, 3, 4)


# -------------------------------------------------------------------------- choice
def choose(
    current: Any,
    candidates: list[Any],
    sample: Sampler,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[Any, float, float]:
    """The winner, its microseconds and those of ``current``.

    All candidates are sifted with a few samples. The best of them and ``current`` then
    take turns in two passes, in opposite orders. A finalist wins if in each pass it is
    faster by more than ``LEAST_GAIN`` and more than the quartiles of both spread.
    """
    sifted = []
    for candidate in candidates:
        step("sifting")
        sifted.append((min(sample(candidate, SIFT_REPLAYS)), candidate))
    sifted.sort(key=lambda pair: pair[0])
    finalists = [candidate for _, candidate in sifted[:FINALISTS]]
    finalists = [f for f in finalists if f != current]
    samples: list[dict[int, list[float]]] = []
    entrants = [current, *finalists]
    for order in (range(len(entrants)), range(len(entrants) - 1, -1, -1)):
        step("finals")
        taken: dict[int, list[float]] = {index: [] for index in order}
        for _ in range(FINAL_REPLAYS // 3):
            for index in order:
                taken[index] += sample(entrants[index], 3)
        samples.append(taken)
    base = statistics.median(samples[0][0] + samples[1][0])
    best, best_us = 0, base
    for index in range(1, len(entrants)):
        wins = all(
            _median_gain(taken[0], taken[index])
            > max(LEAST_GAIN, _spread(taken[0]), _spread(taken[index]))
            for taken in samples
        )
        us = statistics.median(samples[0][index] + samples[1][index])
        if wins and us < best_us:
            best, best_us = index, us
    return entrants[best], best_us, base


def _median_gain(old: list[float], new: list[float]) -> float:
    return 1 - statistics.median(new) / statistics.median(old)


def _spread(samples: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


# ------------------------------------------------------------------------- machine
class Bench(Protocol):
    """The kernels on random layers of one shape."""

    def decode_candidates(self, op: str, tokens: int) -> list[Plan]:
        """Plans that the op takes and that compute the right thing."""
        ...

    def sample_decode(
        self, op: str, tokens: int
    ) -> Callable[[Plan | None, int], list[float]]: ...

    def tile_candidates(self, op: str, block_m: int, tokens: int) -> list[Tile]: ...

    def sample_tile(self, op: str, tokens: int) -> Sampler: ...

    def sample_whole(
        self, tokens: int, plans: tuple[Plan | None, Plan | None], tiles: PrefillTiles
    ) -> Sampler:
        """Of candidates "decode" and "prefill": the whole experts call."""
        ...


class GpuBench:
    """``Bench`` on the GPU at hand; timed by events around replays of graphs."""

    def __init__(self, shape: LayerShape, cu_count: int, variants: Any = None) -> None:
        self.shape, self.cu_count, self.pool = shape, cu_count, variants
        device = "cuda"
        generator = torch.Generator(device).manual_seed(0)
        layer_bytes = shape.experts * shape.expert_bytes
        cache = max(LEAST_CACHE, torch.cuda.get_device_properties().L2_cache_size)
        free = torch.cuda.mem_get_info()[0]
        wanted = min(max(ROTATE_CACHES * cache, 2 * layer_bytes), MOST_BYTES, free // 2)
        copies = max(1, min(12, -(-wanted // layer_bytes)))
        if layer_bytes > free // 2:
            raise ValueError(
                f"{shape}: a layer takes {layer_bytes / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free"
            )
        self.layers = [
            random_layers.random_layer(shape, generator) for _ in range(copies)
        ]
        self.inputs: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self.right: dict[tuple[str, int], torch.Tensor] = {}
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self.matrix_units = torch.version.hip is None

    # ---------------------------------------------------------------------- decode
    def batches(self, tokens: int) -> list[tuple[torch.Tensor, ...]]:
        """x, ids, weights, middle for each of ``BATCHES`` routings."""
        if tokens not in self.inputs:
            generator = torch.Generator().manual_seed(tokens)
            shape, made = self.shape, []
            for _ in range(BATCHES):
                ids, weights = random_layers.random_routing(tokens, shape, generator)
                x = torch.randn(tokens, shape.hidden, generator=generator)
                pairs = tokens * shape.top_k
                middle = torch.randn(pairs, shape.intermediate, generator=generator)
                made.append(
                    tuple(
                        t.cuda()
                        for t in (
                            x.to(shape.dtype),
                            ids,
                            weights,
                            middle.to(shape.dtype),
                        )
                    )
                )
            self.inputs = {tokens: made}  # those of one number at a time
            self.right.clear()
        return self.inputs[tokens]

    def launch(
        self, op: str, tokens: int, call: int, plan: Plan | None, out: torch.Tensor
    ) -> None:
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

        layer = self.layers[call % len(self.layers)]
        x, ids, weights, middle = self.batches(tokens)[call % BATCHES]
        group = self.shape.group_size
        if op == "gate_up":
            w, scales, zeros = layer.w13
            ops.fused_moe_wvSplitK_int4_gate_up(
                x, w, scales, out, ids, "silu", self.cu_count, group, zeros, plan=plan
            )
        else:
            w, scales, zeros = layer.w2
            ops.fused_moe_wvSplitK_int4_down(
                middle,
                w,
                scales,
                out,
                ids,
                weights,
                self.cu_count,
                group,
                zeros,
                plan=plan,
            )

    def output(self, op: str, tokens: int) -> torch.Tensor:
        shape = self.shape
        rows = tokens * shape.top_k if op == "gate_up" else tokens
        columns = shape.intermediate if op == "gate_up" else shape.hidden
        nan = float("nan")
        return torch.full((rows, columns), nan, dtype=shape.dtype, device="cuda")

    def expected(self, op: str, tokens: int) -> torch.Tensor:
        """Of call 0, in float32 from dequantized weights."""
        if (op, tokens) not in self.right:
            x, ids, weights, middle = (t for t in self.batches(tokens)[0])
            shape, layer = self.shape, self.layers[0]
            result = torch.zeros(self.output(op, tokens).shape, device="cuda")
            for expert in ids.unique().tolist():
                pairs = (ids.flatten() == expert).nonzero()[:, 0]
                of = pairs // shape.top_k
                if op == "gate_up":
                    w = layer.w13.dequantized(expert, torch.float32)
                    gate, up = (x[of].float() @ w.T).chunk(2, 1)
                    result[pairs] = reference.activate(gate, up, "silu")
                else:
                    w = layer.w2.dequantized(expert, torch.float32)
                    part = middle[pairs].float() @ w.T
                    result.index_add_(0, of, part * weights.flatten()[pairs, None])
            self.right[op, tokens] = result
        return self.right[op, tokens]

    def decode_candidates(self, op: str, tokens: int) -> list[Plan]:
        plans = gate_up_plans if op == "gate_up" else down_plans
        return [p for p in plans(self.matrix_units) if self.is_right(op, tokens, p)]

    def is_right(self, op: str, tokens: int, plan: Plan | None) -> bool:
        """Whether the op takes the plan and then computes what it should."""
        out = self.output(op, tokens)
        try:
            self.launch(op, tokens, 0, plan, out)
        except RuntimeError as refusal:
            if ": plan:" in str(refusal):  # not for this shape or device
                return False
            raise
        error = reference.relative_error(out, self.expected(op, tokens))
        if not error <= 2 * reference.TOLERANCE[self.shape.dtype]:
            print(
                f"WRONG: {op} with plan {plan}, {tokens} tokens, {self.shape}: "
                f"error {error:.2g}, not used: run vllm-hybrid-w4a16 selftest",
                file=sys.stderr,
            )
            return False
        return True

    def sample_decode(
        self, op: str, tokens: int
    ) -> Callable[[Plan | None, int], list[float]]:
        out = self.output(op, tokens)

        def sample(plan: Plan | None, count: int) -> list[float]:
            def launch(call: int) -> None:
                self.launch(op, tokens, call, plan, out)

            return self.replay((op, tokens, plan), launch, count)

        return sample

    # --------------------------------------------------------------------- prefill
    def call(self, tokens: int, call: int, tiles: PrefillTiles) -> Any:
        from vllm.plugins.hybrid_w4a16 import prefill_kernels

        x, ids, weights, _ = self.batches(tokens)[call % BATCHES]
        layer = self.layers[call % len(self.layers)]
        return prefill_kernels.PrefillCall(
            layer, self.shape, x, ids, weights, None, tiles
        )

    def tile_candidates(self, op: str, block_m: int, tokens: int) -> list[Tile]:
        """Tiles that compile and whose result is right."""
        good = []
        for tile in tile_sizes(block_m):
            pair = PrefillTiles(tile, tile)
            if self.pool is not None and self.pool.wait(self.shape, pair) is not None:
                continue
            call = self.call(tokens, 0, pair)
            out = torch.full_like(call.x, float("nan"))
            call.run(out)
            error = reference.relative_error(out, self.whole(tokens))
            if error <= 4 * reference.TOLERANCE[self.shape.dtype]:
                good.append(tile)
            else:
                print(
                    f"WRONG: prefill with {tile}, {tokens} tokens, {self.shape}: "
                    f"relative error {error:.2g}; it is not used.",
                    file=sys.stderr,
                )
        return good

    def whole(self, tokens: int) -> torch.Tensor:
        """Call 0 of the whole layer by the decode ops, in the rule's plans."""
        if ("whole", tokens) not in self.right:
            middle = self.output("gate_up", tokens)
            self.launch("gate_up", tokens, 0, None, middle)
            x, ids, weights, _ = self.batches(tokens)[0]
            out = torch.empty_like(x)
            self._down(tokens, 0, None, middle, out)
            self.right["whole", tokens] = out.float()
        return self.right["whole", tokens]

    def _down(
        self,
        tokens: int,
        call: int,
        plan: Plan | None,
        middle: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

        _, ids, weights, _ = self.batches(tokens)[call % BATCHES]
        w, scales, zeros = self.layers[call % len(self.layers)].w2
        ops.fused_moe_wvSplitK_int4_down(
            middle,
            w,
            scales,
            out,
            ids,
            weights,
            self.cu_count,
            self.shape.group_size,
            zeros,
            plan=plan,
        )

    def sample_tile(self, op: str, tokens: int) -> Sampler:
        calls: dict[Tile, list[Any]] = {}

        def sample(tile: Tile, count: int) -> list[float]:
            pair = PrefillTiles(tile, tile)
            if tile not in calls:
                calls.clear()
                calls[tile] = [self.call(tokens, i, pair) for i in range(BATCHES)]
            made = calls[tile]
            blocks = [call.blocks() for call in made]

            def launch(index: int) -> None:
                number = index % BATCHES
                made[number].launch(op, blocks[number])

            key = ("tile", op, tokens, tile)
            return self.replay(key, launch, count, calls=BATCHES, keep=False)

        return sample

    def sample_whole(
        self, tokens: int, plans: tuple[Plan | None, Plan | None], tiles: PrefillTiles
    ) -> Sampler:
        middle, out = self.output("gate_up", tokens), self.output("down", tokens)
        calls = [self.call(tokens, i, tiles) for i in range(BATCHES)]

        def decode(index: int) -> None:
            self.launch("gate_up", tokens, index, plans[0], middle)
            self._down(tokens, index, plans[1], middle, out)

        def prefill(index: int) -> None:
            calls[index % BATCHES].run(out)

        def sample(kind: str, count: int) -> list[float]:
            launch = decode if kind == "decode" else prefill
            return self.replay(("whole", kind, tokens), launch, count)

        return sample

    # ---------------------------------------------------------------------- timing
    def replay(
        self,
        key: Any,
        launch: Callable[[int], None],
        count: int,
        calls: int = CALLS,
        keep: bool = True,
    ) -> list[float]:
        """Microseconds per call of ``count`` replays of a graph of ``calls`` calls."""
        graph = self.graphs.get(key)
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                launch(0)  # what a first call does is not for the graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for index in range(calls):
                    launch(index)
            if keep:
                self.graphs[key] = graph
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [
            begin.elapsed_time(end) * 1e3 / calls
            for begin, end in itertools.pairwise(events)
        ]

    def drop_graphs(self) -> None:
        self.graphs.clear()


# -------------------------------------------------------------------------- tuning
class Tuner:
    """Measures one shape; ``entry`` is what the table gets.

    Args:
        current: what is used for the shape now.
        save: called with the entry whenever it has grown.
        progress: has ``step(name)`` and ``say(text)``.
    """

    def __init__(
        self,
        bench: Bench,
        current: tuning.Tuned,
        compute_units: int,
        source: str,
        save: Callable[[dict[str, Any]], object],
        progress: Any,
    ) -> None:
        self.bench, self.current = bench, current
        self.save, self.progress = save, progress
        self.entry: dict[str, Any] = {
            **tuning.shape_fields(current.shape),
            "compute_units": compute_units,
            "kernel_version": tuning.KERNEL_VERSION,
            "source": source,
            "prefill_from": None,
            "decode": [],
            "rows": [],
        }

    def run(self, decode: bool, prefill: bool) -> dict[str, Any]:
        if decode:
            for tokens in DECODE_TOKENS:
                self.tune_decode(tokens)
        if prefill:
            for tokens in PREFILL_TOKENS:
                self.tune_prefill(tokens)
            self.find_begin()
        return self.entry

    def tune_decode(self, tokens: int) -> None:
        row: dict[str, Any] = {"tokens": tokens}
        for op in ("gate_up", "down"):
            name = f"{op}, {tokens} tokens"
            plan, us, rule_us = choose(
                None,
                list(self.bench.decode_candidates(op, tokens)),
                self.bench.sample_decode(op, tokens),
                functools.partial(self._step, name),
            )
            row[op] = None if plan is None else list(plan)
            row[f"{op}_us"], row[f"{op}_rule_us"] = round(us, 2), round(rule_us, 2)
        self._done(tokens)
        self.entry["decode"].append(row)
        self.save(self.entry)
        self.progress.say(
            f"  {tokens} tokens: gate_up {row['gate_up_us']} us (rule "
            f"{row['gate_up_rule_us']}), down {row['down_us']} us (rule "
            f"{row['down_rule_us']})"
        )

    def tune_prefill(self, tokens: int) -> None:
        shape = self.current.shape
        rows_per_expert = tokens * shape.top_k / shape.experts
        now = self.current.prefill_tiles(tokens * shape.top_k)
        # a block far larger than what an expert gets is padding only
        sizes = [m for m in (16, 32, 64, 128) if m == 16 or m < 4 * rows_per_expert]
        sizes.sort(key=lambda m: m != now.gate_up.block_m)  # what there is comes first
        best: tuple[float, PrefillTiles] | None = None
        now_us = 0.0
        for block_m in sizes:
            found = []
            for op, mine in (("gate_up", now.gate_up), ("down", now.down)):
                name = f"prefill {op}, {tokens} tokens"
                candidates = self.bench.tile_candidates(op, block_m, tokens)
                if mine.block_m != block_m:
                    if not candidates:
                        break
                    mine = candidates[0]
                tile, us, base = choose(
                    mine,
                    candidates,
                    self.bench.sample_tile(op, tokens),
                    functools.partial(self._step, name),
                )
                found.append((us, tile, base))
            if len(found) < 2:
                continue
            if block_m == now.gate_up.block_m:
                now_us = found[0][2] + found[1][2]
            us = found[0][0] + found[1][0]
            if best is None or us < best[0] * (1 - LEAST_GAIN):
                best = us, PrefillTiles(found[0][1], found[1][1])
        self._done(tokens)
        if best is None:
            return
        us, tiles = best
        self.entry["rows"].append(
            {
                "hidden": shape.hidden,
                "intermediate": shape.intermediate,
                "rows_per_expert": round(rows_per_expert, 3),
                "block_m": tiles.gate_up.block_m,
                "gate_up": list(dataclasses.astuple(tiles.gate_up)[1:]),
                "down": list(dataclasses.astuple(tiles.down)[1:]),
                "us": round(us, 1),
            }
        )
        self.save(self.entry)
        before = f" (now {now_us:.1f})" if now_us else ""
        self.progress.say(f"  prefill, {tokens} tokens: {us:.1f} us{before}")

    def find_begin(self) -> None:
        """The least number of tokens from which prefill is faster and stays so."""
        shape = self.current.shape
        tuned = dataclasses.replace(
            self.current, entry=self.entry if self.entry["rows"] else None
        )
        decode = {
            row["tokens"]: (
                tuning._plan(row["gate_up"]),
                tuning._plan(row["down"]),
            )
            for row in self.entry["decode"]
        }
        tuned = dataclasses.replace(tuned, decode=decode or self.current.decode)
        begin = None
        for tokens in reversed(BEGIN_TOKENS):
            rows = tuned.entry["rows"] if tuned.entry else None
            pairs = tokens * shape.top_k
            tiles = (
                tuning._nearest_tiles(
                    rows, pairs, shape.experts, shape.hidden, shape.intermediate
                )
                if rows
                else self.current.prefill_tiles(pairs)
            )
            sample = self.bench.sample_whole(tokens, tuned.decode_plans(tokens), tiles)
            winner, us, decode_us = choose(
                "decode",
                ["prefill"],
                sample,
                functools.partial(self._step, f"crossover, {tokens} tokens"),
            )
            self._done(tokens)
            if winner == "decode":
                break
            begin = tokens
        self.entry["prefill_from"] = begin or BEGIN_TOKENS[-1]
        self.save(self.entry)
        self.progress.say(f"  prefill from {self.entry['prefill_from']} tokens on")

    def _step(self, name: str, what: str) -> None:
        self.progress.step(f"{name}, {what}")

    def _done(self, tokens: int) -> None:
        drop = getattr(self.bench, "drop_graphs", None)
        if drop is not None:
            drop()


# ------------------------------------------------------------------------- command
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="*", help="folder, or name of a model on the hub")
    add(
        "--shape",
        action="append",
        default=[],
        metavar="E,TOP_K,H,I,G",
        help="experts, top-k, hidden, intermediate, group size; may be repeated",
    )
    add("--dtype", choices=DTYPES, help="of activations (default: the checkpoint's)")
    add("--tp", type=int, default=1, help="tensor-parallel GPUs (default: 1)")
    add("--only", choices=("decode", "prefill"), help="measure only this")
    add("--show", action="store_true", help="print what would be used, measure nothing")
    add("--json", action="store_true", help="print the new entries as JSON")


def parse_shape(text: str, dtype: str) -> MoEShape:
    """``E,TOP_K,H,I,G``; raises ``ValueError``."""
    sizes = text.split(",")
    if len(sizes) != 5 or not all(s.strip().isdecimal() and int(s) for s in sizes):
        raise ValueError(f"--shape {text!r} is not E,TOP_K,H,I,G: five numbers above 0")
    experts, top_k, hidden, inter, group = map(int, sizes)
    if top_k > experts:
        raise ValueError(f"--shape {text!r}: top-{top_k} of {experts} experts")
    if group not in random_layers.GROUP_SIZES:
        raise ValueError(f"--shape {text!r}: group size {group}, known: 32, 64, 128")
    if hidden % group or inter % group:
        raise ValueError(
            f"--shape {text!r}: {hidden} and {inter} are no multiples of {group}"
        )
    return MoEShape(experts, top_k, hidden, inter, group, dtype)


def shapes_of(args: argparse.Namespace, family: Any) -> list[MoEShape]:
    """Of ``--shape`` and of the checkpoints' hybrid layers, each once.

    Raises ``ValueError``, also for a checkpoint that cannot be read.
    """
    from vllm.plugins.hybrid_w4a16 import explain_layers
    from vllm.plugins.hybrid_w4a16.explain_checkpoint import read_checkpoint

    shapes = [parse_shape(text, args.dtype or "bf16") for text in args.shape]
    for name in args.checkpoint:
        checkpoint = read_checkpoint(name)
        dtype = explain_layers.activation_dtype(checkpoint)
        for layer in explain_layers.expert_layers(checkpoint, args.tp, family):
            if layer.bits == 4 and layer.group_size is not None:
                shapes.append(
                    MoEShape(
                        layer.num_experts,
                        layer.top_k,
                        layer.hidden,
                        layer.intermediate // args.tp,
                        layer.group_size,
                        args.dtype or random_layers.dtype_name(dtype),
                    )
                )
    return list(dict.fromkeys(shapes))


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit status."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices

    switch.register()
    family = devices.device_family()
    try:
        with quiet():
            shapes = shapes_of(args, family)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(family, str):
        print(f"error: {family}", file=sys.stderr)
        return 1
    if args.show:
        print("\n".join(show(family, shapes)))
        return 0
    if family.tuning is None:
        print(
            f"{family.name}: nothing to tune. The CPU ops have no launch plans and no "
            "tiles; which kernel runs is decided per expert from its rows, the group "
            "size and the processor's instruction set."
        )
        return 0
    if not shapes:
        print("error: give a checkpoint or --shape", file=sys.stderr)
        return 2
    return measure(args, family, shapes)


def measure(args: argparse.Namespace, family: Any, shapes: list[MoEShape]) -> int:
    """Tune the shapes on the GPU; returns the exit status."""
    from vllm.plugins.hybrid_w4a16 import prefill_kernels

    entries: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name()
    source = f"vllm-hybrid-w4a16 tune on {device}, {datetime.date.today()}"
    pool = None
    start = time.monotonic()
    with Progress("tune") as progress:
        try:
            for shape in shapes:
                progress.say(f"{shape}")
                layer = LayerShape(
                    shape.experts,
                    shape.top_k,
                    shape.hidden,
                    shape.intermediate,
                    shape.group_size,
                    DTYPES[shape.dtype],
                )
                if args.only != "decode":
                    tiles = [t for m in (16, 32, 64, 128) for t in tile_sizes(m)]
                    pool = prefill_kernels.CompilePool(
                        [(layer, PrefillTiles(tile, tile)) for tile in tiles]
                    )
                bench = GpuBench(layer, family.cu_count, pool)
                tuning.forget()
                current = tuning.lookup(family.name, family.cu_count, shape)
                tuner = Tuner(
                    bench,
                    current,
                    family.cu_count,
                    source,
                    lambda e: tuning.write_owner_entry(family.name, e),
                    progress,
                )
                entries.append(tuner.entry)
                if args.only == "prefill" and current.exact and current.entry:
                    tuner.entry["decode"] = current.entry["decode"]
                if args.only == "decode" and current.exact and current.entry:
                    tuner.entry["rows"] = current.entry["rows"]
                    tuner.entry["prefill_from"] = current.entry["prefill_from"]
                tuner.run(args.only != "prefill", args.only != "decode")
                if pool is not None:
                    pool.close()
        except KeyboardInterrupt:
            if pool is not None:
                pool.close()
            print(
                f"\ninterrupted: what was measured is in "
                f"{tuning.owner_table(family.name)}",
                file=sys.stderr,
            )
            return 130
        except ValueError as error:  # a layer that does not fit into memory
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.json:
        print(json.dumps(entries, indent=1))
    print(
        f"written: {tuning.owner_table(family.name)}, {len(entries)} shapes in "
        f"{time.monotonic() - start:.0f} s",
        file=sys.stderr if args.json else sys.stdout,
    )
    return 0


def show(family: Any, shapes: list[MoEShape]) -> list[str]:
    """Tables, and what would be used for ``shapes``."""
    arch = family.name
    if family.tuning is None:
        return [f"{arch}: no tables, the CPU ops have nothing to tune"]
    owner = tuning.owner_table(arch)
    entries = tuning.owner_entries(arch)
    shipped = tuning.TABLES / f"{family.tuning}.json"
    lines = [
        f"owner    {owner} ({len(entries)} shapes)"
        if owner.is_file()
        else f"owner    {owner} (not there)",
        f"shipped  {shipped}"
        if shipped.is_file()
        else f"shipped  none for {arch}: small tiles",
        f"         {tuning.table(family.tuning).get('source', 'no source')}",
    ]
    for entry in entries:
        usable = (
            entry["compute_units"] == family.cu_count
            and entry["kernel_version"] == tuning.KERNEL_VERSION
        )
        sizes = {name: entry[name] for name in tuning._SHAPE_FIELDS}
        text = f"  {MoEShape(**sizes)}: {entry.get('source', 'no source')}"
        if not usable:
            text += " (of other kernels or another device: not used)"
        lines.append(text)
    for shape in shapes:
        tuned = tuning.lookup(arch, family.cu_count, shape)
        near = "" if tuned.origin == "rule" or tuned.exact else ", the nearest shape"
        lines += ["", f"{shape}: from {tuned.origin}{near}"]
        lines.append(f"  prefill from {tuned.prefill_from} tokens on")
        for tokens, plans in tuned.decode.items():
            texts = ("rule" if plan is None else str(list(plan)) for plan in plans)
            lines.append(f"  up to {tokens} tokens: gate_up, down {', '.join(texts)}")
        for tokens in PREFILL_TOKENS:
            tiles = tuned.prefill_tiles(tokens * shape.top_k)
            sizes_text = (
                str(list(dataclasses.astuple(tile))) for tile in tiles_of(tiles)
            )
            lines.append(f"  prefill of {tokens}: {', '.join(sizes_text)}")
    return lines


def tiles_of(tiles: PrefillTiles) -> tuple[Tile, Tile]:
    return tiles.gate_up, tiles.down
