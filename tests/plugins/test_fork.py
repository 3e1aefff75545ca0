# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The series on vLLM 0.32.0 and 0.33.0, made from their source distributions.

Both are fetched with pip into build/vllm-source, 45 MB each; without a network these
tests are skipped. CI looks at 0.32.0. Every night both releases are looked at, and each
commit is built and its tests run in its own tree (``fork_tree``).
"""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import check_drift, vllm_source
from vllm.plugins.hybrid_w4a16 import cli, fork, fork_edits, fork_files
from vllm.plugins.hybrid_w4a16.fork_series import SERIES

from . import fork_tree
from .fork_tree import OUR_LIBRARY, SCRIPTS, git, run

BEFORE = f"series~{len(SERIES)}"
"""What the series was made on."""

CHECKOUT = Path(__file__).resolve().parents[2]
CLANG = shutil.which("clang++-22")
CMAKE = SCRIPTS / "cmake"
MAXIMUM_LINES = 2500
"""Of a commit, without tests."""
MAXIMUM_OWN_LINES = 120
"""Of the series, in files that vLLM has."""

# vLLM's own tests of the files that the series edits that need no GPU, no model from a
# hub and none of the fixtures in tests/conftest.py.
VLLM_TESTS = (
    "tests/quantization/test_auto_round.py",
    "tests/quantization/test_auto_gptq.py",
    "tests/quantization/test_auto_awq.py",
    "tests/quantization/test_moe_wna16.py",
    "tests/quantization/test_compressed_tensors.py",
)

pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly
VERSIONS = ("0.32.0", pytest.param("0.33.0", marks=NIGHTLY))


@functools.cache
def fetched(version: str) -> Path | str:
    """The unpacked source distribution, or why there is none."""
    try:
        return vllm_source.fetch(version)
    except vllm_source.FetchError as error:
        return str(error)


def stock_tree(version: str) -> Path:
    tree = fetched(version)
    if isinstance(tree, str):
        pytest.skip(f"no source distribution of vLLM {version}: {tree}")
    return tree


class Made(NamedTuple):
    """A tree with the series on branch ``series``, and what it was made from."""

    version: str
    plan: fork.Plan
    tree: Path
    patches: Path


@functools.cache
def _made(version: str, folder: Path) -> Made:
    tree = fork_tree.copy_of(stock_tree(version), folder / "vllm-src")
    plan = fork.make_plan(tree)
    assert plan.conflicts == []
    patches = folder / "patches"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fork_tree.IDENTITY.items():
            patch.setenv(name, value)
        fork.write_patches(plan, patches)
        fork.commit(tree, plan, "series")
    return Made(version, plan, tree, patches)


@pytest.fixture(scope="session", params=VERSIONS)
def made(request, tmp_path_factory) -> Made:
    return _made(request.param, tmp_path_factory.getbasetemp() / request.param)


def fork_arguments(tree: Path, *more: object) -> list[str]:
    return ["fork", "--vllm-src", str(tree), *map(str, more)]


def snapshot(tree: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}


def test_the_series_is_on_its_branch(made):
    log = git(made.tree, "log", "--reverse", "--format=%s", "series")
    assert log.splitlines() == ["stock", *(commit.title for commit in SERIES.values())]
    assert not git(made.tree, "status", "--porcelain")
    assert [step.name for step in made.plan.steps] == list(SERIES)


def test_commits_are_small_and_change_little_of_vllms_own(made):
    sizes = {step.name: step.lines() for step in made.plan.steps}
    assert max(code for code, _, _ in sizes.values()) <= MAXIMUM_LINES, sizes
    own = git(made.tree, "diff", "--numstat", BEFORE, "series", "--", *edited())
    added = sum(int(line.split()[0]) for line in own.splitlines())
    assert added == sum(lines for _, _, lines in sizes.values())
    assert 0 < added < MAXIMUM_OWN_LINES


def edited() -> list[str]:
    return sorted({row.path for row in fork_edits.INSERTIONS})


def test_a_second_run_changes_nothing(made, capsys):
    head = git(made.tree, "rev-parse", "HEAD")
    assert cli.main(fork_arguments(made.tree)) == 0
    output = capsys.readouterr().out
    assert output.startswith("0 applies, ") and "nothing to do" in output
    assert git(made.tree, "rev-parse", "HEAD") == head
    assert not git(made.tree, "status", "--porcelain")


def test_patches_apply_with_git_am_and_have_texts(made, tmp_path, monkeypatch):
    for name, value in fork_tree.IDENTITY.items():
        monkeypatch.setenv(name, value)
    clean = tmp_path / "clean"
    run("git", "clone", "--quiet", "--no-checkout", made.tree, clean, cwd=tmp_path)
    git(clean, "checkout", "--quiet", BEFORE)
    patches = sorted(made.patches.glob("*.patch"))
    assert len(patches) == len(SERIES)
    git(clean, "am", "--quiet", *patches)
    assert git(clean, "rev-parse", "HEAD^{tree}") == git(
        made.tree, "rev-parse", "series^{tree}"
    )
    for patch, (name, commit) in zip(patches, SERIES.items(), strict=True):
        text = patch.with_suffix(".md").read_text()
        assert text.startswith(f"# {commit.title}\n"), name
        assert "## What was not measured" in text
    again = tmp_path / "again"
    fork.write_patches(made.plan, again)
    for patch in made.patches.iterdir():
        assert (again / patch.name).read_bytes() == patch.read_bytes()


def test_vllms_linters_accept_every_file(made):
    """ruff with vLLM's pyproject.toml, clang-format with its .clang-format."""
    paths = git(made.tree, "diff", "--name-only", BEFORE, "series").splitlines()
    python = [path for path in paths if path.endswith(".py")]
    assert len(python) > 30
    # D417 wants each argument on a row of its own, D403 "VLLM" where a sentence starts.
    check = ("check", "--no-cache", "--extend-ignore=D417,D403")
    run(SCRIPTS / "ruff", *check, *python, cwd=made.tree)
    run(SCRIPTS / "ruff", "format", "--no-cache", "--check", *python, cwd=made.tree)
    cxx = [path for path in paths if path.endswith(fork_files.CXX_SUFFIXES)]
    style = ("--style=file", "--dry-run", "-Werror")
    run(SCRIPTS / "clang-format", *style, *cxx, cwd=made.tree)
    for path in paths:
        text = (made.tree / path).read_text()
        assert text.endswith("\n") and not text.endswith("\n\n"), path
        if path not in edited() and not path.endswith((".json", ".md")):
            assert "SPDX-License-Identifier: Apache-2.0" in text[:200], path


