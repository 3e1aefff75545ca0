# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Which devices use the op library, and the reasons for the others."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as device
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

HELD = ("cpu", "gfx1100", "gfx1151", "gfx1201", "sm_80", "sm_90")


@pytest.fixture
def machine(monkeypatch):
    """Pretend a platform, an architecture, and what the op library was built for."""

    def pretend(platform: str, arch: str = "", held: tuple = HELD) -> None:
        names = ("cpu", "rocm", "cuda")
        checks = {f"is_{n}": lambda n=n: n == platform for n in names}
        fake = SimpleNamespace(**checks, device_name=platform)
        monkeypatch.setattr(device, "current_platform", fake)

        def refusal(arch: str) -> str | None:
            return None if arch in held else f"built for something else than {arch}"

        monkeypatch.setattr(ops, "refusal", refusal)
        kernels = [("avx512_vnni", 1), ("amx_int8", 2), ("amx_bf16", 17)]
        monkeypatch.setattr(ops, "cpu_kernels", lambda *_: kernels)
        # The names of Instinct accelerators and of WSL's driver have such a suffix.
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
    assert family.decode == "C++ avx512_vnni, amx_int8"
    assert family.prefill == "C++ amx_bf16" and family.tuning is None


@pytest.mark.parametrize(
    ("platform", "arch", "named"),
    [("rocm", "gfx942", "gfx942"), ("cuda", "sm_75", "sm_75"), ("cpu", "", "cpu")],
)
def test_the_library_refuses_devices(machine, platform, arch, named):
    machine(platform, arch, held=())
    assert device.device_family() == f"built for something else than {named}"


def test_other_platforms_have_no_kernels(machine):
    machine("tpu")
    assert device.device_family() == "platform 'tpu' has no int4 MoE kernels"


def test_the_library_at_hand_says_what_it_was_built_for():
    assert ops.load_error() is None
    built = ops.build_info()
    for arch in ("cpu", "gfx942", "sm_75", *built.get("hip", ())):
        reason = ops.refusal(arch)
        if arch in ("cpu", *built.get("hip", ())):
            assert reason is None
        else:
            assert f"holds no kernels for {arch}; it was built for " in str(reason)


@pytest.mark.parametrize(
    ("name", "loaded"), [("gfx1151", [(1, "gfx1151")]), ("cpu", [])]
)
def test_kernels_are_loaded_on_the_device_at_hand(name, loaded, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(ops, "load_device", lambda *call: calls.append(call))
    device.load_kernels(device.PLANNED[name])
    assert calls == loaded


def test_the_reason_of_the_linker_is_named(monkeypatch, tmp_path):
    source = tmp_path / "broken.c"
    source.write_text(
        "extern int missing_symbol; int *use(void) { return &missing_symbol; }"
    )
    library = tmp_path / "broken.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(ops, "_LIBRARY", str(library))
    monkeypatch.setattr(ops, "_ops_registered", lambda: False)
    error = ops.load_error.__wrapped__()
    assert str(library) in error and "undefined symbol: missing_symbol" in error


def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path):
    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(ops, "_LIBRARY", str(library))
    monkeypatch.setattr(ops, "_ops_registered", lambda: False)
    assert f"{library} is not an ELF library" in ops.load_error.__wrapped__()
