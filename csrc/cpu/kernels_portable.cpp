// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The fp32 kernel in portable C++; the compiler's vector extensions map it to SSE2 or NEON.
#define MOE_INT4_LANES 4
#include "kernels_fma.h"

namespace moe_int4::cpu {

const Kernel kPortable = {"portable", row_bytes, as_many_rows, scratch_bytes, prepare, multiply};
const Kernel kPortableFew = {"portable_few", row_bytes, as_many_rows,
                             scratch_bytes,  prepare,   multiply_as_few};

const Epilogue kPortableEpilogue = kEpilogue;

}  // namespace moe_int4::cpu