@pytest.fixture
def small_tree(tmp_path) -> Path:
    """A tree to damage: what the edits look at, of vLLM 0.32.0."""
    stock, tree = stock_tree("0.32.0"), tmp_path / "tree"
    shutil.copytree(stock / "vllm", tree / "vllm")
    for name in (*edited(), *fork.ROOT_FILES):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stock / name, tree / name)
    return tree


def test_a_target_that_moved_stops_it_before_anything_is_written(
    small_tree, tmp_path, capsys
):
    oracle = small_tree / fork_edits.ORACLE
    oracle.write_text(oracle.read_text().replace("mapping = {", "names = {"))
    ours = small_tree / "vllm/model_executor/layers/fused_moe/hybrid_w4a16_packing.py"
    ours.write_text("# somebody else's\n")
    before = snapshot(small_tree)
    patches = tmp_path / "patches"
    assert cli.main(fork_arguments(small_tree, "--patch-dir", patches)) == 1
    assert snapshot(small_tree) == before and not patches.exists()
    errors = capsys.readouterr().err
    assert "int_wna16.py  map_wna16_backend: 0 places match" in errors
    assert "hybrid_w4a16_packing.py  new file: it exists with other contents" in errors
    assert "Nothing was written." in errors


def test_drift_is_reported_with_file_and_symbol(small_tree, monkeypatch, capsys):
    file = small_tree / "vllm/model_executor/layers/fused_moe/activation.py"
    file.write_text(file.read_text().replace("class MoEActivation(", "class Moved("))
    monkeypatch.setattr(check_drift.vllm_source, "fetch", lambda version: small_tree)
    assert not check_drift.check("0.99.0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vLLM 0.99.0: ") and lines[0].endswith(" do not fit")
    assert len(lines) > 1
    for line in lines[1:]:
        assert "imports: vllm.model_executor.layers.fused_moe" in line
        assert line.endswith(" has no MoEActivation")


