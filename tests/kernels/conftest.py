# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Devices of the kernel tests: every one that the op library has kernels for."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops


def _devices() -> list[str]:
    if ops.load_error() is not None:
        # fork: begin overlay
        return ["cpu"]  # the tests then fail and say why
        # fork: end
        return []
    kinds = set(ops.build_info())
    gpu = {"hip", "cuda"} & kinds and torch.cuda.is_available()
    return [*({"cpu"} & kinds), *(["cuda"] if gpu else [])]


@pytest.fixture(scope="session", autouse=True)
def gpu_kernels():
    """Load the kernels of this machine's GPU, like a layer that uses them."""
    if "cuda" in _devices():
        properties = torch.cuda.get_device_properties(0)
        arch = properties.gcnArchName.split(":")[0]
        # fork: begin overlay
        if torch.version.hip is None:  # there gcnArchName is the GPU's name
            arch = f"sm_{properties.major}{properties.minor}"
        # fork: end
        ops.load_device(0, arch)


@pytest.fixture(params=_devices(), scope="session")
def device(request):
    assert ops.load_error() is None, ops.load_error()
    return request.param


@pytest.fixture
def every_isa(device):
    """Iterate over the CPU's instruction sets; on a GPU run once."""
    isas = ops.build_info().get("cpu", ()) if device == "cpu" else ()

    def choose():
        for isa in isas:
            assert torch.ops._rocm_C.hybrid_w4a16_cpu_isa(isa) == isa
            yield isa
        if not isas:
            yield ""

    yield choose
    if isas:
        torch.ops._rocm_C.hybrid_w4a16_cpu_isa("")


@pytest.fixture
def threads():
    """Set the number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
