# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Reduces the samples of all rounds to one row per variant, mode and load point."""

import statistics
from typing import Any

from .load import METRICS, OPTIONAL_METRICS

Sample = dict[str, Any]
Row = dict[str, Any]

CASE = ("mode", "input_len", "output_len", "concurrency")


def summarize(samples: list[Sample], baseline: str) -> list[Row]:
    """Median, smallest and largest over the rounds; ratios against ``baseline``.

    A ratio is output tokens/s over those of the baseline in the same round, so a slow
    phase of the machine affects both; above 1 the variant is faster. It is ``None`` if
    the baseline did not run.
    """
    cases: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        key = (*(sample[name] for name in CASE), sample["variant"])
        cases.setdefault(key, []).append(sample)
    rows = []
    for (*case, variant), mine in cases.items():
        theirs = {s["round"]: s for s in cases.get((*case, baseline), [])}
        ratios = [
            s["output_tokens_per_s"] / theirs[s["round"]]["output_tokens_per_s"]
            for s in mine
            if s["round"] in theirs
        ]
        optional = [n for n in OPTIONAL_METRICS if all(n in s for s in mine)]
        rows.append(
            {
                "variant": variant,
                **dict(zip(CASE, case, strict=True)),
                "rounds": len(mine),
                **{
                    name: spread([s[name] for s in mine])
                    for name in (*METRICS, *optional)
                },
                "ratio": spread(ratios) if ratios else None,
            }
        )
    return sorted(rows, key=lambda row: [str(row["mode"]), *map(row.get, CASE[1:])])


def spread(values: list[float]) -> dict[str, float]:
    """The median, minimum and maximum of ``values``."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }
