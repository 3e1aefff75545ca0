# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Facts that explain a result: machine, clocks, power, versions, variables, bytes.

``gather`` runs in its own process, so that the process that starts the servers holds no
GPU memory.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import multiprocessing
import os
import pathlib
import subprocess
from typing import Any

_PACKAGES = ("vllm-hybrid-w4a16", "transformers", "triton")
# Variables that affect the run. Others may hold secrets and are not recorded.
_PREFIXES = ("VLLM_", "HIP_", "HSA_", "ROCR_", "CUDA_", "OMP_", "PYTORCH_", "TRITON_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")

# Files with the clocks that the machine may run at: (name, glob)
_POWER_FILES = (
    ("platform_profile", "/sys/firmware/acpi/platform_profile"),
    ("cpu_governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    ("amdgpu_level", "/sys/class/drm/card*/device/power_dpm_force_performance_level"),
    ("amdgpu_sclk", "/sys/class/drm/card*/device/pp_dpm_sclk"),
    ("amdgpu_mclk", "/sys/class/drm/card*/device/pp_dpm_mclk"),
    ("amdgpu_power_cap_uw", "/sys/class/drm/card*/device/hwmon/hwmon*/power1_cap"),
    ("on_ac_power", "/sys/class/power_supply/A*/online"),
)


def gather(
    models: list[str], contexts: list[int], bandwidth: float | None
) -> dict[str, Any]:
    """Facts about the machine, and ``explain``'s result per model and context.

    Args:
        models: checkpoint folders or names.
        contexts: numbers of tokens in the KV cache.
        bandwidth: GB/s for the roofline; ``None``: the default of ``explain``.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_gather, models, contexts, bandwidth).result()


def _gather(
    models: list[str], contexts: list[int], bandwidth: float | None
) -> dict[str, Any]:
    from moe_bench.machine import describe, device_here

    return {
        "machine": {
            **describe(device_here(), len(os.sched_getaffinity(0))),
            "power": power(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "environment": switches(),
        },
        "doctor": _doctor(),
        "rooflines": _rooflines(models, contexts, bandwidth),
    }


def power() -> dict[str, list[str]]:
    """Clocks and power profile; empty if they cannot be read."""
    found = {}
    for name, pattern in _POWER_FILES:
        values = []
        for file in sorted(pathlib.Path("/").glob(pattern[1:])):
            try:
                values.append(" ".join(file.read_text().split()))
            except OSError:
                continue
        if values:
            found[name] = values
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,persistence_mode"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        found[f"nvidia_smi {fields}"] = answer.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def switches() -> dict[str, str]:
    """Environment variables that affect the run."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) and not any(word in name for word in _SECRET)
    }


def _doctor() -> list[dict[str, Any]] | None:
    try:
        from vllm.model_executor.layers.fused_moe.oracle import (
            hybrid_w4a16_switch as switch,
        )
        from vllm.plugins.hybrid_w4a16 import doctor
    except ImportError:
        return None
    switch.register()
    return [dataclasses.asdict(check) for check in doctor.diagnose()]


def _rooflines(
    models: list[str], contexts: list[int], bandwidth: float | None
) -> dict[str, dict[str, Any]]:
    """By model: bytes per token by context, or the reason why there are none."""
    try:
        from vllm.plugins.hybrid_w4a16.explain import explain
    except ImportError:
        return {}
    rooflines: dict[str, dict[str, Any]] = {}
    for model in models:
        try:
            reports = [explain(model, 1, bandwidth, None, n) for n in contexts]
        except ValueError as error:
            rooflines[model] = {"error": str(error)}
            continue
        rooflines[model] = {
            "bandwidth_gbps": reports[0]["bandwidth_gbps"],
            "token_bytes": {
                str(context): report["token_bytes"]
                for context, report in zip(contexts, reports, strict=True)
            },
        }
    return rooflines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
