# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Tunes one shape: the order of the measurements, and the table entry they give."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import PrefillTiles
from vllm.plugins.hybrid_w4a16.tune_bench import Bench
from vllm.plugins.hybrid_w4a16.tune_search import (
    FINALISTS,
    LEAST_GAIN,
    Choice,
    Measured,
    choose,
    finals,
    search,
    sifting,
    sweep,
)

DECODE_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PREFILL_TOKENS = (16, 64, 256, 1024, 4096)
BEGIN_TOKENS = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


class Tuner:
    """Measures one shape; ``entry`` is the result for the tuning table.

    Args:
        current: the current choice for the shape.
        save: called with the entry whenever the entry has grown.
        progress: has ``step(name)`` and ``say(text)``.
        decode_tokens: numbers of tokens to measure launch plans for.
        full: measure every launch plan, and report how far the result of the search is
            from the fastest.
    """

    def __init__(
        self,
        bench: Bench,
        current: tuning.Tuned,
        compute_units: int,
        source: str,
        save: Callable[[dict[str, Any]], object],
        progress: Any,
        decode_tokens: Sequence[int] = DECODE_TOKENS,
        full: bool = False,
    ) -> None:
        self.bench, self.current = bench, current
        self.save, self.progress = save, progress
        self.decode_tokens, self.full = decode_tokens, full
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
        """Tune ``decode``, ``prefill`` or both; returns the entry."""
        if decode:
            for tokens in self.decode_tokens:
                self.tune_decode(tokens)
        if prefill:
            for tokens in PREFILL_TOKENS:
                self.tune_prefill(tokens)
            self.find_begin()
        return self.entry

    def tune_decode(self, tokens: int) -> None:
        """Add the launch plans of gate_up and down for ``tokens`` tokens."""
        row: dict[str, Any] = {"tokens": tokens}
        texts = []
        for op in ("gate_up", "down"):
            found = self._decode_plan(op, tokens)
            row |= {op if key == "plan" else f"{op}_{key}": found[key] for key in found}
            texts.append(_decode_text(op, found))
        if row["gate_up"] or row["down"]:
            texts.append(self._decide_together(row))
        self.bench.drop_graphs()
        self.entry["decode"].append(row)
        self.save(self.entry)
        self.progress.say(f"  {tokens} tokens: {'; '.join(texts)}")

    def _decode_plan(self, op: str, tokens: int) -> dict[str, Any]:
        """The chosen plan (``None``: the rule's), its microseconds and the rule's.

        A full sweep adds ``search_behind``: how much slower the best plan of the search
        is than the fastest of all, as a share, from finals of their own.
        """
        families = self.bench.families(op)
        sample = self.bench.sample_decode(op, tokens)
        step = functools.partial(self._step, f"{op}, {tokens} tokens")
        time_one = sifting(sample, step)

        def measure_one(plan: tuning.Plan) -> float | None:
            return time_one(plan) if self.bench.is_right(op, tokens, plan) else None

        measure = Measured(measure_one)
        ranked = search(families, measure)
        choice = finals(None, ranked[:FINALISTS], sample, step)
        tried = len(measure.times)
        found: dict[str, Any] = {}
        if self.full:
            # the rule's plan is among the candidates
            best = choice.winner
            ranked = sweep(families, measure)
            every = finals(best, ranked[: 2 * FINALISTS], sample, step)
            found["search_behind"] = round(every.current_us / every.fastest_us - 1, 4)
            found["searched"] = [tried, len(measure.times)]
            choice = Choice(every.winner, every.us, choice.current_us, every.fastest_us)
        plan = None if choice.winner is None else list(choice.winner)
        return {
            "plan": plan,
            "us": round(choice.us, 2),
            "rule_us": round(choice.current_us, 2),
            **found,
        }

    def _decide_together(self, row: dict[str, Any]) -> str:
        """Keep of the two plans in ``row`` what makes both launches in turn faster.

        Down starts while gate_up ends, so that a plan can be the fastest alone and not
        beside the other launch. Returns the text for the progress line.
        """
        tokens = row["tokens"]
        found = tuning.as_plan(row["gate_up"]), tuning.as_plan(row["down"])
        rule = (None, None)
        pairs = dict.fromkeys([found, (found[0], None), (None, found[1])])
        choice = finals(
            rule,
            [pair for pair in pairs if pair != rule],
            self.bench.sample_pair(tokens),
            functools.partial(self._step, f"both, {tokens} tokens"),
        )
        for op, plan in zip(("gate_up", "down"), choice.winner, strict=True):
            row[op] = None if plan is None else list(plan)
        row |= {
            "both_us": round(choice.us, 2),
            "both_rule_us": round(choice.current_us, 2),
        }
        return f"both {row['both_us']} us (rule {row['both_rule_us']})"

    def tune_prefill(self, tokens: int) -> None:
        """Add the fastest prefill tiles for ``tokens`` tokens."""
        shape = self.current.shape
        rows_per_expert = tokens * shape.top_k / shape.experts
        now = self.current.prefill_tiles(tokens * shape.top_k)
        # blocks far larger than an expert's rows are mostly padding
        least = 8 if ops.has_tiled() else 16
        sizes = [
            m
            for m in (8, 16, 32, 64, 128)
            if m >= least and m < max(4 * rows_per_expert, least + 1)
        ]
        sizes.sort(key=lambda m: m != now.gate_up.block_m)  # the current size first
        best: tuple[float, PrefillTiles] | None = None
        now_us = 0.0
        for block_m in sizes:
            found: list[Choice] = []
            for op, mine in (("gate_up", now.gate_up), ("down", now.down)):
                name = f"prefill {op}, {tokens} tokens"
                candidates = self.bench.tile_candidates(op, block_m, tokens)
                if found and found[0].winner.tiled:  # whose output is in natural order
                    candidates = [tile for tile in candidates if tile.natural]
                    mine = mine if mine.natural else candidates[0]
                if mine.block_m != block_m:
                    if not candidates:
                        break
                    mine = candidates[0]
                found.append(
                    choose(
                        mine,
                        candidates,
                        self.bench.sample_tile(op, tokens),
                        functools.partial(self._step, name),
                    )
                )
            if len(found) < 2:
                continue
            if block_m == now.gate_up.block_m:
                now_us = found[0].current_us + found[1].current_us
            us = found[0].us + found[1].us
            if best is None or us < best[0] * (1 - LEAST_GAIN):
                best = us, PrefillTiles(found[0].winner, found[1].winner)
        self.bench.drop_graphs()
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
        """Find the lowest number of tokens from which prefill is always faster."""
        shape = self.current.shape
        tuned = dataclasses.replace(
            self.current, entry=self.entry if self.entry["rows"] else None
        )
        decode = {
            row["tokens"]: (
                tuning.as_plan(row["gate_up"]),
                tuning.as_plan(row["down"]),
            )
            for row in self.entry["decode"]
        }
        tuned = dataclasses.replace(tuned, decode=decode or self.current.decode)
        begin = None
        for tokens in reversed(BEGIN_TOKENS):
            rows = tuned.entry["rows"] if tuned.entry else None
            pairs = tokens * shape.top_k
            tiles = (
                tuning.nearest_tiles(
                    rows, pairs, shape.experts, shape.hidden, shape.intermediate
                )
                if rows
                else self.current.prefill_tiles(pairs)
            )
            sample = self.bench.sample_whole(tokens, tuned.decode_plans(tokens), tiles)
            choice = finals(
                "decode",
                ["prefill"],
                sample,
                functools.partial(self._step, f"crossover, {tokens} tokens"),
            )
            self.bench.drop_graphs()
            if choice.winner == "decode":
                break
            begin = tokens
        self.entry["prefill_from"] = begin or BEGIN_TOKENS[-1]
        self.save(self.entry)
        self.progress.say(f"  prefill from {self.entry['prefill_from']} tokens on")

    def _step(self, name: str, what: str) -> None:
        self.progress.step(f"{name}, {what}")


def _decode_text(op: str, found: dict[str, Any]) -> str:
    text = f"{op} {found['us']} us (rule {found['rule_us']})"
    if "search_behind" in found:
        tried, every = found["searched"]
        text += (
            f", the search {100 * found['search_behind']:.1f}% behind the fastest of "
            f"{every} ({tried} tried)"
        )
    return text


def farthest_behind(entries: Sequence[dict[str, Any]]) -> tuple[float, str] | None:
    """The largest ``search_behind`` of fully swept entries, and where it is."""
    found = [
        (row[f"{op}_search_behind"], f"{op}, {row['tokens']} tokens, {shape}")
        for entry in entries
        for shape in [tuning.entry_shape(entry)]
        for row in entry["decode"]
        for op in ("gate_up", "down")
        if f"{op}_search_behind" in row
    ]
    return max(found, default=None)
