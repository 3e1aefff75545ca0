// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The processor's instruction sets, and the one that is selected.
#pragma once

#include <cstdint>
#include <string>

#include "moe_int4_args.h"

namespace moe_int4::cpu {

struct InstructionSet;  // tuning.h

// Whether this processor and its operating system run the kernels of an instruction set.
bool always();
bool has_avx2();
bool has_avx512();
bool has_avx512_vnni();
bool has_avx512_bf16();
bool has_amx();

// The selected instruction set.
const InstructionSet& instruction_set();

// Names of the instruction sets that this library can use on this processor, best first, separated
// by spaces.
std::string available_isas();

// Selects an instruction set by name ("": the best one) and returns its name. Throws
// std::runtime_error if the name is unknown or the instruction set is not available.
std::string select_isa(const std::string& name);

// The kernels of the selected instruction set, one per line: the name and the smallest number of
// rows of an expert for which it runs, for example "avx512_vnni 1\namx_int8 2\namx_bf16 17".
std::string kernels_by_rows(int32_t group_size, DType dtype);

}  // namespace moe_int4::cpu
