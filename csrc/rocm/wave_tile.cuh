// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The product that all kernels share: one wave, kRowsPerWave rows of packed weights, a range of k,
// and up to S activation rows ("slots"). Each lane owns row g of both row sets (g = lane /
// kLanesPerRow) and every kLanesPerRow-th run of 32 weights of them.
//
// One block of one row set, 16 bytes (32 weights) a lane; L is kLanesPerRow:
//
//     k          0..31      32..63            kBlockK - 32..
//              +----------+----------+-------+------------+
//     row 0    | lane 0   | lane 1   |  ...  | lane L-1   |
//     row 1    | lane L   | lane L+1 |  ...  | lane 2L-1  |
//       ...
//     last row | lane 32-L|          |  ...  | lane 31    |
//              +----------+----------+-------+------------+
//
// Dot products: L = 8, 4 rows, kBlockK = 256.
// fork: begin overlay
// Matrix instructions: L = 4, 8 rows, kBlockK = 128.
// fork: end
//
// The second row set is the rows that follow, or in gate_up the up rows of the same indices.
//
// A turn processes kLoadDepth blocks. It requests the activations before the weights, because AMD
// waits for loads in the order of the requests, and requests all weights before it uses any.
// Weights stay in registers; activations go through LDS. The sums of the activations, which remove
// the nibble offset and the zero point, are computed once, during staging.
//
// No load depends on a condition, which would be a branch with a wait. Past the end of a row a lane
// loads the row's last weights again, with a scale of 0.
#pragma once

#include "dequant.cuh"
#include "geometry.h"

namespace moe_int4 {

GPU_DEVICE int lane_row() { return gpu::lane() / kLanesPerRow; }
GPU_DEVICE int lane_k() { return gpu::lane() % kLanesPerRow; }

// Two row sets as a lane addresses them: the start of each, equal for all lanes, and the offset of
// the lane's row in bytes. AMD's loads take exactly this, a scalar and 32 bits.
struct WeightRows {
  struct Set {
    const uint32_t* q;
    const uint16_t* scales;
    const uint32_t* zeros;
    uint32_t q_at, s_at, z_at;
    int zero_shift;  // the row's nibble in a word of zeros
  };
  Set sets[2];
};

// A stack of packed weights, see moe_int4_args.h. Strides within an expert fit in 32 bits, and so
// do the bytes of kRowGroups rows.
struct WeightStack {
  const uint32_t* q;
  int64_t q_stride_e;
  int q_stride_n;
  const uint16_t* scales;
  int64_t s_stride_e;
  int s_stride_n;
  const uint32_t* zeros;
  int64_t z_stride_e;
  int z_stride_n8;

  // The sets that start at rows `first0` and `first1` of expert 0; at() then moves them. The two
  // steps let most of the work finish before the router's output arrives. Rows from `end0` or
  // `end1` on repeat the last row before.
  template <bool ZP>
  GPU_DEVICE WeightRows rows(int first0, int end0, int first1, int end1) const {
    return {{set<ZP>(first0, end0 - 1), set<ZP>(first1, end1 - 1)}};
  }
  template <bool ZP>
  GPU_DEVICE WeightRows at(int expert, WeightRows rows) const {
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      rows.sets[r].q += expert * q_stride_e;
      rows.sets[r].scales += expert * s_stride_e;
      if constexpr (ZP) rows.sets[r].zeros += expert * z_stride_e;
    }
    return rows;
  }

 private:
  template <bool ZP>
  GPU_DEVICE WeightRows::Set set(int first, int last) const {
    // With zero points, the number of rows is a multiple of 8, so AMD's sets of four are complete.
    constexpr bool kWhole = ZP && kRowGroups <= 4;
    if (!kWhole && first > last) first = last;
    const int row = kWhole || lane_row() < last - first ? lane_row() : last - first;
    WeightRows::Set out = {};
    out.q = q + first * q_stride_n;
    out.q_at = static_cast<uint32_t>(row) * static_cast<uint32_t>(q_stride_n) * 4;
    out.scales = scales + first * s_stride_n;
    out.s_at = static_cast<uint32_t>(row) * static_cast<uint32_t>(s_stride_n) * 2;
    if constexpr (ZP) {
      const auto n = static_cast<uint32_t>(first + row), word = static_cast<uint32_t>(first) / 8;
      out.zeros = zeros + static_cast<int>(word) * z_stride_n8;
      out.z_at = (kWhole ? 0 : n / 8 - word) * static_cast<uint32_t>(z_stride_n8) * 4;
      out.zero_shift = 4 * (n % 8);
    }
    return out;
  }
};

