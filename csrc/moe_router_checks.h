// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Argument checks of fused_moe_router_topk, as in moe_int4_checks.h.
#pragma once

#include <cmath>

#include "moe_int4_checks.h"
#include "moe_router_args.h"

namespace moe_int4 {

inline RouterArgs check_router(DeviceType device, const Tensor& a, const Tensor& w,
                               const Tensor& logits, const Tensor& topk_weights,
                               const Tensor& topk_ids, const Tensor& arrived,
                               const std::string& scoring, bool renormalize, int64_t cu_count,
                               const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& is_padding, double scale) {
  const ArgumentChecks check("fused_moe_router_topk", device, a);
  RouterArgs out{};
  out.dtype = check.dtype();
  check.activation("a", a, {{"M"}, {"K"}});
  out.m = check.integer("a", a.size(0), 0, kRouterTokens);
  out.k = check.positive("a", a.size(1));
  if (out.k % 8 != 0) check.fail("a", "columns a multiple of 8", std::to_string(out.k));
  out.a = a.const_data_ptr();
  out.a_stride_m = a.stride(0);

  check.tensor("w", w, {a.scalar_type(), ScalarType::Float}, {{"E"}, {"K", out.k}});
  out.experts = check.integer("w", w.size(0), 1, kRouterExperts);
  out.w = w.const_data_ptr();
  out.w_is_float = w.scalar_type() == ScalarType::Float;
  out.w_stride_e = w.stride(0);
  if (out.experts > 1 && (out.w_stride_e < out.k || out.w_stride_e % 8 != 0)) {
    check.fail("w", "row stride a multiple of 8 and at least " + std::to_string(out.k),
               std::to_string(out.w_stride_e));
  }
  if (reinterpret_cast<uintptr_t>(out.w) % 16 != 0) {
    check.fail(
        "w", "data aligned to 16 bytes",
        "an address " + std::to_string(reinterpret_cast<uintptr_t>(out.w) % 16) + " past one");
  }

  const auto contiguous = [&](const char* name, const Tensor& t, int64_t columns) {
    if (t.size(0) > 1 && t.stride(0) != columns) {
      check.fail(name, "row stride " + std::to_string(columns), std::to_string(t.stride(0)));
    }
  };
  check.tensor("logits", logits, {a.scalar_type(), ScalarType::Float},
               {{"M", out.m}, {"E", out.experts}});
  contiguous("logits", logits, out.experts);
  out.logits = logits.mutable_data_ptr();
  out.logits_are_float = logits.scalar_type() == ScalarType::Float;
  check.tensor("topk_weights", topk_weights, {ScalarType::Float}, {{"M", out.m}, {"top_k"}});
  out.top_k = check.integer("topk_weights", topk_weights.size(1), 1,
                            out.experts < kRouterTopK ? out.experts : kRouterTopK);
  contiguous("topk_weights", topk_weights, out.top_k);
  out.topk_weights = static_cast<float*>(topk_weights.mutable_data_ptr());
  check.tensor("topk_ids", topk_ids, {ScalarType::Int}, {{"M", out.m}, {"top_k", out.top_k}});
  contiguous("topk_ids", topk_ids, out.top_k);
  out.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  check.tensor("arrived", arrived, {ScalarType::Int}, {{"1", 1}});
  out.arrived = static_cast<int32_t*>(arrived.mutable_data_ptr());

  if (scoring != "softmax" && scoring != "sigmoid") {
    check.fail("scoring", "softmax or sigmoid", "'" + scoring + "'");
  }
  out.scoring = scoring == "softmax" ? Scoring::kSoftmax : Scoring::kSigmoid;
  out.renormalize = renormalize;
  if (bias.has_value()) {
    check.tensor("bias", *bias, {ScalarType::Float}, {{"E", out.experts}});
    out.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (is_padding.has_value()) {
    check.tensor("is_padding", *is_padding, {ScalarType::Bool}, {{"M", out.m}});
    out.padding = static_cast<const uint8_t*>(is_padding->const_data_ptr());
  }
  if (!std::isfinite(scale)) check.fail("scale", "a finite number", std::to_string(scale));
  out.scale = static_cast<float>(scale);
  out.cu_count = check.positive("cu_count", cu_count);
  return out;
}

}  // namespace moe_int4
