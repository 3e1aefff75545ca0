// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// fused_moe_router_topk on the CPU: threads share the experts' logits, then one of them selects.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "moe_router_checks.h"
#include "tuning.h"

namespace moe_int4::cpu {
namespace {

class Router {
 public:
  explicit Router(const RouterArgs& args)
      : args_(args),
        kernels_(*instruction_set().epilogue),
        stride_((args.k + kDotBlock - 1) / kDotBlock * kDotBlock),
        a_(static_cast<size_t>(args.m * stride_)) {
    for (int32_t m = 0; m < args.m; ++m) {
      rows_[m] = a_.data() + m * stride_;
      kernels_.load(args.dtype, static_cast<const uint16_t*>(args.a) + m * args.a_stride_m, args.k,
                    a_.data() + m * stride_);
    }
  }

  void run() const {
    torch::stable::parallel_for(0, args_.experts, kExpertsPerTask,
                                [&](int64_t first, int64_t last) {
                                  for (int64_t e = first; e < last; ++e)
                                    find_logits(static_cast<int32_t>(e));
                                });
    for (int32_t m = 0; m < args_.m; ++m) select(m);
  }

 private:
  static constexpr int64_t kExpertsPerTask = 16;

  void find_logits(int32_t e) const {
    float sums[kRouterTokens];
    if (args_.w_is_float) {
      const float* w = static_cast<const float*>(args_.w) + e * args_.w_stride_e;
      for (int32_t m = 0; m < args_.m; ++m) sums[m] = dot(w, rows_[m]);
    } else {
      kernels_.dot(args_.dtype, static_cast<const uint16_t*>(args_.w) + e * args_.w_stride_e, rows_,
                   args_.m, args_.k, sums);
    }
    for (int32_t m = 0; m < args_.m; ++m) {
      const int64_t at = int64_t{m} * args_.experts + e;
      if (args_.logits_are_float) {
        static_cast<float*>(args_.logits)[at] = sums[m];
      } else {
        kernels_.store(args_.dtype, sums + m, 1, static_cast<uint16_t*>(args_.logits) + at);
      }
    }
  }

  // k is a multiple of 8: eight sums, so that the compiler can use vectors.
  float dot(const float* w, const float* a) const {
    float sums[8] = {};
    for (int32_t k = 0; k < args_.k; k += 8) {
      for (int32_t i = 0; i < 8; ++i) sums[i] += w[k + i] * a[k + i];
    }
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) +
           ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }

  void select(int32_t m) const {
    const int32_t experts = args_.experts;
    float score[kRouterExperts], choice[kRouterExperts];
    const int64_t row = int64_t{m} * experts;
    if (args_.logits_are_float) {
      std::copy_n(static_cast<const float*>(args_.logits) + row, experts, score);
    } else {
      kernels_.load(args_.dtype, static_cast<const uint16_t*>(args_.logits) + row, experts, score);
    }
    if (args_.scoring == Scoring::kSigmoid) {
      for (int32_t e = 0; e < experts; ++e) score[e] = 1.0f / (1.0f + std::exp(-score[e]));
    } else {
      float largest = -std::numeric_limits<float>::infinity();
      for (int32_t e = 0; e < experts; ++e) largest = score[e] > largest ? score[e] : largest;
      float sum = 0.0f;
      for (int32_t e = 0; e < experts; ++e) {
        score[e] = std::exp(score[e] - largest);
        sum += score[e];
      }
      const float inverse = 1.0f / sum;
      for (int32_t e = 0; e < experts; ++e) score[e] *= inverse;
    }
    for (int32_t e = 0; e < experts; ++e) {
      if (!std::isfinite(score[e])) score[e] = 0.0f;
      choice[e] = args_.bias == nullptr ? score[e] : score[e] + args_.bias[e];
      if (std::isnan(choice[e])) choice[e] = -std::numeric_limits<float>::infinity();
    }
    int32_t order[kRouterExperts];
    for (int32_t e = 0; e < experts; ++e) order[e] = e;
    std::partial_sort(order, order + args_.top_k, order + experts, [&](int32_t x, int32_t y) {
      return choice[x] > choice[y] || (choice[x] == choice[y] && x < y);
    });
    float scale = args_.scale;
    if (args_.renormalize) {
      float sum = 0.0f;
      for (int32_t i = 0; i < args_.top_k; ++i) sum += score[order[i]];
      scale /= sum > 0.0f ? sum : 1.0f;
    }
    const bool is_padding = args_.padding != nullptr && args_.padding[m] != 0;
    for (int32_t i = 0; i < args_.top_k; ++i) {
      args_.topk_weights[m * args_.top_k + i] = score[order[i]] * scale;
      args_.topk_ids[m * args_.top_k + i] = is_padding ? -1 : order[i];
    }
  }

  const RouterArgs& args_;
  const Epilogue& kernels_;
  const int64_t stride_;
  std::vector<float> a_;
  const float* rows_[kRouterTokens];
};

void router_op(const Tensor& a, const Tensor& w, const Tensor& logits, const Tensor& topk_weights,
               const Tensor& topk_ids, const Tensor& arrived, std::string scoring, bool renormalize,
               int64_t cu_count, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& is_padding, double scale) {
  const RouterArgs args =
      check_router(DeviceType::CPU, a, w, logits, topk_weights, topk_ids, arrived, scoring,
                   renormalize, cu_count, bias, is_padding, scale);
  if (args.m > 0) Router(args).run();
}

}  // namespace
}  // namespace moe_int4::cpu

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CPU, m) {
  m.impl("fused_moe_router_topk", TORCH_BOX(&moe_int4::cpu::router_op));
}
