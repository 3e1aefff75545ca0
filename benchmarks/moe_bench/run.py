# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The run: builds the backends, checks them, times them and reports."""

import argparse
import gc
import os
import statistics
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from moe_bench import ceilings, machine, timing
from moe_bench.arguments import DTYPES, split_names
from moe_bench.backends import BACKENDS, Call
from moe_bench.inputs import (
    ROUTINGS,
    Batch,
    Case,
    Int4Layer,
    make_batches,
    random_layer,
)
from moe_bench.reference import reference_rows, relative_error
from moe_bench.report import (
    ceilings_line,
    table_header,
    table_line,
    write_json,
    write_plot,
)
from moe_bench.vllm_experts import Unavailable

# Weights take at most this share of the free memory.
MEMORY_SHARE = 0.8
# The table is printed again if the second read ceiling is higher by more than this.
CEILING_NOISE = 1.02
# Different routings per number on the CPU.
MAX_BATCHES = 64


def check_names(args: argparse.Namespace) -> None:
    """Check the device and the names that depend on it; splits the lists in place.

    Raises ``ValueError`` naming the option, the value and what was expected.
    """
    args.routing = split_names("--routing", args.routing, ROUTINGS)
    offered = [name for name, b in BACKENDS.items() if args.device in b.devices]
    default = [name for name in offered if BACKENDS[name].by_default]
    args.backends = split_names(
        "--backends", args.backends or ",".join(default), offered
    )
    if args.device == "cpu":
        args.cpu_isa = machine.select_cpu_isa(args.cpu_isa)
    else:
        vendor = torch.version.hip if args.device == "rocm" else torch.version.cuda
        if vendor is None or not torch.cuda.is_available():
            raise ValueError(
                f"--device {args.device}: torch {torch.__version__} sees no such GPU"
            )


def say(text: str) -> None:
    """Print a message at once."""
    print(text, flush=True)


@dataclass(frozen=True)
class Rotation:
    """A backend that is ready to run.

    It has the call, the number of copies of the layer, and the number wanted.
    """

    call: Call
    copies: int
    wanted: int

    def step(self, batches: list[Batch]) -> timing.Step:
        """Call number ``i`` uses the next copy of the layer and the next batch."""

        def step(i: int) -> object:
            return self.call(i % self.copies, batches[i % len(batches)])

        return step


