# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The op library, built by a compiler without the newest CPU instructions."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ALL = (
    *("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16"),
)

OLD_COMPILER = """#!/bin/sh
for flag in "$@"; do
  case "$flag" in
    {rejected}) echo "c++: error: unrecognized option '$flag'" >&2; exit 1 ;;
  esac
done
exec {compiler} "$@"
"""


def run(*command) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return result


@pytest.mark.parametrize(
    ("rejected", "left_out", "unused"),
    [
        ("-mnothing", set(), set()),
        ("-mamx-*", {"amx_bf16", "amx_int8"}, set()),
        # amx_int8 relies on amx_bf16 for many rows, so it is unused without it.
        ("-mavx512bf16", {"amx_bf16", "avx512_bf16"}, {"amx_int8"}),
    ],
    ids=["current", "no AMX", "no BF16"],
)
def test_kernels_that_the_compiler_cannot_build_are_left_out(
    tmp_path, rejected, left_out, unused
):
    tools = {tool: shutil.which(tool) for tool in ("cmake", "ninja", "c++", "nm")}
    if platform.machine() != "x86_64" or None in tools.values():
        pytest.skip("needs an x86-64 processor, cmake, ninja, nm and a C++ compiler")
    compiler = tmp_path / "old-c++"
    compiler.write_text(OLD_COMPILER.format(rejected=rejected, compiler=tools["c++"]))
    compiler.chmod(0o755)
    build = tmp_path / "build"
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Debug"]
    configure += [f"-DTORCH_DIR={Path(torch.__file__).parent}"]
    said = re.findall(r"kernels_(\w+).cpp\s+is\s+left\s+out", run(*configure).stderr)
    assert set(said) == left_out

    plan = run("ninja", "-C", build, "-n", "-v").stdout
    built = set(re.findall(r"kernels_(\w+)\.cpp\.o ", plan))
    assert built == {kernel for kernel in ALL if kernel not in left_out}
    # The choice of kernels (tuning.h) uses no kernel that is missing.
    chooser = "CMakeFiles/_hybrid_w4a16_C.dir/csrc/cpu/isa.cpp.o"
    run("ninja", "-C", build, chooser)
    symbols = run("nm", "--undefined-only", "--demangle", build / chooser).stdout
    chosen = set(re.findall(r"moe_int4::cpu::k(\w+)$", symbols, re.MULTILINE))
    names = {kernel.replace("_", ""): kernel for kernel in ALL}
    # kernels_avx2.cpp has kAvx2 and kAvx2Few
    kernels = (k.removesuffix("Few") for k in chosen if not k.endswith("Epilogue"))
    chosen = {names[kernel.lower()] for kernel in kernels}
    assert chosen == built - unused
