// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The fp32 kernel for AVX2 and FMA.
#define MOE_INT4_LANES 8
#include "kernels_fma.h"

namespace moe_int4::cpu {

const Kernel kAvx2 = {"avx2", row_bytes, as_many_rows, scratch_bytes, prepare, multiply};
const Kernel kAvx2Few = {"avx2_few",    row_bytes, as_many_rows,
                         scratch_bytes, prepare,   multiply_as_few};

const Epilogue kAvx2Epilogue = kEpilogue;

}  // namespace moe_int4::cpu
