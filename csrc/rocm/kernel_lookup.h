// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// What the launchers of the MoE kernels share.
#pragma once

#include <stdexcept>
#include <string>

#include "entry_points.h"
#include "moe_int4_args.h"

namespace moe_int4 {

template <typename DT>
constexpr DType dtype_of() {
  return std::is_same_v<DT, gpu::Half> ? DType::kHalf : DType::kBFloat16;
}

#define MOE_INT4_CASE(OP, NAME, DT, G, ZNAME, ZP, T)                                        \
  if (dtype == dtype_of<DT>() && w.group_size == G && (w.zeros != nullptr) == ZP && t == T) \
    return MOE_INT4_NAME(OP, NAME, G, ZNAME, T);

// `OP`_kernel(dtype, w, t) selects the entry point for a call in which `t` tokens (or rows of a
// block) share weights. The checks have rejected group sizes other than 32, 64 and 128.
#define MOE_INT4_LOOKUP(OP)                                 \
  auto& OP##_kernel(DType dtype, const Weights& w, int t) { \
    MOE_INT4_FOR_ALL(MOE_INT4_CASE, OP)                     \
    throw std::runtime_error(#OP ": no kernel");            \
  }

// Converts a row stride to int. Kernels index within an expert in 32 bits, and within a row set in
// bytes.
inline int small(int64_t stride, int rows) {
  if (stride >= int64_t{1} << 26) {
    throw std::runtime_error(
        "w, scales and zero_points: expected a row stride below 2^26 elements, got " +
        std::to_string(stride));
  }
  if (stride * rows > INT32_MAX) {
    throw std::runtime_error(
        "w, scales and zero_points: expected fewer than 2^31 elements per expert, got " +
        std::to_string(stride * rows));
  }
  return static_cast<int>(stride);
}

}  // namespace moe_int4
