# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What doctor reads about the machine, from artificial files, and its advice."""

import dataclasses
import importlib.metadata

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.platforms import current_platform
from vllm.plugins.hybrid_w4a16 import doctor, machine
from vllm.plugins.hybrid_w4a16.machine import GIB


@pytest.fixture(autouse=True)
def made_up_files(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)


@pytest.fixture
def strix_halo(tmp_path):
    """Create an APU's files; call it with carve-out, GTT and memory in GiB."""

    def make(carve_out, gtt, total, available):
        device = tmp_path / "sys/class/drm/card1/device"
        (device / "hwmon/hwmon3").mkdir(parents=True)
        (device / "mem_info_vram_total").write_text(f"{int(carve_out * GIB)}\n")
        (device / "mem_info_gtt_total").write_text(f"{int(gtt * GIB)}\n")
        (device / "hwmon/hwmon3/power1_cap").write_text("120000000\n")
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal:  {int(total * GIB) >> 10} kB\n"
            f"MemAvailable: {int(available * GIB) >> 10} kB\n"
        )
        (tmp_path / "proc/cpuinfo").write_text("processor: 0\nmodel name : Ryzen X\n")
        profile = tmp_path / "sys/firmware/acpi/platform_profile"
        profile.parent.mkdir(parents=True)
        profile.write_text("balanced\n")
        version = tmp_path / "sys/module/amdgpu/version"
        version.parent.mkdir(parents=True)
        version.write_text("6.16.6\n")
        rocm = tmp_path / "opt/rocm/.info/version"
        rocm.parent.mkdir(parents=True)
        rocm.write_text("7.1.0-46\n")
        for number, target in enumerate((0, 110501)):  # the CPU is a node too
            node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}/properties"
            node.parent.mkdir(parents=True)
            node.write_text(f"simd_count 80\ngfx_target_version {target}\n")

    return make


@pytest.fixture
def on_rocm(monkeypatch):
    """A GPU as torch reports it; call it with HIP's free and total memory in GiB."""

    def make(free, total):
        sizes = int(free * GIB), int(total * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: sizes)
        for name, value in (("is_cpu", False), ("is_rocm", True)):
            monkeypatch.setattr(
                type(current_platform), name, lambda self, value=value: value
            )

    return make


def test_shared_memory_leaves_room_for_the_system(strix_halo):
    strix_halo(0.5, 120, 124, 110)
    memory = machine.read_memory(int(119 * GIB), int(120.5 * GIB))
    assert memory.is_shared and memory.carve_out == GIB // 2
    advice = machine.advise(memory)
    # (110 - 8% of 124) / 120.5, rounded down
    assert advice.argument == "--gpu-memory-utilization 0.83"
    assert "shares the system's memory" in advice.reason and "swap" in advice.reason


def test_a_large_carve_out_is_all_there_is(strix_halo):
    strix_halo(64, 31, 60, 50)
    memory = machine.read_memory(int(24 * GIB), int(64 * GIB))
    assert not memory.is_shared
    advice = machine.advise(memory)
    assert advice.argument == "--gpu-memory-utilization 0.35"
    assert "only the carve-out: 24.0 GiB of 64.0 GiB" in advice.reason
    assert "ttm.pages_limit" in advice.reason


def test_too_little_memory_is_said(strix_halo):
    strix_halo(0.5, 15, 15, 6)
    advice = machine.advise(machine.read_memory(5 * GIB, 15 * GIB))
    assert advice.argument.startswith("--kv-cache-memory-bytes")
    assert "close other programs" in advice.reason


def test_other_facts(strix_halo):
    strix_halo(0.5, 100, 128, 100)
    facts = machine.as_facts(None)
    assert facts["power_profile"] == "balanced" and facts["power_limit_watts"] == 120
    assert facts["versions"]["amdgpu"] == "6.16.6" and facts["cpu"] == "Ryzen X"
    assert facts["gpu_architectures"] == ["gfx1151"]


def test_doctor_on_an_apu_says_what_to_serve_with(strix_halo, on_rocm):
    strix_halo(0.5, 120, 124, 110)
    on_rocm(119, 120.5)
    check = doctor._memory()
    assert check.ok
    assert check.found.startswith(
        "carve-out 0.5 GiB, GTT 120.0 GiB, HIP 119.0 GiB of 120.5 GiB free, "
        "MemAvailable 110.0 GiB. Serve with --gpu-memory-utilization 0.83: "
        "the GPU shares the system's memory"
    )


