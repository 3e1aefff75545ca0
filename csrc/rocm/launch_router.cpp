// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include <stdexcept>
#include <type_traits>

#include "entry_points_router.h"
#include "launch.h"

namespace moe_int4 {
namespace {

constexpr int kWaves = kRouterThreads / gpu::kWaveSize;
static_assert(kWaves >= kRouterTokens, "one wave selects the experts of each token");

decltype(ROUTER_NAME(f16, 16, 1))& kernel_for(const RouterArgs& args) {
  const bool half = args.dtype == DType::kHalf;
  const int bits = args.w_is_float ? 32 : 16, slots = args.m == 1 ? 1 : args.m <= 4 ? 4 : 8;
#define ROUTER_CASE(NAME, DT, BITS, T)                                       \
  if (half == std::is_same_v<DT, gpu::Half> && bits == BITS && slots == T) { \
    return ROUTER_NAME(NAME, BITS, T);                                       \
  }
  ROUTER_FOR_ALL(ROUTER_CASE)
  throw std::runtime_error("fused_moe_router_topk: no kernel");
}

}  // namespace

void launch_router(const RouterArgs& args, void* stream) {
  if (args.m == 0) return;
  // About one block per compute unit: its waves share rows where there are few.
  int rows = 1;
  while (rows < kWaves && rows * args.cu_count < args.experts) rows *= 2;
  const int blocks = (args.experts + rows - 1) / rows;
  const int lds_bytes = (kWaves * kRouterTokens + 1) * 4;
  gpu::launch(kernel_for(args), {blocks, 1, 1, kRouterThreads, lds_bytes, true}, stream, args.a,
              args.a_stride_m, args.m, args.k, args.w, args.w_stride_e, args.experts, args.logits,
              args.logits_are_float, args.bias, args.padding, args.topk_weights, args.topk_ids,
              args.arrived, args.scoring == Scoring::kSigmoid, args.renormalize, args.scale,
              args.top_k, kWaves, kWaves / rows,
              log2_logits_together(args.experts, args.logits_are_float), blocks);
}

}  // namespace moe_int4