// The element `bytes` after a pointer that is the same for all lanes.
template <typename T>
GPU_DEVICE const T* behind(const T* base, uint32_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes);
}

GPU_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Sum over `Lanes` neighbouring lanes.
template <int Lanes>
GPU_DEVICE float sum_over_lanes(float x) {
  if constexpr (Lanes > 1) x += gpu::shuffle_xor<1>(x);
  if constexpr (Lanes > 2) x += gpu::shuffle_xor<2>(x);
  if constexpr (Lanes > 4) x += gpu::shuffle_xor<4>(x);
  if constexpr (Lanes > 8) x += gpu::shuffle_xor<8>(x);
  if constexpr (Lanes > 16) x += gpu::shuffle_xor<16>(x);
  return x;
}

// A lane's loads for one block: the scales and zero points of `Scales` groups.
template <int Scales>
struct Block {
  gpu::U32x4 w[2];
  uint16_t scale[2][Scales];
  uint32_t zero[2][Scales];
};

// Product of a block with the dot instruction: each lane sums over its own k.
template <typename DT, int G, int S>
struct DotProduct {
  static constexpr int kScales = 1;   // groups whose scale a lane needs, per row and block
  static constexpr int kSummed = 32;  // activations per sum: those that a lane multiplies
  static constexpr int kResults = S;

  float acc[2][kResults] = {};

  static GPU_DEVICE int lane_group() { return 32 * lane_k() / G; }  // within a block

  // `staged` and `sums` point to the block, in slot 0.
  GPU_DEVICE void add(const Block<kScales>& b, const float (&scale)[2][kScales],
                      const float (&offset)[2][kScales], const char* staged, const float* sums) {
    float dot[2][S] = {};
    GPU_UNROLL
    for (int q = 0; q < 4; ++q) {
      gpu::U32x4 act[S];
      GPU_UNROLL
      for (int s = 0; s < S; ++s) {
        act[s] = *reinterpret_cast<const gpu::U32x4*>(staged + s * staged_row_bytes(S) +
                                                      16 * (q * kLanesPerRow + lane_k()));
      }
      add_word<0>(dot, b.w[0].v[q], b.w[1].v[q], act);
      if constexpr (S > 1) gpu::order_requests();  // one quarter's activations at a time: registers
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      const float sum = sums[s * staged_sums(S) + lane_k()];
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) acc[r][s] += scale[r][0] * (dot[r][s] - offset[r][0] * sum);
    }
  }

  template <int I>
  static GPU_DEVICE void add_word(float (&dot)[2][S], uint32_t word0, uint32_t word1,
                                  const gpu::U32x4 (&act)[S]) {
    const uint32_t w0 = unpack_pair<DT, I>(word0), w1 = unpack_pair<DT, I>(word1);
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      dot[0][s] = gpu::dot2(DT{}, w0, act[s].v[I], dot[0][s]);
      dot[1][s] = gpu::dot2(DT{}, w1, act[s].v[I], dot[1][s]);
    }
    if constexpr (I < 3) add_word<I + 1>(dot, word0, word1, act);
  }

  GPU_DEVICE void finish() {
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) acc[r][s] = sum_over_lanes<kLanesPerRow>(acc[r][s]);
    }
  }
  static GPU_DEVICE int slot(int i) { return lane_k() == 0 ? i : S; }
};

