# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The device that runs the int4 MoE ops, and the kernels that it uses.

Only this module queries the platform. Whether the op library supports a GPU is decided
by the library itself (``hybrid_w4a16_ops.refusal``).
"""

from dataclasses import dataclass, replace

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import table_name
from vllm.platforms import current_platform


@dataclass(frozen=True)
class DeviceFamily:
    """What the choice of kernels depends on for a kind of device."""

    name: str
    """Name in the log."""
    decode: str
    """Kernels for few tokens."""
    prefill: str
    """Kernels for many tokens."""
    cu_count: int
    """Number of compute units that a GPU grid is spread over; 1 on the CPU."""
    tuning: str | None = None
    """Name of the tuning table; ``None``: decode kernels run any number of tokens."""
    # fork: begin overlay
    opt_in: bool = False
    """Used only on request, not by default."""
    # fork: end


_HIP_KERNELS = "HIP wvSplitK"
# fork: begin overlay
_CUDA_KERNELS = "CUDA wvSplitK"

# For planning on a machine without the device. Source of gfx1151's compute units: AMD's
# product page of Strix Halo.
PLANNED = {
    "gfx1151": DeviceFamily(
        "gfx1151", _HIP_KERNELS, "Triton", 40, table_name("gfx1151")
    ),
    "cuda": DeviceFamily("cuda", _CUDA_KERNELS, "Triton", 1, "sm_90", opt_in=True),
    "cpu": DeviceFamily("cpu", "C++", "C++", 1),
}
# fork: end


def device_family() -> DeviceFamily | str:
    """Return the current device's family, or why the ops do not run on it."""
    error = ops.load_error()
    if error is not None:
        return error
    if current_platform.is_cpu():
        reason = ops.refusal("cpu")
        if reason is not None:
            return reason
        # The ops select a kernel for each expert by its number of rows. Group size and
        # dtype change the thresholds between kernels but add no others.
        *few, many = (name for name, _ in ops.cpu_kernels(128, torch.bfloat16))
        decode, prefill = f"C++ {', '.join(few) or many}", f"C++ {many}"
        return DeviceFamily("cpu", decode, prefill, cu_count=1)
    if current_platform.is_rocm():
        arch = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return _gpu_family(arch, _HIP_KERNELS)
    # fork: begin overlay
    if current_platform.is_cuda():
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}"
        family = _gpu_family(arch, _CUDA_KERNELS)
        return family if isinstance(family, str) else replace(family, opt_in=True)
    # fork: end
    return f"platform {current_platform.device_name!r} has no int4 MoE kernels"


def _gpu_family(arch: str, kernels: str) -> DeviceFamily | str:
    reason = ops.refusal(arch)
    if reason is not None:
        return reason
    cu_count = torch.cuda.get_device_properties().multi_processor_count
    if current_platform.is_rocm():
        # torch counts workgroup processors on RDNA; each has two compute units.
        cu_count *= 2
    return DeviceFamily(arch, kernels, "Triton", cu_count, table_name(arch))


def load_kernels(family: DeviceFamily) -> None:
    """Load the kernels onto the current device, which must be of ``family``.

    Raises ``RuntimeError`` if the op library does not support it.
    """
    if family.tuning is not None:  # a GPU
        ops.load_device(torch.cuda.current_device(), family.name)
