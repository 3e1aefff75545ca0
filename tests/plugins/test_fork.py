# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The fork branch of vLLM 0.32.0 and 0.33.0, made from their source distributions.

Both are fetched with pip into build/vllm-source, 45 MB each; without a network these
tests are skipped.
What runs in the trees uses the compiled libraries of the installed vLLM, a CPU build of
0.32.0. There is none of 0.33.0: its Python runs with those of 0.32.0.
"""

import difflib
import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools import check_drift, vllm_source
from vllm.plugins.hybrid_w4a16 import cli, fork, fork_files, hooks

CHECKOUT = Path(__file__).resolve().parents[2]
OUR_LIBRARY = "_hybrid_w4a16_C.so"
VERSIONS = ("0.32.0", "0.33.0")
SITE = sysconfig.get_path("purelib")
SCRIPTS = Path(sysconfig.get_path("scripts"))
CLANG = shutil.which("clang++-22")
CMAKE = SCRIPTS / "cmake"
MAXIMUM_LINES = 50
NOT_NEEDED = ("docs", "docker", "examples", "recipes", "rust", ".buildkite")

# vLLM's own tests of the files that the fork edits, those of them that need no GPU, no
# model from a hub and none of the fixtures in tests/conftest.py.
VLLM_TESTS = (
    "tests/test_envs.py",
    "tests/quantization/test_auto_round.py",
    "tests/quantization/test_auto_gptq.py",
    "tests/quantization/test_auto_awq.py",
    "tests/quantization/test_moe_wna16.py",
    "tests/quantization/test_compressed_tensors.py",
)

pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly


@functools.cache
def fetched(version: str) -> Path | str:
    """The unpacked source distribution, or why there is none."""
    try:
        return vllm_source.fetch(version)
    except vllm_source.FetchError as error:
        return str(error)


@pytest.fixture(scope="session", params=VERSIONS)
def version(request) -> str:
    return request.param


def stock_tree(version: str) -> Path:
    tree = fetched(version)
    if isinstance(tree, str):
        pytest.skip(f"no source distribution of vLLM {version}: {tree}")
    return tree


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Copies of the trees that processes run in, made once: (version, kind) to path."""

    @functools.cache
    def make(version: str, kind: str) -> Path:
        stock = stock_tree(version)
        tree = tmp_path_factory.mktemp(f"{kind}-{version}") / "vllm-src"
        shutil.copytree(stock, tree, ignore=shutil.ignore_patterns(*NOT_NEEDED))
        if kind == "forked" and version == "0.33.0":  # one each way
            patch = tree.with_name("fork.patch")
            assert cli.main(fork_arguments(stock, "--patch", patch)) == 0
            run("git", "apply", patch, cwd=tree)
        elif kind == "forked":
            make_repository(tree)
            assert cli.main(fork_arguments(tree, "--branch", "hybrid-w4a16")) == 0
        installed = Path(importlib.util.find_spec("vllm").origin).parent
        for library in installed.glob("*.so"):
            if library.name != OUR_LIBRARY:
                shutil.copy(library, tree / "vllm")
        return tree

    return make


def fork_arguments(tree: Path, *more: object) -> list[str]:
    return ["fork", "--vllm-src", str(tree), *map(str, more)]