// fork: begin overlay
// Product of a block with the 16x8x16 matrix instruction. The wave's 16 rows are the rows of the
// instruction. A column is a pair (slot, group within the block): groups have different scales, so
// their sums stay separate. A column is zero outside its group.
template <typename DT, int G, int S>
struct MmaProduct {
  static constexpr int kGroups = kBlockK / G;  // per block
  static constexpr int kPasses = (S * kGroups + 7) / 8;
  static constexpr int kScales = kGroups == 1 ? 1 : 2;
  static constexpr int kSummed = G;
  static constexpr int kResults = kGroups == 1 ? 2 * kPasses : kPasses;

  float acc[2][kResults] = {};
  gpu::U32x4 act[4] = {};  // stays zero in lanes of empty columns

  // Group, within a block, of the lane's first result column; the second column's is the next.
  static GPU_DEVICE int lane_group() { return 2 * lane_k() % kGroups; }

  GPU_DEVICE void add(const Block<kScales>& b, const float (&scale)[2][kScales],
                      const float (&offset)[2][kScales], const char* staged, const float* sums) {
    GPU_UNROLL
    for (int p = 0; p < kPasses; ++p) {
      const int column = 8 * p + lane_row();
      const bool mine = column < S * kGroups && 32 * lane_k() / G == column % kGroups;
      const char* row = staged + column / kGroups * staged_row_bytes(S) + 16 * lane_k();
      float dot[2][4] = {};  // two sums, for a shorter chain of dependent instructions
      GPU_UNROLL
      for (int q = 0; q < 4; ++q) {
        if constexpr (kPasses > 1) act[q] = {{0, 0, 0, 0}};
        if (mine) act[q] = *reinterpret_cast<const gpu::U32x4*>(row + 16 * q * kLanesPerRow);
        const uint32_t w0 = b.w[0].v[q], w1 = b.w[1].v[q];
        const uint32_t low[4] = {unpack_pair<DT, 0>(w0), unpack_pair<DT, 0>(w1),
                                 unpack_pair<DT, 1>(w0), unpack_pair<DT, 1>(w1)};
        const uint32_t high[4] = {unpack_pair<DT, 2>(w0), unpack_pair<DT, 2>(w1),
                                  unpack_pair<DT, 3>(w0), unpack_pair<DT, 3>(w1)};
        mma_16x8x16(DT{}, dot[0], low, {act[q].v[0], act[q].v[1]});
        mma_16x8x16(DT{}, dot[1], high, {act[q].v[2], act[q].v[3]});
      }
      GPU_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float sum = column_sum(p, c, sums);
        const int group = kGroups == 1 ? 0 : c, result = kGroups == 1 ? 2 * p + c : p;
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) {
          acc[r][result] +=
              scale[r][group] * (dot[0][2 * r + c] + dot[1][2 * r + c] - offset[r][group] * sum);
        }
      }
    }
  }

  // Sum of the activations in the lane's c-th result column of pass p. An empty column repeats
  // slot 0; its result is discarded.
  static GPU_DEVICE float column_sum(int p, int c, const float* sums) {
    const int column = 8 * p + 2 * lane_k() + c, slot = column / kGroups;
    return sums[(slot < S ? slot : 0) * staged_sums(S) + column % kGroups];
  }

  GPU_DEVICE void finish() {
    if constexpr (kGroups == 4) {
      GPU_UNROLL
      for (int p = 0; p < kPasses; ++p) {
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) acc[r][p] += gpu::shuffle_xor<1>(acc[r][p]);
      }
    }
  }

  // Slot of the lane's i-th result; S or more if there is none.
  static GPU_DEVICE int slot(int i) {
    if constexpr (kGroups == 1) return 8 * (i / 2) + 2 * lane_k() + i % 2;
    if constexpr (kGroups == 2) return 4 * i + lane_k();
    return lane_k() % 2 == 0 ? 2 * i + lane_k() / 2 : S;
  }
};

