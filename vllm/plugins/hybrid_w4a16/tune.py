# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 tune``: measure a tuning table for this machine.

For each shape it measures the launch plans of decode by number of tokens, the tiles of
prefill, and the number of tokens from which prefill is faster. It verifies the result
of every candidate before it times the candidate. A candidate replaces the current
choice only if it is faster beyond the noise in both of two passes, in which the two
alternate. The table is saved after every step, so Ctrl-C keeps what was measured.

It also times the checkpoint's dense int4 linears beside the kernel that vLLM would
choose for them. On AMD GPUs such a linear runs on our kernel by default only if the
table says that it is faster.

Exit status: 0; 1 when nothing could be measured; 2 for a bad argument; 130 after
Ctrl-C.
"""

import argparse

DTYPES = ("bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tune`` to ``parser``."""
    add = parser.add_argument
    add("checkpoint", nargs="*", help="folder, or name of a model on the Hub")
    add(
        "--shape",
        action="append",
        default=[],
        metavar="E,TOP_K,H,I,G[,S]",
        help="experts, top-k, hidden, intermediate, group size; S: intermediate size "
        "of a shared expert in the same launches; may be repeated",
    )
    add("--dtype", choices=DTYPES, help="activation dtype (default: the checkpoint's)")
    add("--tp", type=int, default=1, help="tensor-parallel GPUs (default: 1)")
    add(
        "--linear",
        action="append",
        default=[],
        metavar="N,K,G",
        help="outputs, inputs and group size of a symmetric dense int4 linear; may be "
        "repeated",
    )
    add("--only", choices=("decode", "prefill", "linears"), help="measure only this")
    add(
        "--tokens",
        metavar="N,N",
        help="numbers of tokens to tune decode for (default: ten from 1 to 32)",
    )
    add(
        "--full",
        action="store_true",
        help="measure every launch plan (takes minutes more) and report how far the "
        "search is from the fastest",
    )
    add("--show", action="store_true", help="print the current choice, measure nothing")
    add("--json", action="store_true", help="print the new entries as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vllm.plugins.hybrid_w4a16 import tune_command

    return tune_command.run(args)
