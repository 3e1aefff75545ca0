# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which compiler the build takes for AMD GPUs, by how ROCm is installed.

The search of csrc/rocm/amd_device_code.cmake is run in trees like those that AMD's
installers make. The compilers in them are links to clang++-22, or scripts that fail.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
CLANG = shutil.which("clang++-22")

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(CLANG is None, reason="needs clang++-22"),
    pytest.mark.skipif(not (SCRIPTS / "cmake").exists(), reason="needs cmake"),
]

PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(search LANGUAGES NONE)
include("{CHECKOUT}/csrc/rocm/amd_device_code.cmake")
hybrid_w4a16_all_archs(archs)
message(STATUS "all: ${{archs}}")
if(NOT ONLY_LIST)
  hybrid_w4a16_find_clang(clang "${{ARCHS}}")
  message(STATUS "took: ${{clang}}")
endif()
"""
OLD = "#!/bin/sh\necho \"clang: error: unknown target CPU 'gfx1151'\" >&2\nexit 1\n"


def real(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(str(CLANG))
    return path


def too_old(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OLD)
    path.chmod(0o755)
    return path


@pytest.fixture
def search(tmp_path):
    """Runs the search with what the test has put into tmp_path; returns its output."""
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "bin").mkdir()

    def search(archs="gfx1151", variables=(), **env):
        settings = {
            "CMAKE_MAKE_PROGRAM": SCRIPTS / "ninja",
            "Python3_EXECUTABLE": sys.executable,
            "TORCH_DIR": tmp_path / "site/torch",
            "HYBRID_W4A16_ROCM_HOMES": tmp_path / "opt/rocm",
            "ARCHS": archs,
            **dict(variables),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        command = [SCRIPTS / "cmake", "-G", "Ninja", "-S", tmp_path]
        command += ["-B", tmp_path / "build", *options]
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **env}
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        return " ".join((run.stdout + run.stderr).split())

    return search


THEROCK = "site/_rocm_sdk_core"


@pytest.mark.parametrize(
    ("clang", "env"),
    [
        (f"{THEROCK}/lib/llvm/bin/clang++", {}),
        ("opt/rocm/llvm/bin/clang++", {}),
        ("own/prefix/lib/llvm/bin/clang++", {"ROCM_PATH": "own/prefix"}),
        ("bin/clang++-22", {}),
        ("bin/amdclang++", {}),
    ],
    ids=["TheRock", "/opt/rocm", "a prefix", "clang alone", "amdclang++ on PATH"],
)
def test_takes_the_compiler_of_each_layout(search, tmp_path, clang, env):
    expected = real(tmp_path / clang)
    # all that TheRock has of the runtime: nothing to link with
    library = tmp_path / THEROCK / "lib/libamdhip64.so.7"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()
    env = {name: str(tmp_path / value) for name, value in env.items()}
    assert f"took: {expected} " in search(**env)


def test_rocm_comes_before_path(search, tmp_path):
    real(tmp_path / "bin/clang++-22")
    expected = real(tmp_path / "opt/rocm/llvm/bin/clang++")
    assert f"took: {expected} " in search()


def test_a_compiler_that_does_not_know_the_gpu_is_passed_over(search, tmp_path):
    too_old(tmp_path / "opt/rocm/llvm/bin/clang++")
    too_old(tmp_path / "bin/clang++")
    expected = real(tmp_path / "bin/clang++-9")
    assert f"took: {expected} " in search("gfx1151;gfx1201")


def test_says_what_was_tried_and_what_to_install(search, tmp_path):
    tried = too_old(tmp_path / "bin/clang++-14")
    output = search()
    assert "No clang here compiles GPU kernels for gfx1151" in output
    assert f"{tried} gfx1151: clang: error: unknown target CPU 'gfx1151'" in output
    for advice in ("rocm-sdk-core", "clang-22 lld-22", "HYBRID_W4A16_GPU=none"):
        assert advice in output


def test_says_that_there_is_no_compiler(search):
    assert "nothing: there is no clang++ in ROCm's folders or on PATH" in search()


def test_a_compiler_that_was_named_is_the_only_one(search, tmp_path):
    real(tmp_path / "bin/clang++-22")
    named = too_old(tmp_path / "named/clang++")
    output = search(variables={"HYBRID_W4A16_CLANG": named}.items())
    assert "No clang here compiles" in output and str(named) in output


def test_the_list_of_architectures(search):
    """The support matrix names them, and so does the README."""
    assert "all: gfx1100;gfx1101;" in search(variables={"ONLY_LIST": "1"}.items())


@pytest.mark.parametrize("asked", ["GPU=hip", "GPU_ARCHS=gfx1151"])
def test_the_build_stops_without_a_compiler(tmp_path, asked):
    name, value = asked.split("=")
    env = {
        **os.environ,
        "PATH": "/usr/bin:/bin",
        "HYBRID_W4A16_CLANG": str(too_old(tmp_path / "clang++")),
        "HYBRID_W4A16_SKIP_VLLM_CHECK": "1",
        f"HYBRID_W4A16_{name}": value,
    }
    source = tmp_path / "source"
    for part in ("csrc", "tools", "vllm"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(CHECKOUT / part, source / part, ignore=ignore)
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / part, source)
    shutil.copy(CHECKOUT / "CMakeLists.txt", source)
    shutil.copy(CHECKOUT / "vllm_hybrid_w4a16.py", source)
    run = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "No clang here compiles GPU kernels for" in run.stderr
    assert not (source / "dist").exists()
