# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The CPU kernels of the int4 MoE ops, one tile at a time, against float64.

The kernels of csrc/cpu are built under AddressSanitizer and UBSan. cpu/amx_emulation.h
replaces AMX instructions, so the AMX kernels are tested on any machine. cpu/tiles.cpp
generates new cases in every run. A failure prints the seed that reproduces them
(environment variable HYBRID_W4A16_TEST_SEED).
"""

import concurrent.futures
import os
import platform
import re
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "cpu"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SEED = int(os.environ.get("HYBRID_W4A16_TEST_SEED", secrets.randbits(32)))
SKIPPED = 77  # tiles.cpp

# fp32 sums of up to 5120 exact products of weights of up to 15 steps.
SUMS = 3e-6
# The same for weights that are 128 too large; the excess is subtracted from the sum.
BF16_SUMS = 3e-5
# For activations as 16-bit integers, whose error is below 1e-4 of a group's norm. With
# few outputs the errors do not average out, so the limit is higher.
INTEGERS = 2e-4

# Kernel: number of cases, limit of the relative error. Each kernel supports any number
# of rows, whatever tuning.h selects it for.
KERNELS = {
    "amx_bf16": (150, BF16_SUMS),
    "amx_int8": (150, INTEGERS),
    "avx512_bf16": (100, BF16_SUMS),
    "avx512_vnni": (100, INTEGERS),
    "avx512": (100, SUMS),
    "avx2": (100, SUMS),
    "portable": (50, SUMS),
    # the same kernels with the path for few rows at any number, for row invariance
    "avx512_few": (30, SUMS),
    "avx2_few": (30, SUMS),
    "portable_few": (15, SUMS),
}


def flags_of_kernels():
    """Return the instruction set flags of each kernels_*.cpp from CMakeLists.txt."""
    flags = {"portable": []}
    if platform.machine() == "x86_64":
        text = (CSRC / "cpu" / "CMakeLists.txt").read_text()
        for name, words in re.findall(r"^  set\((\w+) ([-$].+)\)$", text, re.MULTILINE):
            flags[name] = []
            for word in words.split():
                flags[name] += flags.get(word.strip("${}"), [word])
    return flags


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++-22")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("cpu_tiles")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common = ["-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", *sanitize]
    common += ["-ffp-contract=fast", "-Wno-psabi", f"-I{CSRC}", f"-I{CSRC / 'cpu'}"]
    sources = {}
    # In reverse, because the AMX kernels take longest.
    for name, flags in reversed(flags_of_kernels().items()):
        if name.startswith("amx"):
            flags = [*flags, "-include", HERE / "amx_emulation.h"]
        sources[CSRC / "cpu" / f"kernels_{name}.cpp"] = flags
    sources[HERE / "tiles.cpp"] = []

    def run(*command):
        build = subprocess.run(command, capture_output=True, text=True, check=False)
        assert build.returncode == 0, build.stderr[:4000]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        run(compiler, *common, *sources[source], "-c", source, "-o", target)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run(compiler, *sanitize, *objects, "-o", folder / "tiles")
    return folder / "tiles"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_tiles_are_right(program, kernel):
    if not kernel.startswith("portable") and platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 processor")
    cases, limit = KERNELS[kernel]
    command = [program, kernel, str(cases), str(SEED), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == SKIPPED:
        needed = "AVX2" if kernel.startswith("avx2") else "AVX-512 with VNNI and BF16"
        pytest.skip(f"needs a processor with {needed}")
    if run.returncode != 0:
        pytest.fail(
            f"{run.stdout}{run.stderr[:4000]}{run.stderr[-600:]}", pytrace=False
        )
    assert run.stdout.startswith(f"{cases} cases")
