# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The edits of vLLM's own files in the fork branch, as functions from text to text.

Places are found in the syntax tree, so that everything else stays as it was, byte by
byte. An edit that is already there returns its input; one that does not fit raises
``Conflict``.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

import libcst as cst

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)

from .hooks import Hook

LINE_LENGTH = 88

SWITCH_COMMENT = (
    "# int4 (W4A16) MoE on the hybrid path. auto: on ROCm gfx11/gfx12 and the CPU,",
    "# unless --moe-backend names another; 1: on; 0: off; require: a declined int4",
    "# layer is an error.",
)

CMAKE_INCLUDE = "include(${CMAKE_CURRENT_LIST_DIR}/cmake/hybrid_w4a16.cmake)"
# Commands of vLLM's CMakeLists.txt that define the extensions the ops go into.
CMAKE_AFTER = {
    "_rocm_C": r"define_extension_target\(\s*_rocm_C\s[^()]*\)",
    "_C of the CPU": r"include\([^()\s]*/cmake/cpu_extension\.cmake\)",
}

_BLANK = cst.EmptyLine(indent=False)


class Conflict(Exception):
    """The text is not what the edit was written for; the message says how."""


def insert_prologue(source: str, hook: Hook) -> str:
    """Let ``hook``'s handler go first in its factory.

    Raises ``Conflict`` where the factory is missing, has other parameters, or calls the
    handler in another way.
    """
    module = cst.parse_module(source)
    owner = _class(module, hook.owner)
    function = _one(owner.body.body, cst.FunctionDef, hook.factory, hook.owner)
    _check_parameters(function, hook.parameters)
    body = list(function.body.body)
    prologue = _statements(_prologue_text(hook))
    start = 1 if function.get_docstring() is not None else 0
    if _same_code(body[start : start + len(prologue)], prologue):
        return source
    handler = hook.handler.partition(":")[2]
    if re.search(rf"\b{handler}\b", module.code_for_node(function)):
        raise Conflict(f"it mentions {handler} already, but not as the prologue does")
    load, call = prologue
    call = call.with_changes(leading_lines=[_BLANK])
    for after in body[start : start + 1]:
        body[start] = after.with_changes(leading_lines=[_BLANK, *after.leading_lines])
    body[start:start] = [load, call]
    new = function.with_changes(body=function.body.with_changes(body=body))
    return _replaced(module, function, new)


def declare_switch(source: str) -> str:
    """Give the switch its type, in the ``TYPE_CHECKING`` block of ``vllm/envs.py``."""
    module = cst.parse_module(source)
    blocks = [
        statement
        for statement in module.body
        if isinstance(statement, cst.If)
        and isinstance(statement.test, cst.Name)
        and statement.test.value == "TYPE_CHECKING"
    ]
    if len(blocks) != 1:
        raise Conflict(f"{len(blocks)} blocks `if TYPE_CHECKING`, expected one")
    choices = ", ".join(f'"{choice}"' for choice in switch.CHOICES)
    text = f'{switch.NAME}: Literal[{choices}] = "{switch.CHOICES[0]}"\n'
    (declaration,) = _statements(text)
    body = blocks[0].body.body
    for statement in body:
        if _same_code([statement], [declaration]):
            return source
        if _assigned_name(statement) == switch.NAME:
            raise Conflict(f"{switch.NAME} is declared in another way")
    new = blocks[0].body.with_changes(body=[*body, declaration])
    return _replaced(module, blocks[0].body, new)


def register_switch(source: str) -> str:
    """Add the switch to ``environment_variables`` of ``vllm/envs.py``."""
    module = cst.parse_module(source)
    table = _assigned(module.body, "environment_variables", "the module")
    if not isinstance(table, cst.Dict) or not table.elements:
        raise Conflict("environment_variables is not a dictionary with entries")
    comment = "\n".join(f"    {line}" for line in SWITCH_COMMENT)
    entry = (
        f'    "{switch.NAME}": lambda: (\n'
        f'        os.getenv("{switch.NAME}") or "{switch.CHOICES[0]}"\n    ),'
    )
    sample = cst.ensure_type(
        cst.parse_expression(f"{{\n{comment}\n{entry}\n}}"), cst.Dict
    )
    new = cst.ensure_type(sample.elements[0], cst.DictElement)
    for element in table.elements:
        if isinstance(element, cst.DictElement) and _value(element.key) == switch.NAME:
            if element.value.deep_equals(new.value) or _same_expression(
                element.value, new.value
            ):
                return source
            raise Conflict(f"{switch.NAME} is registered in another way")
    last = table.elements[-1].with_changes(
        comma=cst.Comma(whitespace_after=sample.lbrace.whitespace_after)
    )
    elements = [*table.elements[:-1], last, new]
    return _replaced(module, table, table.with_changes(elements=elements))


