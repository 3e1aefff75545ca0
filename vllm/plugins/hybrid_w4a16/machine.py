# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Reads facts about the machine: memory of an APU, power, drivers, CPU threads.

Files are read below ``ROOT``.
"""

import dataclasses
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Tests put a folder of made-up files here.
ROOT = Path("/")
GIB = 1 << 30
# Reserved for the rest of the system on shared memory: the larger of these.
_RESERVE_BYTES, _RESERVE_SHARE = 6 * GIB, 0.08
# Reserved in a carve-out for the driver's and other programs' buffers.
_CARVE_OUT_RESERVE = GIB


@dataclass(frozen=True)
class Memory:
    """In bytes; ``None`` where it cannot be read."""

    carve_out: int | None
    """Memory that the firmware sets aside for the GPU."""
    gtt: int | None
    """How much of the system's memory the GPU may use in addition."""
    hip_free: int
    hip_total: int
    available: int
    """MemAvailable of Linux."""
    system: int
    """MemTotal."""

    @property
    def is_shared(self) -> bool:
        """Whether HIP's memory exceeds the carve-out, and so is the system's."""
        return self.carve_out is not None and self.hip_total > 1.05 * self.carve_out


@dataclass(frozen=True)
class Advice:
    """What to give ``vllm serve``."""

    argument: str
    reason: str


def read(path: str | Path) -> str | None:
    """A file's text without the line end; ``None`` if it is not there.

    ``path`` is relative to ``ROOT``, or below it.
    """
    try:
        return (ROOT / path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_memory(hip_free: int, hip_total: int) -> Memory:
    """Memory around an AMD GPU; ``hip_*``: what ``torch.cuda.mem_get_info`` says.

    Of several cards, the one with the largest carve-out and GTT counts.
    """
    cards = sorted((ROOT / "sys/class/drm").glob("card*/device/mem_info_vram_total"))
    sizes = [
        tuple(
            int(read(card.parent / f"mem_info_{kind}_total") or 0)
            for kind in ("vram", "gtt")
        )
        for card in cards
    ]
    carve_out, gtt = max(sizes, key=sum, default=(None, None))
    return Memory(
        carve_out,
        gtt,
        hip_free,
        hip_total,
        meminfo("MemAvailable"),
        meminfo("MemTotal"),
    )


def meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes, 0 if it is missing."""
    for line in (read("proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    return 0


def advise(memory: Memory) -> Advice:
    """How much of the memory vLLM should take.

    vLLM takes its share of HIP's total and refuses to start if less is free. On an APU
    HIP's memory is the system's, and other programs use it too.
    """
    if memory.is_shared:
        reserve = max(_RESERVE_BYTES, round(_RESERVE_SHARE * memory.system))
        free = min(memory.hip_free, memory.available)
        usable = free - reserve
        reason = (
            f"the GPU shares the system's memory: {gib(free)} are free, "
            f"{gib(reserve)} of it stay for the system; more would swap"
        )
    else:
        usable = memory.hip_free - _CARVE_OUT_RESERVE
        reason = (
            f"HIP has only the carve-out: {gib(memory.hip_free)} of "
            f"{gib(memory.hip_total)} are free"
        )
        if memory.hip_total < 0.6 * (memory.system + memory.hip_total):
            reason += (
                "; a small carve-out (512 MB, in the firmware) and the kernel's "
                "ttm.pages_limit give the GPU more"
            )
    share = int(100 * usable / memory.hip_total) / 100 if memory.hip_total else 0.0
    if share < 0.05:
        return Advice(
            f"--kv-cache-memory-bytes {2 * GIB}",
            f"{reason}; that is too little for a share: close other programs first",
        )
    return Advice(f"--gpu-memory-utilization {min(share, 0.95):.2f}", reason)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def power_profile() -> str | None:
    """Of the firmware, such as "balanced"."""
    return read("sys/firmware/acpi/platform_profile")


def power_limit_watts() -> float | None:
    """Of the first GPU that has one."""
    pattern = "sys/class/drm/card*/device/hwmon/hwmon*/power1_cap"
    for file in sorted(ROOT.glob(pattern)):
        text = read(file)
        if text and text.isdecimal():
            return int(text) / 1e6
    return None


def gpu_architectures() -> list[str]:
    """Of the AMD GPUs, as the kernel driver knows them: such as "gfx1151".

    ``HSA_OVERRIDE_GFX_VERSION`` does not change these.
    """
    found = []
    for file in sorted(ROOT.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        for line in (read(file) or "").splitlines():
            name, _, value = line.partition(" ")
            # 110501: two decimal digits each for major, minor and stepping; 0: a CPU
            if name == "gfx_target_version" and value.isdecimal() and int(value):
                major, rest = divmod(int(value), 10000)
                found.append(f"gfx{major}{rest // 100:x}{rest % 100:x}")
    return found


def versions() -> dict[str, str]:
    """Kernel, driver and ROCm, as far as they can be read."""
    found = {
        "kernel": platform.release(),
        "amdgpu": read("sys/module/amdgpu/version"),
        "rocm": read("opt/rocm/.info/version"),
        "rocm-sdk-core": _package_version("rocm-sdk-core"),
        "nvidia": _nvidia(),
    }
    return {name: text for name, text in found.items() if text}


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia() -> str | None:
    words = (read("proc/driver/nvidia/version") or "").split()
    return next((w for w in words if w[:1].isdigit() and w.count(".") >= 1), None)


def cpu_threads() -> tuple[int | None, str]:
    """Threads of one vLLM worker on the CPU (``None``: unknown), and why so many."""
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    allowed = len(os.sched_getaffinity(0))
    if binding == "nobind":
        return None, "VLLM_CPU_OMP_THREADS_BIND=nobind: OMP_NUM_THREADS decides"
    if binding != "auto":
        return _count(binding.split("|")[0]), f"VLLM_CPU_OMP_THREADS_BIND={binding}"
    try:
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

        cpus = get_allowed_cpu_list()
        node = min(cpu.numa_node for cpu in cpus)
        cores = len({cpu.physical_core for cpu in cpus if cpu.numa_node == node})
    except (ImportError, AttributeError, RuntimeError, ValueError, OSError):
        cores = allowed
    reserved = int(os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "1"))
    threads = max(1, cores - reserved)
    return threads, (
        f"vLLM reserves {reserved} of {cores} cores; "
        f"VLLM_CPU_OMP_THREADS_BIND=0-{allowed - 1} uses all {allowed} processors"
    )


def _count(text: str) -> int | None:
    """How many processors a list such as "0-3,8" names."""
    total = 0
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            total += int(last or first) - int(first) + 1
    except ValueError:
        return None
    return total


def as_facts(memory: Memory | None) -> dict[str, object]:
    """Everything that a report records about the machine."""
    return {
        "memory": None if memory is None else dataclasses.asdict(memory),
        "system_memory": meminfo("MemTotal"),
        "power_profile": power_profile(),
        "power_limit_watts": power_limit_watts(),
        "versions": versions(),
        "gpu_architectures": gpu_architectures(),
        "cpu": _cpu_model(),
        "processors": len(os.sched_getaffinity(0)),
    }


def _cpu_model() -> str | None:
    for line in (read("proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None
