// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// gate_up for tokens that share experts, see group_tile.cuh: block (x, y, z) owns `row_tiles` tiles
// of kRowGroups indices of the intermediate size per wave, for the y-th distinct expert of
// the z-th kGroupTokens tokens. Blocks without an expert have nothing to do. Waves do not split k,
// so gate and up of an index meet in one lane.
#include "activation.cuh"
#include "entry_points.h"

#if GPU_HAS_MMA
#include "group_tile.cuh"

namespace moe_int4 {

// Row tiles of a wave, each in passes of up to `slots` pairs.
struct GateUpItems {
  int expert, begin, end, slots;  // pairs of the block
  int inter, tile, tile_step, tiles_left;
  int first;

  GPU_DEVICE bool next(GroupItem& item) {
    if (tiles_left == 0) return false;
    const int index = tile * kRowGroups + lane_row(), row = index < inter ? index : inter - 1;
    item = {expert, first, end - first < slots ? end - first : slots, {row, row + inter}};
    first += slots;
    if (first >= end) {
      first = begin;
      tile += tile_step;
      --tiles_left;
    }
    return true;
  }
};

template <typename DT, int G, bool ZP, int NB>
GPU_DEVICE void grouped_gate_up(MOE_INT4_GROUPED_GATE_UP_ARGS) {
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int first_token = gpu::block_z() * kGroupTokens;
  const int left = num_tokens - first_token, tokens = left < kGroupTokens ? left : kGroupTokens;
  char* const rows = gpu::dynamic_lds() + waves * kGroupWeightBytes;
  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  const PairLists lists =
      sort_pairs(router, first_token, tokens, waves, rows + group_row_ring_bytes(slots));
  if (gpu::block_y() >= lists.count) return;
  const int begin = lists.starts[gpu::block_y()], end = lists.starts[gpu::block_y() + 1];
  const int first_tile = gpu::block_x() * waves * row_tiles + gpu::wave();
  const GateUpItems items = {
      lists.experts[gpu::block_y()], begin, end, slots, inter, first_tile, waves, row_tiles, begin};
  GroupTile<DT, G, ZP, NB, true> tile(weights, 0, blocks, k,
                                      gpu::dynamic_lds() + gpu::wave() * kGroupWeightBytes, rows,
                                      slots, waves);
  const auto* const acts = static_cast<const uint16_t*>(a);
  const auto row_of = [&](int i) {
    return acts + (first_token + lists.pairs[i] / top_k) * a_stride_m;
  };
  auto* const out = static_cast<uint16_t*>(c) + first_token * top_k * c_stride_m;
  int index = first_tile * kRowGroups + lane_row();
  tile.run(
      items, [] {}, row_of, [](const GroupItem&) {},
      [&](const GroupItem& item, const float (&sums)[NB][4]) {
        GPU_UNROLL
        for (int b = 0; b < NB; ++b) {
          GPU_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int slot = 8 * b + 2 * lane_k() + i;
            if (slot >= item.count || index >= inter) continue;
            const float value =
                activate(activation, sums[b][i], sums[b][2 + i], alpha, beta, limit);
            out[lists.pairs[item.first + slot] * c_stride_m + index] =
                Format<DT>::from_float(value);
          }
        }
        if (item.first + item.count == end) index += waves * kRowGroups;
      });
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                         \
  extern "C" GPU_KERNEL(moe_int4::kMaxGroupWaves * 32) void MOE_INT4_NAME(                     \
      OP, NAME, G, ZNAME, T)(MOE_INT4_GROUPED_GATE_UP_ARGS) {                                  \
    moe_int4::grouped_gate_up<DT, G, ZP, T / 8>(                                               \
        a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros,       \
        z_stride_e, z_stride_n8, num_experts, inter, k, c, c_stride_m, ids, ids_are_int64,     \
        ids_stride_m, expert_map, map_size, num_tokens, top_k, activation, alpha, beta, limit, \
        waves, slots, blocks, row_tiles);                                                      \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, grouped_gate_up)
#endif
