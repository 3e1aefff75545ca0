# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 fork``: the modules and hooks written into a vLLM source tree."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vllm-src", type=Path, required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    raise NotImplementedError
