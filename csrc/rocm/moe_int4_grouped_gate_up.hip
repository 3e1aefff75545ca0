// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// gate_up for tokens that share experts, see group_tile.cuh: block (x, y, z) computes `row_tiles`
// tiles of kGateUpRows * kRowGroups indices of the intermediate size per wave, for the y-th list of
// pairs of the z-th kGroupTokens tokens. Blocks without a list have nothing to do. Waves do not
// split k, so one lane has both gate and up of an index.
#include "activation.cuh"
#include "entry_points.h"

#if GPU_HAS_MMA
#include "group_tile.cuh"
#include "shared_expert.cuh"

namespace moe_int4 {

template <typename DT, int G, bool ZP, int NB>
GPU_DEVICE void grouped_gate_up(MOE_INT4_GROUPED_GATE_UP_ARGS) {
  if (gpu::block_y() < shared_y) {
    constexpr int kLanes = shared_gate_up_lanes(true);
    return shared_gate_up<DT, kLanes>(a, a_stride_m, k, num_tokens, waves,
                                      MOE_INT4_SHARED_GATE_UP_VALUES);
  }
  const int list = gpu::block_y() - shared_y;
  using Tile = GroupTile<DT, G, ZP, kGateUpRows, NB, true>;
  constexpr int kTileRows = kGateUpRows * kRowGroups;
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int first_token = gpu::block_z() * kGroupTokens;
  const int left = num_tokens - first_token, tokens = left < kGroupTokens ? left : kGroupTokens;
  char* const rows = gpu::dynamic_lds() + waves * kGroupWeightBytes;
  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  const PairLists lists = sort_pairs(router, first_token, tokens, slots, waves,
                                     rows + group_row_ring_bytes(kGateUpRows, slots));
  if (list >= lists.count) return;
  const int first = lists.starts[list], last = lists.starts[list + 1];
  const int step = waves * kTileRows;
  int index = (gpu::block_x() * waves * row_tiles + gpu::wave()) * kTileRows + lane_row();
  const RowTiles items = {{lists.experts[list], first, last - first, index}, step, row_tiles};
  Tile tile(weights, {kRowGroups, 0, inter, inter, 1}, 0, blocks, k,
            gpu::dynamic_lds() + gpu::wave() * kGroupWeightBytes, rows, slots, waves);
  const auto* const acts = static_cast<const uint16_t*>(a) + first_token * a_stride_m;
  const auto row_of = [&](int i) { return acts + lists.pairs[i].token() * a_stride_m; };
  auto* const out =
      static_cast<uint16_t*>(c) + static_cast<int64_t>(first_token) * top_k * c_stride_m;
  tile.run(
      items, [] {}, row_of, [](const GroupItem&) {},
      [&](const GroupItem& item, const typename Tile::Sums& sums) {
        GPU_UNROLL
        for (int b = 0; b < NB; ++b) {
          GPU_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int slot = 8 * b + 2 * lane_k() + i;
            if (slot >= item.count) continue;
            const Pair pair = lists.pairs[item.first + slot];
            uint16_t* const row = out + (pair.token() * top_k + pair.t()) * c_stride_m;
            GPU_UNROLL
            for (int m = 0; m < kGateUpRows; ++m) {
              const float* const sum = sums[b][m];
              const float value = activate(activation, sum[i], sum[2 + i], alpha, beta, limit);
              const int at = index + m * kRowGroups;
              if (at < inter) row[at] = Format<DT>::from_float(value);
            }
          }
        }
        index += step;
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
        waves, slots, blocks, row_tiles, MOE_INT4_SHARED_GATE_UP_VALUES);                      \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, grouped_gate_up)
#endif
