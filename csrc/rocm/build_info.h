// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#pragma once

#include <string>

namespace moe_int4::gpu {

// "hip" or "cuda", then the architectures that this library holds kernels for, separated by spaces:
// "hip gfx1100 gfx1151", "cuda sm_80 sm_90 compute_90" (the last one: PTX, for anything newer).
std::string build_info();

// Throws std::runtime_error naming both sides when the current device is not one of them.
void require_current_device();

}  // namespace moe_int4::gpu
