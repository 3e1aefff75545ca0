// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Choice of the instruction set, at run time.
#pragma once

#include <string>

#include "kernels.h"

namespace moe_int4::cpu {

// The kernels in force for weights of 4 or 8 bits.
const Kernels& kernels(int32_t bits);

// The fp32 kernels that go with them.
const Kernels& fp32_kernels();

// Names of the instruction sets that this processor offers, best first, separated by blanks.
std::string available_isas();

// Puts the named instruction set in force ("": the best one) and returns its name. Throws
// std::runtime_error when the name is unknown or the processor does not offer it.
std::string select_isa(const std::string& name);

}  // namespace moe_int4::cpu