def test_only_a_clean_git_repository_gets_commits(small_tree, capsys):
    before = snapshot(small_tree)
    assert cli.main(fork_arguments(small_tree)) == 1
    assert "is not a git repository: use --patch-dir" in capsys.readouterr().err
    assert snapshot(small_tree) == before
    fork_tree.make_repository(small_tree)
    (small_tree / fork_edits.CMAKE).open("a").write("\n")
    before = git(small_tree, "diff")
    assert cli.main(fork_arguments(small_tree, "--branch", "new")) == 1
    assert "uncommitted changes" in capsys.readouterr().err
    assert git(small_tree, "diff") == before
    assert "new" not in git(small_tree, "branch")


def test_series_and_overlay_decide_alike(made, tmp_path):
    """The grid's layers: the same experts class, or the same reason."""
    stock = tmp_path / "stock"
    shutil.copytree(stock_tree(made.version) / "vllm", stock / "vllm")
    for library in (made.tree / "vllm").glob("*.so"):
        shutil.copy(library, stock / "vllm")
    grid = "tests.plugins.fork_grid"  # of this checkout, not of the tree
    ops = CHECKOUT / "vllm" / OUR_LIBRARY
    calls = (
        ([sys.executable, "-m", grid], fork_tree.environment(stock)),
        (fork_tree.fork_command(ops, grid), fork_tree.fork_environment(made.tree)),
    )
    with ThreadPoolExecutor() as pool:  # a core each
        printed = pool.map(lambda call: run(*call[0], cwd=CHECKOUT, env=call[1]), calls)
    overlay, series = (json.loads(text.splitlines()[-1]) for text in printed)
    assert {k: v for k, v in series.items() if v != overlay[k]} == {}
    assert series.keys() == overlay.keys()
    taken = [k for k, v in series.items() if v[0] == "HybridW4A16MoEExperts"]
    reasons = {v[1] for v in series.values() if v[1] is not None}
    assert len(taken) > 30 and len(reasons) > 8


def test_the_backends_tests_pass_in_the_tree(made):
    """The choice and the conversion of weights; every night all tests run."""
    ops = CHECKOUT / "vllm" / OUR_LIBRARY
    test = "tests/quantization/hybrid_w4a16/test_oracle.py"
    assert " passed" in fork_tree.run_tests(made.tree, ops, test)


@NIGHTLY
@pytest.mark.parametrize("version", ["0.32.0", "0.33.0"])
def test_each_commit_builds_and_passes_its_tests_in_its_own_tree(version):
    stock_tree(version)
    command = [sys.executable, "-m", "tests.plugins.fork_tree", version]
    output = run(*command, cwd=CHECKOUT)
    for name in SERIES:
        assert f"\n{name}: " in f"\n{output}"
    assert output.count(" passed") >= len(SERIES)


def outcomes(tree: Path, report: Path) -> dict[str, str]:
    """What became of each of vLLM's own tests."""
    options = ("-q", "-p", "no:cacheprovider", "--noconftest")
    arguments = ("pytest", *options, f"--junitxml={report}", *VLLM_TESTS)
    done = subprocess.run(
        fork_tree.fork_command(None, *arguments),
        cwd=tree,
        env=fork_tree.fork_environment(tree),
        capture_output=True,
        text=True,
        timeout=fork_tree.TIMEOUT_SECONDS,
    )
    # 1: some fail, here and there
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    return {
        f"{case.get('classname')}::{case.get('name')}": (
            case[0].tag if len(case) else "passed"
        )
        for case in ElementTree.parse(report).iter("testcase")
    }


