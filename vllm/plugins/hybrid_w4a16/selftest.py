# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 selftest``: check the results of the kernels on this machine.

Every kernel of the op library runs in several shapes: on a CPU those of each
instruction set, on a GPU those of decode and prefill. Each element of the outputs is
compared with float64 (on a GPU also with the CPU ops). The experts that the router
selects are those of vLLM's routers. Outputs start as NaN and have sentinels on both
sides. Repeated runs must write the same bits. Rows of a batch are compared with the
same rows alone; with ``VLLM_BATCH_INVARIANT=1``, and always for the router, their bits
must be the same. The conversion of every checkpoint format is compared with the
definition of the format.

Exit status: 0 if every result is right; 1 if one is not, or if nothing could run; 2 for
a bad argument.
"""

import argparse
import json
import time
from typing import Any

from .selftest_group import Group

# No case starts later than this, so the command ends within a minute.
TIME_LIMIT_S = 55.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``selftest`` to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random inputs (default: 0)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TIME_LIMIT_S,
        help=f"no test starts later than this (default: {TIME_LIMIT_S:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    start = time.monotonic()  # the imports below take seconds
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )
    from vllm.plugins.hybrid_w4a16 import selftest_run
    from vllm.plugins.hybrid_w4a16.progress import Progress

    switch.register()
    with Progress("selftest") as progress:
        report = selftest_run.selftest(args.seed, args.seconds, progress, start)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for line in as_text(report):
            print(line)
    return 0 if report["ok"] else 1


def as_text(report: dict[str, Any]) -> list[str]:
    """The report as lines of text, as the command prints it."""
    if report.get("error"):
        return [
            f"NO  {report['error']}",
            "nothing could run: see vllm-hybrid-w4a16 doctor",
        ]
    groups = [Group(**{**g, "alone": tuple(g["alone"])}) for g in report["groups"]]
    lines = [group.line() for group in groups]
    failures = [group for group in groups if group.failure is not None]
    lines.append("")
    lines += [f"FAILED: {group.name}: {group.failure}" for group in failures]
    if failures:
        lines.append(
            f"Keep these kernels from serving: export {report['keep_serving']} (vLLM's "
            "own MoE path)."
        )
    elif not report["ok"]:
        lines.append("nothing ran within the time allowed: raise --seconds")
    else:
        ran = sum(group.cases for group in groups)
        left = sum(group.planned > 0 and group.cases == 0 for group in groups)
        lines.append(
            f"{report['device']}: all right, {ran} cases in {report['seconds']} s"
            + (f"; {left} groups not run, out of time" if left else "")
        )
    return lines