def make_repository(tree: Path) -> None:
    run("git", "init", "--quiet", cwd=tree)
    for key, value in (("name", "Test"), ("email", "test@example.org")):
        run("git", "config", f"user.{key}", value, cwd=tree)
    run("git", "config", "gc.auto", "0", cwd=tree)
    run("git", "add", "--all", cwd=tree)
    run("git", "commit", "--quiet", "--message=stock", cwd=tree)


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of ``command``, which has to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def environment(tree: Path) -> dict[str, str]:
    """Of a process that imports vLLM from ``tree``."""
    return {
        **{k: v for k, v in os.environ.items() if k != "VLLM_HYBRID_W4A16_MOE"},
        "PYTHONPATH": os.pathsep.join((str(tree), SITE)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }


def run_overlay(tree: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Output of Python in ``tree``, this project beside its vLLM as a plugin."""
    return run(sys.executable, *arguments, cwd=cwd or tree, env=environment(tree))


def fork_command(*arguments: object) -> list[str]:
    """Python without site-packages' .pth files: without the overlay's bootstrap."""
    return [sys.executable, "-S", *map(str, arguments)]


def fork_environment(tree: Path) -> dict[str, str]:
    return {**environment(tree), "VLLM_PLUGINS": ""}


def run_fork(tree: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Output of Python in ``tree``, without this project."""
    return run(*fork_command(*arguments), cwd=cwd or tree, env=fork_environment(tree))


def changed_lines(before: Path, after: Path, path: str) -> list[str]:
    old, new = ((tree / path).read_text().splitlines() for tree in (before, after))
    lines = difflib.unified_diff(old, new, lineterm="", n=0)
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


def snapshot(tree: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}


def test_every_edit_applies_and_a_check_writes_nothing(version, capsys):
    stock = stock_tree(version)
    before = snapshot(stock)
    assert cli.main(fork_arguments(stock, "--check")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert snapshot(stock) == before
    for hook in hooks.HOOKS:
        (line,) = (ln for ln in lines if f"{hook.owner}.{hook.factory}" in ln)
        assert line.startswith("applies")
    assert lines[-1].endswith(" 0 conflicts")


def test_what_was_made_is_there_and_twice_changes_nothing(version, trees, capsys):
    tree = trees(version, "forked")
    before = snapshot(tree)
    assert cli.main(fork_arguments(tree)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main(fork_arguments(tree, "--check")) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 applies, ")
    assert snapshot(tree) == before
    if version == "0.32.0":
        log = run("git", "log", "--format=%s", "hybrid-w4a16", cwd=tree)
        assert log.splitlines() == [fork.TITLE, "stock"]
        assert not run("git", "status", "--porcelain", cwd=tree)


def test_few_lines_of_vllms_own_change_and_none_goes(version, trees):
    stock, tree = stock_tree(version), trees(version, "forked")
    ours = fork_files.files_to_add(CHECKOUT)
    assert not [path for path in ours if (stock / path).exists()]
    changed = {}
    for file in stock.rglob("*"):
        path = str(file.relative_to(stock))
        if (tree / path).is_file() and file.read_bytes() != (tree / path).read_bytes():
            changed[path] = changed_lines(stock, tree, path)
    assert set(changed) >= {fork.ENVS, fork.CMAKE}
    lines = [line for of_file in changed.values() for line in of_file]
    assert lines and all(line.startswith("+") for line in lines)
    assert len(lines) < MAXIMUM_LINES


def python_files(tree: Path) -> list[str]:
    """Those that the fork adds or edits."""
    paths = [*fork_files.files_to_add(CHECKOUT), *fork._edits(tree)]
    return [path for path in paths if path.endswith(".py")]


def test_vllms_linter_accepts_what_was_added(version, trees):
    tree = trees(version, "forked")
    paths = python_files(tree)
    # D417 wants each argument on a row of its own, D403 "VLLM" where a sentence starts.
    check = ("check", "--no-cache", "--extend-ignore=D417,D403")
    run(SCRIPTS / "ruff", *check, *paths, cwd=tree)
    run(SCRIPTS / "ruff", "format", "--no-cache", "--check", *paths, cwd=tree)


@pytest.fixture
def small_tree(tmp_path) -> Path:
    """A tree to damage: what the edits look at, of vLLM 0.32.0."""
    stock, tree = stock_tree("0.32.0"), tmp_path / "tree"
    shutil.copytree(stock / "vllm", tree / "vllm")
    for name in (fork.CMAKE, "pyproject.toml", ".clang-format"):
        shutil.copy(stock / name, tree)
    return tree


def test_a_target_that_is_not_there_stops_it_before_anything_is_written(
    small_tree, tmp_path, capsys
):
    hook = hooks.HOOKS[0]
    file = small_tree / fork_files.defining_file(small_tree, hook.module, hook.owner)
    file.write_text(file.read_text().replace(f"def {hook.factory}(", "def renamed("))
    layers = "vllm/model_executor/layers"
    ours = small_tree / layers / "fused_moe/hybrid_w4a16_packing.py"
    ours.write_text("# somebody else's\n")
    before = snapshot(small_tree)
    patch = tmp_path / "out.patch"
    assert cli.main(fork_arguments(small_tree, "--patch", patch)) == 1
    assert snapshot(small_tree) == before and not patch.exists()
    errors = capsys.readouterr().err
    symbol = f"{hook.owner}.{hook.factory}"
    assert f"{symbol}: {hook.owner} has no {hook.factory}, expected one" in errors
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


def test_only_a_clean_git_repository_gets_a_commit(small_tree, capsys):
    before = snapshot(small_tree)
    assert cli.main(fork_arguments(small_tree)) == 1
    assert "is not a git repository: use --patch" in capsys.readouterr().err
    assert snapshot(small_tree) == before
    make_repository(small_tree)
    (small_tree / fork.CMAKE).write_text((small_tree / fork.CMAKE).read_text() + "\n")
    before = run("git", "diff", cwd=small_tree)
    assert cli.main(fork_arguments(small_tree, "--branch", "new")) == 1
    assert "uncommitted changes" in capsys.readouterr().err
    assert run("git", "diff", cwd=small_tree) == before
    assert "new" not in run("git", "branch", cwd=small_tree)


STUB_PROBE = """
import importlib, json, sys
for module, owner, factory, parameters, handler in json.loads(sys.argv[1]):
    where, _, name = handler.partition(":")
    seen = []
    answer = object()
    handlers = importlib.import_module(where)
    setattr(handlers, name, lambda *args: seen.append(args) or answer)
    method = getattr(getattr(importlib.import_module(module), owner), factory)
    assert method(*parameters) is answer, (owner, factory)
    assert seen == [tuple(parameters)], seen
print("all", "vllm.plugins.hybrid_w4a16.hooks" in sys.modules)
"""


def test_each_edited_factory_asks_its_handler_first(version, trees):
    tree = trees(version, "forked")
    rows = [
        (hook.module, hook.owner, hook.factory, hook.parameters, hook.handler)
        for hook in hooks.HOOKS
    ]
    output = run_fork(tree, "-c", STUB_PROBE, json.dumps(rows))
    assert output.splitlines()[-1] == "all False"


@pytest.fixture(scope="session")
def with_ops(trees):
    """A forked tree in which the ops are in the library that the overlay has."""

    def make(version: str) -> Path:
        tree = trees(version, "forked")
        if not (tree / "vllm" / OUR_LIBRARY).exists():
            shutil.copy(CHECKOUT / "vllm" / OUR_LIBRARY, tree / "vllm")
        return tree

    return make


@pytest.mark.parametrize(
    "version", ["0.32.0", pytest.param("0.33.0", marks=NIGHTLY)], scope="session"
)
def test_fork_and_overlay_return_the_same_methods(version, trees, with_ops):
    program = ("-m", "tests.plugins.fork_grid")  # of this checkout, not of the tree
    stock, tree = trees(version, "stock"), with_ops(version)
    with ThreadPoolExecutor() as pool:  # a core each
        printed = (
            pool.submit(run_overlay, stock, *program, cwd=CHECKOUT),
            pool.submit(run_fork, tree, *program, cwd=CHECKOUT),
        )
        overlay, forked = (each.result().splitlines()[-1] for each in printed)
    assert json.loads(forked) == json.loads(overlay)
    classes = set(json.loads(forked).values())
    assert "INCHybridW4A16MoEMethod" in classes and len(classes) > 3


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# Every night all of our tests run in a tree, otherwise the one that goes through a
# layer's whole life: the others were run outside of a tree already.
OURS = pytest.mark.parametrize(
    "ours",
    ["quantization/test_inc_moe.py", pytest.param("quantization", marks=NIGHTLY)],
)


@OURS
def test_our_quantization_tests_pass_in_the_fork(with_ops, ours):
    confined = "--confcutdir=tests/hybrid_w4a16"
    tree = with_ops("0.32.0")
    output = run_fork(tree, *PYTEST, confined, f"tests/hybrid_w4a16/{ours}")
    summary = output.splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary


@OURS
def test_overlay_passes_our_quantization_tests_on_the_other_release(trees, ours):
    tree = trees("0.33.0", "stock")
    tests = CHECKOUT / "tests" / ours
    probe = "import vllm; print(vllm.__version__, vllm.__file__)"
    where = run_overlay(tree, "-c", probe)
    assert where.split()[-2:] == ["0.33.0", str(tree / "vllm/__init__.py")]
    settings = (f"--rootdir={CHECKOUT}", f"--config-file={CHECKOUT}/pyproject.toml")
    run_overlay(tree, *PYTEST, *settings, tests)


def outcomes(tree: Path, report: Path) -> dict[str, str]:
    """What became of each of vLLM's own tests."""
    arguments = (*PYTEST, "--noconftest", f"--junitxml={report}", *VLLM_TESTS)
    done = subprocess.run(
        fork_command(*arguments),
        cwd=tree,
        env=fork_environment(tree),
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[
        -4000:
    ]  # 1: some fail, here and there
    return {
        f"{case.get('classname')}::{case.get('name')}": (
            case[0].tag if len(case) else "passed"
        )
        for case in ElementTree.parse(report).iter("testcase")
    }


@NIGHTLY
def test_vllms_own_tests_have_the_same_result_before_and_after(trees, tmp_path):
    kinds = {kind: trees("0.32.0", kind) for kind in ("stock", "forked")}
    with ThreadPoolExecutor() as pool:  # a core each
        before, after = pool.map(
            lambda kind: outcomes(kinds[kind], tmp_path / f"{kind}.xml"), kinds
        )
    assert after == before
    passed = [test for test, outcome in before.items() if outcome == "passed"]
    for file in VLLM_TESTS:
        module = file.removesuffix(".py").replace("/", ".")
        assert any(test.startswith(module) for test in passed), f"none ran of {file}"


STAND_IN_CPU = """
cmake_minimum_required(VERSION 3.26)
project(vllm_extensions LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
include({tree}/cmake/utils.cmake)
find_python_from_executable({python} "3.11")
append_cmake_prefix_path("torch" "torch.utils.cmake_prefix_path")
find_package(Torch REQUIRED)
file(WRITE ${{CMAKE_BINARY_DIR}}/empty.cpp "")
define_extension_target(_C DESTINATION vllm LANGUAGE CXX
  SOURCES ${{CMAKE_BINARY_DIR}}/empty.cpp USE_SABI 3 WITH_SOABI)
include({tree}/cmake/hybrid_w4a16.cmake)
"""

IN_TREE_PROBE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
assert ops.load_error() is None, ops.load_error()
print("cpu" in ops.build_info(), list(ops.build_info()))
"""


def needs_cmake() -> None:
    if not CMAKE.exists():
        pytest.skip("vLLM's CMake files need CMake 3.26, from requirements/dev.txt")


def test_ops_in_the_cpu_extension_are_found_without_the_overlays_library(
    trees, tmp_path
):
    """Our CMake file of the fork makes them part of a `_C` that is nothing but them.

    vLLM's own CPU extension fetches oneDNN while CMake configures.
    """
    needs_cmake()
    tree = trees("0.32.0", "forked")
    if (tree / "vllm" / OUR_LIBRARY).exists():
        (tree / "vllm" / OUR_LIBRARY).unlink()
    text = STAND_IN_CPU.format(tree=tree, python=sys.executable)
    (tmp_path / "CMakeLists.txt").write_text(text)
    build = tmp_path / "build"
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={SCRIPTS}/ninja")
    run(CMAKE, "-S", tmp_path, "-B", build, *generator, cwd=tmp_path)
    run(CMAKE, "--build", build, cwd=tmp_path)
    (library,) = build.glob("_C*.so")
    assert run_fork(tree, "-c", IN_TREE_PROBE, library).endswith("True ['cpu']\n")


HIP_LANG = "add_library(hip-lang::device INTERFACE IMPORTED)\n"


@pytest.mark.skipif(CLANG is None, reason="needs clang++-22")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tried on x86-64 alone")
def test_cmake_compiles_our_hip_sources_as_part_of_rocm_C(version, trees, tmp_path):
    """vLLM's own CMakeLists.txt, told that there is a ROCm with clang as its compiler.

    There is none, so only what needs none of its headers gets compiled, and the kernels
    for the device alone.
    """
    needs_cmake()
    tree, rocm, triton = (
        trees(version, "forked"),
        tmp_path / "rocm",
        tmp_path / "triton",
    )
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
        *("-G", "Ninja", "-S", tree, "-B", build),
        *(f"-D{key}={value}" for key, value in settings.items()),
        cwd=tmp_path,
        env={**os.environ, "TRITON_KERNELS_SRC_DIR": str(triton)},
    )
    assert "int4 MoE ops: gfx1151\n" in output, "gfx90a has no waves of 32 lanes"

    ninja = functools.partial(run, SCRIPTS / "ninja", "-C", build, cwd=build)
    linked = ninja("-t", "query", "_rocm_C.abi3.so").split()
    ours = [name for name in linked if "/csrc/hybrid_w4a16/" in name]
    folder = "csrc/hybrid_w4a16/rocm/"
    files = [p for p in fork_files.files_to_add(CHECKOUT) if p.startswith(folder)]
    assert len(ours) == sum(p.endswith(".cpp") for p in files) + 1, "torch_bindings.cpp"
    if version != VERSIONS[0]:
        return
    (embedded,) = (name for name in linked if name.endswith("/device_code.cpp.o"))
    ninja(embedded, *(name for name in ours if "hip_runtime" in name))
    kernels = list((build / "device_code").glob("*.co"))
    sources = {Path(p).stem for p in files if p.endswith(".hip")}
    sources = {name for name in sources if "_grouped_" not in name}  # matrix units
    assert {kernel.name.split(".")[0] for kernel in kernels} == sources
    for kernel in kernels:
        assert kernel.read_bytes()[18:20] == b"\xe0\x00", "e_machine: AMDGPU"
