# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The steps of ``vllm-hybrid-w4a16 tune``: shapes, measurements, tables."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import MAX_TOKENS
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    MoEShape,
    PrefillTiles,
    Tile,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_linear_table as linear_table,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
    LinearShape,
)
from vllm.plugins.hybrid_w4a16 import (
    explain_layers,
    explain_linears,
    prefill_kernels,
    random_layers,
    random_linears,
)
from vllm.plugins.hybrid_w4a16.explain_checkpoint import Checkpoint, read_checkpoint
from vllm.plugins.hybrid_w4a16.progress import Progress, quiet
from vllm.plugins.hybrid_w4a16.random_layers import DTYPES, LayerShape
from vllm.plugins.hybrid_w4a16.tune_bench import GpuBench
from vllm.plugins.hybrid_w4a16.tune_linear import GpuLinearBench, tune_linear
from vllm.plugins.hybrid_w4a16.tune_search import tile_sizes
from vllm.plugins.hybrid_w4a16.tune_shape import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    Tuner,
    farthest_behind,
)


def parse_shape(text: str, dtype: str) -> MoEShape:
    """Parse ``E,TOP_K,H,I,G`` or ``E,TOP_K,H,I,G,SHARED``; raises ``ValueError`` for
    anything else."""
    sizes = text.split(",")
    numbers = all(s.strip().isdecimal() and int(s) for s in sizes)
    if len(sizes) not in (5, 6) or not numbers:
        raise ValueError(
            f"--shape {text!r} is not E,TOP_K,H,I,G or E,TOP_K,H,I,G,SHARED: five or "
            "six numbers above 0"
        )
    experts, top_k, hidden, inter, group, *shared = map(int, sizes)
    if top_k > experts:
        raise ValueError(f"--shape {text!r}: top-{top_k} of {experts} experts")
    if group not in random_layers.GROUP_SIZES:
        raise ValueError(f"--shape {text!r}: group size {group}, known: 32, 64, 128")
    if hidden % group or inter % group:
        raise ValueError(
            f"--shape {text!r}: {hidden} and {inter} are not multiples of {group}"
        )
    if shared and shared[0] % 8:  # hidden is a multiple of the group size
        raise ValueError(f"--shape {text!r}: {shared[0]} is not a multiple of 8")
    return MoEShape(experts, top_k, hidden, inter, group, dtype, *shared)


def parse_linear(text: str, dtype: str) -> LinearShape:
    """Parse ``N,K,G``; raises ``ValueError`` for anything else."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(s.strip().isdecimal() and int(s) for s in sizes):
        raise ValueError(f"--linear {text!r} is not N,K,G: three numbers above 0")
    outputs, inputs, group = map(int, sizes)
    if group not in random_layers.GROUP_SIZES:
        raise ValueError(f"--linear {text!r}: group size {group}, known: 32, 64, 128")
    if inputs % group or outputs % 8:
        raise ValueError(
            f"--linear {text!r}: {outputs} and {inputs} are not multiples of 8 and "
            f"{group}"
        )
    return LinearShape(outputs, inputs, group, False, dtype)


def parse_tokens(text: str | None) -> tuple[int, ...]:
    """Parse the value of ``--tokens``; raises ``ValueError``."""
    if text is None:
        return DECODE_TOKENS
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(f"--tokens {text!r} is not N,N,...: numbers above 0")
    return tuple(sorted({int(word) for word in words}))


def dtype_of(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """Name of the activation dtype: of ``--dtype``, else the checkpoint's."""
    dtype = explain_layers.activation_dtype(checkpoint)
    return args.dtype or random_layers.dtype_name(dtype)


