// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// down for tokens that share experts, see group_tile.cuh: a block computes R * kRowsPerWave output
// columns for kGroupTokens tokens. Its waves share the lists of pairs, and 2^log2_k_slices waves
// share the k of each list. A wave adds its results to its own sums in LDS, and the sums of the
// waves are added in wave order, so every run gives the same bits.
#include "entry_points.h"

#if GPU_HAS_MMA
#include "group_tile.cuh"
#include "shared_expert.cuh"

namespace moe_int4 {

constexpr int kRowsOf_grouped_down = 1, kRowsOf_wide_down = 2;  // R

// Processes every step-th list.
struct DownItems {
  PairLists lists;
  int row, step, list;

  GPU_DEVICE bool next(GroupItem& item) {
    if (list >= lists.count) return false;
    const int first = lists.starts[list];
    item = {lists.experts[list], first, lists.starts[list + 1] - first, row};
    list += step;
    return true;
  }
};

template <typename DT, int G, bool ZP, int R, int NB>
GPU_DEVICE void grouped_down(MOE_INT4_GROUPED_DOWN_ARGS) {
  if (gpu::block_y() < shared_y) {
    return shared_down<DT>(n, num_tokens, waves, MOE_INT4_SHARED_DOWN_VALUES);
  }
  using Tile = GroupTile<DT, G, ZP, R, NB, false>;
  constexpr int kRows = R * kRowsPerWave;
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int first_token = (gpu::block_y() - shared_y) * kGroupTokens;
  const int left = num_tokens - first_token, tokens = left < kGroupTokens ? left : kGroupTokens;
  const int first_row = gpu::block_x() * kRows;
  const int first = (gpu::wave() & ((1 << log2_k_slices) - 1)) * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  char* const lds = gpu::dynamic_lds();
  char* const ring = lds + gpu::wave() * wave_lds_bytes;
  char* const rows = ring + kGroupWeightBytes;
  const int results_at = kGroupWeightBytes + group_row_ring_bytes(R, slots);
  auto* const results = reinterpret_cast<float*>(ring + results_at);
  for (int i = gpu::lane(); i < tokens * kRows; i += gpu::kWaveSize) results[i] = 0.0f;

  // Before the previous grid has ended, as in down_stream.
  const PairLists lists =
      sort_pairs(router, first_token, tokens, slots, waves, lds + waves * wave_lds_bytes);
  const int share = gpu::wave() >> log2_k_slices, shares = waves >> log2_k_slices;
  const DownItems items = {lists, first_row + lane_row(), shares,
                           first < last ? share : lists.count};
  Tile tile(weights, {kRowsPerWave, kRowGroups, n, 0, 1}, first, last, k, ring, rows, slots, 1);
  const auto* const acts =
      static_cast<const uint16_t*>(a) + static_cast<int64_t>(first_token) * top_k * a_stride_m;
  const auto wait = [] {
    gpu::wait_previous_grid();
    gpu::allow_next_grid();
  };
  const auto row_of = [&](int i) {
    const Pair pair = lists.pairs[i];
    return acts + (pair.token() * top_k + pair.t()) * a_stride_m;
  };
  int token[NB][2];
  float weight[NB][2];
  bool twice = false;  // a token picked the expert twice
  const auto begin = [&](const GroupItem& item) {
    GPU_UNROLL
    for (int b = 0; b < NB; ++b) {
      GPU_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int slot = 8 * b + 2 * lane_k() + i;
        token[b][i] = -1;
        weight[b][i] = 1.0f;
        if (slot >= item.count) continue;
        const Pair pair = lists.pairs[item.first + slot];
        token[b][i] = pair.token();
        if (topk_weights != nullptr) {
          weight[b][i] = topk_weights[(first_token + pair.token()) * tw_stride_m + pair.t()];
        }
      }
    }
    const Pair* const pair = lists.pairs + item.first + gpu::lane();
    twice = gpu::wave_ballot(gpu::lane() + 1 < item.count && pair[0].token() == pair[1].token());
  };
  tile.run(items, wait, row_of, begin, [&](const GroupItem& item, const typename Tile::Sums& sums) {
    const auto add = [&](int b, int i) {
      GPU_UNROLL
      for (int m = 0; m < R; ++m) {
        float* const out = results + (token[b][i] * kRows + m * kRowsPerWave + lane_row());
        out[0] += weight[b][i] * sums[b][m][i];
        out[kRowGroups] += weight[b][i] * sums[b][m][2 + i];
      }
    };
    // One after another if a token occurs twice.
    for (int slot = twice ? 0 : item.count; slot <= item.count; ++slot) {
      GPU_UNROLL
      for (int b = 0; b < NB; ++b) {
        GPU_UNROLL
        for (int i = 0; i < 2; ++i) {
          const bool mine = twice ? 8 * b + 2 * lane_k() + i == slot : token[b][i] >= 0;
          if (mine && slot <= item.count && token[b][i] >= 0) add(b, i);
        }
      }
      gpu::wave_barrier();
    }
  });
  gpu::block_barrier();

  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < tokens * kRows; i += waves * gpu::kWaveSize) {
    const int column = first_row + i % kRows;
    if (column >= n) continue;
    float sum = 0.0f;
    for (int w = 0; w < waves; ++w) {
      sum += reinterpret_cast<const float*>(lds + w * wave_lds_bytes + results_at)[i];
    }
    static_cast<uint16_t*>(c)[(first_token + i / kRows) * c_stride_m + column] =
        Format<DT>::from_float(sum);
  }
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                           \
  extern "C" GPU_KERNEL(moe_int4::kMaxGroupWaves * 32) void MOE_INT4_NAME(                       \
      OP, NAME, G, ZNAME, T)(MOE_INT4_GROUPED_DOWN_ARGS) {                                       \
    moe_int4::grouped_down<DT, G, ZP, moe_int4::kRowsOf_##OP, T / 8>(                            \
        a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros,         \
        z_stride_e, z_stride_n8, num_experts, n, k, c, c_stride_m, ids, ids_are_int64,           \
        ids_stride_m, expert_map, map_size, num_tokens, top_k, topk_weights, tw_stride_m, waves, \
        slots, wave_lds_bytes, blocks, blocks_per_wave, log2_k_slices,                           \
        MOE_INT4_SHARED_DOWN_VALUES);                                                            \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, grouped_down)
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, wide_down)
#endif
