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
//     row 0    | lane 0   | lane 1   |  ...  | lane L-1   |      L = 8, 4 rows, kBlockK = 256:
//     row 1    | lane L   | lane L+1 |  ...  | lane 2L-1  |      dot products
//       ...                                                      L = 4, 8 rows, kBlockK = 128:
//     last row | lane 32-L|          |  ...  | lane 31    |      matrix instructions
//              +----------+----------+-------+------------+
//
// The second row set is the rows that follow, or in gate_up the up rows of the same indices.
//
// Weights go from memory to registers, kLoadDepth blocks at a time, all requested before the first
// use; activations go through LDS. The activations' sums, which take out the nibble offset and the
// zero point, are made once while they are staged.
#pragma once

#include "dequant.cuh"
#include "geometry.h"

namespace moe_int4 {

GPU_DEVICE int lane_row() { return gpu::lane() / kLanesPerRow; }
GPU_DEVICE int lane_k() { return gpu::lane() % kLanesPerRow; }

// One row of packed weights, as one lane sees it: at the lane's first word and group.
struct WeightRow {
  const uint32_t* q;
  const uint16_t* scales;
  const uint32_t* zeros;  // or null
  int zero_shift;         // the row's nibble in a word of zeros
};

// A stack of packed weights, see moe_int4_args.h; strides within an expert fit 32 bits.
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

  // The row from `word` and `group` on, in expert 0; at() then moves it. In two steps, so that all
  // but a multiplication is done when the router's answer arrives.
  GPU_DEVICE WeightRow row(int n, int word, int group) const {
    WeightRow out = {q + (n * q_stride_n + word), scales + (n * s_stride_n + group),
                     zeros == nullptr ? nullptr : zeros + (n / 8 * z_stride_n8 + group),
                     4 * (n % 8)};
    gpu::settle(out.q);
    gpu::settle(out.scales);
    return out;
  }
  GPU_DEVICE WeightRow at(int expert, const WeightRow& row) const {
    return {row.q + expert * q_stride_e, row.scales + expert * s_stride_e,
            zeros == nullptr ? nullptr : row.zeros + expert * z_stride_e, row.zero_shift};
  }
};

// Sum over `Lanes` lanes beside each other.
template <int Lanes>
GPU_DEVICE float sum_over_lanes(float x) {
  if constexpr (Lanes > 1) x += gpu::shuffle_xor<1>(x);
  if constexpr (Lanes > 2) x += gpu::shuffle_xor<2>(x);
  if constexpr (Lanes > 4) x += gpu::shuffle_xor<4>(x);
  if constexpr (Lanes > 8) x += gpu::shuffle_xor<8>(x);
  return x;
}

// What a lane loads of one block: `Scales` groups' worth of scales and zero points.
template <int Scales>
struct Block {
  gpu::U32x4 w[2];
  uint16_t scale[2][Scales];
  uint32_t zero[2][Scales];
};

// Product of a block through the dot instruction: a lane sums over its own k.
template <typename DT, int G, int S>
struct DotProduct {
  static constexpr int kScales = 1;  // groups whose scale a lane needs, per row and block
  static constexpr int kResults = S;

  float acc[2][kResults] = {};

  static GPU_DEVICE int lane_group() { return 32 * lane_k() / G; }  // within a block

  // `staged` and `sums` are at the block, of slot 0.
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
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      // One lane of a group takes out the offset for all of it.
      const float sum = 32 * lane_k() % G == 0 ? sums[s * staged_sums(S) + lane_group()] : 0.0f;
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

// Product of a block through the 16x8x16 matrix instruction: the wave's 16 rows are its rows, and
// a column is a pair (slot, group within the block), so that the sums of different groups, which
// have different scales, stay apart. A column is zero outside its group.
template <typename DT, int G, int S>
struct MmaProduct {
  static constexpr int kGroups = kBlockK / G;  // in a block
  static constexpr int kPasses = (S * kGroups + 7) / 8;
  static constexpr int kScales = kGroups == 1 ? 1 : 2;
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
      float dot[2][4] = {};  // two sums: a shorter chain of dependent instructions
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
  // slot 0: its result is dropped.
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

  // Slot of the lane's i-th result, S or more: none.
  static GPU_DEVICE int slot(int i) {
    if constexpr (kGroups == 1) return 8 * (i / 2) + 2 * lane_k() + i % 2;
    if constexpr (kGroups == 2) return 4 * i + lane_k();
    return lane_k() % 2 == 0 ? 2 * i + lane_k() / 2 : S;
  }
};

template <typename DT, int G, int S, bool Mma>
struct ProductOf {
  using Type = DotProduct<DT, G, S>;
};
template <typename DT, int G, int S>
struct ProductOf<DT, G, S, true> {
  using Type = MmaProduct<DT, G, S>;
};

// The product over blocks [first, last) of k, in two steps: start() requests the first
// activations, run() does the rest. `row_of(s)` gives the activation row of slot s, null: empty.
template <typename DT, int G, bool ZP, int S>
class WaveTile {
  using Product = typename ProductOf<DT, G, S, gpu::kHasMma>::Type;
  static constexpr int kScales = Product::kScales;
  static constexpr int kGroups = kBlockK / G;
  static constexpr int kStagedBlocks = staged_blocks(S);
  static constexpr int kUnitsPerRow = kStagedBlocks * kBlockK / 8;  // of 16 bytes
  static constexpr int kUnitsPerLane = S * kUnitsPerRow / gpu::kWaveSize;
  static_assert(S * kUnitsPerRow % gpu::kWaveSize == 0 && kLoadDepth % kStagedBlocks == 0);

