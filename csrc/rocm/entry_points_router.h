// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Names and arguments of the router kernel's entry points, as in entry_points.h. A name states the
// dtype of activations, the bits of a weight and for how many tokens it has room:
// moe_router_topk_bf16_w16_t8. Arguments are those of RouterArgs (moe_router_args.h); in addition
//   waves          waves of 32 in the block
//   k_slices       waves that share a row of weights; waves / k_slices rows per block
//   log2_together  log2_logits_together
// Grid: blocks for all rows, 1, 1.
#pragma once

#include "gpu_compat.cuh"
#include "moe_router_args.h"

#define ROUTER_ARGS                                                                                \
  const void *a, int64_t a_stride_m, int m, int k, const void *w, int64_t w_stride_e, int experts, \
      void *logits, int logits_are_float, const float *bias, const uint8_t *padding,               \
      float *topk_weights, int32_t *topk_ids, int32_t *arrived, int sigmoid, int renormalize,      \
      float scale, int top_k, int waves, int k_slices, int log2_together, int blocks
#define ROUTER_VALUES                                                                       \
  a, a_stride_m, m, k, w, w_stride_e, experts, logits, logits_are_float, bias, padding,     \
      topk_weights, topk_ids, arrived, sigmoid, renormalize, scale, top_k, waves, k_slices, \
      log2_together, blocks

// X(dtype name, dtype tag, bits of a weight, T)
#define ROUTER_FOR_T(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 4) X(__VA_ARGS__, 8)
#define ROUTER_FOR_ALL(X)             \
  ROUTER_FOR_T(X, f16, gpu::Half, 16) \
  ROUTER_FOR_T(X, f16, gpu::Half, 32) \
  ROUTER_FOR_T(X, bf16, gpu::BFloat16, 16) ROUTER_FOR_T(X, bf16, gpu::BFloat16, 32)

#define ROUTER_NAME(NAME, BITS, T) moe_router_topk_##NAME##_w##BITS##_t##T
constexpr int kRouterThreads = 256;
#define ROUTER_DECLARE(NAME, DT, BITS, T) \
  GPU_DECLARE(kRouterThreads, ROUTER_NAME(NAME, BITS, T), ROUTER_ARGS)
ROUTER_FOR_ALL(ROUTER_DECLARE)
