// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "launch.h"

#include <stdexcept>
#include <string>

#include "kernel_lookup.h"
#include "plan.h"

namespace moe_int4 {
namespace {

MOE_INT4_LOOKUP(gate_up)
MOE_INT4_LOOKUP(down)
MOE_INT4_LOOKUP(gemm)
#if GPU_HAS_MMA
MOE_INT4_LOOKUP(grouped_gate_up)
MOE_INT4_LOOKUP(multi_gate_up)
MOE_INT4_LOOKUP(grouped_down)
MOE_INT4_LOOKUP(wide_down)
#endif

// The inputs of the launch rule in plan.h.
Problem problem(const Routing& r, const Weights& w, int rows, const void* a, int64_t a_stride,
                int cu_count, bool row_invariant) {
  const bool aligned = reinterpret_cast<uintptr_t>(a) % 16 == 0 && a_stride % 8 == 0;
  return {r.num_tokens,           r.top_k,      w.num_experts, rows,
          ceil_div(w.k, kBlockK), aligned,      cu_count,      gpu::max_lds_bytes(),
          0.5 * w.n * w.k,        row_invariant};
}

// Rows of a grid's y dimension for `blocks` blocks of the shared expert.
int shared_rows(int64_t blocks, int64_t grid_x, int64_t grid_z) {
  return static_cast<int>((blocks + grid_x * grid_z - 1) / (grid_x * grid_z));
}
int shared_rows(const SharedGateUp& shared, int tokens, bool grouped, int grid_x, int grid_z) {
  if (shared.w.q == nullptr) return 0;
  const int tile_rows = gpu::kWaveSize / shared_gate_up_lanes(grouped);
  const int tiles = ceil_div(shared.w.n / 2, tile_rows) + (shared.gate != nullptr ? 1 : 0);
  const int passes = ceil_div(tokens, shared_slots(tokens, shared.w.bits));
  return shared_rows(int64_t{tiles} * passes, grid_x, grid_z);
}
int shared_rows(const SharedDown& shared, int tokens, int grid_x) {
  if (shared.w.q == nullptr) return 0;
  const int passes = ceil_div(tokens, shared_slots(tokens, shared.w.bits));
  return shared_rows(int64_t{ceil_div(shared.w.n, kRowsPerWave)} * passes, grid_x, 1);
}
int log2_group(const Weights& w) {
  int log2 = 5;
  while (1 << log2 < w.group_size) ++log2;
  return log2;
}

#define MOE_INT4_SHARED_WEIGHTS_OF(W)                                                           \
  W.q, small(W.q_stride_n, W.n), W.bits, log2_group(W), static_cast<const uint16_t*>(W.scales), \
      small(W.s_stride_n, W.n), W.zeros, small(W.z_stride_n8, W.n / 8)
#define MOE_INT4_SHARED_GATE_UP_OF(S, Y, X)                                         \
  MOE_INT4_SHARED_WEIGHTS_OF(S.w), S.w.n / 2, static_cast<const uint16_t*>(S.gate), \
      static_cast<uint16_t*>(S.c), S.c_stride_m, S.factors, Y, X
#define MOE_INT4_SHARED_DOWN_OF(S, Y, X)                                                   \
  MOE_INT4_SHARED_WEIGHTS_OF(S.w), static_cast<const uint16_t*>(S.a), S.a_stride_m, S.w.k, \
      S.factors, static_cast<uint16_t*>(S.c), S.c_stride_m, Y, X

// Checks the second or third dimension of a grid.
int grid_size(int size, const char* what) {
  if (size > 65535) {
    throw std::runtime_error(std::string(what) + ": expected at most 65535 per call, got " +
                             std::to_string(size));
  }
  return size;
}

}  // namespace

void launch_gemm(const GemmArgs& args, void* stream) {
  const Weights& w = args.w;
  if (args.num_blocks == 0) return;
  const int blocks = ceil_div(w.k, kBlockK), tiles = ceil_div(w.n, kRowsPerWave);
  const int deciding_blocks = args.row_invariant ? 1 : args.num_blocks;
  const int waves = gemm_waves(blocks, int64_t{tiles} * deciding_blocks, args.cu_count);
  const int rows = args.block_size_m == 1 && !args.row_invariant ? 1 : kMaxSlots;
  const int wave_lds = lds_bytes_per_wave(rows, args.block_size_m);
  gpu::launch(gemm_kernel(args.dtype, w, rows),
              {tiles, grid_size(args.num_blocks, "blocks of rows"), 1, waves * gpu::kWaveSize,
               waves * wave_lds, false},
              stream, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, w.n, w.k, args.c,
              args.c_stride_m, args.expert_ids, args.sorted_token_ids, args.block_size_m,
              args.num_rows, args.top_k, waves, wave_lds, blocks, ceil_div(blocks, waves));
}

void launch_gate_up(const GateUpArgs& args, void* queue) {
  const Weights& w = args.w;
  const Routing& r = args.routing;
  if (r.num_tokens == 0) return;
  const int inter = w.n / 2;
  const Problem p =
      problem(r, w, inter, args.a, args.a_stride_m, args.cu_count, args.row_invariant);
  const GateUpPlan plan = args.plan.size == 0 ? gate_up_plan(p) : parse_gate_up_plan(args.plan, p);
  const int lds = gate_up_lds(p, plan), threads = plan.waves * gpu::kWaveSize;
#if GPU_HAS_MMA
  if (plan.kernel == Kernel::kGrouped) {
    const int lists = most_lists(p.block_pairs(), p.experts, plan.slots);
    const int grid_x = ceil_div(inter, kGateUpRows * kRowGroups * plan.waves * plan.row_tiles);
    const int grid_z = grid_size(ceil_div(r.num_tokens, kGroupTokens), "blocks of tokens");
    const int shared_y = shared_rows(args.shared, r.num_tokens, true, grid_x, grid_z);
    gpu::launch(grouped_gate_up_kernel(args.dtype, w, plan.slots <= 8 ? 8 : 16),
                {grid_x, grid_size(lists + shared_y, "lists of pairs"), grid_z, threads, lds, true},
                queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
                static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
                w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, inter, w.k,
                args.c, args.c_stride_m, r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m,
                r.expert_map, r.map_size, r.num_tokens, r.top_k, static_cast<int>(args.activation),
                args.alpha, args.beta, args.limit, plan.waves, plan.slots, p.blocks, plan.row_tiles,
                MOE_INT4_SHARED_GATE_UP_OF(args.shared, shared_y, grid_x));
    return;
  }
#endif
#if GPU_HAS_MMA
  const bool streams = plan.kernel != Kernel::kEights;
  const int wave_lds = streams ? gate_up_stream_lds(p, plan) : lds / plan.waves;
  const int grid_x = ceil_div(inter, kRowGroups * plan.stream_tiles());
#else
  const int wave_lds = lds / plan.waves, grid_x = ceil_div(inter, kRowGroups);
#endif
  const int grid_z = grid_size(r.num_tokens, "tokens");
  const int shared_y = shared_rows(args.shared, r.num_tokens, false, grid_x, grid_z);
#if GPU_HAS_MMA
  auto& kernel = plan.kernel == Kernel::kWide
                     ? multi_gate_up_kernel(args.dtype, w, 1)
                     : gate_up_kernel(args.dtype, w, streams ? 1 : kMaxSlots);
#else
  auto& kernel = gate_up_kernel(args.dtype, w, plan.kernel == Kernel::kPairs ? 1 : kMaxSlots);
#endif
  gpu::launch(kernel, {grid_x, grid_size(r.top_k + shared_y, "top_k"), grid_z, threads, lds, true},
              queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, inter, w.k,
              args.c, args.c_stride_m, r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m, r.expert_map,
              r.map_size, r.num_tokens, r.top_k, static_cast<int>(args.activation), args.alpha,
              args.beta, args.limit, plan.waves, wave_lds, p.blocks, ceil_div(p.blocks, plan.waves),
              MOE_INT4_SHARED_GATE_UP_OF(args.shared, shared_y, grid_x));
}

void launch_down(const DownArgs& args, void* queue) {
  const Weights& w = args.w;
  const Routing& r = args.routing;
  if (r.num_tokens == 0) return;
  Problem p = problem(r, w, w.n, args.a, args.a_stride_m, args.cu_count, args.row_invariant);
  // fork: begin overlay
  p.shared = args.shared.w.q != nullptr && !args.row_invariant;
  // fork: end
  const DownPlan plan = args.plan.size == 0 ? down_plan(p) : parse_down_plan(args.plan, p);
  const int lds = down_lds(p, plan), wave_lds = down_wave_lds(p, plan);
  const int threads = plan.waves * gpu::kWaveSize;
  const int grid_x = ceil_div(w.n, plan.rows());
  const int shared_y = shared_rows(args.shared, r.num_tokens, grid_x);
  const int blocks_per_wave = ceil_div(p.blocks, plan.k_slices);
  int log2_k_slices = 0;
  while (1 << log2_k_slices < plan.k_slices) ++log2_k_slices;
#if GPU_HAS_MMA
  if (plan.grouped()) {
    gpu::launch(
        plan.kernel == Kernel::kWide ? wide_down_kernel(args.dtype, w, 8)
                                     : grouped_down_kernel(args.dtype, w, 8),
        {grid_x, grid_size(ceil_div(r.num_tokens, kGroupTokens) + shared_y, "blocks of tokens"), 1,
         threads, lds, true},
        queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
        static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n), w.zeros,
        w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, w.n, w.k, args.c,
        args.c_stride_m, r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m, r.expert_map, r.map_size,
        r.num_tokens, r.top_k, args.topk_weights, args.tw_stride_m, plan.waves, plan.slots,
        wave_lds, p.blocks, blocks_per_wave, log2_k_slices,
        MOE_INT4_SHARED_DOWN_OF(args.shared, shared_y, grid_x));
    return;
  }
#endif
  const int tokens = plan.kernel == Kernel::kPairs ? 1 : kMaxSlots;
  gpu::launch(down_kernel(args.dtype, w, tokens),
              {grid_x, grid_size(ceil_div(r.num_tokens, tokens) + shared_y, "blocks of tokens"), 1,
               threads, lds, true},
              queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, w.n, w.k, args.c,
              args.c_stride_m, r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m, r.expert_map,
              r.map_size, r.num_tokens, r.top_k, args.topk_weights, args.tw_stride_m, plan.waves,
              wave_lds, p.blocks, blocks_per_wave, log2_k_slices,
              MOE_INT4_SHARED_DOWN_OF(args.shared, shared_y, grid_x));
}

}  // namespace moe_int4