 public:
  GPU_DEVICE WaveTile(int first, int last, int k) : first_(first), last_(last), k_(k) {
    const int lane_blocks = (k - 32 * lane_k() + kBlockK - 1) >> kLog2BlockK;
    weight_limit_ = lane_blocks < last ? lane_blocks : last;
    group_limit_ = (k / G < last * kGroups ? k / G : last * kGroups) - Product::lane_group();
  }

  // The lane's part of row n, to be moved to an expert and given to run().
  GPU_DEVICE WeightRow row(const WeightStack& weights, int n) const {
    return weights.row(n, first_ * (kBlockK / 8) + 4 * lane_k(),
                       first_ * kGroups + Product::lane_group());
  }

  template <typename RowOf>
  GPU_DEVICE void start(const RowOf& row_of) {
    load_staged(row_of, first_);
  }

  // `staged` is the wave's LDS for staged rows.
  template <typename RowOf>
  GPU_DEVICE void run(WeightRow row0, WeightRow row1, const RowOf& row_of, char* staged) {
    float* const sums = reinterpret_cast<float*>(staged + S * staged_row_bytes(S));
    WeightRow rows[2] = {row0, row1};
    for (int base = first_; base < last_; base += kLoadDepth) {
      GPU_UNROLL
      for (int d = 0; d < kLoadDepth; ++d) load_block(d, rows, base);
      GPU_UNROLL
      for (int d = 0; d < kLoadDepth; ++d) {
        if (base + d >= last_) break;
        if (d % kStagedBlocks == 0) {
          if (base + d > first_) load_staged(row_of, base + d);
          gpu::wave_barrier();  // what was staged before has been read
          store_staged(staged, sums);
          gpu::wave_barrier();
        }
        add_block(d, rows, staged + d % kStagedBlocks * kBlockK * 2,
                  sums + d % kStagedBlocks * kGroups);
      }
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        rows[r].q += kLoadDepth * (kBlockK / 8);
        rows[r].scales += kLoadDepth * kGroups;
        if constexpr (ZP) rows[r].zeros += kLoadDepth * kGroups;
      }
    }
    product_.finish();
  }

  // visit(slot, row set, result) in the lane that holds the result for row lane_row() of the set.
  template <typename Visit>
  GPU_DEVICE void for_each_result(const Visit& visit) const {
    GPU_UNROLL
    for (int i = 0; i < Product::kResults; ++i) {
      const int s = Product::slot(i);
      if (s >= S) continue;
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) visit(s, r, product_.acc[r][i]);
    }
  }

 private:
  // Block base + d; `rows` are at block base.
  GPU_DEVICE void load_block(int d, const WeightRow (&rows)[2], int base) {
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      blocks_[d].w[r] = {{0, 0, 0, 0}};
      if (base + d < weight_limit_) {
        blocks_[d].w[r] = gpu::load_weights(rows[r].q + d * (kBlockK / 8));
      }
    }
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        const bool real = (base + d) * kGroups + i < group_limit_;
        blocks_[d].scale[r][i] = real ? rows[r].scales[d * kGroups + i] : 0;
        if constexpr (ZP) blocks_[d].zero[r][i] = real ? rows[r].zeros[d * kGroups + i] : 0;
      }
    }
  }

  GPU_DEVICE void add_block(int d, const WeightRow (&rows)[2], const char* staged,
                            const float* sums) {
    float scale[2][kScales], offset[2][kScales];
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        scale[r][i] = Format<DT>::to_float(blocks_[d].scale[r][i]);
        int zero = kSymmetricZeroPoint;
        if constexpr (ZP) zero = (blocks_[d].zero[r][i] >> rows[r].zero_shift) & 15;
        offset[r][i] = Format<DT>::kOffset + zero;
      }
    }
    product_.add(blocks_[d], scale, offset, staged, sums);
  }

  // The activations from `block` on, 16 bytes at a time; zeros past the end and for an empty slot.
  template <typename RowOf>
  GPU_DEVICE void load_staged(const RowOf& row_of, int block) {
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      const int unit = gpu::lane() + i * gpu::kWaveSize;
      const int at = block * kBlockK + unit % kUnitsPerRow * 8;
      const uint16_t* row = row_of(unit / kUnitsPerRow);
      units_[i] = {{0, 0, 0, 0}};
      if (row != nullptr && at < k_) units_[i] = gpu::load_16_any(row + at);
    }
  }

  // A lane multiplies four units of a block; the same unit of all lanes along k lies side by side.
  // Lanes beside each other hold a group's units: their sums make the group's.
  GPU_DEVICE void store_staged(char* staged, float* sums) const {
    GPU_UNROLL
    for (int i = 0; i < kUnitsPerLane; ++i) {
      const int unit = gpu::lane() + i * gpu::kWaveSize;
      const int slot = unit / kUnitsPerRow, at = unit % kUnitsPerRow, in_block = at % (kBlockK / 8);
      const int place = at - in_block + in_block % 4 * kLanesPerRow + in_block / 4;
      *reinterpret_cast<gpu::U32x4*>(staged + slot * staged_row_bytes(S) + 16 * place) = units_[i];
      float sum = 0.0f;
      GPU_UNROLL
      for (int j = 0; j < 4; ++j) sum = gpu::dot2(DT{}, units_[i].v[j], Format<DT>::kOnes, sum);
      sum = sum_over_lanes<G / 8>(sum);
      if (at % (G / 8) == 0) sums[slot * staged_sums(S) + at / (G / 8)] = sum;
    }
  }

  int first_, last_, k_;
  int weight_limit_;  // first block in which the lane has no weights to load
  int group_limit_;   // first group past the end, counted from the lane's group in block 0
  Block<kScales> blocks_[kLoadDepth];
  gpu::U32x4 units_[kUnitsPerLane];
  Product product_;
};

}  // namespace moe_int4
