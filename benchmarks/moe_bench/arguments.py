# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Command line of benchmark_moe.py. Does not import torch: ``--threads`` must be in the
environment before torch loads OpenMP."""

import argparse
import os
import pathlib
from collections.abc import Iterable

from moe_bench.shapes import parse_shapes

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
GROUP_SIZES = (32, 64, 128)  # hybrid_w4a16_packing has them too, but imports torch
DEVICES = ("cpu", "cuda", "rocm")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser with its defaults; lists are comma-separated."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument(
        "--shapes",
        "--shape",
        default="qwen3-30b-a3b,qwen3.5-35b-a3b",
        help="model names, experts:top_k:hidden:intermediate, or all",
    )
    parser.add_argument("--tokens", default="1,2,4,8,64,512", help="batch sizes")
    parser.add_argument("--backends", help="default: all that exist for the device")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="activations")
    parser.add_argument("--group-size", default="128", help="of 32, 64, 128")
    parser.add_argument(
        "--routing",
        default="uniform,skewed",
        help="any of balanced, uniform, skewed, few",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write results to this file")
    parser.add_argument("--plot", type=pathlib.Path, help="write a plot to this file")
    parser.add_argument(
        "--layers",
        type=int,
        help="layer copies to rotate (default: enough to read twice the last-level "
        "cache between two uses of a weight, or fewer if the memory cannot hold "
        "them)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--repeats", type=int, default=40, help="samples per number, if time allows"
    )
    parser.add_argument(
        "--cpu-isa",
        default="",
        help="instruction set of the CPU kernels (default: the best one)",
    )
    parser.add_argument("--note", help="text to record in the JSON file")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Split the lists in place and check all that can be checked without torch.

    Raises ``ValueError`` naming the option, the value and what was expected.
    """
    args.shapes = parse_shapes(args.shapes)
    args.tokens = positive_numbers("--tokens", args.tokens)
    args.group_size = positive_numbers("--group-size", args.group_size)
    for group_size in args.group_size:
        if group_size not in GROUP_SIZES:
            raise ValueError(
                f"--group-size: {group_size} is not one of {_join(GROUP_SIZES)}"
            )
        for shape in args.shapes:
            if shape.hidden % group_size or shape.intermediate % group_size:
                raise ValueError(
                    f"--group-size: {group_size} does not divide hidden {shape.hidden} "
                    f"and intermediate {shape.intermediate} of shape {shape.name}"
                )
    for option in ("layers", "threads", "repeats"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option}: {value} is not a positive number")
    cores = len(os.sched_getaffinity(0))
    if args.threads is not None and args.threads > cores:
        raise ValueError(f"--threads: {args.threads} exceeds the {cores} cores allowed")
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"--{option}: the folder of {path} does not exist")
    if args.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot: matplotlib is not installed") from None


def split_names(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """Split comma-separated names; raises ``ValueError`` if one is not ``allowed``."""
    allowed = list(allowed)
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option}: {name!r} is not one of {_join(allowed)}")
    return names


def positive_numbers(option: str, text: str) -> list[int]:
    """Split comma-separated numbers; raises ``ValueError`` if one is not positive."""
    numbers = text.split(",")
    for number in numbers:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"{option}: {number!r} is not a positive number")
    return [int(number) for number in numbers]


def _join(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
