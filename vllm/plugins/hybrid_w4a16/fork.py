# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 fork``: the modules and hooks written into a vLLM source tree.

The same files and the same hook table as the overlay, as one commit or one patch.
Everything is worked out in memory first: where one edit does not fit, nothing is
written.
"""

import argparse
import difflib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import fork_files
from .hooks import HOOKS

APPLIES, THERE, CONFLICTS = "applies", "already there", "conflicts"
ENVS, CMAKE = "vllm/envs.py", "CMakeLists.txt"
CXX_SUFFIXES = (".h", ".cpp", ".cuh", ".hip")
# Import order depends on which modules are there already; ours are in order. D403 would
# have a docstring start with "VLLM".
NOT_FIXED = "I,D403"
TITLE = "[ROCm][MoE] Add a hybrid int4 (W4A16) MoE path for RDNA GPUs and the CPU"


class ForkError(Exception):
    """The tree cannot be written to; the message says why and what to do."""


@dataclass(frozen=True)
class Report:
    """What became of one edit."""

    path: str
    symbol: str
    status: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.status:14}{self.path}  {self.symbol}{detail}"


@dataclass
class Plan:
    """The edits of one tree: reports on all, old and new text of the files to write.

    The old text is ``None`` for a new file.
    """

    reports: list[Report]
    changes: dict[str, tuple[str | None, str]]

    @property
    def conflicts(self) -> list[Report]:
        return [report for report in self.reports if report.status == CONFLICTS]

    def patch(self) -> str:
        """The changes as a unified diff that ``git apply`` and ``patch -p1`` take."""
        return "".join(_diff(path, *texts) for path, texts in self.changes.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--vllm-src",
        type=Path,
        required=True,
        metavar="DIR",
        help="root of a vLLM source tree: a git repository or an unpacked sdist",
    )
    parser.add_argument(
        "--branch", metavar="NAME", help="commit on a new branch, not the current one"
    )
    parser.add_argument(
        "--patch",
        type=Path,
        metavar="FILE",
        help="write a patch to FILE and leave the tree alone",
    )
    parser.add_argument(
        "--check", action="store_true", help="only report what each edit would do"
    )


def run(args: argparse.Namespace) -> int:
    """Do what ``args`` say; 0, or 1 where nothing was written because of a conflict."""
    try:
        return _run(args.vllm_src.resolve(), args.branch, args.patch, args.check)
    except (ForkError, fork_files.ProjectError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(tree: Path, branch: str | None, patch: Path | None, check: bool) -> int:
    plan = make_plan(tree)
    if check:
        print("\n".join(map(str, plan.reports)))
    counts = Counter(report.status for report in plan.reports)
    print(", ".join(f"{counts[s]} {s}" for s in (APPLIES, THERE, CONFLICTS)))
    if plan.conflicts:
        if not check:
            print("\n".join(map(str, plan.conflicts)), file=sys.stderr)
            print("Nothing was written.", file=sys.stderr)
        return 1
    if check:
        return 0
    if not plan.changes:
        print(f"{tree} has everything already: nothing to do.")
    elif patch is not None:
        patch.write_text(plan.patch())
        print(f"Wrote {patch}: apply it with `patch -p1` or `git apply`.")
    else:
        commit(tree, plan, branch)
    return 0


def make_plan(tree: Path) -> Plan:
    """Work out every edit of the vLLM source tree ``tree``; writes nothing.

    Raises ``ForkError`` where ``tree`` is none or a tool is missing, ``ProjectError``
    where this project's sources are not at hand.
    """
    if not (tree / ENVS).is_file() or not (tree / CMAKE).is_file():
        raise ForkError(
            f"{tree} is not a vLLM source tree: it has no {ENVS} and {CMAKE}"
        )
    if importlib.util.find_spec("libcst") is None:
        raise ForkError("libcst is not installed: pip install libcst ruff clang-format")
    plan = Plan([], {})
    added = fork_files.files_to_add(fork_files.project_folder())
    for path, text in added.items():
        _plan_new_file(plan, tree, path, _format(tree, path, text))
    for path, problem in fork_files.missing_imports(tree, added):
        plan.reports.append(Report(path, "imports", CONFLICTS, problem))
    for path, edits in _edits(tree).items():
        _plan_edits(plan, tree, path, edits)
    return plan


Edit = tuple[str, Callable[[str], str]]


def _edits(tree: Path) -> dict[str, list[Edit]]:
    """The edits of vLLM's own files: (symbol, text to text) by path."""
    from . import fork_edits  # needs LibCST, and vLLM for the switch

    edits: dict[str, list[Edit]] = {}

    def add(path: str, symbol: str, edit: Callable[[str], str]) -> None:
        edits.setdefault(path, []).append((symbol, edit))

    for hook in HOOKS:
        path = fork_files.defining_file(tree, hook.module, hook.owner)
        symbol = f"{hook.owner}.{hook.factory}"
        add(path, symbol, partial(fork_edits.insert_prologue, hook=hook))
    add(ENVS, f"{fork_edits.switch.NAME} (type)", fork_edits.declare_switch)
    add(
        ENVS,
        f"{fork_edits.switch.NAME} (environment_variables)",
        fork_edits.register_switch,
    )
    for extension in fork_edits.CMAKE_AFTER:
        include = partial(fork_edits.include_ops, extension=extension)
        add(CMAKE, f"ops in {extension}", include)
    return edits


