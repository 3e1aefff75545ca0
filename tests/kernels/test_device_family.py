# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which devices the op library is used on, and what is said of the others."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as device
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

BUILT = {
    "cpu": ("avx512", "portable"),
    "hip": ("gfx1100", "gfx1151", "gfx1201"),
    "cuda": ("sm_80", "sm_90"),
}


@pytest.fixture
def machine(monkeypatch):
    """Pretend a platform, an architecture and what the op library was built for."""

    def pretend(platform: str, arch: str = "", built: dict = BUILT) -> None:
        names = ("cpu", "rocm", "cuda")
        checks = {f"is_{n}": lambda n=n: n == platform for n in names}
        fake = SimpleNamespace(**checks, device_name=platform)
        monkeypatch.setattr(device, "current_platform", fake)
        monkeypatch.setattr(ops, "build_info", lambda: built)
        # an instinct accelerator's and a WSL driver's names have such a tail
        properties = SimpleNamespace(
            gcnArchName=f"{arch}:sramecc+:xnack-", multi_processor_count=20
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        capability = (
            tuple(int(digit) for digit in arch[3:5]) if platform == "cuda" else 0
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return pretend


def test_rdna_is_used_by_default(machine):
    machine("rocm", "gfx1151")
    assert device.device_family() == device.DeviceFamily(
        "gfx1151",
        "HIP wvSplitK",
        "Triton",
        opt_in=False,
        cu_count=40,
        tuning="rdna",
    )


def test_cuda_is_opt_in(machine):
    machine("cuda", "sm_90")
    assert device.device_family() == device.DeviceFamily(
        "sm_90", "CUDA wvSplitK", "Triton", opt_in=True, cu_count=20, tuning="sm_90"
    )


def test_the_cpu_has_one_path_for_any_number_of_tokens(machine):
    machine("cpu")
    family = device.device_family()
    assert not isinstance(family, str)
    assert family.decode == family.prefill == "C++ avx512" and family.tuning is None


@pytest.mark.parametrize(
    ("platform", "arch", "built", "reason"),
    [
        (
            "rocm",
            "gfx942",
            BUILT,
            (
                "the op library holds no code for gfx942 "
                "(it was built for: gfx1100, gfx1151, gfx1201)"
            ),
        ),
        (
            "cuda",
            "sm_75",
            BUILT,
            "the op library holds no code for sm_75 (it was built for: sm_80, sm_90)",
        ),
        (
            "rocm",
            "gfx1151",
            {"cpu": ("portable",)},
            (
                "the op library holds no code for gfx1151 "
                "(it was built for: no GPU of this vendor)"
            ),
        ),
        ("tpu", "", BUILT, "platform 'tpu' has no int4 MoE kernels"),
    ],
)
def test_other_devices_are_refused_with_the_reason(
    machine, platform, arch, built, reason
):
    machine(platform, arch, built)
    assert device.device_family() == reason
