# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which of this project's files the series brings, in which commit, and their text.

A file belongs to the commit of the first row of ``ROWS`` that matches it. Lines between
``fork: begin NAME`` and ``fork: end``, in comments of any language, come with commit
NAME, which is later than the file's; NAME ``overlay``: with none.
"""

import ast
import fnmatch
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import fork_conditions

OVERLAY = "overlay"
"""Instead of a commit: of this project alone."""

# In this order. Titles and texts: fork_series.py.
COMMITS = (
    "kernels",
    "ops",
    "backend",
    "autoround",
    "cpu",
    "cpu_avx512",
    "lm_head",
    "token",
    "pair",
)

_MOE = "vllm/model_executor/layers/fused_moe"
_QUANTIZATION = "vllm/model_executor/layers/quantization"

# (commit, names of files in this project). A name without a folder matches in any.
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Rules for what the later commits bring, by name.
    ("pair", ("hybrid_w4a16_pair.py", "test_linear_pair.py")),
    (
        "token",
        (
            "hybrid_w4a16_launch.py",
            "vllm/model_executor/kernels/*",
            "*shared*",
            "*router*",
            "hybrid_w4a16_runner.py",
            "test_linear_kernel.py",
        ),
    ),
    (
        "lm_head",
        ("*dense*", "*rescore*", "*wvSplitK_int_g*", "hybrid_w4a16_head*", "*lm_head*"),
    ),
    # Not for upstream: CUDA, runs of the kernels on the host, this project's own build.
    (
        OVERLAY,
        (
            "csrc/rocm/host/*",
            "csrc/rocm/CMakeLists.txt",
            "csrc/rocm/README.md",
            "device_cuda.cpp",
            "stream_tile.cuh",
            "group_tile.cuh",
            "moe_int4_grouped_*.hip",
            "moe_int4_tiled_*.hip",
            "csrc/rocm/tiled*",
            "launch_tiled.cpp",
            "configs/hybrid_w4a16/sm_*.json",
            "hybrid_w4a16_switch.py",
            "hybrid_w4a16_guard*.py",
            "hybrid_w4a16_online_linear.py",
            "hybrid_w4a16_linear_table.py",
            "hybrid_w4a16_graph_timing.py",
            "hybrid_w4a16_reference.py",
            # vLLM's own methods of these formats ask the oracle
            "hybrid_w4a16_gptq.py",
            "hybrid_w4a16_awq.py",
            "hybrid_w4a16_compressed_tensors.py",
        ),
    ),
    (
        "kernels",
        (
            "hybrid_w4a16_packing.py",
            "moe_int4_args.h",
            "gpu_compat.cuh",
            "geometry.h",
            "dequant.cuh",
            "activation.cuh",
            "slots.cuh",
            "wave_tile.cuh",
            "entry_points.h",
            "moe_int4_gate_up.hip",
            "moe_int4_down.hip",
            "moe_int4_gemm.hip",
            "amd_archs.json",
            "amd_device_code.cmake",
            "fork/tests/kernels/moe/hybrid_w4a16/__init__.py",
            "test_device_code.py",
        ),
    ),
    (
        "ops",
        (
            "moe_int4_checks.h",
            "csrc/torch_bindings.cpp",
            "row_invariance.h",
            "torch_bindings_gpu.cpp",
            "kernel_lookup.h",
            "csrc/rocm/device.h",
            "device_hip.cpp",
            "device_code.h",
            "embed_device_code.py",
            "hip_runtime.h",
            "hip_runtime.cpp",
            "inflate.h",
            "inflate.cpp",
            "launch.h",
            "launch.cpp",
            "plan.h",
            "fork/cmake/hybrid_w4a16.cmake",
            "hybrid_w4a16_ops.py",
            "tests/kernels/conftest.py",
            "test_moe_int4_ops.py",
            "test_moe_int4_gpu.py",
            "test_bindings.py",
        ),
    ),
    (
        "backend",
        (
            "hybrid_w4a16_tuning.py",
            "hybrid_w4a16_device.py",
            "configs/hybrid_w4a16/rdna.json",
            "configs/hybrid_w4a16/rdna4.json",
            "experts/hybrid_w4a16_moe.py",
            "experts/hybrid_w4a16_triton.py",
            "oracle/hybrid_w4a16.py",
            "oracle/hybrid_w4a16_formats.py",
            "oracle/hybrid_w4a16_wna16.py",
            "test_moe_int4_prefill.py",
            "triton_interpreter.py",
            "test_packing.py",
            "int4_formats.py",
            "moe_layers.py",
            "fork/tests/quantization/hybrid_w4a16/__init__.py",
            "fork/tests/quantization/hybrid_w4a16/conftest.py",
            "test_oracle.py",
            "fork/docs/features/quantization/hybrid_w4a16.md",
            "benchmark_hybrid_w4a16_moe.py",
        ),
    ),
    (
        "autoround",
        (
            "inc_moe.py",
            "hybrid_w4a16_moe_helper.py",
            "hybrid_w4a16_method.py",
            "hybrid_w4a16_recipes.py",
            "hybrid_w4a16_loading.py",
            "test_inc_moe.py",
        ),
    ),
    (
        "cpu_avx512",
        (
            "kernels_avx512_bf16.cpp",
            "kernels_avx512_vnni.cpp",
            "kernels_amx_*.cpp",
            "integers_avx512.h",
            "vectors_avx512.h",
        ),
    ),
    ("cpu", ("csrc/cpu/*", "test_cpu_layers.py")),
)

# Folders of which every file has a row, and the tests that are carried.
COMPLETE = ("vllm/model_executor", "csrc", "fork")
TESTS = (
    "tests/kernels/conftest.py",
    "tests/kernels/test_moe_int4_ops.py",
    "tests/kernels/test_moe_int4_gpu.py",
    "tests/kernels/test_moe_int4_prefill.py",
    "tests/kernels/test_router.py",
    "tests/kernels/test_shared_expert.py",
    "tests/kernels/test_wvSplitK_int_g.py",
    "tests/quantization/test_packing.py",
    "tests/quantization/test_inc_moe.py",
    "tests/quantization/test_lm_head.py",
    "tests/support/int4_formats.py",
    "tests/support/moe_layers.py",
    "tests/support/triton_interpreter.py",
)
IGNORED = ("__pycache__", "__init__.py")

# (start of a path here, what takes its place in vLLM's tree), first match.
PLACES = (
    ("fork/", ""),
    ("csrc/", "csrc/hybrid_w4a16/"),
    ("tests/kernels/", "tests/kernels/moe/hybrid_w4a16/"),
    ("tests/support/triton", "tests/kernels/moe/hybrid_w4a16/triton"),
    ("tests/quantization/", "tests/quantization/hybrid_w4a16/"),
    ("tests/support/", "tests/quantization/hybrid_w4a16/"),
    ("vllm/", "vllm/"),
)

OUR_HEADER = "Copyright contributors to the hybrid-w4a16 project"
VLLM_HEADER = "Copyright contributors to the vLLM project"
CXX_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")

# vLLM names GPU sources of either vendor *.cu, and its .gitignore has *.hip.
_RENAMED = {".hip": ".cu"}
# (suffixes or names, pattern, replacement) for all text.
_REWRITES = (
    ((".cmake", ".py", ".h", ".cuh", ".cu"), r"(?<=[\w*])\.hip\b", ".cu"),
    ((".py",), r"from \.\.support\.", "from ."),
    ((".py",), r"from \.\.support import", "from . import"),
    ((".py",), r"from tests\.(kernels|support)\.", "from ."),
    # scripts that the series does not bring
    ((".json",), r" \(benchmarks/\w+\.py\)", ""),
)
_BEGIN = re.compile(r"\s*(?:#|//)\s*fork: begin (\S+)\s*")
_END = re.compile(r"\s*(?:#|//)\s*fork: end\s*")


class ProjectError(Exception):
    """The project's sources are not as the table says; the message names the file."""


