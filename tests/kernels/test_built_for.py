# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The op library refuses a GPU that it holds no code for.

``csrc/rocm/build_info.cpp`` is compiled as for CUDA and for HIP against a stand-in of
the vendor's runtime, whose only device is what the test says.
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
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  const int number = std::atoi(std::getenv("DEVICE"));
  *value = what == cudaDevAttrComputeCapabilityMajor ? number / 10 : number % 10;
  return cudaSuccess;
}
"""

HIP_RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
enum hipError_t { hipSuccess };
enum hipMemcpyKind { hipMemcpyHostToDevice, hipMemcpyDeviceToHost };
using hipStream_t = void*;
struct dim3 { dim3(int x = 1, int y = 1, int z = 1) {} };
struct hipDeviceProp_t { char gcnArchName[256]; };
inline const char* hipGetErrorString(hipError_t) { return ""; }
inline hipError_t hipLaunchKernel(const void*, dim3, dim3, void**, size_t,
                                  hipStream_t) { return hipSuccess; }
inline hipError_t hipMalloc(void**, size_t) { return hipSuccess; }
inline hipError_t hipFree(void*) { return hipSuccess; }
inline hipError_t hipMemcpy(void*, const void*, size_t, hipMemcpyKind) {
  return hipSuccess;
}
inline hipError_t hipGetDevice(int* device) { *device = 0; return hipSuccess; }
inline hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int) {
  std::strcpy(properties->gcnArchName, std::getenv("DEVICE"));
  return hipSuccess;
}
"""

MAIN = """
#include <cstdio>
#include <exception>
#include "build_info.h"
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
    (folder / "hip").mkdir()
    (folder / "cuda_runtime_api.h").write_text(CUDA_RUNTIME)
    (folder / "hip" / "hip_runtime_api.h").write_text(HIP_RUNTIME)
    (folder / "main.cpp").write_text(MAIN)
    programs = {}

    def program(kind, built_for):
        if (kind, built_for) not in programs:
            out = folder / f"program{len(programs)}"
            command = [compiler, "-std=c++20", f"-DHYBRID_W4A16_{kind.upper()}"]
            command += [f'-DHYBRID_W4A16_GPU_ARCHS="{built_for}"', f"-I{ROCM}"]
            command += [f"-I{folder}", folder / "main.cpp", ROCM / "build_info.cpp"]
            subprocess.run([*command, "-o", out], check=True)
            programs[kind, built_for] = out
        return programs[kind, built_for]

    def run(kind, built_for, device):
        command = [program(kind, built_for)]
        return subprocess.run(
            command, env={"DEVICE": device}, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize(
    ("kind", "built_for", "device", "runs"),
    [
        ("hip", "gfx1100 gfx1151", "gfx1151:sramecc-:xnack-", True),
        ("hip", "gfx1100 gfx1151", "gfx1150", False),
        ("hip", "gfx1100 gfx1151", "gfx115", False),
        ("hip", "gfx1100 gfx1151", "gfx942:sramecc+:xnack-", False),
        ("cuda", "sm_80 sm_90", "80", True),
        ("cuda", "sm_80 sm_90", "86", True),
        ("cuda", "sm_80 sm_90", "75", False),
        ("cuda", "sm_80 sm_90", "90", True),
        ("cuda", "sm_90", "89", False),
        ("cuda", "sm_90", "100", False),
        ("cuda", "sm_90 compute_90", "100", True),
        ("cuda", "compute_90", "80", False),
    ],
)
def test_runs_only_what_it_was_built_for(ask, kind, built_for, device, runs):
    answer = ask(kind, built_for, device)
    assert answer.returncode == (0 if runs else 1)
    if not runs:
        arch = device.split(":")[0] if kind == "hip" else f"sm_{device}"
        assert f"a {arch}; it was built for {built_for}" in answer.stdout
