// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "build_info.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "gpu_compat.cuh"

namespace moe_int4::gpu {
namespace {

#if defined(HYBRID_W4A16_HIP)
constexpr const char* kKind = "hip";

bool runs_on(const std::string& built, const std::string& device) { return built == device; }
#else
constexpr const char* kKind = "cuda";

// Machine code runs on its own major version from its minor version on, PTX on anything newer.
bool runs_on(const std::string& built, const std::string& device) {
  const size_t digits = built.find('_') + 1;
  const int from = std::atoi(built.c_str() + digits), at = std::atoi(device.c_str() + 3);
  return at >= from && (built.compare(0, 8, "compute_") == 0 || at / 10 == from / 10);
}
#endif

}  // namespace

std::string build_info() { return std::string(kKind) + " " + HYBRID_W4A16_GPU_ARCHS; }

void require_current_device() {
  // One device is used over and over: looking its name up costs more than a launch.
  thread_local int checked = -1;
  const int device = ::gpu::current_device();
  if (device == checked) return;
  const std::string arch = ::gpu::current_arch();
  std::istringstream built(HYBRID_W4A16_GPU_ARCHS);
  for (std::string one; built >> one;) {
    if (runs_on(one, arch)) {
      checked = device;
      return;
    }
  }
  throw std::runtime_error("hybrid_w4a16 holds no kernels for device " + std::to_string(device) +
                           ", a " + arch + "; it was built for " + HYBRID_W4A16_GPU_ARCHS);
}

}  // namespace moe_int4::gpu
