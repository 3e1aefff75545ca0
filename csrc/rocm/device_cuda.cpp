// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// HYBRID_W4A16_GPU_ARCHS lists the architectures that nvcc compiled for, separated by spaces.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "device.h"
#include "gpu_compat.cuh"

namespace moe_int4::gpu {
namespace {

// Machine code runs on devices of its major version with at least its minor version.
bool runs_on(const std::string& built, const std::string& device) {
  const int from = std::atoi(built.c_str() + 3), at = std::atoi(device.c_str() + 3);
  return at >= from && at / 10 == from / 10;
}

}  // namespace

std::string build_info() { return "cuda " HYBRID_W4A16_GPU_ARCHS; }

std::string refusal(const std::string& arch) {
  std::istringstream built(HYBRID_W4A16_GPU_ARCHS);
  for (std::string one; built >> one;) {
    if (runs_on(one, arch)) return "";
  }
  return "hybrid_w4a16 holds no kernels for " + arch + "; it was built for " HYBRID_W4A16_GPU_ARCHS;
}

// The kernels are part of this library, and the driver loads them.
void load_device(int, const std::string& arch) {
  const std::string reason = refusal(arch);
  if (!reason.empty()) throw std::runtime_error(reason);
}

void require_current_device() {
  // Usually the same device is used again, and looking up its name costs more than a launch.
  thread_local int checked = -1;
  const int device = ::gpu::current_device();
  if (device == checked) return;
  const std::string reason = refusal(::gpu::current_arch());
  if (!reason.empty()) {
    throw std::runtime_error("device " + std::to_string(device) + ": " + reason);
  }
  checked = device;
}

void* current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("torch has no current stream on device " + std::to_string(device));
  }
  return stream;
}

}  // namespace moe_int4::gpu
