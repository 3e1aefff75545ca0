# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which device runs the int4 MoE ops, and with which kernels.

The only place in the Python code that asks for the platform. A GPU architecture is
supported when the op library holds code for it.
"""

from dataclasses import dataclass

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import table_name
from vllm.platforms import current_platform


@dataclass(frozen=True)
class DeviceFamily:
    """A kind of device, as far as the choice of kernels goes."""

    name: str
    """What the log calls it."""
    decode: str
    """Kernels that take a few tokens."""
    prefill: str
    """Kernels that take many tokens."""
    opt_in: bool
    """Only on request (``VLLM_HYBRID_W4A16_MOE=1``), not by default."""
    cu_count: int
    """Compute units that a GPU grid is spread over; 1 on the CPU."""
    tuning: str | None = None
    """Tuning table; ``None``: decode takes any number of tokens."""


_HIP_KERNELS = "HIP wvSplitK"
_CUDA_KERNELS = "CUDA wvSplitK"

# For planning on another machine. CUs of gfx1151: AMD's product page of Strix Halo.
PLANNED = {
    "gfx1151": DeviceFamily(
        "gfx1151", _HIP_KERNELS, "Triton", False, 40, table_name("gfx1151")
    ),
    "cuda": DeviceFamily("cuda", _CUDA_KERNELS, "Triton", True, 1, "sm_90"),
    "cpu": DeviceFamily("cpu", "C++", "C++", False, 1),
}


def device_family() -> DeviceFamily | str:
    """The device at hand, or the reason why the ops do not run on it."""
    error = ops.load_error()
    if error is not None:
        return error
    built = ops.build_info()
    if current_platform.is_cpu():
        # the CPU ops group tokens by expert and pick the kernel per expert
        kernels = f"C++ {built['cpu'][0]}"
        return DeviceFamily("cpu", kernels, kernels, opt_in=False, cu_count=1)
    if current_platform.is_rocm():
        arch = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return _gpu_family(arch, built.get("hip", ()), _HIP_KERNELS, opt_in=False)
    if current_platform.is_cuda():
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}"
        return _gpu_family(arch, built.get("cuda", ()), _CUDA_KERNELS, opt_in=True)
    return f"platform {current_platform.device_name!r} has no int4 MoE kernels"


def _gpu_family(
    arch: str, built: tuple[str, ...], kernels: str, opt_in: bool
) -> DeviceFamily | str:
    if arch not in built:
        return (
            f"the op library holds no code for {arch} "
            f"(it was built for: {', '.join(built) or 'no GPU of this vendor'})"
        )
    cu_count = torch.cuda.get_device_properties().multi_processor_count
    if current_platform.is_rocm():
        # torch counts workgroup processors on RDNA: two compute units each
        cu_count *= 2
    return DeviceFamily(arch, kernels, "Triton", opt_in, cu_count, table_name(arch))
