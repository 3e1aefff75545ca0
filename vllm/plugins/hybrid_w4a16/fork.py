# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 fork``: the hybrid path as a series of commits on vLLM.

Each commit builds, passes its tests and can be reviewed alone. Everything is worked out
in memory first: where one edit does not fit, nothing is written.
"""

import argparse
import difflib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import fork_edits, fork_files
from .fork_series import SERIES, Commit

APPLIES, THERE, CONFLICTS = "applies", "already there", "conflicts"
ROOT_FILES = ("pyproject.toml", ".clang-format")
"""Settings of the formatters, beside vLLM's CMakeLists.txt."""
VLLM_COLUMNS = 80
"""Of its C++."""
# A line of a comment that is not empty, and one with columns.
_COMMENT = re.compile(r"\s*//.*[^\s/]")
_COLUMNS = re.compile(r"//.*\S {3,}\S")
# D403 would have a docstring start with "VLLM".
NOT_FIXED = "D403"


class ForkError(Exception):
    """The tree cannot be written to; the message says why and what to do."""


@dataclass(frozen=True)
class Report:
    """What became of one edit."""

    commit: str
    path: str
    symbol: str
    status: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.status:14}{self.commit:11}{self.path}  {self.symbol}{detail}"


@dataclass(frozen=True)
class Step:
    """One commit of the series on one tree."""

    name: str
    commit: Commit
    changes: dict[str, tuple[str | None, str]]
    """Old and new text of the files it writes; old is ``None`` for a new file."""

    def lines(self) -> tuple[int, int, int]:
        """Lines added: without tests, of tests, in vLLM's own files."""
        code = tests = own = 0
        for path, (old, new) in self.changes.items():
            added = added_lines(old or "", new)
            if path.startswith("tests/"):
                tests += added
            else:
                code += added
            if path in _edited_files():
                own += added
        return code, tests, own

    def pull_request(self) -> str:
        return self.commit.pull_request(*self.lines())


@dataclass
class Plan:
    """The series on one tree: reports on all edits, and the commits to write."""

    reports: list[Report] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """Empty where the tree has everything already."""

    @property
    def conflicts(self) -> list[Report]:
        return [report for report in self.reports if report.status == CONFLICTS]


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
        "--patch-dir",
        type=Path,
        metavar="DIR",
        help="write patches for `git am`, and a text for the pull request of each, to "
        "DIR and leave the tree alone",
    )
    parser.add_argument(
        "--check", action="store_true", help="only report what each edit would do"
    )