def test_doctor_on_an_apu_that_is_full(strix_halo, on_rocm):
    strix_halo(0.5, 15, 15, 6)
    on_rocm(5, 15)
    found = doctor._memory().found
    assert f"Serve with --kv-cache-memory-bytes {2 * GIB}: " in found


def test_doctor_without_a_compiler_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    check = doctor._compiler()
    assert check.ok and "--enforce-eager" in check.found
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert doctor._compiler().found == str(compiler)


def test_doctor_without_a_compiler_for_triton(tmp_path, on_rocm, monkeypatch):
    on_rocm(100, 120)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check = doctor._compiler()
    assert not check.ok and "Triton" in check.found and "CC" in check.fix
    (tmp_path / "gcc").touch(mode=0o755)
    assert doctor._compiler().found == str(tmp_path / "gcc")


def test_doctor_names_versions_of_driver_rocm_and_triton(strix_halo, monkeypatch):
    strix_halo(0.5, 120, 124, 110)
    installed = {"triton": "3.7.0", "rocm-sdk-core": "7.10.0"}

    def version(name):
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.version, "hip", "7.1.2")
    found = doctor._versions().found
    for part in (
        "hip 7.1.2",
        "triton 3.7.0",
        "amdgpu 6.16.6",
        "rocm 7.1.0-46",
        "rocm-sdk-core 7.10.0",
    ):
        assert part in found.split(", ")


@pytest.mark.parametrize(
    ("profile", "advised"), [("balanced", True), ("performance", False)]
)
def test_doctor_asks_for_the_performance_profile(
    strix_halo, tmp_path, profile, advised
):
    strix_halo(0.5, 120, 124, 110)
    (tmp_path / "sys/firmware/acpi/platform_profile").write_text(f"{profile}\n")
    found = doctor._power().found
    assert found.startswith(f"profile {profile}, GPU limited to 120 W")
    assert ("echo performance" in found) is advised


@pytest.mark.parametrize("tuned", [True, False])
def test_doctor_names_the_table_in_use(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path))
    family = dataclasses.replace(devices.PLANNED["gfx1151"], cu_count=20)
    monkeypatch.setattr(devices, "device_family", lambda: family)
    shape = tuning.MoEShape(256, 8, 2048, 512, 128, "bf16")
    own = tuning.owner_table("gfx1151")
    if tuned:
        entry = {"decode": [], "rows": [], "prefill_from": 32, "compute_units": 20}
        tuning.write_owner_entry(
            "gfx1151",
            tuning.shape_fields(shape) | entry | {"kernel_version": 1},
        )
    found = doctor._tuning().found
    expected = f"{own} (1 shapes)" if tuned else f"no owner's table ({own})"
    assert found.startswith(expected) and "; shipped: " in found


def test_a_machine_without_any_of_these_files(tmp_path):
    memory = machine.read_memory(10 * GIB, 16 * GIB)
    assert memory.carve_out is None and not memory.is_shared
    assert machine.advise(memory).argument == "--gpu-memory-utilization 0.56"
    assert machine.power_profile() is None
    assert machine.power_limit_watts() is None
    assert machine.gpu_architectures() == []


@pytest.mark.parametrize(
    ("binding", "threads", "why"),
    [
        ("0-1", 2, "VLLM_CPU_OMP_THREADS_BIND=0-1"),
        ("0-3,8|9-12", 5, "=0-3,8|9-12"),
        ("nobind", None, "OMP_NUM_THREADS"),
    ],
)
def test_cpu_threads_that_are_bound(binding, threads, why, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    found, reason = machine.cpu_threads()
    assert found == threads and why in reason


def test_vllm_reserves_a_core(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU", raising=False)
    threads, reason = machine.cpu_threads()
    assert threads >= 1 and "reserves 1 of" in reason
    assert "VLLM_CPU_OMP_THREADS_BIND=0-" in reason


def test_an_override_of_the_architecture_is_explained(strix_halo, monkeypatch):
    strix_halo(0.5, 120, 124, 110)
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
    check = doctor._override()
    assert check.ok and "11.0.0" in check.found and "unset" in check.found
    assert "not those of the GPU's own (gfx1151)" in check.found
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION")
    assert doctor._override().found.endswith("is not set; the GPU is a gfx1151")


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.32.0", False), ("0.33.1", False), ("0.34.0", True), ("1.0.0rc1", True)],
)
def test_a_vllm_newer_than_the_tests(version, said, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    assert (f"not tested with vLLM {version}" in doctor._vllm_fits().found) is said
