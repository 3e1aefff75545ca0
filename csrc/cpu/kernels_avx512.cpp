// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The fp32 kernel for AVX-512.
#define MOE_INT4_LANES 16
#include "kernels_fma.h"

namespace moe_int4::cpu {

const Kernel kAvx512 = {"avx512", row_bytes, as_many_rows, scratch_bytes, prepare, multiply};
const Kernel kAvx512Few = {"avx512_few",  row_bytes, as_many_rows,
                           scratch_bytes, prepare,   multiply_as_few};

const Epilogue kAvx512Epilogue = kEpilogue;

}  // namespace moe_int4::cpu