def run(args: argparse.Namespace) -> int:
    """Do what ``args`` say; 0, or 1 where nothing was written because of a conflict."""
    try:
        return _run(args.vllm_src.resolve(), args.branch, args.patch_dir, args.check)
    except (ForkError, fork_files.ProjectError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(tree: Path, branch: str | None, patches: Path | None, check: bool) -> int:
    _check_tree(tree)
    if not check and patches is None:
        _check_repository(tree)
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
    if not plan.steps:
        print(f"{tree} has everything already: nothing to do.")
        return 0
    if not check and patches is not None:
        write_patches(plan, patches)
    elif not check:
        commit(tree, plan, branch)
    _print_sizes(plan)
    return 0


def _print_sizes(plan: Plan) -> None:
    print(f"{'commit':11} {'lines':>6} {'tests':>6} {'in vLLM files':>14}")
    for step in plan.steps:
        code, tests, own = step.lines()
        print(f"{step.name:11} {code:6} {tests:6} {own:14}")


def make_plan(tree: Path) -> Plan:
    """Work out every commit on the vLLM source tree ``tree``; writes nothing.

    Raises ``ForkError`` where ``tree`` is none or a tool is missing, ``ProjectError``
    where this project's sources are not at hand or not all in the table.
    """
    _check_tree(tree)
    plan = Plan()
    files = fork_files.carried(fork_files.project_folder())
    ours = {name: fork_files.texts(files, name) for name in SERIES}
    originals = {path: _read(tree / path) for path in _edited_files()}
    edited = {}
    for name in SERIES:
        edited[name] = _edited(plan, name, originals)
        _check_references(plan, tree, name, ours[name])
    with _Formatter(tree) as formatter:
        _report_new_files(plan, tree, files, formatter, ours[list(SERIES)[-1]])
        if plan.conflicts or all(r.status == THERE for r in plan.reports):
            return plan
        before: dict[str, str | None] = dict(originals)
        for name, commit in SERIES.items():
            texts = {**edited[name], **formatter.formatted(ours[name])}
            changes = {
                path: (before.get(path), text)
                for path, text in texts.items()
                if before.get(path) != text
            }
            if changes:
                plan.steps.append(Step(name, commit, changes))
            before.update(texts)
    return plan


def _check_tree(tree: Path) -> None:
    needed = (fork_edits.CMAKE, fork_edits.CONFIG, *ROOT_FILES)
    missing = [path for path in needed if not (tree / path).is_file()]
    if missing:
        raise ForkError(
            f"{tree} is not a vLLM source tree: it has no {', '.join(missing)}"
        )


def _edited_files() -> list[str]:
    return list(dict.fromkeys(row.path for row in fork_edits.INSERTIONS))


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _edited(plan: Plan, name: str, originals: dict[str, str | None]) -> dict[str, str]:
    """vLLM's files as of commit ``name``, those that it or one before it edits."""
    so_far = list(SERIES)[: list(SERIES).index(name) + 1]
    texts: dict[str, str] = {}
    for row in fork_edits.INSERTIONS:
        if row.commit not in so_far:
            continue
        text = texts.get(row.path, originals[row.path])
        status, detail = CONFLICTS, "no such file"
        if text is not None:
            try:
                texts[row.path] = row.apply(text)
                status, detail = (THERE if texts[row.path] == text else APPLIES), ""
            except fork_edits.Conflict as conflict:
                detail = str(conflict)
        if row.commit == name:
            plan.reports.append(Report(name, row.path, row.symbol, status, detail))
    return texts


def _check_references(plan: Plan, tree: Path, name: str, ours: dict[str, str]) -> None:
    """Report imports and includes that nothing offers as of commit ``name``."""
    problems = [("imports", *p) for p in fork_files.missing_imports(tree, ours)]
    for path, header in fork_files.missing_includes(ours):
        problems.append(("includes", path, f"there is no {header}"))
    known = {(report.path, report.detail) for report in plan.reports}
    for symbol, path, problem in problems:
        if (path, problem) not in known:
            known.add((path, problem))
            plan.reports.append(Report(name, path, symbol, CONFLICTS, problem))


def _report_new_files(
    plan: Plan,
    tree: Path,
    files: Iterable[fork_files.Carried],
    formatter: "_Formatter",
    final: dict[str, str],
) -> None:
    found = {file.target: _read(tree / file.target) for file in files}
    present = {path: final[path] for path, text in found.items() if text is not None}
    expected = formatter.formatted(present)
    for file in files:
        text, status, detail = found[file.target], APPLIES, ""
        if text is not None and text == expected[file.target]:
            status = THERE
        elif text is not None:
            status = CONFLICTS
            detail = "it exists with other contents; start from a tree without it"
        plan.reports.append(
            Report(file.commit, file.target, "new file", status, detail)
        )


def added_lines(old: str, new: str) -> int:
    """Lines of ``new`` that ``old`` has not."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return sum(line.startswith("+") for line in lines) - 1 if old != new else 0


def keep_tables(text: str) -> str:
    """C++ with comments that align columns kept from being filled by clang-format.

    Only those with a line that is too long for vLLM: the others it leaves alone.
    """
    lines: list[str] = []
    paragraphs: Iterator[tuple[bool, Iterator[str]]] = itertools.groupby(
        text.splitlines(keepends=True), lambda line: bool(_COMMENT.match(line))
    )
    for is_comment, group in paragraphs:
        paragraph = list(group)
        table = is_comment and any(_COLUMNS.search(line) for line in paragraph)
        if table and max(map(len, paragraph)) > VLLM_COLUMNS + 1:
            indent = paragraph[0][: paragraph[0].index("/")]
            paragraph.insert(0, f"{indent}// clang-format off\n")
            paragraph.append(f"{indent}// clang-format on\n")
        lines += paragraph
    return "".join(lines)


class _Formatter:
    """Formats texts under vLLM's own configuration, all of a commit at a time."""

    def __init__(self, tree: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hybrid-w4a16-fork-")
        self._done: dict[tuple[str, str], str] = {}
        self.root = Path(self._folder.name)
        for name in ROOT_FILES:
            shutil.copy(tree / name, self.root)

    def __enter__(self) -> "_Formatter":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def formatted(self, texts: dict[str, str]) -> dict[str, str]:
        new = {p: t for p, t in texts.items() if (p, t) not in self._done}
        for path, text in new.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(fork_files.CXX_SUFFIXES):
                text = keep_tables(text)
            (self.root / path).write_text(text)
        python = [path for path in new if path.endswith(".py")]
        cxx = [path for path in new if path.endswith(fork_files.CXX_SUFFIXES)]
        if python:
            fix = ("check", "--fix-only", f"--extend-ignore={NOT_FIXED}", "-q")
            # the rest of vLLM, by which ruff would know it, is not in this folder
            own = "--config=lint.isort.known-first-party=['vllm']"
            self._call("ruff", *fix, own, "--no-cache", *python)
            self._call("ruff", "format", "-q", "--no-cache", *python)
        if cxx:
            self._call("clang-format", "--style=file", "-i", *cxx)
        for path, text in new.items():
            self._done[path, text] = (self.root / path).read_text()
        return {path: self._done[path, text] for path, text in texts.items()}

    def _call(self, tool: str, *arguments: str) -> None:
        beside_python = Path(sysconfig.get_path("scripts"), tool)
        program = beside_python if beside_python.exists() else shutil.which(tool)
        if program is None:
            raise ForkError(f"{tool} is not installed: pip install ruff clang-format")
        command = [program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.root)
        if done.returncode:
            raise ForkError(f"`{tool} {arguments[0]}` failed: {done.stderr.strip()}")


def commit(tree: Path, plan: Plan, branch: str | None) -> None:
    """Write the plan's commits on ``branch``, by default on the current one.

    Raises ``ForkError``, with the tree as it was, where ``tree`` is no git repository,
    has uncommitted changes, or ``branch`` exists.
    """
    _check_repository(tree)
    if branch is not None:
        _git(tree, "switch", "--quiet", "--create", branch)
    _commit_steps(tree, plan.steps)
    print(_git(tree, "log", f"-{len(plan.steps)}", "--format=%h %s").rstrip())


def _check_repository(tree: Path) -> None:
    top = _git(tree, "rev-parse", "--show-toplevel", unless="not a git repository")
    if Path(top.strip()) != tree:
        raise ForkError(f"{tree} is not a git repository of its own: use --patch-dir")
    dirty = _git(tree, "status", "--porcelain", "--untracked-files=no")
    if dirty:
        raise ForkError(f"{tree} has uncommitted changes, commit them first:\n{dirty}")
    _git(tree, "var", "GIT_COMMITTER_IDENT")  # says what to set where it is not


def _commit_steps(repository: Path, steps: Iterable[Step]) -> None:
    for step in steps:
        for path, (_, text) in step.changes.items():
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / path).write_text(text)
        _git(repository, "add", "--force", "--", *step.changes)
        message = f"--message={step.commit.message()}"
        _git(repository, "commit", "--quiet", "--no-verify", "--signoff", message)


def write_patches(plan: Plan, folder: Path) -> None:
    """Write the plan's commits to ``folder`` as patches that ``git am`` takes.

    Each has a text for its pull request beside it, with the suffix ``.md``. The author
    is git's; the date that of this project's last commit, so that a second call writes
    the same. Raises ``ForkError`` where git has no identity.
    """
    with tempfile.TemporaryDirectory(prefix="hybrid-w4a16-fork-") as name:
        repository = Path(name)
        _git(repository, "init", "--quiet")
        _git(repository, "var", "GIT_COMMITTER_IDENT")
        for path in _edited_files():
            old = next(
                (s.changes[path][0] for s in plan.steps if path in s.changes), None
            )
            if old is not None:
                (repository / path).parent.mkdir(parents=True, exist_ok=True)
                (repository / path).write_text(old)
        _git(repository, "add", "--all", "--force")
        _git(repository, "commit", "--quiet", "--no-verify", "--message=vLLM")
        _commit_steps(repository, plan.steps)
        folder.mkdir(parents=True, exist_ok=True)
        style = ("--zero-commit", "--no-signature", "--quiet")
        output = f"--output-directory={folder.resolve()}"
        _git(repository, "format-patch", *style, output, f"-{len(plan.steps)}")
    patches = sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.patch"))
    for patch, step in zip(patches, plan.steps, strict=True):
        patch.with_suffix(".md").write_text(step.pull_request())
    print(f"Wrote {len(patches)} patches to {folder}: apply them with `git am`.")


def _project_date() -> dict[str, str]:
    """Git's variables for the date of this project's last commit, if there is one."""
    command = ["git", "log", "-1", "--format=%cI"]
    where = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    date = done.stdout.strip()
    return {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date} if date else {}


def _git(tree: Path, *arguments: str, unless: str = "") -> str:
    environment = {**os.environ, **_project_date()}
    done = subprocess.run(
        ["git", *arguments], cwd=tree, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        if unless and unless in done.stderr:
            raise ForkError(f"{tree} is {unless}: use --patch-dir DIR")
        raise ForkError(f"git {arguments[0]} in {tree}: {done.stderr.strip()}")
    return done.stdout
