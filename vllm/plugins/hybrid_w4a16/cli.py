# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The command ``vllm-hybrid-w4a16``.

Each subcommand is a module of this package with ``add_arguments(parser)`` and
``run(args) -> int``, which returns the exit status. Only the requested one is imported.
vLLM and torch take seconds to import, so only ``run`` imports them, and only if needed:
``--help``, a bad path or a broken file gets its answer at once.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

COMMANDS = {
    # name: (module of this package, one line for --help)
    "doctor": ("doctor", "check this installation and say what to fix next"),
    "explain": ("explain", "say what to expect of a checkpoint before serving it"),
    "selftest": ("selftest", "check what every kernel computes on this machine"),
    "tune": ("tune", "measure a tuning table on this machine"),
    "report": ("report", "doctor, selftest and measurements as one archive to send"),
    "fork": ("fork", "write the modules and hooks into a vLLM source tree"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: ``sys.argv``); returns the exit
    status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="vllm-hybrid-w4a16", description="int4 MoE on the hybrid path, for vLLM."
    )
    parser.add_argument("--version", action="version", version=version())
    subparsers = parser.add_subparsers(dest="command", required=True)
    # the parsers of the other subcommands stay empty, so their modules are not imported
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == called:
            command = importlib.import_module(f"{__package__}.{module}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    return args.run(args)


def version() -> str:
    """Version and commit of the installed package, as text for ``--version``."""
    try:
        return f"vllm-hybrid-w4a16 {importlib.metadata.version('vllm-hybrid-w4a16')}"
    except importlib.metadata.PackageNotFoundError:
        return "vllm-hybrid-w4a16, part of this vLLM source tree"


if __name__ == "__main__":
    sys.exit(main())
