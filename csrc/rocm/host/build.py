# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Builds the GPU kernels as a sanitized host program and prints its path.

``python csrc/rocm/host/build.py [--mma] [--cache DIR] [--objects] [--flag=F ...]
[SOURCE ...]``

--mma: kernels use matrix instructions, as on NVIDIA; otherwise they do not, as on
gfx11. --flag: an additional compiler flag. --objects: print the objects' paths, do not
link. Without SOURCE it builds the kernel sources of csrc/rocm and runner.cpp; with
SOURCE only those. scheduler.cpp is always included. Objects and programs are cached by
the hash of the compiler, its flags and the preprocessed source, so a second call takes
a second.

Exit status 2: there is no compiler, or it failed (its output is passed on).
"""

import argparse
import concurrent.futures
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOST_DIR = Path(__file__).resolve().parent
ROCM_DIR = HOST_DIR.parent
CSRC_DIR = ROCM_DIR.parent
DEFAULT_CACHE = CSRC_DIR.parent / "build" / "gpu_host"

COMPILERS = ("clang++-22", "g++", "clang++")
# With -O1 ASan's reports stay readable and builds short. Uninitialised locals hold a
# pattern that spoils results, rather than zeros that may hide the error.
SANITIZE = [
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",
]
INCLUDES = f"-I{CSRC_DIR} -I{ROCM_DIR} -I{HOST_DIR}"
FLAGS = f"-std=c++17 -g1 -fPIC -ffp-contract=off {INCLUDES} -Wall -Wextra".split()
if platform.machine() == "x86_64":
    # vLLM needs AVX2 too. Its conversions and FMA round like the library's functions.
    FLAGS.append("-march=x86-64-v3")
SCHEDULER = HOST_DIR / "scheduler.cpp"


def kernel_sources() -> list[Path]:
    """The translation units of csrc/rocm that need no torch: kernels and launchers."""
    return [*sorted(ROCM_DIR.glob("*.hip")), *sorted(ROCM_DIR.glob("launch*.cpp"))]


def _run(command: list[str]) -> bytes:
    run = subprocess.run(command, capture_output=True, check=False)
    if run.returncode:
        sys.stderr.write(f"{' '.join(command)}\n{run.stderr.decode(errors='replace')}")
        sys.exit(2)
    return run.stdout


def _key(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(
    compiler: str, source: Path, mma: bool, cache: Path, flags: Sequence[str]
) -> Path:
    command = [compiler, *FLAGS, *(["-O2"] if source == SCHEDULER else SANITIZE)]
    command += [f"-DGPU_HOST_MMA={int(mma)}", *flags, "-x", "c++"]
    preprocessed = _run([*command, "-E", str(source)])
    identity = _run([compiler, "--version"]) + " ".join(command).encode()
    out = cache / f"{source.stem}-{_key(identity, preprocessed)}.o"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a parallel build waits for the object
        if not out.exists():
            partial = out.with_suffix(f".{os.getpid()}")
            _run([*command, "-c", str(source), "-o", str(partial)])
            partial.rename(out)
    return out


def compile_objects(
    sources: Sequence[Path], mma: bool, cache: Path, flags: Sequence[str] = ()
) -> tuple[str, list[Path]]:
    """Compiles `sources`; returns the compiler and the objects' paths, in order.

    `mma`: whether gpu::kHasMma holds. Exits with status 2 as documented above.
    """
    if platform.machine() != "x86_64":
        sys.exit(f"the host build needs x86-64, this is {platform.machine()}")
    compiler = next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        sys.stderr.write(
            f"none of {', '.join(COMPILERS)} found; on Debian install g++ or clang-22\n"
        )
        sys.exit(2)
    cache.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_compile, compiler, source.resolve(), mma, cache, flags)
            for source in sources
        ]
        return compiler, [job.result() for job in jobs]


def build(
    sources: Sequence[Path], mma: bool, cache: Path, flags: Sequence[str] = ()
) -> Path:
    """Compiles and links `sources` with scheduler.cpp; returns the program's path."""
    compiler, objects = compile_objects([*sources, SCHEDULER], mma, cache, flags)
    key = _key(compiler.encode(), *(o.name.encode() for o in objects))
    program = cache / f"{sources[-1].stem}-{key}"
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        link = [
            compiler,
            "-fsanitize=address,undefined",
            "-rdynamic",
            *map(str, objects),
        ]
        _run([*link, "-o", str(partial)])
        partial.rename(program)
    return program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE")
    parser.add_argument("--mma", action="store_true")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--flag", action="append", default=[], metavar="F")
    parser.add_argument("--objects", action="store_true")
    options = parser.parse_args()
    sources = options.sources or [*kernel_sources(), HOST_DIR / "runner.cpp"]
    arguments = sources, options.mma, options.cache.resolve(), options.flag
    if options.objects:
        print(*compile_objects(*arguments)[1], sep="\n")
    else:
        print(build(*arguments))
