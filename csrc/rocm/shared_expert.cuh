// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The shared expert of a decode step, for all tokens. Its blocks are extra blocks of the gate_up
// and down grids, which run nothing else. A block multiplies one tile of weight rows with up to
// kSharedSlots tokens. The waves of the block share k, and their sums are added in wave order.
//
// Weights have 4, 8 or 16 bits. A lane reads 16 bytes of a row at a time, all of one group. `Lanes`
// lanes are adjacent along k and a wave covers two sets of kWaveSize / Lanes rows.
#pragma once

#include "activation.cuh"
#include "dequant.cuh"
#include "entry_points.h"
#include "geometry.h"
#include "wave_tile.cuh"

namespace moe_int4 {

// The work of an extra block: a tile of weight rows and the `count` tokens from first_token on.
// The blocks are rows 0..shared_y-1 of the grid's y dimension, numbered over x, y and z. Blocks of
// one tile are adjacent, so that all but one of them find its weights in the L2 cache.
struct SharedBlock {
  int tile, first_token, count;

  GPU_DEVICE SharedBlock(int shared_y, int grid_x, int bits, int num_tokens) {
    const int index = (gpu::block_z() * shared_y + gpu::block_y()) * grid_x + gpu::block_x();
    const int slots = shared_slots(num_tokens, bits), per_tile = (num_tokens + slots - 1) / slots;
    tile = index / per_tile;
    first_token = index % per_tile * slots;
    const int left = num_tokens - first_token;
    count = left < slots ? left : slots;
  }
};

// A row of weights. 16 bits use q alone, 8 bits no zero points.
struct SharedRow {
  const uint32_t* q;
  const uint16_t* scales;
  const uint32_t* zeros;
  int zero_shift;  // the row's nibble in a word of zeros
};

// A load that depends on a condition would be a branch with a wait, so there always are zero points
// to load: without any, the row's weights, which are as many words at least.
GPU_DEVICE SharedRow shared_row(int row, MOE_INT4_SHARED_WEIGHT_ARGS) {
  SharedRow out = {shared_q + row * int64_t{shared_q_stride},
                   shared_scales + row * int64_t{shared_s_stride},
                   shared_zeros + row / 8 * int64_t{shared_z_stride}, row % 8 * 4};
  if (shared_zeros == nullptr) out.zeros = out.q;
  return out;
}

// Products of two weight rows per lane and S activation rows.
template <typename DT, int Bits, int S, int Lanes>
struct SharedTile {
  static constexpr int kRows = gpu::kWaveSize / Lanes;  // of a set
  static constexpr int kRun = 128 / Bits;               // weights in 16 bytes
  static constexpr int kPieces = kRun / 8;
  static constexpr int kUnitK = kRun * Lanes;
#if GPU_HAS_MMA
  // With two units of 4 bits, down_t1 takes 126 registers on sm_90 instead of 111.
  static constexpr int kPackedDepth = 1;
#else
  static constexpr int kPackedDepth = 2;
#endif
  // Units of weights and pieces of activations in flight. With several rows the activations take
  // the registers. A wave that has k for itself needs four units all the same.
  static constexpr int kDepth = Bits != 16 ? kPackedDepth : S == 1 || Lanes == 32 ? 4 : 2;
  static constexpr int kTogether = S == 1 ? kDepth * kPieces : Bits == 16 ? 2 : 1;
  static constexpr float kOffset = Unpacked<DT, Bits>::kOffset;

  float acc[2][S] = {};

