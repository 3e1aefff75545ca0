# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Check that imports point one way and that only one file distinguishes GPU vendors.

    python tools/check_imports.py [CHECKOUT]

Our modules below ``vllm/`` import plugins -> kernels -> quantization -> fused_moe,
without a circle. Imports inside functions and for type checkers count. In ``csrc`` only
``gpu_compat.cuh`` may use the macros of a vendor's compiler.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
LAYERS = "vllm.model_executor.layers"
# A module may import from its own row and from the rows below it.
ORDER = (
    "vllm.plugins",
    "vllm.model_executor.kernels",
    f"{LAYERS}.quantization",
    f"{LAYERS}.fused_moe",
)
GROUND_FLOOR = f"{LAYERS}.fused_moe.hybrid_w4a16_packing"
VENDOR_MACRO = re.compile(r"\b__(?:HIP|CUDA|NV|AMDGCN|AMDGPU|AMD_|GFX|gfx)\w*")
KNOWS_VENDORS = "gpu_compat.cuh"
CXX_SUFFIXES = {".h", ".cpp", ".cuh", ".cu", ".hip"}


def modules(checkout: Path) -> dict[str, Path]:
    """Return our modules below ``vllm/`` by dotted name."""
    found = {}
    for file in (checkout / "vllm").rglob("*.py"):
        parts = file.relative_to(checkout).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file
    return found


def imports(name: str, file: Path, ours: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield (our module, line) for each import of our modules in module ``name``."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            candidates = [full if full in ours else base for full in names]
        else:
            continue
        for candidate in candidates:
            if candidate in ours and candidate != name:
                yield candidate, node.lineno


def rank(name: str) -> int | None:
    """Return the row of ``ORDER`` that a module is in, ``None`` if it is in none."""
    for row, prefix in enumerate(ORDER):
        if name == prefix or name.startswith(f"{prefix}."):
            return row
    return None


def import_problems(checkout: Path) -> Iterator[str]:
    """Yield a line for each import against ``ORDER``, and for an import circle."""
    ours = modules(checkout)
    graph: dict[str, set[str]] = {name: set() for name in ours}
    for name, file in sorted(ours.items()):
        where = file.relative_to(checkout).as_posix()
        row = rank(name)
        if row is None:
            yield f"{where}: in none of {', '.join(ORDER)}"
        for imported, line in imports(name, file, ours):
            graph[name].add(imported)
            other = rank(imported)
            if name == GROUND_FLOOR:
                yield f"{where}:{line}: imports {imported}, expected none of ours"
            elif row is not None and other is not None and other < row:
                yield f"{where}:{line}: imports {imported}, against the direction"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"import circle: {' -> '.join(reversed(error.args[1]))}"


def macro_problems(checkout: Path) -> Iterator[str]:
    """Yield a line for each vendor macro outside of ``gpu_compat.cuh``."""
    for file in sorted((checkout / "csrc").rglob("*")):
        if file.suffix not in CXX_SUFFIXES or file.name == KNOWS_VENDORS:
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = VENDOR_MACRO.search(line.partition("//")[0])
            if found:
                where = f"{file.relative_to(checkout).as_posix()}:{number}"
                yield f"{where}: {found[0]} belongs in {KNOWS_VENDORS}"


def main() -> int:
    checkout = Path(sys.argv[1]).resolve() if sys.argv[1:] else CHECKOUT
    problems = [*import_problems(checkout), *macro_problems(checkout)]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