// fork: end
// The product over blocks [first, last) of k; finish() turns what run() left in the lanes into
// results. Each turn multiplies its weights with S slots at a time, P times: weights are loaded
// once for S * P slots, and only S slots at a time take registers and LDS for activations.
template <typename DT, int G, bool ZP, int S, int P = 1>
class WaveTile {
#if GPU_HAS_MMA
  using Product = MmaProduct<DT, G, S>;
#else
  using Product = DotProduct<DT, G, S>;
#endif
  static constexpr int kScales = Product::kScales;
  static constexpr int kGroups = kBlockK / G;
  static constexpr int kSumsPerBlock = kBlockK / Product::kSummed;
  static constexpr int kStagedBlocks = staged_blocks(S);
  static constexpr int kStagings = kLoadDepth / kStagedBlocks;  // per turn
  // Stagings requested before the weights; with several passes as few as possible: registers.
#if GPU_HAS_MMA
  static constexpr int kAhead = 1;
#else
  static constexpr int kAhead = P > 1 ? 1 : kStagings;
#endif
  static constexpr int kUnitsPerRow = kStagedBlocks * kBlockK / 8;  // of 16 bytes
  static constexpr int kUnitsPerLane = S * kUnitsPerRow / gpu::kWaveSize;
  static_assert(S * kUnitsPerRow % gpu::kWaveSize == 0 && kLoadDepth % kStagedBlocks == 0);

 public:
  GPU_DEVICE WaveTile(int first, int last, int k)
      : first_(first),
        last_(last),
        last_unit_(2 * k - 16),
        last_weights_(k / 2 - 16),
        groups_(static_cast<uint32_t>(k) / G) {}

  // `row_of(s)` is the activation row of slot s, any row for an empty slot; `staged` is the wave's
  // LDS for staged rows.
  template <typename RowOf>
  GPU_DEVICE void run(const WeightRows& rows, const RowOf& row_of, char* staged) {
    float* const sums = reinterpret_cast<float*>(staged + S * staged_row_bytes(S));
    enter_rows(row_of, 0);
    for (int base = first_; base < last_; base += kLoadDepth) {
      request_ahead(base);
      request_weights(rows, base);
      gpu::order_requests();
      GPU_UNROLL
      for (int p = 0; p < P; ++p) {
        if (p > 0) {
          gpu::order_requests();  // not earlier: registers
          enter_rows(row_of, p);
          request_ahead(base);
        }
        GPU_UNROLL
        for (int d = 0; d < kLoadDepth; ++d) {
          if (d > 0 && base + d >= last_) {
            if constexpr (P == 1) return;
            break;
          }
          if (d % kStagedBlocks == 0) {
            const int staging = d / kStagedBlocks;
            if (staging >= kAhead) request_units(0, base + d);
            gpu::wave_barrier();  // all reads of the previous staging are done
            store_staged(staging % kAhead, staged, sums);
            gpu::wave_barrier();
          }
          add_block(products_[p], d, rows, base, staged + d % kStagedBlocks * kBlockK * 2,
                    sums + d % kStagedBlocks * kSumsPerBlock);
        }
      }
      if constexpr (P > 1) enter_rows(row_of, 0);
    }
  }

  GPU_DEVICE void finish() {
    GPU_UNROLL
    for (int p = 0; p < P; ++p) products_[p].finish();
  }