def shapes_of(
    args: argparse.Namespace, checkpoints: Sequence[Checkpoint], family: Any
) -> list[MoEShape]:
    """The shapes of ``--shape`` and of the checkpoints' hybrid layers, without repeats.

    Raises ``ValueError`` for a bad shape.
    """
    shapes = [parse_shape(text, args.dtype or "bf16") for text in args.shape]
    for checkpoint in checkpoints:
        for layer in explain_layers.expert_layers(checkpoint, args.tp, family):
            if layer.bits == 4 and layer.group_size is not None:
                shape = MoEShape(
                    layer.num_experts,
                    layer.top_k,
                    layer.hidden,
                    layer.intermediate // args.tp,
                    layer.group_size,
                    dtype_of(args, checkpoint),
                )
                shapes.append(shape)
                shared = checkpoint.shared_expert_size // args.tp
                if shared and shared % 8 == 0:
                    shapes.append(dataclasses.replace(shape, shared=shared))
    return list(dict.fromkeys(shapes))


def linears_of(
    args: argparse.Namespace, checkpoints: Sequence[Checkpoint], family: Any
) -> list[LinearShape]:
    """The linears of ``--linear`` and the checkpoints' int4 linears, without repeats.

    Raises ``ValueError`` for a bad shape.
    """
    found = [parse_linear(text, args.dtype or "bf16") for text in args.linear]
    for checkpoint in checkpoints:
        for linear in explain_linears.linears(checkpoint, args.tp, family).values():
            shape = LinearShape(
                linear.outputs,
                linear.inputs,
                linear.group_size,
                linear.zero_points,
                dtype_of(args, checkpoint),
            )
            found.append(shape)
    return list(dict.fromkeys(found))


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    switch.register()
    family = devices.device_family()
    try:
        tokens = parse_tokens(args.tokens)
        with quiet():
            checkpoints = [read_checkpoint(name) for name in args.checkpoint]
            shapes = shapes_of(args, checkpoints, family)
            linears = linears_of(args, checkpoints, family)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(family, str):
        print(f"error: {family}", file=sys.stderr)
        return 1
    if args.show:
        print("\n".join(show(family, shapes, linears)))
        return 0
    if family.tuning is None:
        print(
            f"{family.name}: nothing to tune. The CPU ops have no launch plans and no "
            "tiles; which kernel runs is decided per expert from its rows, the group "
            "size and the processor's instruction set."
        )
        return 0
    if args.only == "linears":
        shapes = []
    elif args.only is not None:
        linears = []
    if not shapes and not linears:
        print("error: give a checkpoint, --shape or --linear", file=sys.stderr)
        return 2
    return measure(args, family, shapes, tokens, linears)


def measure(
    args: argparse.Namespace,
    family: Any,
    shapes: list[MoEShape],
    decode_tokens: tuple[int, ...],
    linears: list[LinearShape],
) -> int:
    """Tune the shapes and measure the linears on the GPU; returns the exit status."""
    devices.load_kernels(family)
    entries: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name()
    source = f"vllm-hybrid-w4a16 tune on {device}, {datetime.date.today()}"
    pool = None
    start = time.monotonic()
    with Progress("tune") as progress:
        try:
            for shape in shapes:
                if shape.shared and args.only == "prefill":
                    continue  # prefill leaves the shared expert to vLLM
                progress.say(f"{shape}")
                tokens = [
                    t for t in decode_tokens if not shape.shared or t <= MAX_TOKENS
                ]
                if shape.shared and not tokens:
                    progress.say(f"  left out: decode takes up to {MAX_TOKENS} tokens")
                    continue
                layer = LayerShape(
                    shape.experts,
                    shape.top_k,
                    shape.hidden,
                    shape.intermediate,
                    shape.group_size,
                    DTYPES[shape.dtype],
                )
                prefill = args.only != "decode" and not shape.shared
                if prefill:
                    tiles = [t for m in (16, 32, 64, 128) for t in tile_sizes(m)]
                    pool = prefill_kernels.CompilePool(
                        [(layer, PrefillTiles(tile, tile)) for tile in tiles]
                    )
                bench = GpuBench(layer, family.cu_count, pool, shape.shared)
                tuning.forget()
                current = tuning.lookup(family.name, family.cu_count, shape)
                tuner = Tuner(
                    bench,
                    current,
                    family.cu_count,
                    source,
                    lambda e: tuning.write_owner_entry(family.name, e),
                    progress,
                    tokens,
                    args.full,
                )
                entries.append(tuner.entry)
                if args.only == "prefill" and current.exact and current.entry:
                    tuner.entry["decode"] = current.entry["decode"]
                if args.only == "decode" and current.exact and current.entry:
                    tuner.entry["rows"] = current.entry["rows"]
                    tuner.entry["prefill_from"] = current.entry["prefill_from"]
                tuner.run(args.only != "prefill", prefill)
                if pool is not None:
                    pool.close()
                    pool = None
                del bench, tuner  # gigabytes of weights
            entries += measure_linears(family, linears, source, progress)
        except KeyboardInterrupt:
            if pool is not None:
                pool.close()
            print(
                f"\ninterrupted: the measurements so far are in "
                f"{tuning.owner_table(family.name)}",
                file=sys.stderr,
            )
            return 130
        except ValueError as error:  # a layer that does not fit in memory
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.json:
        print(json.dumps(entries, indent=1))
    out = sys.stderr if args.json else sys.stdout
    behind = farthest_behind([entry for entry in entries if "decode" in entry])
    if behind is not None:
        share, where = behind
        print(
            f"the search is at most {100 * share:.1f}% behind the fastest of the full "
            f"sweep ({where})",
            file=out,
        )
    print(
        f"written: {tuning.owner_table(family.name)}, {len(entries)} shapes in "
        f"{time.monotonic() - start:.0f} s",
        file=out,
    )
    return 0


