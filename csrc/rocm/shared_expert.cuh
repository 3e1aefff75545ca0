// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The shared expert of a decode step: 16-bit weights, all tokens. Its blocks are extra blocks of
// the gate_up and down grids, which run nothing else. A block multiplies one tile of weight rows
// with up to kSharedSlots tokens. The waves of the block share k, and their sums are added in wave
// order.
//
// A lane reads 8 weights of a row at a time. As for packed weights, kLanesPerRow lanes are adjacent
// along k and a wave covers two sets of kRowGroups rows.
#pragma once

#include "activation.cuh"
#include "dequant.cuh"
#include "geometry.h"
#include "wave_tile.cuh"

namespace moe_int4 {

// The extra blocks of a grid: rows 0..shared_y-1 of its y dimension, numbered over x, y and z.
GPU_DEVICE int shared_block(int shared_y, int grid_x) {
  return (gpu::block_z() * shared_y + gpu::block_y()) * grid_x + gpu::block_x();
}

// Products of two weight rows per lane and S activation rows.
template <typename DT, int S>
struct SharedTile {
  // Units in flight. With several rows the activations take the registers.
  static constexpr int kDepth = S == 1 ? 4 : 2;

  float acc[2][S] = {};

  // Multiplies this wave's part of k. row_of(s): activation row s.
  template <typename RowOf>
  GPU_DEVICE void run(const uint16_t* row0, const uint16_t* row1, int k, int waves,
                      const RowOf& row_of) {
    const int units = (k + kSharedUnitK - 1) / kSharedUnitK, each = (units + waves - 1) / waves;
    const int first = gpu::wave() * each;
    const int last = first + each < units ? first + each : units;
    if (first >= last) gpu::wait_previous_grid();
    GPU_ROLLED
    for (int unit = first; unit < last; unit += kDepth) {
      gpu::U32x4 w[kDepth][2], act[kDepth][S];
      GPU_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        w[d][0] = gpu::load_weights(row0 + column(unit + d, k));
        w[d][1] = gpu::load_weights(row1 + column(unit + d, k));
      }
      gpu::order_requests();
      if (unit == first) {  // the weights do not depend on the previous grid
        gpu::wait_previous_grid();
        gpu::allow_next_grid();
      }
      GPU_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        GPU_UNROLL
        for (int s = 0; s < S; ++s) act[d][s] = gpu::load_16_any(row_of(s) + column(unit + d, k));
      }
      gpu::order_requests();
      GPU_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        const bool real = unit + d < last && (unit + d) * kSharedUnitK + 8 * lane_k() < k;
        GPU_UNROLL
        for (int s = 0; s < S; ++s) {
          GPU_UNROLL
          for (int i = 0; i < 4; ++i) {
            const uint32_t pair = real ? act[d][s].v[i] : 0;
            acc[0][s] = gpu::dot2(DT{}, w[d][0].v[i], pair, acc[0][s]);
            acc[1][s] = gpu::dot2(DT{}, w[d][1].v[i], pair, acc[1][s]);
          }
        }
      }
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      acc[0][s] = sum_over_lanes<kLanesPerRow>(acc[0][s]);
      acc[1][s] = sum_over_lanes<kLanesPerRow>(acc[1][s]);
    }
  }

  // Adds the sums of all waves and calls finish(s, row, sum of row0's kind, sum of row1's kind) in
  // one thread per row 0..kRowGroups-1 of each of `count` activation rows.
  template <typename Finish>
  GPU_DEVICE void reduce(int count, int waves, const Finish& finish) {
    auto* const lds = reinterpret_cast<float*>(gpu::dynamic_lds());
    if (lane_k() == 0) {
      GPU_UNROLL
      for (int s = 0; s < S; ++s) {
        float* const mine = lds + (gpu::wave() * kSharedSlots + s) * kRowsPerWave;
        mine[lane_row()] = acc[0][s];
        mine[kRowGroups + lane_row()] = acc[1][s];
      }
    }
    gpu::block_barrier();
    const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
    for (int i = thread; i < count * kRowGroups; i += waves * gpu::kWaveSize) {
      const int s = i / kRowGroups, r = i % kRowGroups;
      float sum0 = 0.0f, sum1 = 0.0f;
      for (int wave = 0; wave < waves; ++wave) {
        const float* const of = lds + (wave * kSharedSlots + s) * kRowsPerWave;
        sum0 += of[r];
        sum1 += of[kRowGroups + r];
      }
      finish(s, r, sum0, sum1);
    }
  }

 private:
  // The lane's first weight of a unit, or an earlier one past the end of the row.
  static GPU_DEVICE int column(int unit, int k) {
    const int at = unit * kSharedUnitK + 8 * lane_k();
    return at < k ? at : k - 8;
  }
};

// The sums take the LDS of the other blocks' waves.
static_assert(kSharedBytesPerWave <= lds_bytes_per_wave(1, 1));
#if GPU_HAS_MMA
static_assert(kSharedBytesPerWave <= kWindowBytes && kSharedBytesPerWave <= kGroupWindowBytes);
#endif

