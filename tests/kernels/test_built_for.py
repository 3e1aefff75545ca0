# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The op library rejects a GPU that it has no code for.

``csrc/rocm/device_cuda.cpp`` is compiled against a stand-in for CUDA's runtime, whose
only device is the one that the test chooses. test_hip_launch.py covers HIP.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROCM = Path(__file__).resolve().parents[2] / "csrc" / "rocm"

CUDA_RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdlib>
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor,
                      cudaDevAttrComputeCapabilityMinor,
                      cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
using cudaStream_t = void*;
struct dim3 { dim3(int x = 1, int y = 1, int z = 1) {} };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t*, const void*, void**) {
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void**, size_t) { return cudaSuccess; }
inline cudaError_t cudaFree(void*) { return cudaSuccess; }
inline cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  const int number = std::atoi(std::getenv("DEVICE"));
  *value = what == cudaDevAttrComputeCapabilityMajor ? number / 10 : number % 10;
  return cudaSuccess;
}
"""

STREAM_SHIM = """
#pragma once
inline int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }
"""

MAIN = """
#include <cstdio>
#include <exception>
#include "device.h"
int main() {
  try {
    moe_int4::gpu::require_current_device();
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
    return 1;
  }
}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++-22")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("built_for")
    shim = folder / "torch/csrc/inductor/aoti_torch/c/shim.h"
    shim.parent.mkdir(parents=True)
    shim.write_text(STREAM_SHIM)
    (folder / "cuda_runtime_api.h").write_text(CUDA_RUNTIME)
    (folder / "main.cpp").write_text(MAIN)
    programs = {}

    def program(built_for):
        if built_for not in programs:
            out = folder / f"program{len(programs)}"
            command = [compiler, "-std=c++20", "-DHYBRID_W4A16_CUDA"]
            command += [f'-DHYBRID_W4A16_GPU_ARCHS="{built_for}"', f"-I{ROCM}"]
            command += [f"-I{folder}", folder / "main.cpp", ROCM / "device_cuda.cpp"]
            subprocess.run([*command, "-o", out], check=True)
            programs[built_for] = out
        return programs[built_for]

    def run(built_for, device):
        command = [program(built_for)]
        return subprocess.run(
            command, env={"DEVICE": device}, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize(
    ("built_for", "device", "runs"),
    [
        ("sm_80 sm_90", "80", True),
        ("sm_80 sm_90", "86", True),
        ("sm_80 sm_90", "75", False),
        ("sm_80 sm_90", "90", True),
        ("sm_90", "89", False),
        ("sm_90", "100", False),
    ],
)
def test_runs_only_what_it_was_built_for(ask, built_for, device, runs):
    answer = ask(built_for, device)
    assert answer.returncode == (0 if runs else 1)
    if not runs:
        expected = f"no kernels for sm_{device}; it was built for {built_for}"
        assert answer.stdout == f"device 0: hybrid_w4a16 has {expected}"