class Carried(NamedTuple):
    """A file of this project that the series brings."""

    commit: str
    source: Path
    target: str
    """Path in vLLM's tree."""


def project_folder() -> Path:
    """The checkout that this module is part of; ``ProjectError`` if it is installed.

    A wheel holds neither csrc nor tests.
    """
    folder = Path(__file__).resolve().parents[3]
    if not (folder / "fork/cmake").is_dir():
        raise ProjectError(
            f"{folder} is not a checkout of this project. The series needs its "
            "sources: pip install --no-build-isolation -e . in a checkout, or run "
            "`make fork VLLM_SRC=DIR` there."
        )
    return folder


def carried(project: Path) -> list[Carried]:
    """Every file that the series brings. ``ProjectError`` names one without a row."""
    paths = [project / path for path in TESTS]
    for folder in COMPLETE:
        paths += [path for path in (project / folder).rglob("*") if path.is_file()]
    found, unlisted = [], []
    for path in sorted(paths):
        name = path.relative_to(project).as_posix()
        if "__pycache__" in path.parts or path.suffix == ".so":
            continue
        if path.name == "__init__.py" and not name.startswith("fork/"):
            continue
        commit = commit_of(name)
        if commit is None:
            unlisted.append(name)
        elif commit != OVERLAY:
            found.append(Carried(commit, path, target_of(name)))
    if unlisted:
        raise ProjectError(
            f"{', '.join(unlisted)}: no row of ROWS in fork_files.py says which commit "
            "brings it"
        )
    return found


