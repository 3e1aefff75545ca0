# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Fetch and unpack the source distribution of a vLLM release, with pip.

    python tools/vllm_source.py [VERSION] [--to build/vllm-source]

Prints the folder of the unpacked tree. A tree from an earlier call is reused. Without
VERSION it fetches the newest release.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDER = CHECKOUT / "build" / "vllm-source"
TIMEOUT_SECONDS = 300


class FetchError(Exception):
    """The release could not be downloaded; the message is pip's."""


def fetch(version: str, folder: Path = FOLDER) -> Path:
    """Return the unpacked source tree of vLLM ``version`` in ``folder``.

    Raises ``FetchError``, for example without a network.
    """
    tree = folder / f"vllm-{version}"
    if tree.is_dir():
        return tree
    archive = folder / f"vllm-{version}.tar.gz"
    if not archive.is_file():
        # pip builds metadata even for a download. Without the override vLLM's setup.py
        # invents a version outside of git, and pip rejects it.
        environment = {
            **os.environ,
            "VLLM_VERSION_OVERRIDE": version,
            "VLLM_TARGET_DEVICE": "empty",
        }
        what = ["--no-binary=vllm", f"vllm=={version}", f"--dest={folder}"]
        _pip("download", "--no-deps", "--no-build-isolation", *what, env=environment)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / f"{tree.name}.new", filter="data")
    (folder / f"{tree.name}.new" / tree.name).rename(tree)
    (folder / f"{tree.name}.new").rmdir()
    archive.unlink()
    return tree


def newest() -> str:
    """Return the newest vLLM version that pip lists; ``FetchError`` if none."""
    match = re.search(r"\((\S+)\)", _pip("index", "versions", "vllm"))
    if match is None:
        raise FetchError("pip lists no version of vllm")
    return match[1]


def _pip(*arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            f"pip {arguments[0]}: no answer in {error.timeout} s"
        ) from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise FetchError(f"pip {arguments[0]}: {'; '.join(errors) or done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="default: the newest release")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args()
    try:
        print(fetch(args.version or newest(), args.to))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
