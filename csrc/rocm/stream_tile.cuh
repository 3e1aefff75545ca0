// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The product of wave_tile.cuh for one activation row per expert, where kStreams is true: one wave
// multiplies kRowsPerWave rows of packed weights over a range of k, for one pair (token, expert)
// after another, or one tile of rows after another for one pair. All items form one stream of
// windows of kWindowBlocks blocks. kRingWindows windows are being copied to LDS or multiplied at a
// time. That takes no registers and does not stop between items. Activation rows are 16-byte
// aligned.
//
// The columns of the matrix instruction are the groups within a block; empty columns read zeros. A
// second product, of -(offset + zero point) for every weight, removes those.
#pragma once

#include "wave_tile.cuh"

namespace moe_int4 {

enum class Items {
  kPairs,
  kOnePair,  // there is at most one item
  kTiles,    // of kRowGroups rows of each row set, for one pair
};

template <typename DT, int G, bool ZP, Items Of>
class StreamTile {
  static constexpr int kGroups = kBlockK / G;            // in a block
  static constexpr int kColumns = kGroups == 1 ? 1 : 2;  // of a lane's two, those in use

 public:
  // The row sets start at row0 and row1 of the lane. Rows of the first set from `rows_of_set` on
  // repeat the last one before. `ring` is the wave's LDS. `zeros` is the block's; its first wave
  // fills it, so a block barrier has to follow.
  GPU_DEVICE StreamTile(const WeightStack& weights, int row0, int row1, int rows_of_set, int first,
                        int last, int k, char* ring, char* zeros)
      : weights_(weights),
        first_(first),
        last_(last),
        k_(k),
        row_(row0),
        last_row_(rows_of_set - 1),
        ring_(gpu::lds_address(ring) + 16 * gpu::lane()) {
    if (gpu::wave() == 0 && gpu::lane() < kStreamZeroBytes / 16) {
      reinterpret_cast<gpu::U32x4*>(zeros)[gpu::lane()] = {{0, 0, 0, 0}};
    }
    const int lane_blocks = (k - 32 * lane_k() + kBlockK - 1) >> kLog2BlockK;
    limit_ = lane_blocks < last ? lane_blocks : last;
    const bool mine = lane_row() < kGroups && 32 * lane_k() / G == lane_row();
    act_ = gpu::lds_address(mine ? ring + kWindowWeightBytes + 16 * lane_k() : zeros);
    act_block_ = mine ? kBlockK * 2 : 0;
    act_window_ = mine ? kWindowBytes : 0;
    const int rows[2] = {row0, row1};
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      q_at_[r] = rows[r] * weights.q_stride_n + first * (kBlockK / 8) + 4 * lane_k();
      s_at_[r] = rows[r] * weights.s_stride_n + first * kGroups + lane_k();
      q_[r] = weights.q + q_at_[r];
      s_[r] = weights.scales + s_at_[r];
      gpu::settle(q_[r]);
      gpu::settle(s_[r]);
      if constexpr (ZP) {
        z_at_[r] = rows[r] / 8 * weights.z_stride_n8 + first * kGroups + lane_k();
        z_[r] = weights.zeros + z_at_[r];
        zero_shift_[r] = 4 * (rows[r] % 8);
      }
    }
    // A lane multiplies four units of 8 activations per block. The same unit of all lanes along k
    // is contiguous.
    const int unit = gpu::lane() % 16;
    act_to_ = kWindowWeightBytes - 16 * gpu::lane() +
              16 * (gpu::lane() / 16 * 16 + unit % 4 * kLanesPerRow + unit / 4);
  }

  // Requests the first windows of the items (one bit each): weights (`experts`: lane p has pair
  // p's) and activations (`row_of(item)`). Call both in any order, the second with Commit.
  template <bool Commit>
  GPU_DEVICE void request_weights(uint32_t pairs, int experts) {
    experts_ = experts;
    at_ = {pairs, first_};
    if (at_.pairs != 0) enter_weights();
    GPU_UNROLL
    for (int w = 0; w < kRingWindows; ++w) {
      copy_weights<Commit>(ring_ + w * kWindowBytes);
      load_scales(w);
      if (advance(at_) && Of != Items::kOnePair && at_.pairs != 0) next_weights();
    }
  }
  template <bool Commit, typename RowOf>
  GPU_DEVICE void request_activations(uint32_t pairs, const RowOf& row_of) {
    Place at = {pairs, first_};
    if (pairs != 0) enter_activations(at, row_of);
    GPU_UNROLL
    for (int w = 0; w < kRingWindows; ++w) {
      if (at.pairs != 0) copy_activations(ring_ + w * kWindowBytes, at.block);
      if constexpr (Commit) commit_window();
      if (advance(at) && Of != Items::kOnePair && at.pairs != 0) enter_activations(at, row_of);
    }
  }

