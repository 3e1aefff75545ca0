# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Report where a vLLM release no longer fits the hook table or our modules' imports.

    python -m tools.check_drift [VERSION ...]

Part of `make nightly`. Without VERSION it checks the newest release. It downloads the
release's source distribution and checks it like `vllm-hybrid-w4a16 fork --check`,
without running or installing it. Exit status: 0 if everything fits, 1 if something does
not, 2 if a release could not be downloaded or read.
"""

import argparse
import sys

from tools import vllm_source
from vllm.plugins.hybrid_w4a16 import fork


def check(version: str) -> bool:
    """Print what does not fit vLLM ``version``; return whether everything fits.

    Raises ``vllm_source.FetchError`` and ``fork.ForkError``.
    """
    plan = fork.make_plan(vllm_source.fetch(version))
    edits = [report for report in plan.reports if report.symbol != "new file"]
    print(f"vLLM {version}: {len(edits)} edits, {len(plan.conflicts)} do not fit")
    for report in plan.conflicts:
        print(f"  {report}")
    return not plan.conflicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    try:
        versions = parser.parse_args().versions or [vllm_source.newest()]
        return 0 if all([check(version) for version in versions]) else 1
    except (vllm_source.FetchError, fork.ForkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
