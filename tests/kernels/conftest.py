# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Devices of the kernel tests: every one that the op library has kernels for."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
    load_kernels,
)


def _devices() -> list[str]:
    if ops.load_error() is not None:
        return ["cpu"]  # the tests then fail with the reason
    gpu = {"hip", "cuda"} & set(ops.build_info()) and torch.cuda.is_available()
    return ["cpu", "cuda"] if gpu else ["cpu"]


@pytest.fixture(scope="session", autouse=True)
def gpu_kernels():
    """Load the kernels of this machine's GPU, like a layer that uses them."""
    if "cuda" in _devices():
        family = device_family()
        assert isinstance(family, DeviceFamily), family
        load_kernels(family)


@pytest.fixture(params=_devices(), scope="session")
def device(request):
    assert ops.load_error() is None, ops.load_error()
    return request.param


@pytest.fixture
def every_isa(device):
    """Iterate over the CPU's instruction sets; on a GPU run once."""
    select = torch.ops._rocm_C.hybrid_w4a16_cpu_isa

    def isas():
        for isa in ops.build_info()["cpu"] if device == "cpu" else ("",):
            if device == "cpu":
                assert select(isa) == isa
            yield isa

    yield isas
    select("")


@pytest.fixture
def threads():
    """Set the number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