@NIGHTLY
def test_vllms_own_tests_have_the_same_result_before_and_after(made, tmp_path):
    after = outcomes(made.tree, tmp_path / "after.xml")
    git(made.tree, "checkout", "--quiet", BEFORE)
    try:
        before = outcomes(made.tree, tmp_path / "before.xml")
    finally:
        git(made.tree, "checkout", "--quiet", "series")
    assert after == before
    passed = [test for test, outcome in before.items() if outcome == "passed"]
    for file in VLLM_TESTS:
        module = file.removesuffix(".py").replace("/", ".")
        assert any(test.startswith(module) for test in passed), f"none ran of {file}"


HIP_LANG = "add_library(hip-lang::device INTERFACE IMPORTED)\n"


@NIGHTLY
@pytest.mark.skipif(CLANG is None, reason="needs clang++-22")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tried on x86-64 alone")
def test_vllms_cmake_compiles_our_sources_as_part_of_rocm_C(made, tmp_path):
    """vLLM's own CMakeLists.txt, told that there is a ROCm with clang as its compiler.

    There is none, so only what needs none of its headers gets compiled, and the kernels
    for the device alone.
    """
    if not CMAKE.exists():
        pytest.skip("vLLM's CMake files need CMake 3.26, from requirements/dev.txt")
    rocm, triton = tmp_path / "rocm", tmp_path / "triton"
    for file, text in (
        (rocm / "lib/cmake/hip-lang/hip-lang-config.cmake", HIP_LANG),
        (rocm / "include/README", ""),
        (triton / "__init__.py", ""),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    flags = "-std=gnu++20 -nogpulib -nogpuinc --offload-device-only"
    settings = {
        "CMAKE_MAKE_PROGRAM": SCRIPTS / "ninja",
        "VLLM_TARGET_DEVICE": "rocm",
        "VLLM_PYTHON_EXECUTABLE": sys.executable,
        "HIP_FOUND": "TRUE",
        "ROCM_PATH": rocm,
        "CMAKE_HIP_COMPILER": CLANG,
        "CMAKE_HIP_COMPILER_FORCED": "TRUE",
        "CMAKE_HIP_COMPILER_ROCM_ROOT": rocm,
        "CMAKE_HIP_ARCHITECTURES": "gfx90a;gfx1151",
        "HIP_ARCHITECTURES": "gfx90a;gfx1151",
        "CMAKE_HIP_FLAGS": f"{flags} --no-gpu-bundle-output",
        "FETCHCONTENT_BASE_DIR": tmp_path / "deps",
    }
    build = tmp_path / "build"
    output = run(
        CMAKE,
        *("-G", "Ninja", "-S", made.tree, "-B", build),
        *(f"-D{key}={value}" for key, value in settings.items()),
        cwd=tmp_path,
        env={**os.environ, "TRITON_KERNELS_SRC_DIR": str(triton)},
    )
    assert "int4 MoE ops: gfx1151\n" in output, "gfx90a has no waves of 32 lanes"
    ninja = functools.partial(run, SCRIPTS / "ninja", "-C", build, cwd=build)
    linked = ninja("-t", "query", "_rocm_C.abi3.so").split()
    ours = [name for name in linked if "/csrc/hybrid_w4a16/" in name]
    sources = list((made.tree / "csrc/hybrid_w4a16/rocm").glob("*.cpp"))
    assert len(ours) == len(sources) + 1, "torch_bindings.cpp"
    (embedded,) = (name for name in linked if name.endswith("/device_code.cpp.o"))
    ninja(embedded, *(name for name in ours if "hip_runtime" in name))
    kernels = list((build / "device_code").glob("*.co"))
    expected = {p.stem for p in (made.tree / "csrc/hybrid_w4a16/rocm").glob("*.cu")}
    assert {kernel.name.split(".")[0] for kernel in kernels} == expected
    for kernel in kernels:
        assert kernel.read_bytes()[18:20] == b"\xe0\x00", "e_machine: AMDGPU"
