// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// gate_up for many tokens, with group_tile.cuh: a block computes `row_tiles` tiles of
// kGateUpRows * kRowGroups indices of the intermediate size per wave, for one list of T pairs. The
// blocks of a list are adjacent. Waves do not split k, so one lane has both gate and up of two
// adjacent indices.
#include "activation.cuh"
#include "entry_points.h"

#if GPU_HAS_MMA
#include "tiled_lists.cuh"

namespace moe_int4 {

template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void tiled_gate_up(MOE_INT4_TILED_GATE_UP_ARGS) {
  static_assert(kGateUpRows == 2, "a lane has rows of two adjacent indices");
  using Tile = GroupTile<DT, G, ZP, kGateUpRows, T / 8, true>;
  constexpr int kTileRows = kGateUpRows * kRowGroups;
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const int per_block = waves * row_tiles * kTileRows,
            columns = (inter + per_block - 1) / per_block;
  const int list_of_block = gpu::block_x() / columns, column = gpu::block_x() % columns;
  char* const rows = gpu::dynamic_lds() + waves * kGroupWeightBytes;
  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  const TiledList list =
      read_list<T>(list_of_block, sorted_ids, expert_ids, num_padded, num_pairs, top_k, num_experts,
                   rows + group_row_ring_bytes(kGateUpRows, T));
  if (list.expert < 0) return;
  const int step = waves * kTileRows;
  int index = (column * waves * row_tiles + gpu::wave()) * kTileRows + 2 * lane_row();
  Tile tile(weights, {1, 0, inter, inter, 2}, 0, blocks, k,
            gpu::dynamic_lds() + gpu::wave() * kGroupWeightBytes, rows, T, waves);
  const auto* const acts = static_cast<const uint16_t*>(a);
  const auto row_of = [&](int i) {
    return acts + static_cast<int>(gpu::lds_load_4(list.rows + 4 * i)) * a_stride_m;
  };
  auto* const out = static_cast<uint16_t*>(c);
  tile.run(
      RowTiles{{list.expert, 0, list.count, index}, step, row_tiles}, [] {}, row_of,
      [](const GroupItem&) {},
      [&](const GroupItem&, const typename Tile::Sums& sums) {
        GPU_UNROLL
        for (int b = 0; b < T / 8; ++b) {
          GPU_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int slot = 8 * b + 2 * lane_k() + i;
            const int pair = slot < list.count ? list.pairs[slot] : -1;
            if (pair < 0 || index >= inter) continue;
            float value[2];
            GPU_UNROLL
            for (int m = 0; m < 2; ++m) {
              const float* const sum = sums[b][m];
              value[m] = activate(activation, sum[i], sum[2 + i], alpha, beta, limit);
            }
            store_pair<DT>(out + pair * c_stride_m + index, value[0], value[1]);
          }
        }
        index += step;
      });
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                           \
  extern "C" GPU_KERNEL(moe_int4::kMaxTiledWaves * 32) void MOE_INT4_NAME(                       \
      OP, NAME, G, ZNAME, T)(MOE_INT4_TILED_GATE_UP_ARGS) {                                      \
    moe_int4::tiled_gate_up<DT, G, ZP, T>(                                                       \
        a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros,         \
        z_stride_e, z_stride_n8, num_experts, inter, k, c, c_stride_m, sorted_ids, expert_ids,   \
        num_padded, num_pairs, top_k, activation, alpha, beta, limit, waves, blocks, row_tiles); \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, tiled_gate_up)
#endif
