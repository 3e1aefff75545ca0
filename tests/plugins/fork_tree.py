# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Trees of vLLM with the series, commit by commit: made, built, tested.

A tree has the compiled libraries of the installed vLLM, a CPU build of 0.32.0. There is
none of 0.33.0: its Python runs with those of 0.32.0. What the series adds to vLLM's
libraries is built from the tree by its own cmake/hybrid_w4a16.cmake, and loaded before
anything else.

    python -m tests.plugins.fork_tree VERSION [COMMIT ...]

builds each commit, runs its tests in its own tree, and prints what came out. A second
call skips the commits that passed and have not changed.
"""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

from tools import vllm_source
from vllm.plugins.hybrid_w4a16 import fork

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / "build/fork-tree"
SITE = sysconfig.get_path("purelib")
SCRIPTS = Path(sysconfig.get_path("scripts"))
DEVICE_CODE = "tests/kernels/moe/hybrid_w4a16/test_device_code.py"
OUR_LIBRARY = "_hybrid_w4a16_C.so"
TIMEOUT_SECONDS = 3600
"""Of one command: a build, or the tests of a folder."""
NOT_NEEDED = ("docker", "examples", "recipes", "rust")
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Test"), ("EMAIL", "test@example.org"))
}

# Stands in for vLLM's CMakeLists.txt: what the included file uses of it.
CMAKE_PROJECT = """\
cmake_minimum_required(VERSION 3.25)
project(series LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_SKIP_RPATH ON)
set(CMAKE_BUILD_TYPE Release)
set(Python_EXECUTABLE "{python}")
set(TORCH_INSTALL_PREFIX "{torch}")
set(VLLM_GPU_LANG "{language}")
set(VLLM_GPU_ARCHES {archs} gfx942)
add_library(torch INTERFACE)
target_include_directories(torch SYSTEM INTERFACE "{torch}/include")
target_link_directories(torch INTERFACE "{torch}/lib")
target_link_libraries(torch INTERFACE torch_cpu c10)
file(WRITE "${{CMAKE_BINARY_DIR}}/empty.cpp" "")
add_library({extension} MODULE "${{CMAKE_BINARY_DIR}}/empty.cpp")
include({tree}/cmake/hybrid_w4a16.cmake)
"""


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of ``command``, which has to succeed within ``TIMEOUT_SECONDS``."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def git(tree: Path, *arguments: object) -> str:
    return run("git", *arguments, cwd=tree, env={**os.environ, **IDENTITY})


def make_repository(tree: Path) -> None:
    git(tree, "init", "--quiet")
    git(tree, "config", "gc.auto", "0")
    git(tree, "config", "user.name", "Test")
    git(tree, "config", "user.email", "test@example.org")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--message=stock")


def copy_of(stock: Path, tree: Path) -> Path:
    """A copy of a source tree, as a git repository, with the installed libraries."""
    shutil.copytree(stock, tree, ignore=shutil.ignore_patterns(*NOT_NEEDED))
    make_repository(tree)
    installed = importlib.util.find_spec("vllm")
    assert installed is not None and installed.origin is not None
    for library in Path(installed.origin).parent.glob("*.so"):
        if library.name != OUR_LIBRARY:
            shutil.copy(library, tree / "vllm")
            with (tree / ".git/info/exclude").open("a") as file:
                file.write(f"/vllm/{library.name}\n")
    return tree


def build(tree: Path, folder: Path, language: str = "", archs: str = "gfx1151") -> Path:
    """The library of the ops of ``tree``: for the CPU, or ``language`` HIP."""
    extension = "_rocm_C" if language else "_C"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(
        CMAKE_PROJECT.format(
            python=sys.executable,
            torch=Path(torch.__file__).parent,
            language=language,
            archs=archs,
            extension=extension,
            tree=tree,
        )
    )
    cmake = SCRIPTS / "cmake"
    run(cmake, "-S", folder, "-B", folder / "out", "-G", "Ninja", cwd=folder)
    run(cmake, "--build", folder / "out", cwd=folder)
    return folder / "out" / f"lib{extension}.so"


def environment(tree: Path) -> dict[str, str]:
    """Of a process that imports vLLM from ``tree``."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("VLLM_HYBRID")},
        "PYTHONPATH": os.pathsep.join((str(tree), SITE)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }


def fork_environment(tree: Path) -> dict[str, str]:
    return {**environment(tree), "VLLM_PLUGINS": ""}


@functools.cache
def python_without_site() -> Path:
    """A program that runs this Python with ``-S``, for children of a test's process."""
    program = FOLDER / "python"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    program.chmod(0o755)
    return program