def include_ops(source: str, extension: str) -> str:
    """Add the ops' CMake file after the command that defines ``extension``."""
    found = list(re.finditer(CMAKE_AFTER[extension], source))
    if len(found) != 1:
        raise Conflict(
            f"{len(found)} commands match {CMAKE_AFTER[extension]}, expected one"
        )
    end = found[0].end()
    line_start = source.rindex("\n", 0, found[0].start()) + 1
    indent = source[line_start : found[0].start()]
    line = f"\n{indent}{CMAKE_INCLUDE}"
    return (
        source if source.startswith(line, end) else source[:end] + line + source[end:]
    )


def _prologue_text(hook: Hook) -> str:
    """The prologue in as few lines as fit."""
    module, _, handler = hook.handler.partition(":")
    package, _, name = module.rpartition(".")
    load, function = f"from {module} import {handler}", handler
    shorter = f"from {package} import {name}", f"{name}.{handler}"
    if not _fits(load) and _fits(shorter[0]) and _fits(f"if method := {shorter[1]}("):
        load, function = shorter
    elif not _fits(load):
        first = f"from {module} import ("
        # as vLLM itself marks the names of modules that are too long for a line
        mark = "" if _fits(first) else "  # noqa: E501"
        load = f"{first}{mark}\n    {handler},\n)"
    arguments = ", ".join(hook.parameters)
    call = f"if method := {function}({arguments}):"
    if not _fits(call):
        call = f"if method := {function}(\n    {arguments}\n):"
    return f"{load}\n\n{call}\n    return method\n"


def _fits(line: str) -> bool:
    """Whether a line of a method's body is short enough."""
    return len("        " + line) <= LINE_LENGTH


def _statements(text: str) -> list[cst.BaseStatement]:
    return list(cst.parse_module(text).body)


def _replaced(module: cst.Module, old: cst.CSTNode, new: cst.CSTNode) -> str:
    return cst.ensure_type(module.deep_replace(old, new), cst.Module).code


def _class(module: cst.Module, name: str) -> cst.ClassDef:
    return _one(module.body, cst.ClassDef, name, "the module")


def _one(
    statements: Sequence[Any],
    kind: type[cst.ClassDef] | type[cst.FunctionDef],
    name: str,
    where: str,
) -> Any:
    """The class or function ``name``, which has to be there once."""
    found = [s for s in statements if isinstance(s, kind) and s.name.value == name]
    if len(found) != 1:
        raise Conflict(f"{where} has {len(found) or 'no'} {name}, expected one")
    if not isinstance(found[0].body, cst.IndentedBlock):
        raise Conflict(f"the body of {name} is on one line")
    return found[0]


def _check_parameters(function: cst.FunctionDef, expected: tuple[str, ...]) -> None:
    code = cst.Module([function.with_changes(decorators=(), leading_lines=())]).code
    (tree,) = ast.parse(code).body
    assert isinstance(tree, ast.FunctionDef)
    every = tree.args
    names = [a.arg for a in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    names += [star.arg for star in (every.vararg, every.kwarg) if star is not None]
    if tuple(names) != expected:
        raise Conflict(f"parameters are {tuple(names)}, expected {expected}")


def _assigned(
    statements: Sequence[cst.CSTNode], name: str, where: str
) -> cst.BaseExpression:
    """The value that ``statements`` assign to ``name``, once."""
    found = [s for s in statements if _assigned_name(s) == name]
    if len(found) != 1:
        raise Conflict(f"{where} assigns {name} {len(found)} times, expected once")
    return found[0].body[0].value  # type: ignore[attr-defined]


def _assigned_name(statement: cst.CSTNode) -> str | None:
    if not isinstance(statement, cst.SimpleStatementLine):
        return None
    target: cst.CSTNode | None = None
    if isinstance(statement.body[0], cst.AnnAssign):
        target = statement.body[0].target
    elif isinstance(statement.body[0], cst.Assign):
        target = statement.body[0].targets[0].target
    return target.value if isinstance(target, cst.Name) else None


def _value(node: cst.CSTNode | None) -> object:
    return node.evaluated_value if isinstance(node, cst.SimpleString) else None


def _same_code(a: Sequence[cst.CSTNode], b: Sequence[cst.CSTNode]) -> bool:
    """Whether statements are equal but for layout and comments."""

    def normal(nodes: Sequence[cst.CSTNode]) -> str:
        return ast.dump(ast.parse(cst.Module(list(nodes)).code))  # type: ignore[arg-type]

    return normal(a) == normal(b)


def _same_expression(a: cst.BaseExpression, b: cst.BaseExpression) -> bool:
    def normal(node: cst.BaseExpression) -> str:
        return ast.dump(ast.parse(cst.Module([]).code_for_node(node), mode="eval"))

    return normal(a) == normal(b)
