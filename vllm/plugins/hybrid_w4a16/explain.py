# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 explain``: what to expect of a checkpoint before serving it.

Reads config.json and the safetensors headers, but no weights. Exit status: 0; 1 if the
checkpoint cannot be read; 2 for a bad argument. A layer that serving would reject is
marked "error"; the exit status stays 0.
"""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from .explain_checkpoint import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from .explain_layers import ExpertsLayer

# GB/s that large copies reach, and where the number is from. Other devices vary too
# much: there --bandwidth is needed.
BANDWIDTH: dict[str, tuple[float | None, str | None]] = {
    "gfx1151": (212.0, "what copy tools reach on Strix Halo, 256 theoretical"),
}
# The mean context of a request with 100 input and 128 output tokens.
DEFAULT_CONTEXT = 164


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``explain`` to ``parser``."""
    parser.add_argument("checkpoint", help="folder, or name of a model on the Hub")
    parser.add_argument(
        "--tp", type=_positive, default=1, help="tensor-parallel GPUs (default: 1)"
    )
    parser.add_argument(
        "--bandwidth", type=_positive_float, help="memory bandwidth of a GPU in GB/s"
    )
    parser.add_argument(
        "--device",
        choices=("gfx1151", "cuda", "cpu"),
        help="the device to plan for (default: this machine's)",
    )
    parser.add_argument(
        "--context",
        type=_positive,
        default=DEFAULT_CONTEXT,
        help=f"tokens in the KV cache (default: {DEFAULT_CONTEXT}, the mean over a "
        "request of 100 input and 128 output tokens)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit status."""
    try:
        checkpoint = read_checkpoint(args.checkpoint)
        # after reading the files, because importing vLLM takes seconds
        from vllm.plugins.hybrid_w4a16.progress import quiet

        with quiet():  # the report has everything
            report = _report(
                checkpoint, args.tp, args.bandwidth, args.device, args.context
            )
    except ValueError as error:  # CheckpointError, and the switch's
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def explain(
    name: str,
    tp_size: int = 1,
    bandwidth: float | None = None,
    device: str | None = None,
    context: int = DEFAULT_CONTEXT,
) -> dict[str, Any]:
    """What the command prints, as the object of its ``--json``.

    Args:
        name: checkpoint folder or hub name.
        tp_size: GPUs, tensor-parallel; bytes per token are those of one of them.
        bandwidth: GB/s (10^9 bytes/s) of one GPU.
        device: one of ``--device``'s choices, ``None``: the machine at hand.
        context: tokens in the KV cache.

    Raises ``CheckpointError``, and ``ValueError`` for a wrong switch.
    """
    return _report(read_checkpoint(name), tp_size, bandwidth, device, context)


def _report(
    checkpoint: Checkpoint,
    tp_size: int,
    bandwidth: float | None,
    device: str | None,
    context: int,
) -> dict[str, Any]:
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )

    from . import (
        explain_bytes,
        explain_fused,
        explain_launches,
        explain_layers,
        explain_linears,
        explain_runners,
    )

    switch.register()
    value = switch.value()
    family = devices.PLANNED[device] if device else devices.device_family()
    layers = explain_layers.expert_layers(checkpoint, tp_size, family)
    drafts = explain_layers.draft_layers(checkpoint, tp_size, family)
    every_linear = explain_linears.linears(checkpoint, tp_size, family)
    runners: dict[int, Any] | str = {}
    if any(layer.hybrid for layer in layers):
        runners = explain_runners.moe_runners(checkpoint, tp_size, family)
    shared = explain_fused.shared_experts(checkpoint, layers, every_linear, runners)
    routers = explain_fused.routers(checkpoint, layers, runners, family)
    launches = explain_launches.launches(
        checkpoint, layers, every_linear, shared, routers
    )
    parts = explain_bytes.parts(checkpoint, layers, tp_size, context)
    total = sum(part.token_bytes for part in parts)
    known = family if isinstance(family, devices.DeviceFamily) else None
    source: str | None = "--bandwidth"
    if bandwidth is None:
        bandwidth, source = BANDWIDTH.get(known.name if known else "", (None, None))
    return {
        "checkpoint": checkpoint.name,
        "model_type": checkpoint.value("model_type", default="unknown"),
        "file_bytes": checkpoint.file_bytes,
        "device": {
            "name": known.name if known else None,
            "assumed": device is not None,
            "decode": known.decode if known else None,
            "prefill": known.prefill if known else None,
            "unsupported": None if known else family,
        },
        "switch": f"{switch.NAME}={value}",
        "tp": tp_size,
        "context": context,
        "format": _format(checkpoint),
        "expert_layers": _groups(layers),
        "draft_layers": _groups(drafts),
        "hybrid_layers": sum(layer.hybrid for layer in layers),
        "declined_layers": sum(not (layer.hybrid or layer.error) for layer in layers),
        "refused_layers": sum(layer.error for layer in layers),
        "hybrid_draft_layers": sum(layer.hybrid for layer in drafts),
        "linears": [
            dataclasses.asdict(group)
            for group in explain_linears.grouped(every_linear.values())
        ],
        "launches": {part: found.launches for part, found in launches.items()},
        "shared_experts": dataclasses.asdict(explain_fused.count(shared.values())),
        "model_error": runners if isinstance(runners, str) else None,
        "routers": {
            **dataclasses.asdict(explain_fused.count(routers.values())),
            "most_tokens": explain_fused.most_router_tokens(layers, routers),
        },
        "parts": [
            {
                **dataclasses.asdict(part),
                "launches_per_layer": list(launches[part.name].per_layer)
                if part.name in launches
                else None,
            }
            for part in parts
        ],
        "heads": [
            dataclasses.asdict(option)
            for option in explain_bytes.head_options(checkpoint, parts)
        ],
        "token_bytes": total,
        "bandwidth_gbps": bandwidth,
        "bandwidth_source": source if bandwidth else None,
        "roofline_tokens_per_s": bandwidth * 1e9 / total if bandwidth else None,
    }