class Benchmark:
    """One run: its arguments, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.failed = False
        self.device = torch.device("cpu" if args.device == "cpu" else "cuda")
        self.threads = args.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        facts = machine.describe(args.device, self.threads)
        facts["cpu_isa"] = args.cpu_isa
        facts["command"] = args.command
        facts["note"] = args.note
        say(
            f"machine: {facts.get('gpu') or facts['cpu']}, {self.threads} CPU threads, "
            f"load average {facts['load_average']:.1f}"
        )
        found = ceilings.measure_ceilings(self.device, self.threads)
        say(ceilings_line(found))
        on_cpu = self.device.type == "cpu"
        self.read_now = ceilings.ReadNow(self.threads) if on_cpu else None
        self.cache_bytes = facts["cache_bytes"]
        self.result: dict[str, Any] = {
            "machine": facts,
            "ceilings": found,
            "rows": [],
            "unavailable": [],
        }

    def run(self) -> None:
        """Measure everything; results are written after every number of tokens."""
        for shape in self.args.shapes:
            for group_size in self.args.group_size:
                dtype = getattr(torch, DTYPES[self.args.dtype])
                self._run_case(Case(shape, dtype, group_size, self.device))
                _free_memory()
        self._measure_ceilings_again()
        self._save()
        if self.args.plot is not None and self.result["rows"]:
            write_plot(self.args.plot, self.result)

    def _save(self) -> None:
        if self.args.json is not None:
            write_json(self.args.json, self.result)

    def _measure_ceilings_again(self) -> None:
        """Use the better of two measurements of the ceilings for all rows: the machine
        may have been busy during the first."""
        first = self.result["ceilings"]
        better = ceilings.measure_ceilings(self.device, self.threads, first)
        self.result["ceilings"] = better
        for row in self.result["rows"]:
            row["pct_read"] = 100 * row["gbps"] / better["read_gbps"]
        if better["read_gbps"] > CEILING_NOISE * first["read_gbps"]:
            say(f"\nagain, against the better {ceilings_line(better)}")
            say(table_header())
            for row in self.result["rows"]:
                say(table_line(row))

    def _run_case(self, case: Case) -> None:
        shape = case.shape
        say(
            f"\n{shape.name}: {shape.num_experts} experts, top-{shape.top_k}, hidden "
            f"{shape.hidden}, intermediate {shape.intermediate}, group "
            f"{case.group_size}, {self.args.dtype}"
        )
        layer = random_layer(case)
        running = {}
        for index, name in enumerate(self.args.backends):
            try:
                running[name] = self._build(case, layer, self.args.backends[index:])
            except Unavailable as reason:
                self._drop(case, name, f"does not run here: {reason}")
            except Exception as error:
                self._fail(case, name, error)
        say(table_header())
        for routing in self.args.routing:
            for tokens in self.args.tokens:
                self._run_cell(case, layer, running, routing, tokens)
                self._save()

    def _build(self, case: Case, layer: Int4Layer, names: list[str]) -> Rotation:
        """Build the first of the backends that remain.

        ``names`` has all that remain, so that it leaves memory for the others.
        """
        layer_bytes, wanted = {}, {}
        for name in names:
            expert = BACKENDS[name].expert_bytes(case.shape, case.group_size)
            layer_bytes[name] = expert * case.shape.num_experts
            wanted[name] = self.args.layers or copies_to_rotate(
                expert * case.shape.top_k, self.cache_bytes
            )
        usable = int(machine.available_bytes(self.args.device) * MEMORY_SHARE)
        name = names[0]
        if layer_bytes[name] > usable:
            raise Unavailable(
                f"one layer takes {layer_bytes[name] / 2**30:.1f} GiB, "
                f"{usable / 2**30:.1f} GiB of memory can be used"
            )
        copies = share_memory(wanted, layer_bytes, usable)[name]
        call = BACKENDS[name].build(case, layer, copies)
        line = f"{copies} layers, {copies * layer_bytes[name] / 2**20:.0f} MiB"
        if copies < wanted[name]:
            line += (
                f"; {wanted[name]} were wanted and memory holds no more: part of the "
                "weights may come from a cache"
            )
        say(f"  {name}: {line}")
        return Rotation(call, copies, wanted[name])

    def _fail(self, case: Case, name: str, error: Exception) -> None:
        """Continue without a backend that failed; the others are still useful."""
        self.failed = True
        traceback.print_exception(error)
        self._drop(case, name, f"FAILED: {type(error).__name__}: {error}")

    def _drop(self, case: Case, name: str, reason: str) -> None:
        say(f"  {name}: {reason}")
        self.result["unavailable"].append(
            {
                "backend": name,
                "shape": case.shape.name,
                "group_size": case.group_size,
                "reason": reason,
            }
        )

    def _run_cell(
        self,
        case: Case,
        layer: Int4Layer,
        running: dict[str, Rotation],
        routing: str,
        tokens: int,
    ) -> None:
        on_cpu = case.device.type == "cpu"
        calls = timing.graph_calls(tokens)  # of a GPU's graph
        count = min(self.args.repeats, MAX_BATCHES) if on_cpu else calls
        batches = make_batches(case, routing, tokens, count)
        expected = reference_rows(layer, batches[0])
        errors = {}
        for name, rotation in list(running.items()):
            try:
                errors[name] = check(name, rotation, batches[0], expected)
            except Exception as error:
                del running[name]
                self._fail(case, name, error)
        steps = {name: rotation.step(batches) for name, rotation in running.items()}
        if self.read_now is None:
            samples = timing.time_on_gpu(steps, self.args.repeats, calls)
            read_now = None
        else:
            self.read_now.gbps.clear()
            samples = timing.time_on_cpu(
                steps, self.args.repeats, self.read_now.measure
            )
            read_now = statistics.median(self.read_now.gbps)
        hybrid = statistics.median(samples["hybrid"]) if "hybrid" in samples else None
        for name, times in samples.items():
            # a graph runs all batches, a single call runs one
            used = batches[: len(times)] if on_cpu else batches
            distinct = statistics.mean(batch.distinct_experts for batch in used)
            num_bytes = distinct * case.shape.int4_bytes(case.group_size)
            us = statistics.median(times)
            gbps = num_bytes / us / 1e3
            deciles = statistics.quantiles(times, n=10, method="inclusive")
            row = {
                "shape": case.shape.name,
                "tokens": tokens,
                "routing": routing,
                "backend": name,
                "dtype": self.args.dtype,
                "group_size": case.group_size,
                "us": us,
                "us_p10": deciles[0],
                "us_p90": deciles[-1],
                "samples": len(times),
                "gbps": gbps,
                "pct_read": 100 * gbps / self.result["ceilings"]["read_gbps"],
                "read_now_gbps": read_now,
                "pct_read_now": None if read_now is None else 100 * gbps / read_now,
                "ratio_to_hybrid": None if hybrid is None else us / hybrid,
                "rel_error": errors[name],
                "distinct_experts": distinct,
                "weight_bytes": num_bytes,
                "layers_rotated": running[name].copies,
                "layers_wanted": running[name].wanted,
            }
            self.result["rows"].append(row)
            say(table_line(row))


def check(name: str, rotation: Rotation, batch: Batch, expected: torch.Tensor) -> float:
    """Relative error on a batch; raises ``ArithmeticError`` above the bound."""
    # the last copy, so that a wrong copy would show too
    output = rotation.call(rotation.copies - 1, batch)
    error = relative_error(output, batch, expected)
    bound = BACKENDS[name].max_error
    if not error <= bound:
        raise ArithmeticError(
            f"wrong at {batch.x.shape[0]} tokens: relative error {error:.3g}, at most "
            f"{bound} is expected"
        )
    return error


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copies_to_rotate(call_bytes: int, cache_bytes: int) -> int:
    """Layer copies needed to read twice the cache between two uses of a weight."""
    return max(2, 1 + -(-2 * cache_bytes // call_bytes))


def share_memory(
    wanted: dict[str, int], layer_bytes: dict[str, int], usable: int
) -> dict[str, int]:
    """Layer copies per backend that fit in ``usable`` bytes together.

    Each backend gets one copy. The rest is distributed so that all get the same share
    of the copies that they want.
    """
    copies = dict.fromkeys(wanted, 1)
    left = usable - sum(layer_bytes.values())
    while short := [
        name
        for name in wanted
        if copies[name] < wanted[name] and layer_bytes[name] <= left
    ]:
        name = min(short, key=lambda name: copies[name] / wanted[name])
        copies[name] += 1
        left -= layer_bytes[name]
    return copies
