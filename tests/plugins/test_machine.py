# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What doctor reads of the machine, from made-up files, and what it advises."""

import pytest

from vllm.plugins.hybrid_w4a16 import doctor, machine
from vllm.plugins.hybrid_w4a16.machine import GIB


@pytest.fixture
def strix_halo(tmp_path):
    """Files of an APU; call with carve-out, GTT and memory in GiB."""

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
        return tmp_path

    return make


def test_shared_memory_leaves_room_for_the_system(strix_halo):
    root = strix_halo(0.5, 120, 124, 110)
    memory = machine.read_memory(int(119 * GIB), int(120.5 * GIB), root)
    assert memory.is_shared and memory.carve_out == GIB // 2
    advice = machine.advise(memory)
    # (110 - 8% of 124) / 120.5, rounded down
    assert advice.argument == "--gpu-memory-utilization 0.83"
    assert "shares the system's memory" in advice.reason and "swap" in advice.reason


def test_a_large_carve_out_is_all_there_is(strix_halo):
    root = strix_halo(64, 31, 60, 50)
    memory = machine.read_memory(int(24 * GIB), int(64 * GIB), root)
    assert not memory.is_shared
    advice = machine.advise(memory)
    assert advice.argument == "--gpu-memory-utilization 0.35"
    assert "only the carve-out: 24.0 GiB of 64.0 GiB" in advice.reason
    assert "ttm.pages_limit" in advice.reason


def test_too_little_memory_is_said(strix_halo):
    root = strix_halo(0.5, 15, 15, 6)
    advice = machine.advise(machine.read_memory(5 * GIB, 15 * GIB, root))
    assert advice.argument.startswith("--kv-cache-memory-bytes")
    assert "close other programs" in advice.reason


def test_other_facts(strix_halo):
    root = strix_halo(0.5, 100, 128, 100)
    facts = machine.as_facts(None, root)
    assert facts["power_profile"] == "balanced" and facts["power_limit_watts"] == 120
    assert facts["versions"]["amdgpu"] == "6.16.6" and facts["cpu"] == "Ryzen X"


def test_a_machine_without_any_of_these_files(tmp_path):
    memory = machine.read_memory(10 * GIB, 16 * GIB, tmp_path)
    assert memory.carve_out is None and not memory.is_shared
    assert machine.advise(memory).argument == "--gpu-memory-utilization 0.56"
    assert machine.power_profile(tmp_path) is None
    assert machine.power_limit_watts(tmp_path) is None


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


def test_an_override_of_the_architecture_is_explained(monkeypatch):
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
    check = doctor._override()
    assert check.ok and "11.0.0" in check.found and "unset" in check.found


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.32.0", False), ("0.33.1", False), ("0.34.0", True), ("1.0.0rc1", True)],
)
def test_a_vllm_newer_than_the_tests(version, said, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    assert (f"not tested with vLLM {version}" in doctor._vllm_fits().found) is said
