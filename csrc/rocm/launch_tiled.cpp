// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "entry_points.h"

#if GPU_HAS_MMA
#include <stdexcept>
#include <string>

#include "kernel_lookup.h"
#include "plan.h"
#include "tiled.h"

namespace moe_int4 {
namespace {

MOE_INT4_LOOKUP(tiled_gate_up)
MOE_INT4_LOOKUP(tiled_down)

// Checks the caller's tile; returns the bytes of LDS per block.
int checked_lds(const char* op, const TiledShape& tile, int r) {
  const auto check = [op](const char* what, const std::string& expected, int64_t got, bool ok) {
    if (ok) return;
    throw std::runtime_error(std::string("fused_moe_wvSplitK_int4_tiled_") + op + ": tile: " +
                             what + ": expected " + expected + ", got " + std::to_string(got));
  };
  const int64_t t = tile.pairs;
  check("pairs (value 0)", "8, 16, 32 or 64", t, t == 8 || t == 16 || t == 32 || t == 64);
  check("waves (value 1)", "1 to " + std::to_string(kMaxTiledWaves), tile.waves,
        tile.waves >= 1 && tile.waves <= kMaxTiledWaves);
  check("row_tiles (value 2)", "1 to 1024", tile.row_tiles,
        tile.row_tiles >= 1 && tile.row_tiles <= 1024);
  const int lds = tiled_lds_bytes(r, static_cast<int>(t), static_cast<int>(tile.waves));
  const int most = gpu::max_lds_bytes();
  check("bytes of shared memory that it takes", "at most " + std::to_string(most), lds,
        lds <= most);
  return lds;
}

gpu::LaunchShape shape(const TiledShape& tile, int lists, int rows, int tile_rows, int lds) {
  const int waves = static_cast<int>(tile.waves);
  const int64_t columns = ceil_div(rows, waves * static_cast<int>(tile.row_tiles) * tile_rows);
  if (columns * lists > INT32_MAX) {
    throw std::runtime_error("expert_ids: expected fewer than 2^31 blocks, got " +
                             std::to_string(columns * lists));
  }
  return {static_cast<int>(columns * lists), 1, 1, waves * gpu::kWaveSize, lds, true};
}

}  // namespace

void launch_tiled_gate_up(const TiledGateUpArgs& args, void* queue) {
  const Weights& w = args.w;
  const int lds = checked_lds("gate_up", args.tile, kGateUpRows), inter = w.n / 2;
  if (args.sorted.lists == 0 || args.sorted.num_pairs == 0) return;
  const SortedPairs& s = args.sorted;
  gpu::launch(tiled_gate_up_kernel(args.dtype, w, static_cast<int>(args.tile.pairs)),
              shape(args.tile, s.lists, inter, kGateUpRows * kRowGroups, lds), queue, args.a,
              args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, inter, w.k,
              args.c, args.c_stride_m, s.ids, s.expert_ids, s.num_padded, s.num_pairs, s.top_k,
              static_cast<int>(args.activation), args.alpha, args.beta, args.limit, args.tile.waves,
              ceil_div(w.k, kBlockK), args.tile.row_tiles);
}

void launch_tiled_down(const TiledDownArgs& args, void* queue) {
  const Weights& w = args.w;
  const int lds = checked_lds("down", args.tile, kTiledDownRows);
  if (args.sorted.lists == 0 || args.sorted.num_pairs == 0) return;
  const SortedPairs& s = args.sorted;
  gpu::launch(tiled_down_kernel(args.dtype, w, static_cast<int>(args.tile.pairs)),
              shape(args.tile, s.lists, w.n, kTiledDownRows * kRowsPerWave, lds), queue, args.a,
              args.a_stride_m, w.q, w.q_stride_e, small(w.q_stride_n, w.n),
              static_cast<const uint16_t*>(w.scales), w.s_stride_e, small(w.s_stride_n, w.n),
              w.zeros, w.z_stride_e, small(w.z_stride_n8, w.n / 8), w.num_experts, w.n, w.k, args.c,
              args.c_stride_m, s.ids, s.expert_ids, s.num_padded, s.num_pairs, args.topk_weights,
              args.tile.waves, ceil_div(w.k, kBlockK), args.tile.row_tiles);
}

}  // namespace moe_int4
#endif
