# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Takes the branches for CUDA out of C++ sources, as ``unifdef`` does.

Conditions that are decided by ``KNOWN`` go, with the lines that they exclude; of mixed
ones the undecided part stays.
"""

import re

# Symbols that no build of vLLM for AMD or for the CPU defines.
KNOWN = {
    "__CUDACC__": False,
    "HYBRID_W4A16_CUDA": False,
    "HYBRID_W4A16_AMD_PATH": False,
    "GPU_HAS_MMA": False,
}

_DIRECTIVE = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b\s*(.*?)\s*(//.*)?")


class _Level:
    """An ``#if`` up to its ``#endif``."""

    def __init__(self) -> None:
        self.taken = False
        """A branch that is always taken has begun: what follows goes."""
        self.kept = False
        """A branch has been written with its condition."""
        self.writes = True
        """The branch at hand is written."""


def resolve(text: str) -> str:
    """``text`` without the conditions that ``KNOWN`` decides."""
    lines: list[str] = []
    levels: list[_Level] = []
    for line in text.splitlines(keepends=True):
        match = _DIRECTIVE.fullmatch(line.rstrip("\n"))
        if match is None:
            if all(level.writes for level in levels):
                lines.append(line)
            continue
        word, condition = match[1], match[2]
        outer = levels if word.startswith("if") else levels[:-1]
        visible = all(level.writes for level in outer)
        if word.startswith("if"):
            levels.append(_Level())
            if word != "if":
                condition = ("!" if word == "ifndef" else "") + f"defined({condition})"
        level = levels[-1]
        new: str | None = None
        if word == "endif":
            levels.pop()
            if level.kept:
                new = line
        elif level.taken:
            level.writes = False
        else:
            value = True if word == "else" else simplify(condition)
            level.writes = value is not False
            level.taken = value is True
            if value is True:
                new = "#else\n" if level.kept else None
            elif value is not False:
                if value == condition and word.startswith("if"):
                    new = line
                else:
                    new = f"#{'elif' if level.kept else 'if'} {value}\n"
                level.kept = True
        if new is not None and visible:
            lines.append(new)
    return "".join(lines)


def simplify(condition: str) -> str | bool:
    """``condition`` with what ``KNOWN`` decides worked out: text, or its value."""
    for operator, absorbing in (("||", True), ("&&", False)):
        if operator in condition and "(" not in re.sub(r"\(\w+\)", "", condition):
            parts = [simplify(part.strip()) for part in condition.split(operator)]
            if absorbing in parts:
                return absorbing
            left = [part for part in parts if isinstance(part, str)]
            return f" {operator} ".join(left) if left else not absorbing
    match = re.fullmatch(r"(!?)\s*(?:defined\((\w+)\)|(\w+))", condition)
    if match is None or (match[2] or match[3]) not in KNOWN:
        return condition
    value = KNOWN[match[2] or match[3]]
    return not value if match[1] else value