  // visit(slot, row set, result) is called in the lane that has the result of row lane_row().
  template <typename Visit>
  GPU_DEVICE void for_each_result(const Visit& visit) const {
    GPU_UNROLL
    for (int p = 0; p < P; ++p) {
      GPU_UNROLL
      for (int i = 0; i < Product::kResults; ++i) {
        const int s = Product::slot(i);
        if (s >= S) continue;
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) visit(p * S + s, r, products_[p].acc[r][i]);
      }
    }
  }

 private:
  // Sets the activation rows of slots p * S to p * S + S - 1.
  template <typename RowOf>
  GPU_DEVICE void enter_rows(const RowOf& row_of, int p) {
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      act_rows_[i] = row_of(p * S + (gpu::lane() + i * gpu::kWaveSize) / kUnitsPerRow);
    }
  }

  GPU_DEVICE void request_ahead(int base) {
    GPU_UNROLL
    for (int j = 0; j < kAhead; ++j) request_units(j, base + j * kStagedBlocks);
    gpu::order_requests();
  }

  // The group of the lane's i-th scale in block base + d.
  static GPU_DEVICE uint32_t group(int base, int d, int i) {
    return base * kGroups + (d * kGroups + Product::lane_group() + i);
  }

  GPU_DEVICE void request_weights(const WeightRows& rows, int base) {
    GPU_UNROLL
    for (int d = 0; d < kLoadDepth; ++d) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        const uint32_t at = smaller(group(base, d, i), groups_ - 1);
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) {
          const WeightRows::Set& set = rows.sets[r];
          blocks_[d].scale[r][i] = *behind(set.scales, set.s_at + 2 * at);
          if constexpr (ZP) blocks_[d].zero[r][i] = *behind(set.zeros, set.z_at + 4 * at);
        }
      }
    }
    GPU_UNROLL
    for (int d = 0; d < kLoadDepth; ++d) {
      const uint32_t at =
          smaller(base * (kBlockK / 2) + (d * (kBlockK / 2) + 16 * lane_k()), last_weights_);
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        blocks_[d].w[r] = gpu::load_weights(behind(rows.sets[r].q, rows.sets[r].q_at + at));
      }
    }
  }

  // Multiplies block base + d.
  GPU_DEVICE void add_block(Product& product, int d, const WeightRows& rows, int base,
                            const char* staged, const float* sums) {
    float scale[2][kScales], offset[2][kScales];
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        gpu::arrived(blocks_[d].scale[r][i]);
        const bool real = group(base, d, i) < groups_;
        scale[r][i] = real ? Format<DT>::to_float(blocks_[d].scale[r][i]) : 0.0f;
        int zero = kSymmetricZeroPoint;
        if constexpr (ZP) {
          gpu::arrived(blocks_[d].zero[r][i]);
          zero = (blocks_[d].zero[r][i] >> rows.sets[r].zero_shift) & 15;
        }
        offset[r][i] = Format<DT>::kOffset + zero;
      }
    }
    product.add(blocks_[d], scale, offset, staged, sums);
  }

  // Loads the units of staging j, from `block` on.
  GPU_DEVICE void request_units(int j, int block) {
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      const int unit = gpu::lane() + i * gpu::kWaveSize;
      const uint32_t at = smaller(block * (kBlockK * 2) + unit % kUnitsPerRow * 16, last_unit_);
      units_[j][i] = gpu::load_16_any(behind(act_rows_[i], at));
    }
  }

  // A lane multiplies four units of a block. The same unit of all lanes along k is contiguous.
  // Neighbouring lanes hold the units of a sum.
  GPU_DEVICE void store_staged(int j, char* staged, float* sums) const {
    constexpr int kLanesPerSum = Product::kSummed / 8;
    float sum[kUnitsPerLane];
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      const int unit = gpu::lane() + i * gpu::kWaveSize;
      const int slot = unit / kUnitsPerRow, at = unit % kUnitsPerRow, in_block = at % (kBlockK / 8);
      const int place = at - in_block + in_block % 4 * kLanesPerRow + in_block / 4;
      *reinterpret_cast<gpu::U32x4*>(staged + slot * staged_row_bytes(S) + 16 * place) =
          units_[j][i];
      sum[i] = 0.0f;
      GPU_UNROLL
      for (int w = 0; w < 4; ++w) {
        sum[i] = gpu::dot2(DT{}, units_[j][i].v[w], Format<DT>::kOnes, sum[i]);
      }
      sum[i] = sum_over_lanes<kLanesPerSum>(sum[i]);
    }
    if (gpu::lane() % kLanesPerSum != 0) return;
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      const int unit = gpu::lane() + i * gpu::kWaveSize;
      sums[unit / kUnitsPerRow * staged_sums(S) + unit % kUnitsPerRow / kLanesPerSum] = sum[i];
    }
  }

  int first_, last_;
  uint32_t last_unit_;     // offset of a row's last 8 activations, in bytes
  uint32_t last_weights_;  // offset of its last 32 weights, in bytes
  uint32_t groups_;        // per row
  const uint16_t* act_rows_[kUnitsPerLane];
  gpu::U32x4 units_[kAhead][kUnitsPerLane];
  Block<kScales> blocks_[kLoadDepth];
  Product products_[P];
};

}  // namespace moe_int4