  // Multiplies this wave's part of k. row_of(s): activation row s. Aligned: of with_alignment.
  template <bool Aligned, typename RowOf>
  GPU_DEVICE void run(const SharedRow& row0, const SharedRow& row1, int log2_group, bool symmetric,
                      int k, int waves, const RowOf& row_of) {
    // A block with one row takes 18.8 instead of 18.4 us without the branches (H200).
    constexpr bool kAligned = Aligned && S > 1;
    const int units = (k + kUnitK - 1) / kUnitK, each = (units + waves - 1) / waves;
    const int first = gpu::wave() * each;
    const int last = first + each < units ? first + each : units;
    if (first >= last) gpu::wait_previous_grid();
    GPU_ROLLED
    for (int unit = first; unit < last; unit += kDepth) {
      Loaded weights[kDepth][2];
      GPU_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        const int at = column(unit + d < last ? unit + d : last - 1, k);
        weights[d][0] = load(row0, at, log2_group);
        weights[d][1] = load(row1, at, log2_group);
      }
      gpu::order_requests();
      if (unit == first) {  // the weights do not depend on the previous grid
        gpu::wait_previous_grid();
        gpu::allow_next_grid();
      }
      float dot[2][S] = {}, sum[S] = {};  // of a unit, and of its activations
      GPU_UNROLL
      for (int begin = 0; begin < kDepth * kPieces; begin += kTogether) {
        gpu::U32x4 act[kTogether][S];
        GPU_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int at = column(unit + (begin + i) / kPieces, k) + 8 * ((begin + i) % kPieces);
          GPU_UNROLL
          for (int s = 0; s < S; ++s) act[i][s] = load_activations<kAligned>(row_of(s) + at);
        }
        gpu::order_requests();
        GPU_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int d = (begin + i) / kPieces, piece = (begin + i) % kPieces;
          const bool real = unit + d < last && start(unit + d) < k;
          if constexpr (Bits == 16) {
            add_piece(weights[d], piece, real, act[i], acc, sum);
          } else {
            add_piece(weights[d], piece, true, act[i], dot, sum);
            if (piece == kPieces - 1) add_unit(weights[d], real, symmetric, row0, row1, dot, sum);
          }
        }
      }
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      acc[0][s] = sum_over_lanes<Lanes>(acc[0][s]);
      acc[1][s] = sum_over_lanes<Lanes>(acc[1][s]);
    }
  }

  // Adds the sums of all waves and calls finish(s, row, sum of row0's kind, sum of row1's kind) in
  // one thread per row 0..kRows-1 of each of `count` activation rows.
  template <typename Finish>
  GPU_DEVICE void reduce(int count, int waves, const Finish& finish) {
    auto* const lds = reinterpret_cast<float*>(gpu::dynamic_lds());
    if (gpu::lane() % Lanes == 0) {
      GPU_UNROLL
      for (int s = 0; s < S; ++s) {
        float* const mine = lds + (gpu::wave() * kSharedSlots + s) * 2 * kRows;
        mine[gpu::lane() / Lanes] = acc[0][s];
        mine[kRows + gpu::lane() / Lanes] = acc[1][s];
      }
    }
    gpu::block_barrier();
    const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
    for (int i = thread; i < count * kRows; i += waves * gpu::kWaveSize) {
      const int s = i / kRows, r = i % kRows;
      float sum0 = 0.0f, sum1 = 0.0f;
      for (int wave = 0; wave < waves; ++wave) {
        const float* const of = lds + (wave * kSharedSlots + s) * 2 * kRows;
        sum0 += of[r];
        sum1 += of[kRows + r];
      }
      finish(s, r, sum0, sum1);
    }
  }

 private:
  struct Loaded {
    gpu::U32x4 w;
    uint16_t scale;
    uint32_t zero;
  };

  // The lane's first weight of a unit; it may be past the end of the row.
  static GPU_DEVICE int start(int unit) { return unit * kUnitK + kRun * (gpu::lane() % Lanes); }
  // The same or, past the end, an earlier one.
  static GPU_DEVICE int column(int unit, int k) { return start(unit) < k ? start(unit) : k - kRun; }

  static GPU_DEVICE Loaded load(const SharedRow& row, int at, int log2_group) {
    Loaded out = {};
    if constexpr (Bits != 16) out.scale = row.scales[at >> log2_group];
    if constexpr (Bits == 4) out.zero = row.zeros[at >> log2_group];
    out.w = gpu::load_weights(row.q + at / (32 / Bits));
    return out;
  }

  // Adds eight weights of both rows. Not real: past the end of the wave's part.
  static GPU_DEVICE void add_piece(const Loaded (&weights)[2], int piece, bool real,
                                   const gpu::U32x4 (&act)[S], float (&to)[2][S], float (&sum)[S]) {
    const Unpacked<DT, Bits> x(weights[0].w, piece), y(weights[1].w, piece);
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = real ? act[s].v[i] : 0;
        to[0][s] = gpu::dot2(DT{}, x.pair[i], pair, to[0][s]);
        to[1][s] = gpu::dot2(DT{}, y.pair[i], pair, to[1][s]);
        if constexpr (kOffset != 0.0f) sum[s] = gpu::dot2(DT{}, pair, Format<DT>::kOnes, sum[s]);
      }
    }
  }

  // Scales the products of a unit, adds them to acc and resets them.
  GPU_DEVICE void add_unit(const Loaded (&weights)[2], bool real, bool symmetric,
                           const SharedRow& row0, const SharedRow& row1, float (&dot)[2][S],
                           float (&sum)[S]) {
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      const SharedRow& row = r == 0 ? row0 : row1;
      int zero = Unpacked<DT, Bits>::kSymmetricZero;
      if constexpr (Bits == 4) {
        if (!symmetric) zero = static_cast<int>(weights[r].zero >> row.zero_shift & 15);
      }
      const float scale = real ? Format<DT>::to_float(weights[r].scale) : 0.0f;
      GPU_UNROLL
      for (int s = 0; s < S; ++s) {
        acc[r][s] += scale * (dot[r][s] - (kOffset + zero) * sum[s]);
        dot[r][s] = 0.0f;
      }
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) sum[s] = 0.0f;
  }
};

// The sums take the LDS of the other blocks' waves.
static_assert(kSharedBytesPerWave <= lds_bytes_per_wave(1, 1));
#if GPU_HAS_MMA
static_assert(kSharedBytesPerWave <= kWindowBytes && kSharedBytesPerWave <= kGroupWindowBytes);
#endif

