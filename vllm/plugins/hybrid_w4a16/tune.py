# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 tune``: measure the owner's tuning table on this machine.

For each shape: launch plans of decode by number of tokens, tiles of prefill, and the
number of tokens from which prefill is faster. Every candidate's result is verified
before it is timed. A candidate replaces what is used now only if it is faster beyond
the noise in both of two passes in which the two take turns. What has been measured is
written after every step, so that Ctrl-C keeps it.

Exit status: 0; 1 when nothing could be measured; 2 for a bad argument; 130 after
Ctrl-C.
"""

import argparse

DTYPES = ("bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="*", help="folder, or name of a model on the hub")
    add(
        "--shape",
        action="append",
        default=[],
        metavar="E,TOP_K,H,I,G",
        help="experts, top-k, hidden, intermediate, group size; may be repeated",
    )
    add("--dtype", choices=DTYPES, help="of activations (default: the checkpoint's)")
    add("--tp", type=int, default=1, help="tensor-parallel GPUs (default: 1)")
    add("--only", choices=("decode", "prefill"), help="measure only this")
    add(
        "--tokens",
        metavar="N,N",
        help="of decode: measure these numbers of tokens (default: 1 to 32, ten)",
    )
    add(
        "--full",
        action="store_true",
        help="measure every launch plan there is (minutes more), and say how far the "
        "search is from the fastest",
    )
    add("--show", action="store_true", help="print what would be used, measure nothing")
    add("--json", action="store_true", help="print the new entries as JSON")


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit status."""
    from vllm.plugins.hybrid_w4a16 import tune_command

    return tune_command.run(args)
