# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Results as rows and as tables: a column for each setting."""

import statistics
from collections.abc import Iterable
from typing import Any

from token_bench.parts import PARTS

Row = dict[str, Any]
_LABEL = 24
_COLUMN = 28


def spread(values: list[float]) -> dict[str, float]:
    """Median and deciles."""
    if len(values) == 1:
        values = values * 2
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "ms": statistics.median(values),
        "ms_p10": deciles[0],
        "ms_p90": deciles[-1],
    }


def decode_row(setting: str, batch: int, turns: list[dict[str, Any]]) -> Row:
    """Time per output token, over the steps of all turns (``worker.Engine.decode``)."""
    gained = statistics.mean(turn["tokens"] for turn in turns)
    return {
        "setting": setting,
        "batch": batch,
        **spread([ms / gained for turn in turns for ms in turn["ms"]]),
        "steps": sum(len(turn["ms"]) for turn in turns),
        "tokens_per_step": gained,
        "distinct_tokens": statistics.mean(turn["distinct"] for turn in turns),
        "turns_ms": [statistics.median(turn["ms"]) / gained for turn in turns],
    }


def prefill_row(setting: str, prompt: int, times: list[float]) -> Row:
    """Time to the first token, over all turns."""
    return {
        "setting": setting,
        "prompt": prompt,
        **spread(times),
        "samples": len(times),
    }


def load_row(setting: str, requests: int, turns: list[dict[str, Any]]) -> Row:
    """Output tokens/s and time of a step, over all turns (``worker.Engine.load``)."""
    return {
        "setting": setting,
        "load": requests,
        **spread([ms for turn in turns for ms in turn["ms"]]),
        "tokens_per_s": statistics.median(turn["tokens_per_s"] for turn in turns),
        "turns_tokens_per_s": [turn["tokens_per_s"] for turn in turns],
        "requests_per_step": statistics.mean(turn["requests"] for turn in turns),
        "first_ms": spread([ms for turn in turns for ms in turn["first_ms"]]),
    }


def time_table(settings: list[str], peer: str | None, result: Row) -> list[str]:
    """All times of all settings as lines; ``peer``: the setting of the ratios."""
    lines = [_line("ms", settings)]
    for title, rows, key in (
        ("TPOT, batch", result["decode"], "batch"),
        ("TTFT, prompt", result["prefill"], "prompt"),
        ("step, load", result["load"], "load"),
    ):
        for value in dict.fromkeys(row[key] for row in rows):
            mine = {row["setting"]: row for row in rows if row[key] == value}
            base = mine.get(peer or "")
            cells = [_times(mine.get(name), base) for name in settings]
            lines.append(_line(f"{title} {value}", cells))
    if any(row["tokens_per_step"] != 1 for row in result["decode"]):
        for batch in dict.fromkeys(row["batch"] for row in result["decode"]):
            mine = {r["setting"]: r for r in result["decode"] if r["batch"] == batch}
            cells = [
                f"{mine[name]['tokens_per_step']:.2f}" if name in mine else "-"
                for name in settings
            ]
            lines.append(_line(f"tokens/step, batch {batch}", cells))
    for requests in dict.fromkeys(row["load"] for row in result["load"]):
        mine = {r["setting"]: r for r in result["load"] if r["load"] == requests}
        base = mine.get(peer or "")
        cells = [_rate(mine.get(name), base) for name in settings]
        lines.append(_line(f"tokens/s, load {requests}", cells))
    return lines


def part_tables(settings: list[str], traces: list[Row]) -> list[str]:
    """GPU time and launches by part as lines, a table for each trace."""
    lines = []
    for title in dict.fromkeys(map(_traced, traces)):
        mine = {row["setting"]: row for row in traces if _traced(row) == title}
        names = [name for name in settings if name in mine]
        lines += ["", _line(f"GPU us, {title}", names)]
        for part in PARTS:
            found = [mine[name]["parts"].get(part) for name in names]
            if any(found):
                lines.append(_line(part, map(_part, found)))
        busy = [(mine[name]["busy_us"], mine[name]["launches"]) for name in names]
        lines.append(_line("busy", (_us(*pair) for pair in busy)))
        lines.append(_line("step", (f"{mine[name]['step_us']:.1f}" for name in names)))
        lines += [
            f"  rest, {name}: {kernel[:60]} {_part(found)}"
            for name in names
            for kernel, found in mine[name]["rest"].items()
        ]
    return lines


def _times(row: Row | None, base: Row | None) -> str:
    if row is None:
        return "-"
    text = f"{row['ms']:.2f} ({row['ms_p10']:.2f}-{row['ms_p90']:.2f})"
    return text if base is None else f"{text} {base['ms'] / row['ms']:.2f}x"


def _rate(row: Row | None, base: Row | None) -> str:
    if row is None:
        return "-"
    text = f"{row['tokens_per_s']:.0f}"
    if base is None:
        return text
    return f"{text} {row['tokens_per_s'] / base['tokens_per_s']:.2f}x"


def _traced(row: Row) -> str:
    kind = next(kind for kind in ("batch", "prompt", "load") if kind in row)
    return f"{kind} {row[kind]}"


def _part(part: dict[str, float] | None) -> str:
    return "-" if part is None else _us(part["us"], part["launches"])


def _us(us: float, launches: float) -> str:
    return f"{us:.1f} ({launches:g})"


def _line(label: str, cells: Iterable[str]) -> str:
    return f"{label:{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)
