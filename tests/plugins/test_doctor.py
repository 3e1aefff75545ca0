# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``doctor``: what it finds, and the one thing that it says to fix next."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import vllm
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.platforms import current_platform
from vllm.plugins.hybrid_w4a16 import cli, doctor, hooks


@pytest.fixture(autouse=True)
def default_environment(monkeypatch):
    monkeypatch.delenv(switch.NAME, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if current_platform.is_cuda():  # opt-in there
        monkeypatch.setenv(switch.NAME, "1")


def diagnosis(capsys):
    """Exit status, checks by name and the next step of an in-process run."""
    status = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (status == 0)
    return status, {check["name"]: check for check in report["checks"]}, report["next"]


def test_healthy_installation_in_a_fresh_process():
    run = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "vllm-hybrid-w4a16"), "doctor"],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "DEBUG"},  # kept out of the output
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    *checks, empty, last = run.stdout.splitlines()
    assert len(checks) == len(doctor.CHECKS) and not empty
    assert all(line.startswith("ok ") for line in checks)
    assert last == "next: nothing, int4 MoE layers go hybrid here"
    assert f"torch {torch.__version__}" in run.stdout
    assert f"fit vLLM {vllm.__version__}" in run.stdout


def test_missing_op_library(monkeypatch, capsys):
    monkeypatch.setattr(ops, "load_error", lambda: "the op library X does not exist")
    status, checks, following = diagnosis(capsys)
    assert status == 1
    assert checks["op library"]["found"] == "the op library X does not exist"
    assert following.startswith("build it for the installed torch: pip install")


def test_unsupported_architecture(monkeypatch, capsys):
    reason = "the op library holds no code for gfx906 (it was built for: gfx1151)"
    monkeypatch.setattr(devices, "device_family", lambda: reason)
    monkeypatch.setattr(type(current_platform), "is_rocm", lambda self: True)
    status, checks, following = diagnosis(capsys)
    assert (status, checks["kernels"]["found"]) == (1, reason)
    assert "HYBRID_W4A16_GPU_ARCHS=<architecture above> pip install" in following


def test_gpu_that_torch_does_not_reach(monkeypatch, capsys):
    def no_gpu():
        raise RuntimeError("No HIP GPUs are available\nmore")

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", no_gpu)
    monkeypatch.setattr(devices, "device_family", no_gpu)
    status, checks, following = diagnosis(capsys)
    assert status == 1
    found = checks["architecture"]["found"]
    assert found == "torch cannot use a GPU: No HIP GPUs are available"
    assert "torch.cuda.get_device_properties" in following


def test_vllm_that_the_hooks_do_not_fit(monkeypatch, capsys):
    first = hooks.HOOKS[0]
    bad = dataclasses.replace(first, factory="get_another_method")
    monkeypatch.setattr(hooks, "HOOKS", (bad, *hooks.HOOKS[1:]))
    status, checks, following = diagnosis(capsys)
    assert status == 1
    found = checks["hooks"]["found"]
    assert f"vLLM {vllm.__version__}" in found and bad.target in found
    assert following.startswith("install vLLM 0.30 to 0.33")


@pytest.mark.parametrize(
    ("variable", "value", "name", "following"),
    [
        ("VLLM_PLUGINS", "other,more", "plugin", "add hybrid_w4a16 to VLLM_PLUGINS"),
        (switch.NAME, "0", "switch", f"unset {switch.NAME}"),
        (
            switch.NAME,
            "maybe",
            "switch",
            f"{switch.NAME} is one of auto, 1, 0, require",
        ),
    ],
)
def test_environment(variable, value, name, following, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    status, checks, said = diagnosis(capsys)
    assert status == 1
    assert [key for key, check in checks.items() if not check["ok"]] == [name]
    assert value in checks[name]["found"]
    assert said.startswith(following)


def test_opt_in_device(monkeypatch, capsys):
    monkeypatch.delenv(switch.NAME, raising=False)
    monkeypatch.setattr(devices, "device_family", lambda: devices.PLANNED["cuda"])
    status, checks, following = diagnosis(capsys)
    assert (status, following) == (1, f"export {switch.NAME}=1")
    monkeypatch.setenv(switch.NAME, "1")
    assert diagnosis(capsys)[0] == 0


def test_first_cause_is_named_not_its_consequences(monkeypatch, capsys):
    monkeypatch.setattr(ops, "load_error", lambda: "broken library")
    monkeypatch.setenv(switch.NAME, "0")
    status, checks, following = diagnosis(capsys)
    failed = [name for name, check in checks.items() if not check["ok"]]
    assert failed == ["op library", "kernels", "switch"]
    assert following == checks["op library"]["fix"]