  // Multiplies. done(item, sums) gets the item's two results, in lanes with lane_k() == 0.
  template <typename RowOf, typename Done>
  GPU_DEVICE void run(uint32_t pairs, const RowOf& row_of, const Done& done) {
    int w = 0;
    GPU_ROLLED
    for (; pairs != 0; pairs &= pairs - 1) {
      float acc[2] = {};
      GPU_ROLLED
      for (int base = first_; base < last_; base += kWindowBlocks) {
        add_blocks<0>(acc, base, ring_ + w * kWindowBytes, act_ + w * act_window_);
        // Wait for the whole window, also for copies that no block waited for, before its reuse.
        gpu::wait_copies<(kRingWindows - 1) * kWindowBlocks>();
        GPU_UNROLL
        for (int i = 0; i + 1 < kRingWindows; ++i) scales_[i] = scales_[i + 1];
        if (at_.pairs != 0) {
          gpu::wave_barrier();  // all reads of the window are done
          copy_activations(ring_ + w * kWindowBytes, at_.block);
        }
        copy_weights<true>(ring_ + w * kWindowBytes);
        load_scales(kRingWindows - 1);
        if (advance(at_) && Of != Items::kOnePair && at_.pairs != 0) {
          next_weights();
          enter_activations(at_, row_of);
        }
        w = w + 1 == kRingWindows ? 0 : w + 1;
      }
      if constexpr (kGroups == 4) {
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) acc[r] += gpu::shuffle_xor<1>(acc[r]);
      }
      done(gpu::first_bit(pairs), acc);
    }
    gpu::wait_all_copies();
    gpu::wave_barrier();  // all reads of the ring are done
  }

 private:
  struct Place {
    uint32_t pairs;  // remaining items; the lowest bit is the current one
    int block;
  };

  // Scales and zero points of a window: each lane loads one of four adjacent groups.
  struct Scales {
    uint16_t scale[kGroups][2];
    uint32_t zero[kGroups][2];
  };

  // Moves to the next window; true if it belongs to another item or does not exist.
  GPU_DEVICE bool advance(Place& at) const {
    at.block += kWindowBlocks;
    if (at.block < last_) return false;
    at.block = first_;
    at.pairs &= at.pairs - 1;
    return true;
  }

  GPU_DEVICE void enter_weights() {
    const int e =
        Of != Items::kPairs ? experts_ : gpu::shuffle(experts_, gpu::first_bit(at_.pairs));
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      if constexpr (Of != Items::kPairs) {
        q_[r] += e * weights_.q_stride_e;
        s_[r] += e * weights_.s_stride_e;
        if constexpr (ZP) z_[r] += e * weights_.z_stride_e;
      } else {
        q_[r] = weights_.q + e * weights_.q_stride_e + q_at_[r];
        s_[r] = weights_.scales + e * weights_.s_stride_e + s_at_[r];
        if constexpr (ZP) z_[r] = weights_.zeros + e * weights_.z_stride_e + z_at_[r];
      }
    }
  }

  // Back to the first block, of the next pair or of the next rows.
  GPU_DEVICE void next_weights() {
    if constexpr (Of != Items::kTiles) {
      enter_weights();
    } else {
      const int row = row_ + kRowGroups < last_row_ ? row_ + kRowGroups : last_row_;
      const int down = row - row_, back = (last_ - first_ + kWindowBlocks - 1) / kWindowBlocks;
      row_ = row;
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        q_[r] += down * weights_.q_stride_n - back * (kWindowBlocks * (kBlockK / 8));
        s_[r] += down * weights_.s_stride_n - back * (kWindowBlocks * kGroups);
        // With zero points the rows are a multiple of kRowGroups.
        if constexpr (ZP) z_[r] += weights_.z_stride_n8 - back * (kWindowBlocks * kGroups);
      }
    }
  }

  template <typename RowOf>
  GPU_DEVICE void enter_activations(const Place& at, const RowOf& row_of) {
    a_ = row_of(gpu::first_bit(at.pairs)) + first_ * kBlockK + 8 * gpu::lane();
  }

  template <bool Commit>
  GPU_DEVICE void copy_weights(gpu::LdsAddress to) {
    if (at_.pairs == 0) {
      if constexpr (Commit) commit_window();
      return;
    }
    GPU_UNROLL
    for (int i = 0; i < kWindowBlocks; ++i) {
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        gpu::copy_weights_async(to + (2 * i + r) * (kBlockWeightBytes / 2),
                                q_[r] + i * (kBlockK / 8), at_.block + i < limit_);
      }
      if constexpr (Commit) gpu::commit_copies();
    }
    q_[0] += kWindowBlocks * (kBlockK / 8);
    q_[1] += kWindowBlocks * (kBlockK / 8);
  }

  // Every block has a group of copies, even if the block does not exist.
  static GPU_DEVICE void commit_window() {
    GPU_UNROLL
    for (int i = 0; i < kWindowBlocks; ++i) gpu::commit_copies();
  }

  GPU_DEVICE void load_scales(int w) {
    const int left = at_.pairs != 0 ? k_ / G - at_.block * kGroups - lane_k() : 0;
    GPU_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        scales_[w].scale[j][r] = 0;
        if (4 * j < left) scales_[w].scale[j][r] = s_[r][4 * j];
        if constexpr (ZP) {
          scales_[w].zero[j][r] = 0;
          if (4 * j < left) scales_[w].zero[j][r] = z_[r][4 * j];
        }
      }
    }
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      s_[r] += kWindowBlocks * kGroups;
      if constexpr (ZP) z_[r] += kWindowBlocks * kGroups;
    }
  }

  GPU_DEVICE void copy_activations(gpu::LdsAddress to, int block) {
    GPU_UNROLL
    for (int j = 0; j < kWindowBlocks / 2; ++j) {
      const int from = 8 * (gpu::lane() + j * gpu::kWaveSize);
      gpu::copy_16_async(to + (act_to_ + j * kBlockK * 4), a_ + 8 * j * gpu::kWaveSize,
                         block * kBlockK + from < k_);
    }
    a_ += kWindowBlocks * kBlockK;
  }

  template <int I>
  GPU_DEVICE void add_blocks(float (&acc)[2], int base, gpu::LdsAddress window,
                             gpu::LdsAddress act) {
    if constexpr (I < kWindowBlocks) {
      if (base + I >= last_) return;
      gpu::wait_copies<kRingWindows * kWindowBlocks - 1 - I>();
      gpu::wave_barrier();  // the copies of the other lanes
      add_block<I>(acc, window, act);
      add_blocks<I + 1>(acc, base, window, act + act_block_);
    }
  }

  // Block I of a window.
  template <int I>
  GPU_DEVICE void add_block(float (&acc)[2], gpu::LdsAddress weights, gpu::LdsAddress act) {
    const gpu::U32x4 w0 = gpu::lds_load_16(weights + I * kBlockWeightBytes);
    const gpu::U32x4 w1 =
        gpu::lds_load_16(weights + (I * kBlockWeightBytes + kBlockWeightBytes / 2));
    uint32_t minus[2];
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      int zero = kSymmetricZeroPoint;
      if constexpr (ZP) {
        const int own = I * kGroups + 32 * lane_k() / G;
        zero =
            gpu::shuffle_in_quad(scales_[0].zero[I * kGroups / 4][r], own) >> zero_shift_[r] & 15;
      }
      minus[r] = unpack_pair<DT, 0>(zero * 0x00010001u) ^ 0x80008000u;
    }
    float dot[4][4] = {};  // four sums, for a shorter chain of dependent instructions
    GPU_UNROLL
    for (int q = 0; q < 4; ++q) {
      const gpu::U32x4 a = gpu::lds_load_16(act + 16 * q * kLanesPerRow);
      const uint32_t x = w0.v[q], y = w1.v[q];
      const uint32_t low[4] = {unpack_pair<DT, 0>(x), unpack_pair<DT, 0>(y), unpack_pair<DT, 1>(x),
                               unpack_pair<DT, 1>(y)};
      const uint32_t high[4] = {unpack_pair<DT, 2>(x), unpack_pair<DT, 2>(y), unpack_pair<DT, 3>(x),
                                unpack_pair<DT, 3>(y)};
      mma_16x8x16(DT{}, dot[0], low, {a.v[0], a.v[1]});
      mma_16x8x16(DT{}, dot[1], high, {a.v[2], a.v[3]});
      mma_16x8x16(DT{}, dot[2], {minus[0], minus[1], minus[0], minus[1]}, {a.v[0], a.v[1]});
      mma_16x8x16(DT{}, dot[3], {minus[0], minus[1], minus[0], minus[1]}, {a.v[2], a.v[3]});
    }
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int d = 2 * r + c, group = I * kGroups + 2 * lane_k() % kGroups + c;
        const int bits = gpu::shuffle_in_quad<int>(scales_[0].scale[I * kGroups / 4][r], group);
        acc[r] += Format<DT>::to_float(static_cast<uint16_t>(bits)) *
                  ((dot[0][d] + dot[2][d]) + (dot[1][d] + dot[3][d]));
      }
    }
  }

  const WeightStack& weights_;
  int first_, last_, k_;
  int row_, last_row_;               // kTiles: of the first set, the lane's and the last
  int limit_;                        // first block in which the lane has no weights
  gpu::LdsAddress ring_;             // the lane's first 16 bytes
  int act_to_;                       // from there to the activations that the lane copies
  gpu::LdsAddress act_;              // those that it multiplies in the first window, or zeros
  int act_block_, act_window_;       // offsets of those in the next block and the next window
  int q_at_[2], s_at_[2], z_at_[2];  // the lane's rows in an expert, from block first_ on
  int zero_shift_[2];                // their nibbles in a word of zeros
  int experts_;
  // The window to request next.
  Place at_;
  const uint32_t *q_[2], *z_[2];
  const uint16_t *s_[2], *a_;
  Scales scales_[kRingWindows];
};

}  // namespace moe_int4
