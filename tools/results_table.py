# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Markdown tables from a JSON file of ``benchmarks/benchmark_moe.py``.

    python -m tools.results_table FILE [--routing uniform] [--tokens 1,4] [--peer NAME]

The table has a row per shape and number of tokens: microseconds of hybrid and of the
peer, the peer's time divided by hybrid's, and the share of the read ceiling that hybrid
reached.
"""

import argparse
import json
from pathlib import Path


def rows(
    data: dict, routing: str, tokens: list[int] | None, peer: str
) -> list[tuple[str, int, float, float, float]]:
    """Return (shape, tokens, hybrid us, peer us, hybrid's percent of the ceiling)."""
    by_case: dict[tuple[str, int], dict[str, dict]] = {}
    for row in data["rows"]:
        if row.get("routing", routing) == routing:
            case = by_case.setdefault((row["shape"], row["tokens"]), {})
            case[row["backend"]] = row
    return [
        (
            shape,
            count,
            case["hybrid"]["us"],
            case[peer]["us"],
            case["hybrid"]["pct_read"],
        )
        for (shape, count), case in by_case.items()
        if "hybrid" in case and peer in case and (tokens is None or count in tokens)
    ]


def table(
    data: dict, routing: str, tokens: list[int] | None, peer: str, name: str
) -> str:
    """Return the rows as a Markdown table; ``name`` heads the peer's column."""
    lines = [
        f"| shape | tokens | hybrid | {name} | ratio | read ceiling |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, count, ours, theirs, read in rows(data, routing, tokens, peer):
        lines.append(
            f"| {shape} | {count} | {ours:.1f} | {theirs:.1f} | "
            f"{theirs / ours:.2f} | {read:.0f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--tokens", help="numbers of tokens, separated by commas")
    parser.add_argument("--peer", default="marlin")
    args = parser.parse_args()
    tokens = [int(text) for text in args.tokens.split(",")] if args.tokens else None
    data = json.loads(args.file.read_text())
    print(table(data, args.routing, tokens, args.peer, args.peer.capitalize()))


if __name__ == "__main__":
    main()