def _plan_new_file(plan: Plan, tree: Path, path: str, text: str) -> None:
    file = tree / path
    if not file.exists():
        plan.changes[path] = (None, text)
        plan.reports.append(Report(path, "new file", APPLIES))
    elif file.is_file() and file.read_text() == text:
        plan.reports.append(Report(path, "new file", THERE))
    else:
        detail = "it exists with other contents; start from a tree without the patch"
        plan.reports.append(Report(path, "new file", CONFLICTS, detail))


def _plan_edits(plan: Plan, tree: Path, path: str, edits: list[Edit]) -> None:
    from .fork_edits import Conflict

    file = tree / path
    if not file.is_file():
        for symbol, _ in edits:
            plan.reports.append(Report(path, symbol, CONFLICTS, "no such file"))
        return
    text = before = file.read_text()
    for symbol, edit in edits:
        try:
            new = edit(text)
        except Conflict as conflict:
            plan.reports.append(Report(path, symbol, CONFLICTS, str(conflict)))
        else:
            plan.reports.append(Report(path, symbol, THERE if new == text else APPLIES))
            text = new
    if text != before:
        # Only where vLLM's own text is as this formatter has it: no change but ours.
        if _format(tree, path, before) == before:
            text = _format(tree, path, text)
        plan.changes[path] = (before, text)


def _format(tree: Path, path: str, text: str) -> str:
    """``text`` as the formatters have it under vLLM's own configuration."""
    if path.endswith(".py"):
        name = f"--stdin-filename={tree / path}"
        fix = ("check", "--fix-only", f"--extend-ignore={NOT_FIXED}", "-q")
        text = _pipe(tree, text, "ruff", *fix, name, "-")
        return _pipe(tree, text, "ruff", "format", "-q", name, "-")
    if path.endswith(CXX_SUFFIXES):
        # .hip is no suffix that clang-format takes for C++
        name = f"--assume-filename={tree / path}".removesuffix(".hip") + ".cpp"
        return _pipe(tree, text, "clang-format", "--style=file", name)
    return text


def _pipe(tree: Path, text: str, tool: str, *arguments: str) -> str:
    beside_python = Path(sysconfig.get_path("scripts"), tool)
    program = beside_python if beside_python.exists() else shutil.which(tool)
    if program is None:
        raise ForkError(f"{tool} is not installed: pip install ruff clang-format")
    done = subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True, cwd=tree
    )
    if done.returncode:
        command = " ".join((tool, *arguments))
        raise ForkError(f"`{command}` in {tree} failed: {done.stderr.strip()}")
    return done.stdout


def _diff(path: str, old: str | None, new: str) -> str:
    header = f"diff --git a/{path} b/{path}\n"
    if old is None:
        header += "new file mode 100644\n"
    lines = difflib.unified_diff(
        (old or "").splitlines(keepends=True),
        new.splitlines(keepends=True),
        "/dev/null" if old is None else f"a/{path}",
        f"b/{path}",
    )
    return header + "".join(lines)


def commit_message() -> str:
    """Title, what and why, and for each hook why it exists and when it can go."""
    what = (
        "int4 MoE layers on skinny-GEMM kernels that read each weight once, two\n"
        "launches per layer and decode step. A layer that it cannot take falls back\n"
        "to vLLM's MoE path; VLLM_HYBRID_W4A16_MOE=0 switches it off."
    )
    parts = [TITLE, what]
    for hook in HOOKS:
        parts.append(f"{hook.target}\n  Why: {hook.why}\n  Until: {hook.until}")
    return "\n\n".join(parts) + "\n"


def commit(tree: Path, plan: Plan, branch: str | None) -> None:
    """Write the plan's files and commit them, all in one commit.

    Raises ``ForkError``, with the tree as it was, where ``tree`` is no git repository,
    a file to edit has uncommitted changes, or ``branch`` exists.
    """
    top = _git(tree, "rev-parse", "--show-toplevel", unless="not a git repository")
    if Path(top.strip()) != tree:
        raise ForkError(f"{tree} is not a git repository of its own: use --patch FILE")
    paths = list(plan.changes)
    dirty = _git(tree, "status", "--porcelain", "--untracked-files=no")
    if dirty:
        raise ForkError(f"{tree} has uncommitted changes, commit them first:\n{dirty}")
    if branch is not None:
        _git(tree, "switch", "--quiet", "--create", branch)
    for path, (_, text) in plan.changes.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    _git(tree, "add", "--force", "--", *paths)  # vLLM's .gitignore lists *.hip
    _git(tree, "commit", "--quiet", "--signoff", f"--message={commit_message()}")
    print(_git(tree, "log", "-1", "--stat=100", "--format=%h %s").rstrip())


def _git(tree: Path, *arguments: str, unless: str = "") -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=tree, capture_output=True, text=True, check=False
    )
    if done.returncode:
        if unless and unless in done.stderr:
            raise ForkError(f"{tree} is {unless}: use --patch FILE")
        raise ForkError(f"git {arguments[0]} in {tree}: {done.stderr.strip()}")
    return done.stdout
