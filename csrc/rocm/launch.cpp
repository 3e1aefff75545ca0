// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "launch.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "entry_points.h"
#include "tuning.h"

namespace moe_int4 {
namespace {

#if defined(HYBRID_W4A16_CUDA)
constexpr Family kFamily = gpu::kAmdPath ? Family::kRdna : Family::kCuda;
#elif defined(HYBRID_W4A16_HIP)
constexpr Family kFamily = Family::kRdna;
#else
constexpr Family kFamily = Family::kHost;
#endif

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename DT>
constexpr DType dtype_of() {
  return std::is_same_v<DT, gpu::Half> ? DType::kHalf : DType::kBFloat16;
}

#define MOE_INT4_CASE(OP, NAME, DT, G, ZNAME, ZP, T)                                        \
  if (dtype == dtype_of<DT>() && w.group_size == G && (w.zeros != nullptr) == ZP && t == T) \
    return MOE_INT4_NAME(OP, NAME, G, ZNAME, T);

// The entry point for a call whose tokens (or rows of a block) share weights `t` at a time. Group
// sizes other than 32, 64 and 128 do not get here.
auto& gate_up_kernel(DType dtype, const Weights& w, int t) {
  MOE_INT4_FOR_ALL(MOE_INT4_CASE, gate_up)
  throw std::runtime_error("gate_up: no kernel");
}
auto& down_kernel(DType dtype, const Weights& w, int t) {
  MOE_INT4_FOR_ALL(MOE_INT4_CASE, down)
  throw std::runtime_error("down: no kernel");
}
auto& gemm_kernel(DType dtype, const Weights& w, int t) {
  MOE_INT4_FOR_ALL(MOE_INT4_CASE, gemm)
  throw std::runtime_error("gemm: no kernel");
}

// A row stride, given that kernels index within an expert in 32 bits, and by bytes within a row
// set.
int small(int64_t stride, int rows) {
  if (stride >= int64_t{1} << 26) {
    throw std::runtime_error("rows of weights lie 2^26 elements or more apart: not supported");
  }
  if (stride * rows > INT32_MAX) {
    throw std::runtime_error("an expert's weights span 2^31 elements or more: not supported");
  }
  return static_cast<int>(stride);
}

// Whether `tokens` rows of `stride` elements from `a` on go to the kernels for one activation row,
// which serve up to `most`; where those stream, they copy 16 bytes at a time.
bool goes_single(int tokens, int most, const void* a, int64_t stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(a) % 16 == 0 && stride % 8 == 0;
  return tokens <= most && (aligned || !kStreams);
}

// A grid's second or third dimension.
int grid_size(int size, const char* what) {
  if (size > 65535) {
    throw std::runtime_error(std::string(what) + ": a call takes at most 65535, got " +
                             std::to_string(size));
  }
  return size;
}

}  // namespace

void launch_gemm(const GemmArgs& args, void* stream) {
  const Weights& w = args.w;
  if (args.num_blocks == 0) return;
  const int blocks = ceil_div(w.k, kBlockK), tiles = ceil_div(w.n, kRowsPerWave);
  const int waves = waves_sharing_k(tuning(kFamily, blocks), blocks, 1,
                                    int64_t{tiles} * args.num_blocks, args.cu_count);
  const int rows = args.block_size_m == 1 ? 1 : kMaxSlots;
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
  const int blocks = ceil_div(w.k, kBlockK), tiles = ceil_div(inter, kRowGroups);
  const Tuning& tuned = tuning(kFamily, blocks);
  const bool single = goes_single(r.num_tokens, tuned.gate_up_single, args.a, args.a_stride_m);
  const int tokens = single ? 1 : kMaxSlots;
  const bool stream = single && kStreams;
  const int waves = waves_sharing_k(tuned, blocks, stream ? kWindowBlocks : 1,
                                    int64_t{tiles} * r.top_k * r.num_tokens, args.cu_count);
  const int wave_lds = stream ? stream_lds_bytes_per_wave(ceil_div(blocks, waves), 1)
                              : lds_bytes_per_wave(tokens, r.num_tokens);
  gpu::launch(gate_up_kernel(args.dtype, w, tokens),
              {tiles, grid_size(r.top_k, "top_k"), grid_size(r.num_tokens, "tokens"),
               waves * gpu::kWaveSize, waves * wave_lds + (stream ? kStreamZeroBytes : 0), true},
              queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, inter, w.k,
              args.c, args.c_stride_m, r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m, r.expert_map,
              r.map_size, r.num_tokens, r.top_k, static_cast<int>(args.activation), args.alpha,
              args.beta, args.limit, waves, wave_lds, blocks, ceil_div(blocks, waves));
}

void launch_down(const DownArgs& args, void* queue) {
  const Weights& w = args.w;
  const Routing& r = args.routing;
  if (r.num_tokens == 0) return;
  const int blocks = ceil_div(w.k, kBlockK);
  const Tuning& tuned = tuning(kFamily, blocks);
  const bool single = goes_single(r.num_tokens, tuned.down_single, args.a, args.a_stride_m);
  const int tokens = single ? 1 : kMaxSlots;
  const int block_tokens = r.num_tokens < tokens ? r.num_tokens : tokens;
  const bool stream = single && kStreams;
  int waves = single ? waves_of_single_down(tuned, r.num_tokens) : tuned.down_waves;
  int log2_k_slices, wave_lds, lds;
  for (;; waves /= 2) {  // until the device has the LDS
    log2_k_slices = log2_down_k_slices(tuned, blocks, waves, block_tokens * r.top_k);
    wave_lds = stream ? stream_lds_bytes_per_wave(ceil_div(blocks, 1 << log2_k_slices),
                                                  ceil_div(r.top_k, waves >> log2_k_slices))
                      : lds_bytes_per_wave(tokens, r.num_tokens);
    lds = waves * wave_lds + (stream ? kStreamZeroBytes : 0);
    if (!stream || waves == 1 || lds <= gpu::max_lds_bytes()) break;
  }
  gpu::launch(
      down_kernel(args.dtype, w, tokens),
      {ceil_div(w.n, kRowsPerWave), grid_size(ceil_div(r.num_tokens, tokens), "blocks of tokens"),
       1, waves * gpu::kWaveSize, lds, true},
      queue, args.a, args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
      static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n), w.zeros,
      w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, w.n, w.k, args.c, args.c_stride_m,
      r.ids, r.ids_are_int64 ? 1 : 0, r.ids_stride_m, r.expert_map, r.map_size, r.num_tokens,
      r.top_k, args.topk_weights, args.tw_stride_m, waves, wave_lds, blocks,
      ceil_div(blocks, 1 << log2_k_slices), log2_k_slices);
}

}  // namespace moe_int4
