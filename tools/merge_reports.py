#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Add received reports to the table in docs/results.md.

    python -m tools.merge_reports ARCHIVE [ARCHIVE ...] [--results docs/results.md]

An archive is the output of ``vllm-hybrid-w4a16 report``. Each report is a row; it
replaces a row with the same device, checkpoint, commit and date. Exit status: 0; 1 if
an archive is not such a report, in which case nothing is written.
"""

import argparse
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "docs/results.md"
BEGIN, END = "<!-- reports: begin -->", "<!-- reports: end -->"
FORM = 1  # version of the format, as in vllm/plugins/hybrid_w4a16/report.py
MOST_BYTES = 10 << 20
HEADER = (
    "| Device | Checkpoint | Stock tok/s | Hybrid tok/s | Ratio | TPOT ms | Selftest "
    "| vLLM, torch | Power | Commit | Date |"
)
# Columns that identify the report of a row.
KEY = (0, 1, 9, 10)


class ReportError(ValueError):
    """An archive that is not a report, or a document without the table's markers."""


def read_report(archive: Path) -> dict[str, Any]:
    """The report.json of an archive, read without unpacking. Raises ``ReportError``."""
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.rpartition("/")[2] == "report.json"]
            if len(members) != 1 or not members[0].isfile():
                raise ReportError(f"{archive}: holds {len(members)} report.json")
            if members[0].size > MOST_BYTES:
                raise ReportError(f"{archive}: report.json has {members[0].size} bytes")
            file = tar.extractfile(members[0])
            assert file is not None
            report = json.load(file)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ReportError(f"{archive}: {error}") from error
    form = report.get("form") if isinstance(report, dict) else None
    if form != FORM:
        raise ReportError(f"{archive}: form is {form}, expected {FORM}")
    return report


def row(report: dict[str, Any]) -> str:
    """The table row of a report, with a dash for everything that was not measured."""
    facts, results = report["environment"], report["results"]
    found = results.get("compare") or {}
    summary = found.get("summary") or {}
    stock, hybrid = summary.get("stock"), summary.get("hybrid")
    tested = results.get("selftest")
    selftest = "-" if tested is None else ("passed" if tested["ok"] else "FAILED")
    limit = facts.get("power_limit_watts")
    cells = [
        facts.get("gpu") or facts.get("cpu") or "unknown",
        report["checkpoint"],
        _spread(stock and stock["tokens_per_s"], 1),
        _spread(hybrid and hybrid["tokens_per_s"], 1),
        _spread(found.get("ratio"), 2),
        _spread(hybrid and hybrid["tpot_ms"], 2),
        selftest,
        f"{facts['vllm']}, {facts['torch']}",
        f"{limit:.0f} W" if limit else facts.get("power_profile") or "-",
        str(facts.get("commit") or "unknown")[:12],
        facts["date"],
    ]
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _spread(values: dict[str, float] | None, digits: int) -> str:
    if not values:
        return "-"
    median, least, most = (
        f"{values[name]:.{digits}f}" for name in ("median", "min", "max")
    )
    return f"{median} ({least} to {most})"


def _plain(text: str) -> str:
    """The text without characters that end a cell or are Markdown."""
    kept = "".join(c for c in str(text) if c.isprintable() and c not in "|<>`[]")
    return kept.strip() or "-"


def merge(document: str, reports: list[dict[str, Any]]) -> str:
    """The document with the reports in its table, sorted by device and date.

    Raises ``ReportError`` if the document lacks the markers of the table.
    """
    head, begin, rest = document.partition(BEGIN)
    table, end, tail = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"the document has no markers {BEGIN} and {END}")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    by_key = {_key(line): line for line in rows if line != HEADER and "---" not in line}
    for report in reports:
        line = row(report)
        by_key[_key(line)] = line
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    lines += [by_key[key] for key in sorted(by_key)]
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"


def _key(line: str) -> tuple[str, ...]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return tuple(cells[i] for i in KEY)


def main(arguments: list[str] | None = None) -> int:
    """Merge the archives on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    try:
        reports = [read_report(archive) for archive in args.archives]
        text = merge(args.results.read_text(), reports)
    except (ReportError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.results.write_text(text)
    print(f"{len(reports)} reports in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
