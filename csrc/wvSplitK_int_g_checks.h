// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Argument checks of wvSplitK_int_g and wvSplitK_int_g_rescore, as in moe_int4_checks.h.
#pragma once

#include <cmath>
#include <limits>

#include "moe_int4_checks.h"

namespace moe_int4 {

constexpr int32_t kDenseRows = 16;  // most activation rows per call

inline int32_t check_rows(const ArgumentChecks& checks, const Tensor& a, int64_t most) {
  checks.activation("a", a, {{"M"}, {"K"}});
  return checks.integer("a", a.size(0), 0, most);
}

inline DenseArgs check_dense(DeviceType device, const Tensor& a, const Tensor& w,
                             const Tensor& scales, const Tensor& c, int64_t cu_count,
                             int64_t group_size, int64_t bits,
                             const std::optional<Tensor>& zero_points) {
  const ArgumentChecks checks("wvSplitK_int_g", device, a);
  DenseArgs args{};
  args.dtype = checks.dtype();
  // The CPU's kernels take any number of rows.
  constexpr int64_t kAnyRows = std::numeric_limits<int32_t>::max();
  args.m = check_rows(checks, a, device == DeviceType::CPU ? kAnyRows : kDenseRows);
  args.a = a.const_data_ptr();
  args.a_stride_m = a.stride(0);
  const int64_t k = a.size(1);
  if (bits != 4 && bits != 8) checks.fail("bits", "4 or 8", std::to_string(bits));
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    checks.fail("group_size", "32, 64 or 128", std::to_string(group_size));
  }
  if (k <= 0 || k % group_size != 0) {
    checks.fail("a", "columns a multiple of group_size " + std::to_string(group_size),
                std::to_string(k));
  }
  // w counts words of eight nibbles (4 bits) or bytes (8 bits).
  const int64_t columns = bits == 4 ? k / 8 : k, per_16_bytes = bits == 4 ? 4 : 16;
  checks.tensor("w", w, {bits == 4 ? ScalarType::Int : ScalarType::Byte},
                {{"N"}, {bits == 4 ? "K//8" : "K", columns}});
  Weights& out = args.w;
  out.bits = static_cast<int32_t>(bits);
  out.num_experts = 1;
  out.n = checks.positive("w", w.size(0));
  out.k = checks.positive("a", k);
  out.group_size = static_cast<int32_t>(group_size);
  out.q = static_cast<const uint32_t*>(w.const_data_ptr());
  if (out.n > 1 && (w.stride(0) < columns || w.stride(0) % per_16_bytes != 0)) {
    checks.fail("w", "row stride a multiple of 16 bytes and at least " + std::to_string(columns),
                std::to_string(w.stride(0)));
  }
  out.q_stride_n = bits == 4 ? w.stride(0) : w.stride(0) / 4;
  if (reinterpret_cast<uintptr_t>(out.q) % 16 != 0) {
    checks.fail(
        "w", "data aligned to 16 bytes",
        "an address " + std::to_string(reinterpret_cast<uintptr_t>(out.q) % 16) + " past one");
  }
  const int64_t groups = k / group_size;
  checks.activation("scales", scales, {{"N", out.n}, {"K//G", groups}});
  out.scales = scales.const_data_ptr();
  out.s_stride_n = scales.stride(0);
  if (zero_points.has_value()) {
    if (bits == 8) checks.fail("zero_points", "None with 8 bits", "a tensor");
    if (out.n % 8 != 0) {
      checks.fail("w", "N a multiple of 8 with zero_points", std::to_string(out.n));
    }
    checks.tensor("zero_points", *zero_points, {ScalarType::Int},
                  {{"N//8", out.n / 8}, {"K//G", groups}});
    out.zeros = static_cast<const uint32_t*>(zero_points->const_data_ptr());
    out.z_stride_n8 = zero_points->stride(0);
  }
  checks.output("c", c, {{"M", args.m}, {"N", out.n}});
  args.c = c.mutable_data_ptr();
  args.c_stride_m = c.stride(0);
  args.cu_count = checks.positive("cu_count", cu_count);
  args.row_invariant = row_invariance();
  return args;
}

inline RescoreArgs check_rescore(DeviceType device, const Tensor& a, const Tensor& w,
                                 const Tensor& errors, const Tensor& c, const Tensor& partials,
                                 double window, double bound) {
  const ArgumentChecks checks("wvSplitK_int_g_rescore", device, a);
  RescoreArgs args{};
  args.dtype = checks.dtype();
  args.m = check_rows(checks, a, kDenseRows);
  args.a = a.const_data_ptr();
  args.a_stride_m = a.stride(0);
  args.k = checks.positive("a", a.size(1));
  if (args.k % 8 != 0) checks.fail("a", "columns a multiple of 8", std::to_string(args.k));
  checks.activation("w", w, {{"N"}, {"K", args.k}});
  args.n = checks.positive("w", w.size(0));
  args.w = w.const_data_ptr();
  args.w_stride_n = w.stride(0);
  if (args.n > 1 && (args.w_stride_n < args.k || args.w_stride_n % 8 != 0)) {
    checks.fail("w", "row stride a multiple of 8 and at least " + std::to_string(args.k),
                std::to_string(args.w_stride_n));
  }
  if (reinterpret_cast<uintptr_t>(args.w) % 16 != 0) {
    checks.fail(
        "w", "data aligned to 16 bytes",
        "an address " + std::to_string(reinterpret_cast<uintptr_t>(args.w) % 16) + " past one");
  }
  checks.tensor("errors", errors, {ScalarType::Float}, {{"N", args.n}});
  args.errors = static_cast<const float*>(errors.const_data_ptr());
  checks.output("c", c, {{"M", args.m}, {"N", args.n}});
  args.c = c.mutable_data_ptr();
  args.c_stride_m = c.stride(0);
  checks.tensor("partials", partials, {ScalarType::Float},
                {{"M", args.m}, {"2 * parts", 2 * kRescoreParts}});
  args.partials = static_cast<float*>(partials.mutable_data_ptr());
  args.p_stride_m = partials.stride(0);
  if (args.m > 1 && args.p_stride_m < 2 * kRescoreParts) {
    checks.fail("partials", "row stride of at least " + std::to_string(2 * kRescoreParts),
                std::to_string(args.p_stride_m));
  }
  const auto limit = [&](const char* argument, double value) {
    if (!(value >= 0) || std::isinf(value)) {
      checks.fail(argument, "a finite number of at least 0", std::to_string(value));
    }
    return static_cast<float>(value);
  };
  args.window = limit("window", window);
  args.bound = limit("bound", bound);
  return args;
}

}  // namespace moe_int4
