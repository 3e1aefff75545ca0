# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which files the fork branch adds, and where in vLLM's tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

# (glob in this project, folder it is relative to, folder in vLLM's tree). A later row
# wins where two have the same target: fork/ holds what only the fork branch has.
ROWS = (
    ("vllm/model_executor/**/*.py", "vllm", "vllm"),
    ("vllm/model_executor/**/*.json", "vllm", "vllm"),
    ("csrc/*", "csrc", "csrc/hybrid_w4a16"),
    ("csrc/cpu/*", "csrc", "csrc/hybrid_w4a16"),
    ("csrc/rocm/*.[chp]*", "csrc", "csrc/hybrid_w4a16"),
    ("csrc/rocm/amd_archs.json", "csrc", "csrc/hybrid_w4a16"),
    ("csrc/rocm/host/*.h", "csrc", "csrc/hybrid_w4a16"),
    ("tests/__init__.py", "tests", "tests/hybrid_w4a16"),
    ("tests/[kq]*/__init__.py", "tests", "tests/hybrid_w4a16"),
    ("tests/quantization/test_*.py", "tests", "tests/hybrid_w4a16"),
    ("tests/kernels/conftest.py", "tests", "tests/hybrid_w4a16"),
    ("tests/kernels/test_moe_int4_ops.py", "tests", "tests/hybrid_w4a16"),
    ("tests/kernels/test_moe_int4_gpu.py", "tests", "tests/hybrid_w4a16"),
    ("tests/kernels/test_moe_int4_prefill.py", "tests", "tests/hybrid_w4a16"),
    ("tests/support/__init__.py", "tests", "tests/hybrid_w4a16"),
    ("tests/support/int4_formats.py", "tests", "tests/hybrid_w4a16"),
    ("tests/support/moe_layers.py", "tests", "tests/hybrid_w4a16"),
    ("tests/support/triton_interpreter.py", "tests", "tests/hybrid_w4a16"),
    ("benchmarks/benchmark_moe.py", "benchmarks", "benchmarks/hybrid_w4a16"),
    ("benchmarks/moe_bench/*.py", "benchmarks", "benchmarks/hybrid_w4a16"),
    ("fork/**/*", "fork", ""),
)

# Reads checkpoints in tests/fixtures: binary files, and a patch takes text only.
NEEDS_FIXTURES = "tests/hybrid_w4a16/quantization/test_real_checkpoints.py"

# The fork's kernels are for AMD GPUs and the CPU.
FOR_CUDA = "csrc/hybrid_w4a16/rocm/device_cuda.cpp"

OUR_HEADER = "Copyright contributors to the hybrid-w4a16 project"
VLLM_HEADER = "Copyright contributors to the vLLM project"


class ProjectError(Exception):
    """The project's sources are not at hand; the message says what to do."""


def project_folder() -> Path:
    """The checkout that this module is part of; ``ProjectError`` if it is installed.

    A wheel holds neither csrc nor tests.
    """
    folder = Path(__file__).resolve().parents[3]
    if not (folder / "fork/cmake").is_dir():
        raise ProjectError(
            f"{folder} is not a checkout of this project. The fork branch needs its "
            "sources: pip install --no-build-isolation -e . in a checkout, or run "
            "`make fork VLLM_SRC=DIR` there."
        )
    return folder


def files_to_add(project: Path) -> dict[str, str]:
    """The text of every file that the fork adds, by path in vLLM's tree."""
    files: dict[str, str] = {}
    for pattern, base, target in ROWS:
        for file in sorted(project.glob(pattern)):
            if file.is_file() and "__pycache__" not in file.parts:
                path = (Path(target) / file.relative_to(project / base)).as_posix()
                files[path] = file.read_text().replace(OUR_HEADER, VLLM_HEADER)
    del files[NEEDS_FIXTURES], files[FOR_CUDA]
    return dict(sorted(files.items()))


def _imports(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every absolute ``from`` import, wherever it is."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.module or "", alias.name


def defining_file(tree: Path, module: str, name: str) -> str:
    """Path in ``tree`` of the file that defines ``name`` of ``module``.

    A package that imports the name from elsewhere is followed there. Where there is no
    such file or name, the path that was expected to have it.
    """
    stem = module.replace(".", "/")
    package = f"{stem}/__init__.py"
    path = package if (tree / package).is_file() else f"{stem}.py"
    if (tree / path).is_file():
        for node in ast.parse((tree / path).read_text()).body:
            if isinstance(node, ast.ImportFrom):
                here = path.removesuffix(".py").split("/")[: -node.level or None]
                source = ".".join([*(here if node.level else []), node.module or ""])
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return defining_file(tree, source.strip("."), alias.name)
    return path


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