// Tile `tile` of gate_up for tokens first_token.. : rows i (gate) and i + inter (up). The tile
// after the last one is the gate of the shared expert.
template <typename DT, int S>
GPU_DEVICE void shared_gate_up_tile(const uint16_t* a, int64_t a_stride_m, int k, int num_tokens,
                                    int waves, int tile, int tiles, int first_token,
                                    MOE_INT4_SHARED_GATE_UP_ARGS) {
  const int count = num_tokens - first_token < S ? num_tokens - first_token : S;
  const bool is_gate = tile == tiles;
  const int index = tile * kRowGroups + lane_row();
  const int row = index < shared_inter ? index : shared_inter - 1;
  const uint16_t* row0 = is_gate ? shared_gate : shared_w + row * int64_t{shared_w_stride};
  const uint16_t* row1 =
      is_gate ? shared_gate : shared_w + (row + shared_inter) * int64_t{shared_w_stride};
  const auto row_of = [&](int s) { return a + (first_token + (s < count ? s : 0)) * a_stride_m; };
  SharedTile<DT, S> product;
  product.run(row0, row1, k, waves, row_of);
  product.reduce(count, waves, [&](int s, int r, float gate, float up) {
    const int at = tile * kRowGroups + r, token = first_token + s;
    if (is_gate) {
      if (r == 0) shared_factors[token] = sigmoid(gate);
    } else if (at < shared_inter) {
      shared_c[token * shared_c_stride + at] = Format<DT>::from_float(gate * sigmoid(gate) * up);
    }
  });
}

template <typename DT>
GPU_DEVICE void shared_gate_up(const void* a, int64_t a_stride_m, int k, int num_tokens, int waves,
                               MOE_INT4_SHARED_GATE_UP_ARGS) {
  const auto* const acts = static_cast<const uint16_t*>(a);
  const int tiles = (shared_inter + kRowGroups - 1) / kRowGroups;
  const int per_tokens = tiles + (shared_gate != nullptr ? 1 : 0);
  const int block = shared_block(shared_y, grid_x), tile = block % per_tokens;
  if (num_tokens == 1) {
    if (block >= per_tokens) return;
    shared_gate_up_tile<DT, 1>(acts, a_stride_m, k, num_tokens, waves, tile, tiles, 0,
                               MOE_INT4_SHARED_GATE_UP_VALUES);
  } else {
    const int first_token = block / per_tokens * kSharedSlots;
    if (first_token >= num_tokens) return;
    shared_gate_up_tile<DT, kSharedSlots>(acts, a_stride_m, k, num_tokens, waves, tile, tiles,
                                          first_token, MOE_INT4_SHARED_GATE_UP_VALUES);
  }
}

template <typename DT, int S>
GPU_DEVICE void shared_down_tile(int n, int num_tokens, int waves, int tile, int first_token,
                                 MOE_INT4_SHARED_DOWN_ARGS) {
  const int count = num_tokens - first_token < S ? num_tokens - first_token : S;
  const int index0 = tile * kRowsPerWave + lane_row(), index1 = index0 + kRowGroups;
  const uint16_t* row0 = shared_w + (index0 < n ? index0 : n - 1) * int64_t{shared_w_stride};
  const uint16_t* row1 = shared_w + (index1 < n ? index1 : n - 1) * int64_t{shared_w_stride};
  const auto row_of = [&](int s) {
    return shared_a + (first_token + (s < count ? s : 0)) * shared_a_stride;
  };
  SharedTile<DT, S> product;
  product.run(row0, row1, shared_k, waves, row_of);
  product.reduce(count, waves, [&](int s, int r, float sum0, float sum1) {
    const int at = tile * kRowsPerWave + r, token = first_token + s;
    const float factor = shared_factors != nullptr ? shared_factors[token] : 1.0f;
    uint16_t* const out = shared_c + token * shared_c_stride;
    if (at < n) out[at] = Format<DT>::from_float(factor * sum0);
    if (at + kRowGroups < n) out[at + kRowGroups] = Format<DT>::from_float(factor * sum1);
  });
}

template <typename DT>
GPU_DEVICE void shared_down(int n, int num_tokens, int waves, MOE_INT4_SHARED_DOWN_ARGS) {
  const int tiles = (n + kRowsPerWave - 1) / kRowsPerWave;
  const int block = shared_block(shared_y, grid_x), tile = block % tiles;
  if (num_tokens == 1) {
    if (block >= tiles) return;
    shared_down_tile<DT, 1>(n, num_tokens, waves, tile, 0, MOE_INT4_SHARED_DOWN_VALUES);
  } else {
    const int first_token = block / tiles * kSharedSlots;
    if (first_token >= num_tokens) return;
    shared_down_tile<DT, kSharedSlots>(n, num_tokens, waves, tile, first_token,
                                       MOE_INT4_SHARED_DOWN_VALUES);
  }
}

}  // namespace moe_int4
