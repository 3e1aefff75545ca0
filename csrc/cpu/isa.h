// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// What the processor offers, and the instruction set in force.
#pragma once

#include <cstdint>
#include <string>

#include "moe_int4_args.h"

namespace moe_int4::cpu {

struct InstructionSet;  // tuning.h

// Whether this processor, under this operating system, runs the kernels of an instruction set.
bool always();
bool has_avx2();
bool has_avx512();
bool has_avx512_vnni();
bool has_avx512_bf16();
bool has_amx();

// The instruction set in force.
const InstructionSet& instruction_set();

// Names of the instruction sets that this library can use on this processor, best first, separated
// by blanks.
std::string available_isas();

// Puts the named instruction set in force ("": the best one) and returns its name. Throws
// std::runtime_error when the name is unknown or the instruction set is not available.
std::string select_isa(const std::string& name);

// The kernels that run under the instruction set in force, a line each: the name, and from how many
// rows of an expert on it runs. For example "avx512_vnni 1\namx_int8 2\namx_bf16 17".
std::string kernels_by_rows(int32_t group_size, DType dtype);

}  // namespace moe_int4::cpu
