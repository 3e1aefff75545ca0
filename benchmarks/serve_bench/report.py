# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Results as a Markdown table and as a plot."""

import pathlib
from typing import Any

from .summary import Row

_COLUMNS = (
    ("TTFT ms", "ttft_ms", ".1f"),
    ("TPOT ms", "tpot_ms", ".2f"),
    ("ITL p50 ms", "itl_p50_ms", ".2f"),
    ("ITL p99 ms", "itl_p99_ms", ".2f"),
    ("output tok/s", "output_tokens_per_s", ".1f"),
)
# Only where a row has them.
_OPTIONAL_COLUMNS = (
    ("TTFT p99 ms", "ttft_p99_ms", ".1f"),
    ("TPOT p99 ms", "tpot_p99_ms", ".2f"),
    ("drafts accepted %", "accepted_drafts_pct", ".1f"),
)
_PANELS = (
    ("ttft_ms", "time to first token (ms)"),
    ("tpot_ms", "time per output token (ms)"),
    ("itl_p99_ms", "inter-token latency, p99 (ms)"),
    ("output_tokens_per_s", "output tokens per second"),
)


def markdown(result: dict[str, Any]) -> str:
    """The summary as a Markdown document."""
    machine, settings = result["machine"], result["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_threads']} threads"
    versions = [machine["vllm"], f"torch {machine['torch']}"]
    versions += [f"{name} {v}" for name, v in machine["packages"].items() if v]
    commit = str(machine["commit"])[:12] + " with changes" * bool(machine["dirty"])
    servers = (
        "all on the same servers, started together and driven one at a time"
        if settings["together"]
        else "each with servers of its own"
    )
    how = (
        f"Median (least to largest) of {_rounds(result)}, {servers}; ratio: output "
        f"tokens/s over `{result['baseline']}` in the same round."
    )
    lines = [
        f"# Serving: {', '.join(v['name'] for v in result['variants'])}",
        "",
        f"{where}; {', '.join(versions)}; commit {commit}; {machine['date']}.",
    ]
    if not machine.get("hip"):
        lines.append("Not measured on AMD hardware.")
    lines += ["", f"    {result['command']}", "", how, ""]
    if settings["note"]:
        lines += [settings["note"], ""]
    lines += _table(result["summary"])
    for name, why in result["failures"].items():
        lines += ["", f"`{name}` did not run: {why}"]
    lines += [""] + [
        f"`{variant['name']}`: {line}"
        for variant in result["variants"]
        for line in variant["moe_log"]
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rounds(result: dict[str, Any]) -> str:
    """Number of rounds with results; an interrupted run has fewer than requested."""
    done = max((row["rounds"] for row in result["summary"]), default=0)
    return f"{done} round{'s' * (done != 1)}"


def _table(rows: list[Row]) -> list[str]:
    titles = ["variant", "mode", "in/out", "at a time"]
    columns = [*_COLUMNS]
    columns += [c for c in _OPTIONAL_COLUMNS if any(c[1] in row for row in rows)]
    titles += [title for title, _, _ in columns] + ["ratio"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in rows:
        cells = [
            row["variant"],
            row["mode"],
            f"{row['input_len']}/{row['output_len']}",
            str(row["concurrency"]),
            *(_cell(row.get(key), form) for _, key, form in columns),
            _cell(row["ratio"], ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return "-"
    median = f"{value['median']:{form}}"
    if value["min"] == value["max"]:
        return median
    return f"{median} ({value['min']:{form}} to {value['max']:{form}})"


def plot(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write the plot of ``draw`` to a file."""
    figure = draw(result)
    figure.savefig(path, dpi=110)
    figure.clear()


def draw(result: dict[str, Any]) -> Any:
    """Bars per variant and load point, with whiskers from the smallest to the largest
    round.

    The legend names every variant, including those that did not run. If the bandwidth
    is known, each load of one request at a time has a dashed line at the time for
    reading a token's weights and cache.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["summary"]
    names = [variant["name"] for variant in result["variants"]]
    groups = list(dict.fromkeys(_group(row) for row in rows))
    machine = result["machine"]
    bars = len(groups) * len(names)
    columns = 2 if bars <= 8 else 1
    figure = Figure(
        figsize=(5.5 * columns if columns == 2 else 3 + 0.55 * bars, 16.8 / columns),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(4 // columns, columns, squeeze=False)
    for axis, (metric, title) in zip(axes.flat, _PANELS, strict=True):
        _bars(axis, result, names, groups, metric)
        if metric == "tpot_ms":
            _floors(axis, result, names, groups)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.margins(y=0.15)
        axis.grid(True, axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    handles, labels = axes.flat[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    where = machine.get("gpu") or f"{machine['cpu']} ({machine['cpu_threads']} threads)"
    figure.suptitle(
        f"{result['title']}\n{where}, {machine['vllm']}, "
        f"median of {_rounds(result)}, least to largest",
        fontsize=12,
    )
    return figure


def _label(name: str, result: dict[str, Any]) -> str:
    """The variant's name, and the modes in which it did not run."""
    failures = [case.rpartition(", ") for case in result["failures"]]
    modes = [mode for variant, _, mode in failures if variant == name]
    if not modes:
        return name
    if not any(row["variant"] == name for row in result["summary"]):
        return f"{name} (did not run)"
    return f"{name} (did not run: {', '.join(modes)})"


def _group(row: Row) -> tuple[str, int, int, int]:
    return row["mode"], row["input_len"], row["output_len"], row["concurrency"]


def _bars(
    axis: Any, result: dict[str, Any], names: list[str], groups: list, metric: str
) -> None:
    rows = result["summary"]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        mine = {_group(row): row[metric] for row in rows if row["variant"] == name}
        at = [x for x, group in enumerate(groups) if group in mine]
        values = [mine[groups[x]] for x in at]
        medians = [value["median"] for value in values]
        whiskers = [
            [v["median"] - v["min"] for v in values],
            [v["max"] - v["median"] for v in values],
        ]
        bars = axis.bar(
            [x + (number - (len(names) - 1) / 2) * width for x in at],
            medians,
            0.92 * width,
            yerr=whiskers,
            capsize=3,
            label=_label(name, result),
        )
        axis.bar_label(bars, [_short(m) for m in medians], label_type="center")
    axis.set_xticks(
        range(len(groups)),
        [f"{i} in, {o} out\n{c} at a time, {mode}" for mode, i, o, c in groups],
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _floors(axis: Any, result: dict[str, Any], names: list[str], groups: list) -> None:
    models = {variant["name"]: variant["model"] for variant in result["variants"]}
    width = 0.8 / len(names)
    label = None
    for number, name in enumerate(names):
        roofline = result["rooflines"].get(models[name], {})
        if not roofline.get("bandwidth_gbps"):
            continue
        for x, (_, input_len, output_len, concurrency) in enumerate(groups):
            if concurrency != 1:
                continue
            moved = roofline["token_bytes"][str(input_len + output_len // 2)]
            floor = moved / roofline["bandwidth_gbps"] / 1e6
            left = x + (number - len(names) / 2) * width
            text = f"reading weights and cache at {roofline['bandwidth_gbps']:g} GB/s"
            axis.hlines(
                floor,
                left,
                left + width,
                "black",
                "dashed",
                label=text if label is None else None,
            )
            label = text