def commit_of(name: str) -> str | None:
    """The commit that brings the file ``name`` of this project, ``OVERLAY`` for none.

    ``None``: no row matches.
    """
    for commit, patterns in ROWS:
        if any(fnmatch.fnmatch(f"/{name}", f"*/{p}") for p in patterns):
            return commit
    return None


def target_of(name: str) -> str:
    """Path in vLLM's tree of the file ``name`` of this project."""
    for start, place in PLACES:
        if name.startswith(start):
            path = Path(place + name.removeprefix(start))
            return path.with_suffix(_RENAMED.get(path.suffix, path.suffix)).as_posix()
    raise ProjectError(f"{name}: no row of PLACES in fork_files.py")


def texts(files: Iterable[Carried], commit: str) -> dict[str, str]:
    """The text of ``files`` as of ``commit``, by path in vLLM's tree, not formatted."""
    so_far = set(COMMITS[: COMMITS.index(commit) + 1])
    result = {}
    for file in files:
        if file.commit in so_far:
            text = file.source.read_text().replace(OUR_HEADER, VLLM_HEADER)
            text = select(text, so_far, file.source.name)
            if file.target.endswith(CXX_SUFFIXES):
                text = fork_conditions.resolve(text)
            for suffixes, pattern, replacement in _REWRITES:
                if file.target.endswith(suffixes):
                    text = re.sub(pattern, replacement, text)
            result[file.target] = text
    return dict(sorted(result.items()))


def select(text: str, commits: set[str], name: str) -> str:
    """``text`` without the markers and what stands between those of other commits.

    Raises ``ProjectError`` naming file ``name`` and the line of a marker without its
    counterpart or with an unknown commit.
    """
    lines, block = [], None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        begin = _BEGIN.fullmatch(line)
        if begin or _END.fullmatch(line):
            if bool(begin) == (block is not None):
                raise ProjectError(f"{name}:{number}: {line.strip()} does not pair up")
            block = begin[1] if begin else None
            if begin and block not in (*COMMITS, OVERLAY):
                raise ProjectError(
                    f"{name}:{number}: no commit {block}; there are "
                    f"{', '.join(COMMITS)} and {OVERLAY}"
                )
        elif "fork: " in line and re.match(r"\s*(#|//)\s*fork: ", line):
            raise ProjectError(f"{name}:{number}: {line.strip()} is no marker")
        elif block is None or block in commits:
            lines.append(line)
    if block is not None:
        raise ProjectError(f"{name}: fork: begin {block} has no end")
    return "".join(lines)


def _imports(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every absolute ``from`` import, wherever it is."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.module or "", alias.name


def missing_imports(tree: Path, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What ``files`` import from vLLM that neither they nor ``tree`` define.

    Yields (path of the importing file, what is missing). Conditional imports count;
    what a module defines by ``__getattr__`` or a star import is taken on trust.
    """
    for path, text in files.items():
        if path.endswith(".py"):
            for module, name in _imports(text):
                problem = _problem(tree, files, module, name)
                if problem:
                    yield path, problem


def _problem(tree: Path, files: dict[str, str], module: str, name: str) -> str | None:
    if module.split(".")[0] != "vllm":
        return None
    if _module_text(tree, files, f"{module}.{name}") is not None:
        return None
    text = _module_text(tree, files, module)
    if text is None:
        return f"there is no module {module}"
    names = _defined_names(text)
    if names & {name, "*", "__getattr__"}:
        return None
    return f"{module} has no {name}"


def _module_text(tree: Path, files: dict[str, str], module: str) -> str | None:
    stem = module.replace(".", "/")
    for path in (f"{stem}.py", f"{stem}/__init__.py"):
        if path in files:
            return files[path]
        if (tree / path).is_file():
            return (tree / path).read_text()
    return "" if (tree / stem).is_dir() else None


def _defined_names(text: str) -> set[str]:
    names: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(text).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {
                (alias.asname or alias.name).split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            pending += ast.iter_child_nodes(node)
    return names


def missing_includes(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(path, header) of every quoted include of ``files`` that none of them is."""
    root = "csrc/hybrid_w4a16"
    for path, text in files.items():
        if path.startswith(f"{root}/"):
            for header in re.findall(r'^\s*#include "([^"]+)"', text, re.M):
                folders = (str(Path(path).parent), root)
                if not any(f"{folder}/{header}" in files for folder in folders):
                    yield path, header
