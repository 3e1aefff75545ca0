# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Make .venv: vLLM for the CPU, the pinned requirements, this project (editable).

    python3.11 tools/make_venv.py [--venv .venv]

Needs Python 3.11, a C++ compiler and CMake. A step is skipped if its inputs have not
changed since it last succeeded, so a second call takes a moment.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [CHECKOUT / "requirements" / name for name in ("cpu.txt", "dev.txt")]
LIBRARY = CHECKOUT / "vllm" / "_hybrid_w4a16_C.so"
CPU_NAME = CHECKOUT / "requirements" / "vllm-cpu-name"
INPUTS = ["CMakeLists.txt", "setup.py", "pyproject.toml", "tools/overlay_target.py"]
PROGRESS_SECONDS = 5
LOG_LINES_SHOWN = 30


class StepError(Exception):
    """A step failed; the message says which and what to do."""


class Step:
    """One command, skipped if ``key`` has not changed since it last succeeded."""

    def __init__(
        self, venv: Path, name: str, title: str, key: str, advice: str
    ) -> None:
        self.title, self.key, self.advice = title, key, advice
        self.stamp = venv / f"{name}.stamp"
        self.log = venv / f"{name}.log"

    def is_done(self) -> bool:
        """Whether the step last succeeded with the same key."""
        return self.stamp.is_file() and self.stamp.read_text() == self.key

    def run(self, command: list[str], shown: tuple[str, ...]) -> None:
        """Run ``command``; log its output, print lines that start with ``shown``.

        Raises ``StepError`` if it fails.
        """
        if self.is_done():
            print(f"== {self.title}: unchanged", flush=True)
            return
        print(f"== {self.title}", flush=True)
        start = last_report = time.monotonic()
        with self.log.open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                now = time.monotonic()
                report_due = now - last_report > PROGRESS_SECONDS
                if line.strip().startswith(shown) or report_due:
                    text = line.strip().partition(" (from ")[0][:90]
                    print(f"   {now - start:4.0f} s  {text}", flush=True)
                    last_report = now
        if process.wait() != 0:
            tail = self.log.read_text().splitlines()[-LOG_LINES_SHOWN:]
            raise StepError(
                "\n".join(tail)
                + f"\n\nFAILED: {self.title} (exit status {process.returncode})"
                + f"\nCommand: {' '.join(command)}\nWhole log: {self.log}"
                + f"\nWhat to do: {self.advice}"
            )
        self.stamp.write_text(self.key)
        print(f"   {time.monotonic() - start:4.0f} s  done", flush=True)


def hash_of(files: Iterable[Path]) -> str:
    """A hash of the names and contents of ``files``."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def build_inputs() -> list[Path]:
    """The files from which the op library and the installed metadata are built."""
    files = [*REQUIREMENTS, CPU_NAME / "pyproject.toml"]
    files += [CHECKOUT / name for name in INPUTS]
    files += [path for path in (CHECKOUT / "csrc").rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def check_tools() -> None:
    """Check for missing tools before the steps that take minutes.

    Raises ``StepError``.
    """
    if sys.version_info[:2] != (3, 11):
        raise StepError(
            "FAILED: the pinned requirements are for Python 3.11, this is "
            f"{sys.version.split()[0]} ({sys.executable}).\n"
            "What to do: make PYTHON=/path/to/python3.11 ..."
        )
    missing = [tool for tool in ("c++", "cmake") if shutil.which(tool) is None]
    if missing:
        raise StepError(
            f"FAILED: not found on PATH: {', '.join(missing)}.\n"
            "What to do: on Debian or Ubuntu, apt-get install g++ cmake"
        )


def make_venv(venv: Path) -> None:
    """Bring ``venv`` up to date; raises ``StepError``."""
    python = str(venv / "bin" / "python")
    if not (venv / "bin" / "pip").exists():  # venv creates it last
        print(f"== Creating {venv}", flush=True)
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip_install = [python, "-m", "pip", "install", "--no-deps"]

    requirements = Step(
        venv,
        "requirements",
        "Installing vLLM for the CPU and the pinned requirements (about a minute)",
        hash_of(REQUIREMENTS),
        "check that pip reaches its index (pip config list) and 5 GB of disk are free, "
        "then run the same command again.",
    )
    # --no-compile: Python compiles only what it imports, which takes less time in all.
    files = [argument for file in REQUIREMENTS for argument in ("-r", str(file))]
    requirements.run(
        [*pip_install, "--no-compile", "--progress-bar=off", *files], ("Installing",)
    )

    project = Step(
        venv,
        "project",
        "Building the op library and installing this project (editable)",
        hash_of(build_inputs()),
        "look for the first error in the log; it works with g++ 12 and CMake 3.25.",
    )
    if not LIBRARY.exists():
        project.stamp.unlink(missing_ok=True)
    project.run(
        [
            *pip_install,
            "--no-build-isolation",
            "-v",
            str(CPU_NAME),
            "--editable",
            str(CHECKOUT),
        ],
        ("[", "---", "vLLM ", "torch ", "CPU ", "HIP ", "CUDA "),
    )


def main() -> int:
    """Make the environment; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=CHECKOUT / ".venv")
    venv = parser.parse_args().venv.absolute()
    try:
        check_tools()
        make_venv(venv)
    except StepError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
