// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Which GPUs this library supports, and how kernels are made ready on one. Errors are
// std::runtime_error.
// fork: begin overlay
// Implemented by device_hip.cpp and device_cuda.cpp.
// fork: end
#pragma once

#include <string>

namespace moe_int4::gpu {

// The kind of device, then the architectures that this library has kernels for, separated by
// spaces: "hip gfx1100 gfx1151".
// fork: begin overlay
// Of a library for CUDA: "cuda sm_80 sm_90".
// fork: end
std::string build_info();

// Empty if the library has kernels for `arch`, such as "gfx1151", else a sentence that names
// `arch` and what the library was built for.
std::string refusal(const std::string& arch);

// Makes kernels ready on a torch device, a GPU of architecture `arch`; HIP loads them. Must not be
// called while a graph is captured. A second call does nothing.
void load_device(int device, const std::string& arch);

// Throws if kernels cannot run on the current device; the message names it and what the library was
// built for.
void require_current_device();

// torch's current stream on a device.
void* current_stream(int device);

}  // namespace moe_int4::gpu
