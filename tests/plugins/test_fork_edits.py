# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The fork's edits on small sources: what they insert, when they stop, the command."""

import ast
import dataclasses
import difflib
import functools
import inspect
import os
import posixpath
import re

import pytest

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.plugins.hybrid_w4a16 import cli, fork, fork_edits, fork_files, hooks

HOOK = hooks.Hook(
    module="vllm.some.module",
    owner="Factory",
    factory="method",
    parameters=("self", "number"),
    handler="vllm.ours.handlers:handler",
    why="test",
)

FACTORY = '''\
import os


class Factory:
    # what the method is for
    @staticmethod
    def other(number):  return   number  # oddly spaced, and stays so

    def method(
        self,
        number: int,
    ) -> "str | None":
        """Docstring."""
        # why this branch
        if number:
            return f"stock {number}"

        return None
'''

EDITED = FACTORY.replace(
    '''        """Docstring."""
''',
    '''        """Docstring."""
        from vllm.ours.handlers import handler

        if method := handler(self, number):
            return method

''',
)


def test_prologue_goes_after_the_docstring_and_changes_nothing_else():
    assert fork_edits.insert_prologue(FACTORY, HOOK) == EDITED


def test_prologue_that_is_there_stays_in_whatever_layout():
    assert fork_edits.insert_prologue(EDITED, HOOK) == EDITED
    other = EDITED.replace("handler(self, number)", "handler(\n  self,\n  number)")
    assert fork_edits.insert_prologue(other, HOOK) == other


def test_prologue_of_a_static_method_without_docstring():
    hook = dataclasses.replace(HOOK, factory="other", parameters=("number",))
    source = "class Factory:\n    @staticmethod\n    def other(number):\n        pass\n"
    edited = fork_edits.insert_prologue(source, hook)
    namespace: dict = {}
    exec(edited.replace("from vllm.ours.handlers import handler", ""), namespace)
    namespace["handler"] = lambda number: number if number == 2 else None
    assert namespace["Factory"].other(2) == 2
    assert namespace["Factory"].other(3) is None


def test_a_long_import_becomes_one_of_the_module():
    handler = "vllm.model_executor.layers.quantization.a_module_of_ours:handler_of_ours"
    edited = fork_edits.insert_prologue(
        FACTORY, dataclasses.replace(HOOK, handler=handler)
    )
    assert "from vllm.model_executor.layers.quantization import a_module_of" in edited
    assert "if method := a_module_of_ours.handler_of_ours(self, number):" in edited


def test_long_calls_and_imports_are_wrapped():
    name = "a_handler_with_quite_a_long_name_for_a_function_in_vllm"
    hook = dataclasses.replace(
        HOOK,
        handler=f"vllm.model_executor.layers.quantization:{name}",
        parameters=("self", "quantization_config", "layer", "prefix"),
    )
    source = FACTORY.replace(
        "        number: int,\n", "        quantization_config, layer, prefix\n"
    )
    edited = fork_edits.insert_prologue(source, hook)
    ast.parse(edited)
    assert max(map(len, edited.splitlines())) <= fork_edits.LINE_LENGTH


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FACTORY.replace("Factory", "Other"), "the module has no Factory"),
        (FACTORY.replace("def method", "def renamed"), "Factory has no method"),
        (FACTORY + "\n    def method(self): pass\n", "Factory has 2 method"),
        (
            FACTORY.replace("number: int", "number: int, prefix: str"),
            r"parameters are \('self', 'number', 'prefix'\), expected",
        ),
        (
            FACTORY.replace("number: int", "*number: int"),
            r"expected|parameters",
        ),
        (
            EDITED.replace("handler(self, number)", "handler(self, 1)"),
            "mentions handler already",
        ),
    ],
    ids=["class", "method", "twice", "more parameters", "star", "other call"],
)
def test_factory_that_does_not_fit_is_a_conflict(source, message):
    if "*number" in source:  # the same names, called in another way
        hook = dataclasses.replace(HOOK, parameters=("self", "number", "more"))
    else:
        hook = HOOK
    with pytest.raises(fork_edits.Conflict, match=message):
        fork_edits.insert_prologue(source, hook)


ENVS = """\
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    VLLM_OTHER: bool = False


environment_variables: dict[str, Callable] = {
    # the other one
    "VLLM_OTHER": lambda: bool(
        1
    ),
}

# after
"""


def test_switch_gets_its_type_and_its_entry(monkeypatch):
    edited = fork_edits.register_switch(fork_edits.declare_switch(ENVS))
    differences = difflib.ndiff(ENVS.splitlines(), edited.splitlines())
    assert not [line for line in differences if line.startswith("- ")]
    namespace: dict = {"Callable": object, "os": os}
    exec(edited, namespace)
    assert list(namespace["environment_variables"]) == ["VLLM_OTHER", switch.NAME]
    value = namespace["environment_variables"][switch.NAME]
    for text, expected in (("", "auto"), ("1", "1")):
        monkeypatch.setenv(switch.NAME, text)
        assert value() == expected
    assert max(map(len, edited.splitlines())) <= fork_edits.LINE_LENGTH
    assert fork_edits.declare_switch(edited) == edited
    assert fork_edits.register_switch(edited) == edited


def test_the_fork_registers_the_switch_as_the_overlay_does(monkeypatch):
    from vllm import envs

    monkeypatch.setattr(envs, "environment_variables", {})
    switch.register()
    default = envs.environment_variables[switch.NAME]
    monkeypatch.delenv(switch.NAME, raising=False)
    assert default() == switch.CHOICES[0]


