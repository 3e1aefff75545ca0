# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 doctor``: check this installation and say what to fix next.

Exit status: 0 if int4 MoE layers run on the hybrid path on this machine; 1 if something
prevents it (the last line says how to fix it); 2 for a bad argument.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from . import machine

DISTRIBUTION = "vllm-hybrid-w4a16"
PLUGIN = "hybrid_w4a16"
_REINSTALL = "pip install -v --no-build-isolation --force-reinstall --no-deps ."


# The newest vLLM release that this version is tested with.
TESTED_VLLM = (0, 33)


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    fix: str | None = None
    """What to do if the check failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor`` to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )
    from vllm.plugins.hybrid_w4a16.progress import quiet

    switch.register()
    with quiet():  # the table has everything
        checks = diagnose()
    todo = next((check.fix for check in checks if not check.ok), None)
    if args.json:
        facts = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"ok": todo is None, "checks": facts, "next": todo}, indent=1))
    else:
        for check in checks:
            print(f"{'ok ' if check.ok else 'NO '} {check.name:<13} {check.found}")
        print(f"\nnext: {todo or 'nothing, int4 MoE layers go hybrid here'}")
    return 0 if todo is None else 1


def diagnose() -> list[Check]:
    """Run all checks; a cause comes before its consequences."""
    return [check() for check in CHECKS]


def _versions() -> Check:
    import torch

    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    found += [f"hip {torch.version.hip}"] if torch.version.hip else []
    found += [f"cuda {torch.version.cuda}"] if torch.version.cuda else []
    for package in ("triton", DISTRIBUTION):
        found.append(f"{package} {_version(package) or 'not installed'}")
    found += [f"{name} {text}" for name, text in machine.versions().items()]
    return Check("versions", True, ", ".join(found))


def _platform() -> Check:
    from vllm.platforms import current_platform

    name = type(current_platform).__name__
    if name == "UnspecifiedPlatform":
        return Check(
            "platform",
            False,
            "vLLM found no device that it was built for",
            "install vLLM for ROCm beside a ROCm build of torch; if a GPU is there "
            "but not found, check its driver and the access to /dev/kfd and /dev/dri",
        )
    return Check("platform", True, f"{name} ({current_platform.device_name})")


def _architecture() -> Check:
    import torch

    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        capability = torch.backends.cpu.get_cpu_capability()
        return Check("architecture", True, f"{platform.machine()}, {capability}")
    try:
        properties = torch.cuda.get_device_properties()
    except (RuntimeError, AssertionError) as error:
        return Check(
            "architecture",
            False,
            f"torch cannot use a GPU: {str(error).splitlines()[0]}",
            "make `python -c 'import torch; torch.cuda.get_device_properties(0)'` work",
        )
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:  # elsewhere gcnArchName is the GPU's name
        arch = properties.gcnArchName
    memory = properties.total_memory / 2**30
    return Check("architecture", True, f"{properties.name}, {arch}, {memory:.1f} GiB")


def _vllm_fits() -> Check:
    import vllm
    from vllm.plugins.hybrid_w4a16 import hooks

    misfits = []
    for hook in hooks.HOOKS:
        try:
            hooks.apply_hooks((hook,))
        except hooks.HookError as error:
            misfits.append(str(error))
    if misfits:
        return Check(
            "hooks",
            False,
            f"vLLM {vllm.__version__}: {'; '.join(misfits)}",
            "install vLLM 0.30 to 0.33, or a release of this package for the vLLM here",
        )
    found = f"{len(hooks.HOOKS)} fit vLLM {vllm.__version__}"
    numbers = vllm.__version__.split(".")[:2]
    if all(number.isdecimal() for number in numbers) and (
        tuple(map(int, numbers)) > TESTED_VLLM
    ):
        newest = ".".join(map(str, TESTED_VLLM))
        found += f"; not tested with vLLM {vllm.__version__}, only up to {newest}"
    return Check("hooks", True, found)


def _library() -> Check:
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

    error = ops.load_error()
    if error is not None:
        return Check(
            "op library",
            False,
            error,
            f"build it for the installed torch: {_REINSTALL}",
        )
    built = [f"{kind} {' '.join(names)}" for kind, names in ops.build_info().items()]
    return Check("op library", True, f"has code for: {', '.join(built)}")


def _device() -> Check:
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices

    try:
        family: devices.DeviceFamily | str = devices.device_family()
    except (RuntimeError, AssertionError) as error:
        family = str(error).splitlines()[0]
    if isinstance(family, str):
        return Check("kernels", False, family, _device_fix())
    return Check("kernels", True, f"decode: {family.decode}, prefill: {family.prefill}")


def _device_fix() -> str:
    from vllm.platforms import current_platform

    build = f"HYBRID_W4A16_GPU_ARCHS=<architecture above> {_REINSTALL}"
    if current_platform.is_rocm():
        return (
            "build the op library for this GPU in a checkout, with a clang that has "
            f"the AMDGPU target (ROCm's, or Debian's clang-22 lld-22): {build}"
        )
    if current_platform.is_cuda():
        return (
            "build the op library for this GPU in a checkout, with nvcc on PATH: "
            f"{build}"
        )
    return "use a ROCm, CUDA or CPU build of vLLM: there are kernels for these"


def _plugin() -> Check:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return Check(
            "plugin",
            False,
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading it",
            f"add {PLUGIN} to VLLM_PLUGINS, or unset it",
        )
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    if PLUGIN in entries.names:
        return Check("plugin", True, "vLLM loads it in every process")
    if _version(DISTRIBUTION) is None:
        return Check("plugin", True, "not installed, part of this vLLM source tree")
    return Check("plugin", False, "its entry point is missing", _REINSTALL)


def _switch() -> Check:
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )

    try:
        value = switch.value()
    except ValueError as error:
        choices = ", ".join(switch.CHOICES)
        return Check("switch", False, str(error), f"{switch.NAME} is one of {choices}")
    found = f"{switch.NAME}={value}"
    if value == "0":
        return Check("switch", False, f"{found}: off", f"unset {switch.NAME}")
    try:
        family: devices.DeviceFamily | str = devices.device_family()
    except (RuntimeError, AssertionError):
        family = "reported above"
    opt_in = isinstance(family, devices.DeviceFamily) and family.opt_in
    if value == "auto" and opt_in:
        why = f"{found}: on this device it is opt-in"
        return Check("switch", False, why, f"export {switch.NAME}=1")
    return Check("switch", True, found)


def _memory() -> Check:
    """Free memory; on AMD also how much vLLM can use, which an APU does not report."""
    import torch

    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        available = machine.gib(machine.meminfo("MemAvailable"))
        return Check("memory", True, f"{available} of the system's are free")
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):
        return Check("memory", True, "no GPU, see above")
    found = f"{machine.gib(free)} of {machine.gib(total)} free"
    if not current_platform.is_rocm():
        return Check("memory", True, found)
    memory = machine.read_memory(free, total)
    parts = [
        f"carve-out {machine.gib(memory.carve_out or 0)}",
        f"GTT {machine.gib(memory.gtt or 0)}",
        f"HIP {found}",
        f"MemAvailable {machine.gib(memory.available)}",
    ]
    advice = machine.advise(memory)
    text = f"{', '.join(parts)}. Serve with {advice.argument}: {advice.reason}"
    return Check("memory", True, text)


def _power() -> Check:
    profile, limit = machine.power_profile(), machine.power_limit_watts()
    found = f"profile {profile or 'unknown'}"
    if limit is not None:
        found += f", GPU limited to {limit:.0f} W"
    if profile in ("low-power", "balanced", "quiet", "cool"):
        found += (
            "; results are higher with `echo performance | sudo tee "
            "/sys/firmware/acpi/platform_profile`"
        )
    return Check("power", True, found)


def _override() -> Check:
    value = os.environ.get("HSA_OVERRIDE_GFX_VERSION")
    own = ", ".join(machine.gpu_architectures())
    if not value:
        found = "HSA_OVERRIDE_GFX_VERSION is not set"
        return Check("override", True, f"{found}; the GPU is a {own}" if own else found)
    itself = f"the GPU's own ({own})" if own else "the GPU's own"
    return Check(
        "override",
        True,
        f"HSA_OVERRIDE_GFX_VERSION={value}: torch reports that architecture, so its "
        f"kernels and its tuning table are used here, not those of {itself}; unset it "
        "if torch and vLLM have code for the GPU itself",
    )


def _threads() -> Check:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return Check("threads", True, "not relevant, vLLM runs on a GPU")
    threads, why = machine.cpu_threads()
    count = "as many as OpenMP takes" if threads is None else str(threads)
    return Check("threads", True, f"vLLM uses {count}: {why}")


def _compiler() -> Check:
    """torch.compile and Triton call a compiler at run time; our wheel does not."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    variable, names = ("CXX", ("g++",)) if on_cpu else ("CC", ("gcc", "clang"))
    chosen = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, (chosen,) if chosen else names)), None)
    if found is not None:
        return Check("compiler", True, found)
    if on_cpu:
        return Check(
            "compiler",
            True,
            "no C++ compiler on PATH, which torch.compile needs on a CPU: serve with "
            "--enforce-eager, or install g++",
        )
    return Check(
        "compiler",
        False,
        "no C compiler on PATH, which Triton needs to launch its kernels",
        "install gcc, or set CC to a C compiler",
    )


def _tuning() -> Check:
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning

    try:
        family: devices.DeviceFamily | str = devices.device_family()
    except (RuntimeError, AssertionError):
        family = "unknown"
    if isinstance(family, str):
        return Check("tuning", True, "no kernels, see above")
    if family.tuning is None:
        return Check("tuning", True, "nothing to tune on this device")
    own = tuning.owner_table(family.name)
    shapes = len(tuning.owner_entries(family.name))
    shipped = tuning.table(family.tuning).get("source", "none")
    text = f"{own} ({shapes} shapes)" if shapes else f"no owner's table ({own})"
    return Check("tuning", True, f"{text}; shipped: {shipped}")


CHECKS: tuple[Callable[[], Check], ...] = (
    _versions,
    _platform,
    _architecture,
    _vllm_fits,
    _library,
    _device,
    _compiler,
    _plugin,
    _switch,
    _tuning,
    _memory,
    _power,
    _override,
    _threads,
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
