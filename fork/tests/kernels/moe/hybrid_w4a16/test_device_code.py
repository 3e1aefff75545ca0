# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The kernels for AMD GPUs compile, and every entry point is in the code object.

Needs no GPU and no ROCm: any clang with the AMDGPU target and lld.
"""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[4] / "csrc" / "hybrid_w4a16"
ROCM = SOURCES / "rocm"
ARCHS = list(json.loads((ROCM / "amd_archs.json").read_text()))
KERNELS = sorted(path.stem for path in ROCM.glob("*.cu"))


def flags() -> list[str]:
    """Those that the build uses."""
    text = (ROCM / "amd_device_code.cmake").read_text()
    match = re.search(r"set\(hybrid_w4a16_device_flags\n(.*?)\n\)", text, re.S)
    assert match is not None
    return re.sub(r"#.*", "", match[1]).split()


def clangs() -> list[str]:
    names = ["amdclang++", "/opt/rocm/llvm/bin/clang++"]
    names += [f"clang++-{version}" for version in range(30, 18, -1)] + ["clang++"]
    return [found for name in names if (found := shutil.which(name))]


def compiled(clang: str, arch: str, source: Path, folder: Path):
    target = folder / "code.o"
    command = [clang, *flags(), f"--offload-arch={arch}", f"-I{ROCM}", f"-I{SOURCES}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(target)], capture_output=True, text=True
    )
    return done, target


@pytest.fixture(scope="module")
def clang(tmp_path_factory) -> str:
    """The first one that builds a kernel of bf16 dot products, as the build asks."""
    folder = tmp_path_factory.mktemp("probe")
    source = folder / "probe.cu"
    source.write_text(
        "using Pair = __bf16 __attribute__((ext_vector_type(2)));\n"
        'extern "C" __attribute__((global)) void probe(float* out, Pair a, Pair b) {\n'
        "  out[0] = __builtin_amdgcn_fdot2_f32_bf16(a, b, out[0], false);\n}\n"
    )
    for name in clangs():
        if compiled(name, "gfx1151", source, folder)[0].returncode == 0:
            return name
    pytest.skip("no clang with the AMDGPU target and lld")


def entry_points(stem: str) -> set[str]:
    """Names that the kernel's file defines: op, dtype, group, zero points, rows."""
    text = (ROCM / f"{stem}.cu").read_text()
    if stem.startswith("moe_int4_"):
        op = stem.removeprefix("moe_int4_")
        assert f"MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, {op})" in text
        kinds = itertools.product(("f16", "bf16"), (32, 64, 128), ("sym", "zp"), (1, 8))
        return {f"moe_int4_{op}_{d}_g{g}_{z}_t{t}" for d, g, z, t in kinds}
    return set()


@pytest.mark.parametrize("stem", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_entry_point_is_compiled(clang, arch, stem, tmp_path):
    done, target = compiled(clang, arch, ROCM / f"{stem}.cu", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    code = target.read_bytes()
    assert code.startswith(b"\x7fELF")
    names = set(re.findall(rb"\0(\w+)\.kd(?=\0)", code))
    assert names
    assert {name.encode() for name in entry_points(stem)} <= names
