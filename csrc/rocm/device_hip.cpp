// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include <sstream>
#include <stdexcept>

#include "device.h"
#include "hip_runtime.h"

namespace moe_int4::gpu {

std::string build_info() { return "hip " + ::gpu::held_archs(); }

std::string refusal(const std::string& arch) {
  std::istringstream held(::gpu::held_archs());
  for (std::string one; held >> one;) {
    if (one == arch) return "";
  }
  return "hybrid_w4a16 has no kernels for " + arch + "; it was built for " + ::gpu::held_archs();
}

void load_device(int device, const std::string& arch) {
  ::gpu::load_kernels(device, arch, current_stream(device));
}

void require_current_device() {}  // every launch looks up the current device's own function

// Looked up by name, so that one library works with every build of torch. Only ROCm builds have the
// function, under the name that it has in CUDA builds.
void* current_stream(int device) {
  static const auto get = reinterpret_cast<int (*)(int32_t, void**)>(
      ::gpu::find_symbol("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (get == nullptr) return stream;  // a torch for CPUs: only the default stream
  if (get(device, &stream) != 0) {
    throw std::runtime_error("torch has no current stream on device " + std::to_string(device));
  }
  return stream;
}

}  // namespace moe_int4::gpu
