# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Results as a table, as JSON and as a plot."""

import json
import pathlib
from typing import Any

Row = dict[str, Any]

_COLUMNS = (
    ("shape", "shape", "{:s}", 15),
    ("group", "group_size", "{:d}", 5),
    ("tokens", "tokens", "{:d}", 6),
    ("routing", "routing", "{:s}", 8),
    ("experts", "distinct_experts", "{:.1f}", 7),
    ("backend", "backend", "{:s}", 8),
    ("us", "us", "{:.1f}", 10),
    ("p10", "us_p10", "{:.1f}", 10),
    ("p90", "us_p90", "{:.1f}", 10),
    ("GB/s", "gbps", "{:.1f}", 8),
    ("% read", "pct_read", "{:.1f}", 6),
    ("% now", "pct_read_now", "{:.1f}", 6),
    ("x hybrid", "ratio_to_hybrid", "{:.2f}", 8),
    ("rel. error", "rel_error", "{:.1e}", 10),
)


def ceilings_line(ceilings: dict[str, Any]) -> str:
    """The measured ceilings as a line of text."""
    launch = ceilings.get("launch_us")
    return (
        f"ceilings: read {ceilings['read_gbps']:.1f} GB/s ({ceilings['read_method']}), "
        f"copy {ceilings['copy_gbps']:.1f} GB/s ({ceilings['copy_method']})"
        + ("" if launch is None else f", launch {launch:.2f} us")
    )


def table_header() -> str:
    """The titles of the table's columns."""
    return "  ".join(f"{title:>{width}}" for title, _, _, width in _COLUMNS)


def table_line(row: Row) -> str:
    """A row as a line of the table."""
    cells = []
    for _, key, form, width in _COLUMNS:
        text = "-" if row[key] is None else form.format(row[key])
        cells.append(f"{text:>{width}}")
    return "  ".join(cells)


def write_json(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write the result to a file as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_plot(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Time against tokens, one panel per case, with the time that reading the picked
    experts' weights takes at the read ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    cases = sorted(
        {(r["shape"], r["group_size"], r["routing"]) for r in rows},
        key=[(r["shape"], r["group_size"], r["routing"]) for r in rows].index,
    )
    columns = min(len(cases), 2)
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(6.4 * columns, 4.4 * lines + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        mine = [r for r in rows if (r["shape"], r["group_size"], r["routing"]) == case]
        _draw_case(axis, mine)
        axis.set_title(f"{case[0]}, group {case[1]}, {case[2]} routing", fontsize=11)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    machine, ceilings = result["machine"], result["ceilings"]
    figure.suptitle(
        f"Routed experts of one layer, {rows[0]['dtype']} activations\n"
        f"{machine.get('gpu') or machine['cpu']}"
        + ("" if machine.get("gpu") else f" ({machine['cpu_threads']} threads)")
        + f", read ceiling {ceilings['read_gbps']:.0f} GB/s",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_case(axis: Any, rows: list[Row]) -> None:
    for backend in dict.fromkeys(r["backend"] for r in rows):
        points = sorted(
            (r["tokens"], r["us"], r["us_p10"], r["us_p90"])
            for r in rows
            if r["backend"] == backend
        )
        tokens, us, low, high = zip(*points, strict=True)
        (line,) = axis.plot(tokens, us, marker="o", markersize=4, label=backend)
        axis.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15)
    # the same for every backend: picked bytes over the ceiling
    floor = {r["tokens"]: r["us"] * r["pct_read"] / 100 for r in rows}
    counts = sorted(floor)
    at_ceiling = [floor[count] for count in counts]
    axis.plot(counts, at_ceiling, "k--", label="weights at the read ceiling")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks: list[int] = []
    for count in counts:
        if not ticks or count >= 1.3 * ticks[-1]:  # closer labels would overlap
            ticks.append(count)
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.set_xlabel("tokens in the batch")
    axis.set_ylabel("time of the experts call (µs)")
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=9)