@pytest.mark.parametrize(
    ("edit", "source", "message"),
    [
        (fork_edits.declare_switch, "x = 1\n", "0 blocks `if TYPE_CHECKING`"),
        (
            fork_edits.declare_switch,
            ENVS.replace("VLLM_OTHER: bool = False", f"{switch.NAME}: int = 3"),
            "declared in another way",
        ),
        (fork_edits.register_switch, "x = 1\n", "assigns environment_variables 0"),
        (
            fork_edits.register_switch,
            ENVS.replace('"VLLM_OTHER"', f'"{switch.NAME}"'),
            "registered in another way",
        ),
    ],
)
def test_envs_that_do_not_fit_are_a_conflict(edit, source, message):
    with pytest.raises(fork_edits.Conflict, match=message):
        edit(source)


CMAKE = """\
if (CPU)
    include(${CMAKE_CURRENT_LIST_DIR}/cmake/cpu_extension.cmake)
endif()
  define_extension_target(
    _rocm_C
    SOURCES ${A}
    WITH_SOABI)

define_extension_target(_rocm_C_other SOURCES ${B})
"""


def test_cmake_file_is_included_after_each_extension():
    edited = CMAKE
    for extension in fork_edits.CMAKE_AFTER:
        edited = fork_edits.include_ops(edited, extension)
    line = fork_edits.CMAKE_INCLUDE
    assert edited == CMAKE.replace(
        "cpu_extension.cmake)\n", f"cpu_extension.cmake)\n    {line}\n"
    ).replace("WITH_SOABI)\n", f"WITH_SOABI)\n  {line}\n")
    for extension in fork_edits.CMAKE_AFTER:
        assert fork_edits.include_ops(edited, extension) == edited
        with pytest.raises(fork_edits.Conflict, match="0 commands match"):
            fork_edits.include_ops("project(x)\n", extension)


@pytest.mark.parametrize("row", hooks.HOOKS, ids=str)
def test_every_row_says_why_it_exists_and_when_it_can_go(row):
    for text in (row.why, row.until):
        assert text.endswith(".") and len(text.split()) > 4
    message = fork.commit_message()
    assert row.target in message and row.why in message and row.until in message


def test_the_fork_carries_the_layers_and_not_the_delivery():
    files = fork_files.files_to_add(fork_files.project_folder())
    assert not [path for path in files if path.startswith("vllm/plugins/")]
    layers = "vllm/model_executor/layers"
    assert {
        f"{layers}/fused_moe/oracle/hybrid_w4a16.py",
        f"{layers}/fused_moe/configs/hybrid_w4a16/rdna.json",
        f"{layers}/quantization/inc_moe.py",
    } <= files.keys()


def test_every_include_of_ours_is_in_the_fork():
    files = fork_files.files_to_add(fork_files.project_folder())
    sources = {path: text for path, text in files.items() if path.startswith("csrc/")}
    assert len(sources) > 20
    for path, text in sources.items():
        for header in re.findall(r'^#include "([^"]+)"', text, re.M):
            folders = (posixpath.dirname(path), "csrc/hybrid_w4a16")
            found = [posixpath.normpath(f"{folder}/{header}") for folder in folders]
            assert sources.keys() & set(found), f"{path} includes {header}"


def test_a_missing_import_is_found(tmp_path):
    (tmp_path / "vllm/there").mkdir(parents=True)
    (tmp_path / "vllm/there/__init__.py").write_text(
        "import os\nif os.name:\n    A = 1\ntry:\n    from x import y as B\n"
        "except ImportError:\n    B = None\ndef f(): inner = 1\n"
    )
    files = {
        "vllm/new.py": "from vllm.there import A, B, f, os, inner, gone\n"
        "def g():\n    from vllm.nowhere import x\n    from vllm import there, new\n"
    }
    assert list(fork_files.missing_imports(tmp_path, files)) == [
        ("vllm/new.py", "vllm.there has no inner"),
        ("vllm/new.py", "vllm.there has no gone"),
        ("vllm/new.py", "there is no module vllm.nowhere"),
    ]


def test_the_file_that_defines_a_name_is_found_through_packages(tmp_path):
    for path, text in {
        "vllm/a/__init__.py": "from .b import First as Second\n",
        "vllm/a/b.py": "from vllm.c import First\n",
        "vllm/c.py": "class First: pass\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    find = functools.partial(fork_files.defining_file, tmp_path)
    assert find("vllm.a", "Second") == "vllm/c.py"
    assert find("vllm.a", "Third") == "vllm/a/__init__.py"
    assert find("vllm.gone", "First") == "vllm/gone.py"


def test_subcommands_keep_the_contract():
    for name, (_, summary) in cli.COMMANDS.items():
        assert summary
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0


def test_fork_of_what_is_no_vllm_tree_is_an_error(tmp_path, capsys):
    assert cli.main(["fork", "--vllm-src", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a vLLM source tree" in capsys.readouterr().err


def test_without_a_checkout_the_error_says_what_to_do(tmp_path, monkeypatch):
    installed = tmp_path / "vllm/plugins/hybrid_w4a16/fork_files.py"
    monkeypatch.setattr(fork_files, "__file__", str(installed))
    with pytest.raises(fork_files.ProjectError, match="not a checkout.*VLLM_SRC"):
        fork_files.project_folder()


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.handler)
def test_handlers_look_at_nothing_when_the_switch_is_off(hook, monkeypatch):
    """In the fork nothing else keeps vLLM as it was: `@switch.unless_off`."""
    switch.register()
    monkeypatch.setenv(switch.NAME, "0")
    handler = hooks._load_handler(hook.handler)
    assert len(inspect.signature(handler).parameters) == len(hook.parameters)
    assert handler(*[object()] * len(hook.parameters)) is None
