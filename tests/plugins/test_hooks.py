# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Applying the hook table to stand-in targets and to the installed vLLM."""

import dataclasses
import importlib
import inspect
import logging
import os
import subprocess
import sys
import types

import pytest

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.platforms import current_platform
from vllm.plugins import hybrid_w4a16
from vllm.plugins.hybrid_w4a16 import hooks


def handler_that_takes_even(self, number):
    return f"hybrid {number}" if number % 2 == 0 else None


def static_handler(number):
    return f"hybrid {number}" if number % 2 == 0 else None


@pytest.fixture
def target(monkeypatch):
    """A module with factories like vLLM's, and hooks for them."""
    module = types.ModuleType("stand_in_target")

    class Factory:
        def method(self, number):
            return f"stock {number}"

        @staticmethod
        def static(number):
            return f"stock {number}"

    module.Factory = Factory
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "stand_in_handlers", sys.modules[__name__])
    method = hooks.Hook(
        module=module.__name__,
        owner="Factory",
        factory="method",
        parameters=("self", "number"),
        handler="stand_in_handlers:handler_that_takes_even",
        why="test",
    )
    static = dataclasses.replace(
        method,
        factory="static",
        parameters=("number",),
        handler="stand_in_handlers:static_handler",
    )
    return Factory, method, static


def test_handler_result_wins_and_none_falls_through(target):
    factory, method, static = target
    hooks.apply_hooks((method, static))
    assert factory().method(2) == "hybrid 2"
    assert factory().method(3) == "stock 3"
    assert factory().method(number=4) == "hybrid 4"
    assert factory.static(2) == factory().static(2) == "hybrid 2"
    assert factory.static(number=3) == "stock 3"


def test_applying_twice_wraps_once(target):
    factory, method, static = target
    hooks.apply_hooks((method, static))
    wrapped = dict(vars(factory))
    hooks.apply_hooks((method, static))
    assert dict(vars(factory)) == wrapped
    assert inspect.unwrap(factory.method)(factory(), 2) == "stock 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "stand_in_nothing"}, "No module named 'stand_in_nothing'"),
        ({"owner": "Missing"}, "has no attribute 'Missing'"),
        ({"factory": "missing"}, "Factory has no missing"),
        (
            {"parameters": ("number", "prefix")},
            r"parameters are \('number',\), expected \('number', 'prefix'\)",
        ),
    ],
)
def test_hook_that_does_not_fit_leaves_everything_as_it_was(target, change, message):
    factory, method, static = target
    before = dict(vars(factory))
    bad = dataclasses.replace(static, **change)
    with pytest.raises(hooks.HookError, match=message) as error:
        hooks.apply_hooks((method, bad))
    assert bad.target in str(error.value)
    assert method.target not in str(error.value)
    assert dict(vars(factory)) == before


@pytest.fixture
def misfit(target, monkeypatch):
    _, method, _ = target
    bad = dataclasses.replace(method, factory="missing")
    apply_hooks = hooks.apply_hooks
    monkeypatch.setattr(hooks, "apply_hooks", lambda: apply_hooks((bad,)))
    return bad


def test_register_survives_a_missing_target_and_says_which(misfit, monkeypatch, caplog):
    import vllm

    monkeypatch.delenv(switch.NAME, raising=False)
    logger = logging.getLogger(hybrid_w4a16.__name__)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        hybrid_w4a16.register()
    assert f"its hooks do not fit vLLM {vllm.__version__}" in caplog.text
    assert f"{misfit.target}: Factory has no missing" in caplog.text


def test_register_raises_on_a_missing_target_under_require(misfit, monkeypatch):
    monkeypatch.setenv(switch.NAME, "require")
    with pytest.raises(hooks.HookError, match="Factory has no missing"):
        hybrid_w4a16.register()


