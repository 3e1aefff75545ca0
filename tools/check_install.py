# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checks that the wheel works in an environment with only vLLM and without a compiler.

    python -m tools.check_install [--wheel dist/X.whl] [--folder build/clean]

Makes a fresh virtual environment with vLLM for the CPU and installs the wheel with
plain pip. From it, runs doctor, selftest, tune, a server and report, with no compiler
on PATH. Then uninstalls the wheel and checks that every file of the environment is
again what it was, byte for byte. Exit status: 0; 1 if a step failed; 2 if the
environment could not be made.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools import merge_reports
from tools.make_venv import CPU_NAME

CHECKOUT = Path(__file__).resolve().parent.parent
CHECKPOINT = CHECKOUT / "demo/int4-autoround-g128"
REQUIREMENTS = CHECKOUT / "requirements/cpu.txt"
# Programs that compile, assemble or link.
COMPILER = re.compile(
    r"(.*-)?(cc|c\+\+|c[89]9|gcc|g\+\+|cpp|clang|clang\+\+|clang-cpp|ld|ld\..+|lld|as)"
    r"(-[\d.]+)?|ccache|hipcc|amdclang.*|nvcc"
)
NAME = "vllm-hybrid-w4a16"
SHAPE = "128,8,2048,768,128"


class StepError(Exception):
    """A step failed; the message says how."""


def without_compilers(folder: Path) -> str:
    """Return a PATH: links in ``folder`` to all programs of PATH except compilers."""
    folder.mkdir(parents=True)
    for place in os.get_exec_path():
        if not os.path.isdir(place):
            continue
        for program in os.scandir(place):
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not os.path.lexists(link):
                link.symlink_to(program.path)
    return str(folder)


def hashes(site: Path) -> dict[str, str]:
    """Return the hash of every file in site-packages except Python's byte code."""
    return {
        str(file.relative_to(site)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in site.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }


class Clean:
    """The environment, and commands in it; each step has a log for its output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv/bin"
        self.site = next((folder / "venv/lib").glob("python*/site-packages"))
        path = without_compilers(folder / "bin")
        home = folder / "home"
        home.mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("CC", "CXX")},
            "PATH": f"{self.bin}:{path}",
            "HOME": str(home),
            "VLLM_CONFIG_ROOT": str(home / "config"),
            "VLLM_CACHE_ROOT": str(home / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.environment.pop("PYTHONPATH", None)

    def run(self, name: str, *command: object, expected: int = 0) -> str:
        """Run a command of the environment and return its output.

        Raises ``StepError`` unless its exit status is the expected one.
        """
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            status = subprocess.run(
                [str(word) for word in command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if status != expected:
            raise StepError(f"exit status {status}, expected {expected}: see {log}")
        return log.read_text()

    def ours(self, name: str, *words: object, expected: int = 0) -> str:
        command = self.bin / "vllm-hybrid-w4a16"
        return self.run(name, command, name, *words, expected=expected)


def make(folder: Path) -> Clean:
    """Make a fresh environment with vLLM; raises ``StepError``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip: list[str | Path] = [folder / "venv/bin/python", "-m", "pip", "install"]
    pip += ["-q", "--no-deps"]
    # the build backend of vllm-cpu-name is among the requirements
    steps: tuple[list[str | Path], ...] = (
        ["-r", REQUIREMENTS],
        ["--no-build-isolation", CPU_NAME],
    )
    for words in steps:
        done = subprocess.run(
            [*pip, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise StepError(done.stdout)
    return Clean(folder)


def expect(text: str, *parts: str) -> None:
    """Raise ``StepError`` with the part that ``text`` lacks."""
    for part in parts:
        if not re.search(part, text):
            raise StepError(f"the output lacks {part!r}:\n{text[-2000:]}")


def no_compiler(clean: Clean) -> None:
    for name in ("cc", "c++", "gcc", "g++", "clang", "clang++", "hipcc", "nvcc"):
        found = shutil.which(name, path=clean.environment["PATH"])
        if found:
            raise StepError(f"{found} is on PATH")


def doctor(clean: Clean) -> None:
    text = clean.ours("doctor")
    expect(text, r"has code for: cpu .*, hip( gfx1\w+){10}", "next: nothing")
    expect(text, "no C\\+\\+ compiler on PATH.*--enforce-eager")


def selftest(clean: Clean) -> None:
    expect(clean.ours("selftest"), "cpu: all right, [0-9]+ cases")


def tune(clean: Clean) -> None:
    expect(clean.ours("tune", "--shape", SHAPE), "nothing to tune")


def serve(clean: Clean) -> None:
    """The demo, whose client needs packages of this environment."""
    log = clean.folder / "server.log"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tools.demo"),
            *("--vllm", clean.bin / "vllm", "--log", log),
        ],
        cwd=CHECKOUT,
        env={**clean.environment, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise StepError(f"exit status {done.returncode}:\n{done.stdout[-3000:]}")
    expect(done.stdout, "6 of 6 on the hybrid int4 path", r"[0-9]+ tokens/s")


def report(clean: Clean) -> None:
    """Stock vLLM cannot load this checkpoint on a CPU: a finding, so status 1."""
    words = ["--rounds", 1, "--skip", "selftest", "--serve-args"]
    arguments = "--enforce-eager --max-model-len 2048"
    text = clean.ours("report", CHECKPOINT, *words, arguments, expected=1)
    expect(text, r"\| stock \| .*has no parameter", r"\| hybrid \| [0-9.]+ \(")
    archive = clean.folder / "hybrid-w4a16-report.tar.gz"
    results = clean.folder / "results.md"
    shutil.copy(merge_reports.RESULTS, results)
    if merge_reports.main([str(archive), "--results", str(results)]):
        raise StepError(f"{archive} cannot be merged")


STEPS: tuple[Callable[[Clean], None], ...] = (
    no_compiler,
    doctor,
    selftest,
    tune,
    serve,
    report,
)


def check(clean: Clean, wheel: Path) -> bool:
    """Run all steps and print how each ended; return whether all succeeded."""
    before = hashes(clean.site)

    def install(clean: Clean) -> None:
        clean.run("install", clean.bin / "pip", "install", wheel)
        after = hashes(clean.site)
        changed = [name for name in before if after.get(name) != before[name]]
        if changed:
            raise StepError(f"changes {len(changed)} files of others: {changed[:5]}")

    def uninstall(clean: Clean) -> None:
        clean.run("uninstall", clean.bin / "pip", "uninstall", "-y", NAME)
        after = hashes(clean.site)
        if after != before:
            names = sorted(set(after.items()) ^ set(before.items()))
            raise StepError(f"not as before: {[name for name, _ in names[:5]]}")

    good = True
    for step in (install, *STEPS, uninstall):
        start = time.monotonic()
        try:
            step(clean)
            outcome = "ok    "
        except StepError as error:
            good, outcome = False, f"FAILED {error}\n"
        took = f"{time.monotonic() - start:.0f} s"
        print(f"{step.__name__:<12} {outcome} {took}", flush=True)
    print(f"{len(before)} files of vLLM and its requirements were compared")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="default: the newest one in dist")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build/clean")
    options = parser.parse_args()
    wheels = sorted(CHECKOUT.glob("dist/*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = options.wheel or (wheels[-1] if wheels else None)
    if wheel is None or not wheel.is_file():
        parser.error(f"no wheel at {wheel or CHECKOUT / 'dist'}: run `make wheel`")
    try:
        clean = make(options.folder.absolute())
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if check(clean, wheel.absolute()) else 1


if __name__ == "__main__":
    sys.exit(main())
