// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// down for tokens that share experts, see group_tile.cuh: a block owns kRowsPerWave output columns
// for kGroupTokens tokens. Its waves share the distinct experts, and 2^log2_k_slices waves share
// each one's k; a wave adds its results into its own sums in LDS, and the waves' sums meet in wave
// order: the same bits on every run.
#include "entry_points.h"

#if GPU_HAS_MMA
#include "group_tile.cuh"

namespace moe_int4 {

// Every step-th distinct expert, each in passes of up to `slots` pairs.
struct DownItems {
  PairLists lists;
  int slots, row0, row1, step;
  int d, pass;

  GPU_DEVICE bool next(GroupItem& item) {
    if (d >= lists.count) return false;
    const int first = lists.starts[d] + pass, left = lists.starts[d + 1] - first;
    item = {lists.experts[d], first, left < slots ? left : slots, {row0, row1}};
    pass += slots;
    if (left <= slots) {
      pass = 0;
      d += step;
    }
    return true;
  }
};

template <typename DT, int G, bool ZP, int NB>
GPU_DEVICE void grouped_down(MOE_INT4_GROUPED_DOWN_ARGS) {
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int first_token = gpu::block_y() * kGroupTokens;
  const int left = num_tokens - first_token, tokens = left < kGroupTokens ? left : kGroupTokens;
  const int first_row = gpu::block_x() * kRowsPerWave;
  const int index0 = first_row + lane_row(), index1 = index0 + kRowGroups;
  const int row0 = index0 < n ? index0 : n - 1, row1 = index1 < n ? index1 : n - 1;
  const int first = (gpu::wave() & ((1 << log2_k_slices) - 1)) * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  char* const lds = gpu::dynamic_lds();
  char* const ring = lds + gpu::wave() * wave_lds_bytes;
  char* const rows = ring + kGroupWeightBytes;
  const int results_at = kGroupWeightBytes + group_row_ring_bytes(slots);
  auto* const results = reinterpret_cast<float*>(ring + results_at);
  for (int i = gpu::lane(); i < tokens * kRowsPerWave; i += gpu::kWaveSize) results[i] = 0.0f;

  // Before the previous grid has ended, as in down_stream.
  const PairLists lists =
      sort_pairs(router, first_token, tokens, waves, lds + waves * wave_lds_bytes);
  const int share = gpu::wave() >> log2_k_slices, shares = waves >> log2_k_slices;
  const DownItems items = {lists, slots, row0, row1, shares, first < last ? share : lists.count, 0};
  GroupTile<DT, G, ZP, NB, false> tile(weights, first, last, k, ring, rows, slots, 1);
  const auto* const acts =
      static_cast<const uint16_t*>(a) + static_cast<int64_t>(first_token) * top_k * a_stride_m;
  const auto wait = [] {
    gpu::wait_previous_grid();
    gpu::allow_next_grid();
  };
  const auto row_of = [&](int i) { return acts + lists.pairs[i] * a_stride_m; };
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
        const int pair = lists.pairs[item.first + slot];
        token[b][i] = pair / top_k;
        if (topk_weights != nullptr) {
          weight[b][i] = topk_weights[(first_token + token[b][i]) * tw_stride_m + pair % top_k];
        }
      }
    }
    const int slot = gpu::lane();
    twice = gpu::wave_ballot(slot + 1 < item.count &&
                             lists.pairs[item.first + slot] / top_k ==
                                 lists.pairs[item.first + slot + 1] / top_k) != 0;
  };
  tile.run(items, wait, row_of, begin, [&](const GroupItem& item, const float (&sums)[NB][4]) {
    const auto add = [&](int b, int i) {
      float* const out = results + (token[b][i] * kRowsPerWave + lane_row());
      out[0] += weight[b][i] * sums[b][i];
      out[kRowGroups] += weight[b][i] * sums[b][2 + i];
    };
    if (!twice) {
      GPU_UNROLL
      for (int b = 0; b < NB; ++b) {
        GPU_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (token[b][i] >= 0) add(b, i);
        }
      }
      return;
    }
    for (int slot = 0; slot < item.count; ++slot) {  // one after the other
      GPU_UNROLL
      for (int b = 0; b < NB; ++b) {
        GPU_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (8 * b + 2 * lane_k() + i == slot) add(b, i);
        }
      }
      gpu::wave_barrier();
    }
  });
  gpu::block_barrier();

  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < tokens * kRowsPerWave; i += waves * gpu::kWaveSize) {
    const int column = first_row + i % kRowsPerWave;
    if (column >= n) continue;
    float sum = 0.0f;
    for (int w = 0; w < waves; ++w) {
      sum += reinterpret_cast<const float*>(lds + w * wave_lds_bytes + results_at)[i];
    }
    static_cast<uint16_t*>(c)[(first_token + i / kRowsPerWave) * c_stride_m + column] =
        Format<DT>::from_float(sum);
  }
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                           \
  extern "C" GPU_KERNEL(moe_int4::kMaxGroupWaves * 32) void MOE_INT4_NAME(                       \
      OP, NAME, G, ZNAME, T)(MOE_INT4_GROUPED_DOWN_ARGS) {                                       \
    moe_int4::grouped_down<DT, G, ZP, T / 8>(                                                    \
        a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros,         \
        z_stride_e, z_stride_n8, num_experts, n, k, c, c_stride_m, ids, ids_are_int64,           \
        ids_stride_m, expert_map, map_size, num_tokens, top_k, topk_weights, tw_stride_m, waves, \
        slots, wave_lds_bytes, blocks, blocks_per_wave, log2_k_slices);                          \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, grouped_down)
#endif