def test_register_does_not_touch_the_hooks_when_off(misfit, monkeypatch, caplog):
    monkeypatch.setenv(switch.NAME, "0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    hybrid_w4a16.register()
    assert caplog.text == ""


def test_off_on_the_cpu_says_that_vllm_cannot_load_such_checkpoints(
    monkeypatch, caplog
):
    monkeypatch.setenv(switch.NAME, "0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    hybrid_w4a16.register()
    assert f"{switch.NAME}=0: vLLM itself cannot load AutoRound, GPTQ or AWQ" in (
        caplog.text
    )


def test_switch_refuses_unknown_values(monkeypatch):
    switch.register()
    monkeypatch.setenv(switch.NAME, "maybe")
    with pytest.raises(ValueError, match=f"'maybe' for {switch.NAME}.*auto.*require"):
        switch.value()


def test_empty_switch_is_unset(monkeypatch):
    switch.register()
    monkeypatch.setenv(switch.NAME, "")
    assert switch.value() == "auto"


def test_switch_is_one_of_vllms_variables(monkeypatch):
    from vllm import envs
    from vllm.platforms import current_platform

    switch.register()
    monkeypatch.setenv(switch.NAME, "1")
    current_platform.validate_environ(hard_fail=True)
    assert envs.compile_factors()[switch.NAME] == "1"


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.target)
def test_table_fits_the_installed_vllm(hook):
    hooks.apply_hooks()
    owner = getattr(importlib.import_module(hook.module), hook.owner)
    factory = inspect.getattr_static(owner, hook.factory)
    assert getattr(factory, "__func__", factory)._hybrid_w4a16_hook is hook
    handler = hooks._load_handler(hook.handler)
    assert len(inspect.signature(handler).parameters) == len(hook.parameters)


@pytest.mark.parametrize("row", hooks.KERNEL_ROWS, ids=lambda row: row.target)
def test_kernel_comes_first_once_however_often_it_is_added(row):
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.platforms import PlatformEnum

    hooks.apply_hooks()
    hooks.apply_hooks()
    names = [
        kernel.__name__ for kernel in _POSSIBLE_KERNELS[PlatformEnum[row.platform]]
    ]
    assert names[0] == "HybridW4A16LinearKernel" and len(names) > 1
    assert names.count(names[0]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"module": "stand_in_nothing"},
        {"table": "_MISSING"},
        {"platform": "ABACUS"},
        {"kernel": "stand_in_handlers:Missing"},
    ],
)
def test_kernel_row_that_does_not_fit_leaves_everything_as_it_was(target, change):
    factory, method, _ = target
    before = dict(vars(factory))
    bad = dataclasses.replace(hooks.KERNEL_ROWS[0], **change)
    with pytest.raises(hooks.HookError) as error:
        hooks.apply_hooks((method,), (bad,))
    assert bad.target in str(error.value)
    assert dict(vars(factory)) == before


PROBE = """
import inspect
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme
factory = inc_wna16_scheme.INCWna16Scheme.get_moe_method
print("wrapped" if hasattr(factory, "_hybrid_w4a16_hook") else "stock")
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "wrapped"), ("0", "stock")],
)
def test_entry_point_in_a_fresh_process(value, expected):
    env = {key: v for key, v in os.environ.items() if key != switch.NAME}
    if value is not None:
        env[switch.NAME] = value
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.split()[-1] == expected


WITHOUT_VLLM = """
import sys
import vllm_hybrid_w4a16
try:
    status = vllm_hybrid_w4a16.main()
except SystemExit as exit:
    status = exit.code
loaded = {"vllm", "torch"} & set(sys.modules)
assert not loaded, loaded
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "explain"),
        (["--version"], 0, "vllm-hybrid-w4a16 "),
        (["doctor", "--help"], 0, "--json"),
        (["explain", "--help"], 0, "--bandwidth"),
        (["fork", "--help"], 0, "--vllm-src"),
        (["explain", "/no/such/folder"], 1, "neither a folder nor the name"),
        (["explain", "{tmp}"], 1, "holds no safetensors files"),
    ],
)
def test_the_command_answers_without_importing_vllm(arguments, status, text, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM, *arguments], capture_output=True, text=True
    )
    assert run.returncode == status, run.stderr
    assert text in run.stdout + run.stderr