def _format(checkpoint: Checkpoint) -> str:
    quantization = checkpoint.quantization
    if quantization is None:
        return "16-bit"
    method = quantization.get("quant_method", "unnamed")
    packing = quantization.get("packing_format") or quantization.get("format")
    return f"{method}, {packing}" if packing else method


def _groups(layers: list["ExpertsLayer"]) -> list[dict[str, Any]]:
    """Group the layers that differ only in their index."""
    groups: dict[tuple[Any, ...], list[ExpertsLayer]] = {}
    for layer in layers:
        same = dataclasses.replace(layer, index=-1, name="")
        groups.setdefault(dataclasses.astuple(same), []).append(layer)
    return [
        {
            **dataclasses.asdict(members[0]),
            "index": [layer.index for layer in members],
            "name": members[0].name,
            "stored_bytes": sum(layer.stored_bytes for layer in members),
            "loaded_bytes": sum(layer.loaded_bytes for layer in members),
        }
        for members in groups.values()
    ]


def as_text(report: dict[str, Any]) -> str:
    """The report as the command prints it."""
    device = report["device"]
    if device["unsupported"]:
        kernels = f"no hybrid kernels: {device['unsupported']}"
    else:
        assumed = " (assumed, op library taken for granted)" * device["assumed"]
        kernels = (
            f"{device['name']}{assumed}, decode: {device['decode']}, "
            f"prefill: {device['prefill']}"
        )
    facts = [report["model_type"], _size(report["file_bytes"]), report["format"]]
    lines = [
        f"checkpoint  {report['checkpoint']} ({', '.join(facts)})",
        f"device      {kernels}",
        f"switch      {report['switch']}",
        "",
        *_expert_table(report),
        *_linear_table(report),
        "",
        *_part_table(report),
        "",
        *_launches_lines(report),
        *_conclusion(report),
        *_head_table(report),
    ]
    return "\n".join(lines)


def _expert_table(report: dict[str, Any]) -> list[str]:
    if not report["expert_layers"]:
        return ["no routed experts: a dense model"]
    rows: list[tuple[str, ...]] = [
        ("expert layers", "experts", "size", "bits", "group", "bytes", "path")
    ]
    groups = [(_ranges(group["index"]), group) for group in report["expert_layers"]]
    for group in report["draft_layers"]:
        groups.append((f"draft {_ranges(group['index'])}", group))
    for label, group in groups:
        zeros = "" if group["group_size"] is None or group["symmetric"] else " +zp"
        rows.append(
            (
                label,
                f"{group['num_experts']}, top-{group['top_k']}",
                f"{group['hidden']} x {group['intermediate']}",
                str(group["bits"]),
                f"{group['group_size'] or '-'}{zeros}",
                _size(group["stored_bytes"]),
                _path(group),
            )
        )
    return _aligned(rows, "<<<<<><")


def _linear_table(report: dict[str, Any]) -> list[str]:
    if not report["linears"]:
        return []
    rows: list[tuple[str, ...]] = [("int4 linears", "layers", "size", "group", "path")]
    for group in report["linears"]:
        rows.append(
            (
                group["name"],
                str(group["layers"]),
                f"{group['outputs']} x {group['inputs']}",
                str(group["group_size"]),
                "hybrid" if group["hybrid"] else f"vLLM's kernel: {group['reason']}",
            )
        )
    return ["", *_aligned(rows, "<><><")]