def fork_command(library: Path | None, *arguments: str) -> list[str]:
    """Python without site-packages' .pth files, that is without this project.

    ``arguments``: a module and its arguments. ``library``: loaded first, in the place
    of vLLM's own with the ops in it.
    """
    load = f"torch.ops.load_library({str(library)!r}); " if library else ""
    program = (
        f"import runpy, sys, torch; {load}sys.argv = {list(arguments)!r}; "
        f"sys.executable = {str(python_without_site())!r}; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-S", "-c", program]


def run_tests(tree: Path, library: Path | None, *tests: str) -> str:
    """The summary lines of pytest on ``tests``, of which none may fail."""
    # of the architectures that device code is compiled for, one is enough here
    chosen = ("-k", "gfx1151 or not test_device_code")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen)
    summaries = []
    for folder in dict.fromkeys(str(Path(test).parent) for test in tests):
        # A run per folder: tests/conftest.py, above them all, needs what is not here.
        # In the environment, for tests that start pytest themselves.
        env = {**fork_environment(tree), "PYTEST_ADDOPTS": f"--confcutdir={folder}"}
        files = [test for test in tests if str(Path(test).parent) == folder]
        command = fork_command(library, "pytest", *options, *files)
        output = run(*command, cwd=tree, env=env)
        summaries.append(output.splitlines()[-1].strip("= "))
    return "; ".join(summaries)


class Runner:
    """The commits of the series on ``version``, built and tested one at a time.

    Keeps its trees in ``folder``, and a list of the source trees that passed: a commit
    whose source tree is in the list is not run again.
    """

    def __init__(self, version: str, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "vllm-src"
        if not self.tree.exists():
            copy_of(vllm_source.fetch(version), self.tree)
            git(self.tree, "branch", "stock")
        git(self.tree, "checkout", "--quiet", "--force", "--detach", "stock")
        git(self.tree, "clean", "--quiet", "--force", "-d")
        self.plan = fork.make_plan(self.tree)
        if self.plan.conflicts:
            raise fork.ForkError("\n".join(map(str, self.plan.conflicts)))
        git(self.tree, "branch", "--quiet", "--force", "series", "stock")
        git(self.tree, "checkout", "--quiet", "series")
        fork.commit(self.tree, self.plan, None)
        self.names = [step.name for step in self.plan.steps]

    def passed(self) -> dict[str, str]:
        """The summary of each source tree that passed, by its hash."""
        file = self.folder / "passed.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def commit(self, name: str) -> str:
        """Builds commit ``name`` and runs its tests. Returns what it did.

        Raises ``AssertionError`` with the output of what failed.
        """
        behind = len(self.names) - 1 - self.names.index(name)
        source = git(self.tree, "rev-parse", f"series~{behind}^{{tree}}").strip()
        passed = self.passed()
        if source in passed:
            return f"{passed[source]} (in an earlier run)"
        git(self.tree, "checkout", "--quiet", f"series~{behind}")
        built, library = self._build(name)
        if name == "autoround":
            # AutoRound's layers need ops, which the CPU gets in the next commit
            git(self.tree, "checkout", "--quiet", "series")
            library = build(self.tree, self.folder / "build-final")
            git(self.tree, "checkout", "--quiet", f"series~{behind}")
        tests = (DEVICE_CODE, *self.plan.steps[-1 - behind].commit.tests)
        started = time.monotonic()
        summary = run_tests(self.tree, library, *dict.fromkeys(tests))
        took = time.monotonic() - started
        result = f"built {built}; {summary}; {took:.0f} s of tests"
        passed[source] = result
        (self.folder / "passed.json").write_text(json.dumps(passed, indent=1))
        return result

    def _build(self, name: str) -> tuple[str, Path | None]:
        built, library = [], None
        if (self.tree / "cmake/hybrid_w4a16.cmake").exists():
            build(self.tree, self.folder / f"build-{name}-hip", "HIP")
            built.append("HIP library")
        if (self.tree / "csrc/hybrid_w4a16/cpu/CMakeLists.txt").exists():
            library = build(self.tree, self.folder / f"build-{name}")
            built.append("CPU library")
        return ", ".join(built) or "nothing", library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="default: all")
    parser.add_argument(
        "--keep-going", action="store_true", help="go on after a commit that fails"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help="of trees, builds and the list of what passed (default: %(default)s)",
    )
    args = parser.parse_intermixed_args()
    runner = Runner(args.version, (args.folder / args.version).resolve())
    if unknown := set(args.commits) - set(runner.names):
        parser.error(f"no commit {', '.join(unknown)}: {', '.join(runner.names)}")
    failed = False
    for name in args.commits or runner.names:
        try:
            print(f"{name}: {runner.commit(name)}", flush=True)
        except AssertionError as error:
            print(f"{name}: failed\n{error}", flush=True)
            failed = True
            if not args.keep_going:
                break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
