// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Arguments of fused_moe_router_topk: router logits, scores and the top-k experts of each token.
#pragma once

#include <cstdint>

#include "moe_int4_args.h"

namespace moe_int4 {

enum class Scoring : int32_t { kSoftmax = 0, kSigmoid = 1 };

constexpr int32_t kRouterTokens = 8;     // most tokens per call
constexpr int32_t kRouterExperts = 512;  // most experts
constexpr int32_t kRouterTopK = 32;      // most experts per token

// Strides are in elements; the innermost stride is 1. Matrices without a stride are contiguous.
//   logit[m, e] = round(a[m] . w[e]), summed in fp32
//   score[m]    = softmax(logit[m]) or sigmoid(logit[m]); 0 where it is not finite
//   ids[m]      = the top_k experts with the largest score + bias, largest first, ties by number
//   weights[m]  = score[m, ids[m]] * scale, divided by their sum if renormalize
struct RouterArgs {
  DType dtype;
  const void* a;  // [M, K]
  int64_t a_stride_m;
  int32_t m, k;   // k: a multiple of 8
  const void* w;  // [E, K], rows at multiples of 16 bytes
  int64_t w_stride_e;
  bool w_is_float;  // otherwise DType
  int32_t experts;
  void* logits;  // [M, E], written
  bool logits_are_float;
  const float* bias;       // [E] or null
  const uint8_t* padding;  // [M] or null: tokens whose ids become -1
  float* topk_weights;     // [M, top_k]
  int32_t* topk_ids;       // [M, top_k]
  int32_t* arrived;        // 0 before and after the call; not used on the CPU
  Scoring scoring;
  bool renormalize;
  float scale;
  int32_t top_k;
  int32_t cu_count;
};

// How many neighbouring logits a lane of vLLM's softmax kernel holds: powers of two take 16 bytes,
// other multiples of 64 two logits. Sums in the same order have the same bits. vLLM has other
// kernels for other numbers of experts, whose order this does not repeat.
constexpr int32_t log2_logits_together(int32_t experts, bool logits_are_float) {
  if ((experts & (experts - 1)) == 0) return logits_are_float ? 2 : 3;
  return experts % 64 == 0 ? 1 : 0;
}

}  // namespace moe_int4