def _launches_lines(report: dict[str, Any]) -> list[str]:
    launches, what = report["launches"], _launches_word(report)
    if not launches:
        return []
    count = f"{what:12}{sum(launches.values())} per token by this project"
    lines = [f"{count}; not counted: vLLM's kernels and the lm_head"]
    if report["model_error"]:
        lines.append(
            f"{'':12}shared experts and routers: unknown, {report['model_error']}"
        )
        return lines
    most = report["routers"]["most_tokens"]
    for kind, where in (
        ("shared_experts", f" into the routed experts' {what}"),
        ("routers", f" with their top-k, up to {most} tokens"),
    ):
        found = report[kind]
        if not found["layers"]:
            continue
        text = f"{kind.replace('_', ' ')}: {found['fused']} of {found['layers']} fused"
        text += where if found["fused"] else ""
        if found["reason"]:
            text += f"; left to vLLM: {found['reason']}"
        lines.append(f"{'':12}{text}")
    return lines


def _launches_word(report: dict[str, Any]) -> str:
    return "op calls" if report["device"]["name"] == "cpu" else "launches"


def _path(group: dict[str, Any]) -> str:
    """The path that serving takes for the layers of a group."""
    if group["hybrid"]:
        if group["down_group_size"] == group["group_size"]:
            return "hybrid"
        return (
            "hybrid, shards cut groups: scales of down_proj are repeated for groups of "
            f"{group['down_group_size']}"
        )
    return f"{'error' if group['error'] else 'declined'}: {group['reason']}"


def _part_table(report: dict[str, Any]) -> list[str]:
    bandwidth, total = report["bandwidth_gbps"], report["token_bytes"]
    per = " and GPU" if report["tp"] > 1 else ""
    rows: list[tuple[str, ...]] = [
        (
            *("part", "on disk", f"per token{per}", "share", "ms"),
            *(_launches_word(report), "per layer"),
        )
    ]

    def row(name: str, stored: int, moved: float, *launches: str) -> tuple[str, ...]:
        ms = f"{moved / bandwidth / 1e6:.3f}" if bandwidth else "-"
        share = f"{100 * moved / total:.1f}%"
        disk = _size(stored) if stored else "-"
        return name, disk, _size(moved), share, ms, *launches

    counts = report["launches"]
    for part in report["parts"]:
        count, per_layer = str(counts.get(part["name"], "-")), "-"
        if part["launches_per_layer"]:
            per_layer = "-".join(map(str, dict.fromkeys(part["launches_per_layer"])))
        rows.append(
            row(
                part["name"],
                part["stored_bytes"],
                part["token_bytes"],
                count,
                per_layer,
            )
        )
    stored = sum(part["stored_bytes"] for part in report["parts"])
    rows.append(row("total", stored, total, str(sum(counts.values())), "-"))
    return _aligned(rows, "<>>>>>>")


def _conclusion(report: dict[str, Any]) -> list[str]:
    if report["bandwidth_gbps"] is None:
        return ["roofline    unknown: pass the memory bandwidth as --bandwidth GB/s"]
    most = max(report["parts"], key=lambda part: part["token_bytes"])
    rate = f"{report['roofline_tokens_per_s']:.1f} tokens/s, one stream"
    bandwidth = f"{report['bandwidth_gbps']:g} GB/s ({report['bandwidth_source']})"
    part, whole = _size(most["token_bytes"]), _size(report["token_bytes"])
    return [
        f"roofline    {rate}, at {bandwidth}",
        f"limited by  {most['name']}: {part} of {whole} per token",
        "            This is an upper bound from bytes alone. Launches, arithmetic and",
        "            kernels below the bandwidth reduce it.",
    ]


def _head_table(report: dict[str, Any]) -> list[str]:
    """One line for each format that the lm_head can be kept in."""
    if not report["heads"]:
        return []
    bandwidth, first = report["bandwidth_gbps"], report["heads"][0]["token_bytes"]
    rows: list[tuple[str, ...]] = [
        ("lm_head as", "per token", "model per token", "tokens/s", "memory")
    ]
    for option in report["heads"]:
        total = report["token_bytes"] - first + option["token_bytes"]
        rate = f"{bandwidth * 1e9 / total:.1f}" if bandwidth else "-"
        cells = [option["token_bytes"], total, option["memory_bytes"]]
        read, whole, memory = (_size(cell) if cell else "-" for cell in cells)
        rows.append((option["name"], read, whole, rate, memory))
    return ["", *_aligned(rows, "<>>>>")]


def _aligned(rows: list[tuple[str, ...]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{align}{width}}"
            for cell, align, width in zip(row, alignment, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _size(count: float) -> str:
    """Bytes with a decimal prefix, as bandwidths have it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _ranges(indices: list[int]) -> str:
    """0-2, 4 for [0, 1, 2, 4]."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in runs
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