// Calls use(tile) with the tile for weights of `bits` bits and for one token or several.
template <typename DT, int Lanes, typename Use>
GPU_DEVICE void with_shared_tile(int bits, int num_tokens, const Use& use) {
  if (num_tokens == 1) {
    if (bits == 16) return use(SharedTile<DT, 16, 1, Lanes>{});
    if (bits == 8) return use(SharedTile<DT, 8, 1, Lanes>{});
    return use(SharedTile<DT, 4, 1, Lanes>{});
  }
  if (bits == 16) return use(SharedTile<DT, 16, kSharedSlots, Lanes>{});
  if (bits == 8) return use(SharedTile<DT, 8, shared_slots(2, 8), Lanes>{});
  return use(SharedTile<DT, 4, shared_slots(2, 4), Lanes>{});
}

// A tile of gate_up is kRows rows i (gate) and i + inter (up). The one after the last is the gate
// of the shared expert, which always has 16 bits.
template <typename DT, int Lanes>
GPU_DEVICE void shared_gate_up(const void* a, int64_t a_stride_m, int k, int num_tokens, int waves,
                               MOE_INT4_SHARED_GATE_UP_ARGS) {
  constexpr int kRows = gpu::kWaveSize / Lanes;
  const int tiles = (shared_inter + kRows - 1) / kRows;
  const SharedBlock block(shared_y, grid_x, shared_bits, num_tokens);
  const int tile = block.tile, first_token = block.first_token, count = block.count;
  if (tile >= tiles + (shared_gate != nullptr ? 1 : 0)) return;
  const auto* const acts = static_cast<const uint16_t*>(a) + first_token * a_stride_m;
  const auto row_of = [&](int s) { return acts + (s < count ? s : 0) * a_stride_m; };
  const bool is_gate = tile == tiles;
  const int index = tile * kRows + gpu::lane() / Lanes;
  const int row = index < shared_inter ? index : shared_inter - 1;
  SharedRow row0 = shared_row(row, MOE_INT4_SHARED_WEIGHT_VALUES);
  SharedRow row1 = shared_row(row + shared_inter, MOE_INT4_SHARED_WEIGHT_VALUES);
  if (is_gate) row0.q = row1.q = reinterpret_cast<const uint32_t*>(shared_gate);
  with_shared_tile<DT, Lanes>(is_gate ? 16 : shared_bits, num_tokens, [&](auto product) {
    with_alignment(a, a_stride_m, [&](auto aligned) {
      product.template run<decltype(aligned)::kValue>(row0, row1, shared_log2_group,
                                                      shared_zeros == nullptr, k, waves, row_of);
    });
    product.reduce(count, waves, [&](int s, int r, float gate, float up) {
      const int at = tile * kRows + r, token = first_token + s;
      if (is_gate) {
        if (r == 0) shared_factors[token] = sigmoid(gate);
      } else if (at < shared_inter) {
        shared_c[token * shared_c_stride + at] = Format<DT>::from_float(gate * sigmoid(gate) * up);
      }
    });
  });
}

// A tile of down is kRowsPerWave rows.
template <typename DT>
GPU_DEVICE void shared_down(int n, int num_tokens, int waves, MOE_INT4_SHARED_DOWN_ARGS) {
  gpu::keep_arguments(MOE_INT4_SHARED_DOWN_VALUES);
  const int tiles = (n + kRowsPerWave - 1) / kRowsPerWave;
  const SharedBlock block(shared_y, grid_x, shared_bits, num_tokens);
  const int tile = block.tile, first_token = block.first_token, count = block.count;
  if (tile >= tiles) return;
  const uint16_t* const acts = shared_a + first_token * shared_a_stride;
  const auto row_of = [&](int s) { return acts + (s < count ? s : 0) * shared_a_stride; };
  const int index0 = tile * kRowsPerWave + lane_row(), index1 = index0 + kRowGroups;
  const SharedRow row0 = shared_row(index0 < n ? index0 : n - 1, MOE_INT4_SHARED_WEIGHT_VALUES);
  const SharedRow row1 = shared_row(index1 < n ? index1 : n - 1, MOE_INT4_SHARED_WEIGHT_VALUES);
  with_shared_tile<DT, kLanesPerRow>(shared_bits, num_tokens, [&](auto product) {
    with_alignment(shared_a, shared_a_stride, [&](auto aligned) {
      product.template run<decltype(aligned)::kValue>(
          row0, row1, shared_log2_group, shared_zeros == nullptr, shared_k, waves, row_of);
    });
    product.reduce(count, waves, [&](int s, int r, float sum0, float sum1) {
      const int at = tile * kRowsPerWave + r, token = first_token + s;
      const float factor = shared_factors != nullptr ? shared_factors[token] : 1.0f;
      uint16_t* const out = shared_c + token * shared_c_stride;
      if (at < n) out[at] = Format<DT>::from_float(factor * sum0);
      if (at + kRowGroups < n) out[at + kRowGroups] = Format<DT>::from_float(factor * sum1);
    });
  });
}

}  // namespace moe_int4