def measure_linears(
    family: Any, linears: list[LinearShape], source: str, progress: Any
) -> list[dict[str, Any]]:
    """Measure dense int4 linears on the GPU; returns their entries."""
    entries = []
    with random_linears.one_rank() if linears else contextlib.nullcontext():
        for shape in linears:
            progress.say(f"{shape}")
            try:
                bench = GpuLinearBench(shape, family)
            except ValueError as error:  # vLLM has other kernels for it
                progress.say(f"  left out: {error}")
                continue
            entry = tune_linear(
                bench,
                shape,
                family.cu_count,
                source,
                lambda entry: linear_table.write(family.name, entry),
                progress,
            )
            entries.append(entry)
            del bench
    return entries


def show(
    family: Any, shapes: list[MoEShape], linears: Sequence[LinearShape] = ()
) -> list[str]:
    """Lines for ``--show``: the tables, and the current choice for the shapes."""
    arch = family.name
    if family.tuning is None:
        return [f"{arch}: no tables, the CPU ops have nothing to tune"]
    owner = tuning.owner_table(arch)
    entries = tuning.owner_entries(arch)
    count = len(linear_table.entries(arch))
    shipped = tuning.TABLES / f"{family.tuning}.json"
    lines = [
        f"owner    {owner} ({len(entries)} shapes, {count} linears)"
        if owner.is_file()
        else f"owner    {owner} (not there)",
        f"shipped  {shipped}"
        if shipped.is_file()
        else f"shipped  none for {arch}: small tiles",
        f"         {tuning.table(family.tuning).get('source', 'no source')}",
    ]
    for entry in entries:
        shape = tuning.entry_shape(entry)
        text = f"  {shape}: {entry.get('source', 'no source')}"
        if not tuning.is_usable(entry, family.cu_count):
            text += " (for other kernels or another device: not used)"
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
    for linear in linears:
        entry_found = linear_table.find(arch, family.cu_count, linear)
        origin = "not measured" if entry_found is None else entry_found["source"]
        lines += ["", f"{linear}: {origin}"]
        if entry_found is not None:
            lines += linear_lines(entry_found)
    return lines


def linear_lines(entry: dict[str, Any]) -> list[str]:
    """Lines about what was measured of a linear."""
    lines = []
    for row in entry["rows"]:
        text = f"  {row['rows']} rows: {row['way']} {row['us']} us"
        if row["peer_us"] is not None:
            text += f", {entry['peer']} {row['peer_us']} us"
        lines.append(text)
    reason = linear_table.why_not(entry)
    return lines if reason is None else [*lines, f"  {reason}"]


def tiles_of(tiles: PrefillTiles) -> tuple[Tile, Tile]:
    """The tiles of gate_up and down, in this order."""
    return tiles.gate_up, tiles.down
