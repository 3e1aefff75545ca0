# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the host does in a prefill call: launches, and nothing that waits for the GPU.

Triton compiles the kernels and launches nothing (``benchmarks/prefill_host.py``).
"""

import importlib.util
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/prefill_host.py"
SIZES = (4, 2, 256, 128, 128)
ALIGN = "moe_align_block_size"


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def host():
    driver = pytest.importorskip("triton.runtime.driver").driver
    spec = importlib.util.spec_from_file_location("prefill_host", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", None)
        yield module


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [
        ("gfx1151", ["gate_up", "down", "sum"]),
        pytest.param(
            "sm_90",
            ["to_planes", "gate_up", "down", "sum"],
            marks=pytest.mark.nightly,  # compiles for ten seconds
        ),
    ],
)
def test_a_call_launches_no_more_than_marlin_and_never_waits(host, arch, kernels):
    from triton.runtime.driver import driver

    device = host.NoLaunches(arch)
    driver.set_active(device)
    with host.no_ops(device.launches):
        marlin = host.marlin_call(device.launches, 64, SIZES)
        marlin()
        of_marlin = device.launches.total()
        device.launches.clear()
        for tokens in (33, 64):  # a size of its own captures like any other
            hybrid = host.hybrid_call(arch, tokens, SIZES)
            with Operators() as operators:
                hybrid()
            expected = {ALIGN: 1, **{f"moe_int4_prefill_{name}": 1 for name in kernels}}
            assert dict(device.launches) == expected
            assert device.launches.total() <= of_marlin
            device.launches.clear()
            # Allocations and views: nothing copies or reads a value on the host.
            allowed = {"aten::empty.memory_format", "aten::as_strided"}
            assert operators.names <= allowed
