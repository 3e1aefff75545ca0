#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times the routed experts of int4 MoE layers: router output in, layer output back.

Runs our experts and their peers on the same random weights, over more layers than the
caches can hold, and measures the machine's read bandwidth in the same run. README.md in
this folder explains each column.
"""

import contextlib
import os
import shlex
import sys

from moe_bench.arguments import check_arguments, make_parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns 0, or 1 if a backend failed or gave wrong results (it is not timed then). A
    bad argument ends the process with status 2 and a message.
    """
    parser = make_parser(__doc__)
    if arguments is None:
        arguments = sys.argv[1:]
    args = parser.parse_args(arguments)
    args.command = shlex.join(["benchmark_moe.py", *arguments])
    try:
        check_arguments(args)
        if args.threads is not None:
            # OpenMP reads it when torch loads it
            os.environ["OMP_NUM_THREADS"] = str(args.threads)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        from moe_bench.run import Benchmark, check_names
        from moe_bench.vllm_experts import vllm_config

        check_names(args)
    except ValueError as error:
        parser.error(str(error))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(vllm_config())
        benchmark = Benchmark(args)
        benchmark.run()
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    sys.exit(main())
