// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Which GPUs this library runs on, and what has to happen on one before kernels are started.
// Implemented by device_hip.cpp and device_cuda.cpp. Throws std::runtime_error.
#pragma once

#include <string>

namespace moe_int4::gpu {

// "hip" or "cuda", then the architectures that this library holds kernels for, separated by spaces:
// "hip gfx1100 gfx1151", "cuda sm_80 sm_90".
std::string build_info();

// Empty where kernels for `arch` ("gfx1151", "sm_90") are here, else a sentence that names both.
std::string refusal(const std::string& arch);

// Makes kernels ready on a device of torch, which is a GPU of architecture `arch`; HIP: loads them.
// Not while a graph is captured. A second call does nothing.
void load_device(int device, const std::string& arch);

// Fails when kernels cannot be started on the current device, naming it and what is held.
void require_current_device();

// torch's current stream on a device.
void* current_stream(int device);

}  // namespace moe_int4::gpu
