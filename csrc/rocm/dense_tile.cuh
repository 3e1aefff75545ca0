// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The product of one weight matrix with few activation rows. Unlike with experts, every wave needs
// the same activations. They stay in LDS for the lifetime of a block, in the order in which
// products read them, with zeros past the end. Weights go from memory to registers as a stream of
// windows over all of a wave's tiles. A wave has one window, so that more waves fit and every load
// of a turn is requested before the first wait.
// fork: begin overlay
// With matrix instructions, a window is requested while the previous one is multiplied; a column of
// the instruction is a pair (slot, group within the block).
// fork: end
//
// Lanes and row sets are those of wave_tile.cuh: in each block a lane has a run of kRun weights, 16
// bytes, of row lane_row of both row sets.
#pragma once

#include "dense_geometry.h"
#include "wave_tile.cuh"

namespace moe_int4 {

// One expert of a stack.
struct DenseMatrix {
  WeightStack stack;
  int n, k;
};

template <typename DT, int Bits, int G, bool ZP, int S>
class DenseTile {
  using Shape = DenseShape<Bits, G>;
  static constexpr int kRun = Shape::kRun, kUnits = Shape::kUnits, kBlock = Shape::kBlock;
  static constexpr int kGroups = Shape::kGroups, kDepth = Shape::kDepth;
  static constexpr int kRowBytes = Shape::kRowBytes, kSums = Shape::kSums;
  static constexpr int kBlockBytes = S * kRowBytes;
#if GPU_HAS_MMA
  static constexpr int kPasses = (S * kGroups + 7) / 8;
  static constexpr int kScales = kGroups > 1 ? 2 : 1;    // per lane and row
  static constexpr int kWindows = kPasses == 1 ? 3 : 2;  // in flight, by registers
  static constexpr int kResults = kGroups == 1 ? 2 * kPasses : kPasses;
#else
  static constexpr int kScales = 1;   // per lane and row
  static constexpr int kWindows = 1;  // in flight
  static constexpr int kResults = S;
#endif

  struct Window {
    gpu::U32x4 w[kDepth][2];
    uint16_t scale[kDepth][2][kScales];
    uint32_t zero[kDepth][2][kScales];
  };

  static GPU_DEVICE int lane_group() {
#if GPU_HAS_MMA
    return 2 * lane_k() % kGroups;
#else
    return kRun * lane_k() / G % kGroups;
#endif
  }

 public:
  // The wave's share: blocks [first, last) of k of `tiles` tiles, every `step`-th from `tile` on.
  // `lds` is the LDS of the block.
  GPU_DEVICE DenseTile(const DenseMatrix& matrix, int blocks, int first, int last, int tile,
                       int tiles, int step, char* lds)
      : matrix_(matrix),
        blocks_(blocks),
        first_(first),
        last_(last),
        tiles_(tiles),
        step_(step),
        windows_(tiles * ((last - first + kDepth - 1) / kDepth)),
        staged_(lds),
        sums_(reinterpret_cast<float*>(lds + blocks * kBlockBytes)),
        last_weights_(static_cast<uint32_t>(matrix.k) * Bits / 8 - 16),
        last_group_(static_cast<uint32_t>(matrix.k) / G - 1),
        next_tile_(tile),
        next_base_(first),
        base_(first) {
    enter_tile();
  }

  // Requests the first windows; it may run before the previous grid ends, as no grid writes
  // weights.
  GPU_DEVICE void start() {
    GPU_UNROLL
    for (int i = 0; i < kWindows; ++i) {
      if (i < windows_) request(window_[i]);
    }
  }

  // All threads of the block copy the `rows` activation rows to LDS. A block barrier has to follow.
  GPU_DEVICE void stage(const uint16_t* a, int64_t stride, int rows, int threads) {
    with_alignment(a, stride, [&](auto aligned) {
      copy_rows<decltype(aligned)::kValue>(a, stride, rows, threads);
    });
  }

  template <bool Aligned>
  GPU_DEVICE void copy_rows(const uint16_t* a, int64_t stride, int rows, int threads) {
    constexpr int kUnitsPerRow = kBlock / 8, kUnitsPerSum = kUnitsPerRow / kSums;
    constexpr int kBatch = S < 4 ? S : Bits == 8 ? 2 : 4;  // loads in flight, by registers
    const int units = blocks_ * S * kUnitsPerRow;
    const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
    // Whole waves, for the sums over lanes.
    for (int begin = thread; begin - thread < units; begin += kBatch * threads) {
      gpu::U32x4 values[kBatch];
      GPU_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const Unit u(begin + j * threads);
        values[j] = {{0, 0, 0, 0}};
        if (u.slot < rows && u.at() < matrix_.k && u.block < blocks_) {
          values[j] = load_activations<Aligned>(a + u.slot * stride + u.at());
        }
      }
      GPU_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int i = begin + j * threads;
        const Unit u(i);
        if (i < units) {
          // The same unit of all lanes along k is contiguous.
          const int place = u.unit % kUnits * kLanesPerRow + u.unit / kUnits;
          *reinterpret_cast<gpu::U32x4*>(staged_ + u.block * kBlockBytes + u.slot * kRowBytes +
                                         16 * place) = values[j];
        }
        if constexpr (Unpacked<DT, Bits>::kOffset != 0.0f || ZP) {
          float sum = 0.0f;
          GPU_UNROLL
          for (int v = 0; v < 4; ++v) sum = gpu::dot2(DT{}, values[j].v[v], Format<DT>::kOnes, sum);
          sum = sum_over_lanes<kUnitsPerSum>(sum);
          if (i < units && u.unit % kUnitsPerSum == 0) {
            sums_[(u.block * S + u.slot) * kSums + u.unit / kUnitsPerSum] = sum;
          }
        }
      }
    }
  }

  // Multiplies the share: visit(i, slot, row of the tile, sum) is called for the i-th tile in the
  // lane that has the sum. A share without blocks has zeros.
  template <typename Visit>
  GPU_DEVICE void run(const Visit& visit) {
    if (windows_ == 0) {
      while (done_ < tiles_) finish(visit);
      return;
    }
    for (int begin = 0;; begin += kWindows) {
      GPU_UNROLL
      for (int i = 0; i < kWindows; ++i) {
        multiply(window_[i], visit);
        if (begin + i + 1 == windows_) return;
        if (begin + i + kWindows < windows_) request(window_[i]);
      }
    }
  }

 private:
  // Eight activations of a slot, the i-th of those that a block stages.
  struct Unit {
    int unit, slot, block;
    GPU_DEVICE explicit Unit(int i)
        : unit(i % (kBlock / 8)), slot(i / (kBlock / 8) % S), block(i / (kBlock / 8) / S) {}
    GPU_DEVICE int at() const { return block * kBlock + 8 * unit; }  // along k
  };

  // Finds the rows of the next tile. Tiles and rows past the last one repeat it.
  GPU_DEVICE void enter_tile() {
    const int last = (matrix_.n - 1) / kRowsPerWave;
    const int row = (next_tile_ < last ? next_tile_ : last) * kRowsPerWave;
    rows_ = matrix_.stack.template rows<ZP>(row, matrix_.n, row + kRowGroups, matrix_.n);
#if GPU_HAS_MMA
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {  // pointers per lane take fewer registers here
      WeightRows::Set& set = rows_.sets[r];
      set = {behind(set.q, set.q_at), behind(set.scales, set.s_at), behind(set.zeros, set.z_at)};
    }
#endif
  }

  // Requests the next window. Past the end of a row a lane loads its last weights again, where
  // activations and sums are zero.
  GPU_DEVICE void request(Window& to) {
    constexpr int kBytes = kBlock * Bits / 8;  // per row and block
    gpu::order_requests();
    GPU_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        const uint32_t group = (next_base_ + d) * kBlock / G + lane_group() + i;
        const uint32_t at = smaller(group, last_group_);
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) {
          const WeightRows::Set& set = rows_.sets[r];
          to.scale[d][r][i] = *behind(set.scales, set.s_at + 2 * at);
          if constexpr (ZP) to.zero[d][r][i] = *behind(set.zeros, set.z_at + 4 * at);
        }
      }
    }
    GPU_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      const uint32_t at =
          smaller(next_base_ * kBytes + (d * kBytes + 16 * lane_k()), last_weights_);
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        to.w[d][r] = gpu::load_weights(behind(rows_.sets[r].q, rows_.sets[r].q_at + at));
      }
    }
    gpu::order_requests();
    next_base_ += kDepth;
    if (next_base_ < last_) return;
    next_base_ = first_;
    next_tile_ += step_;
    enter_tile();
  }

  template <typename Visit>
  GPU_DEVICE void multiply(Window& window, const Visit& visit) {
    GPU_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      if (base_ + d >= last_) break;
      add_block(window, d, base_ + d);
    }
    // Also wait for what no block waited for, before its registers are reused.
    gpu::arrived(window.w[kDepth - 1][1].v[0]);
    base_ += kDepth;
    if (base_ < last_) return;
    base_ = first_;
    finish(visit);
  }

  GPU_DEVICE void add_block(Window& window, int d, int block) {
    float scale[2][kScales], offset[2][kScales];
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int i = 0; i < kScales; ++i) {
        gpu::arrived(window.scale[d][r][i]);
        scale[r][i] = Format<DT>::to_float(window.scale[d][r][i]);
        int zero = Unpacked<DT, Bits>::kSymmetricZero;
        // Tiles begin at multiples of 8 rows.
        if constexpr (ZP) {
          gpu::arrived(window.zero[d][r][i]);
          const int row = (r * kRowGroups + lane_row()) % 8;
          zero = static_cast<int>(window.zero[d][r][i] >> (4 * row) & 15);
        }
        offset[r][i] = Unpacked<DT, Bits>::kOffset + zero;
      }
    }
    const char* act = staged_ + block * kBlockBytes + 16 * lane_k();
    const float* sums = sums_ + block * (S * kSums);
#if GPU_HAS_MMA
    add_mma(window.w[d], scale, offset, act, sums);
#else
    add_dot(window.w[d], scale, offset, act, sums);
#endif
  }

#if GPU_HAS_MMA
  GPU_DEVICE void add_mma(const gpu::U32x4 (&w)[2], const float (&scale)[2][kScales],
                          const float (&offset)[2][kScales], const char* act, const float* sums) {
    float dot[kPasses][2][4] = {};  // two sums each, for a shorter chain of dependent instructions
    GPU_UNROLL
    for (int q = 0; q < kUnits; ++q) {
      const Unpacked<DT, Bits> x(w[0], q), y(w[1], q);
      GPU_UNROLL
      for (int p = 0; p < kPasses; ++p) {
        const int column = 8 * p + lane_row(), slot = column / kGroups;
        const bool mine = slot < S && (kGroups == 1 || kRun * lane_k() / G == column % kGroups);
        gpu::U32x4 b = {{0, 0, 0, 0}};
        if (mine) {
          b = *reinterpret_cast<const gpu::U32x4*>(act + slot * kRowBytes + 16 * q * kLanesPerRow);
        }
        mma_16x8x16(DT{}, dot[p][0], {x.pair[0], y.pair[0], x.pair[1], y.pair[1]},
                    {b.v[0], b.v[1]});
        mma_16x8x16(DT{}, dot[p][1], {x.pair[2], y.pair[2], x.pair[3], y.pair[3]},
                    {b.v[2], b.v[3]});
      }
    }
    GPU_UNROLL
    for (int p = 0; p < kPasses; ++p) {
      GPU_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * p + 2 * lane_k() + c, slot = column / kGroups;
        float sum = 0.0f;
        if constexpr (Unpacked<DT, Bits>::kOffset != 0.0f || ZP) {
          sum = sums[(slot < S ? slot : 0) * kGroups + column % kGroups];
        }
        const int group = kScales == 1 ? 0 : c, result = kGroups == 1 ? 2 * p + c : p;
        GPU_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float product = dot[p][0][2 * r + c] + dot[p][1][2 * r + c];
          acc_[r][result] += scale[r][group] * (product - offset[r][group] * sum);
        }
      }
    }
  }
#else
  GPU_DEVICE void add_dot(const gpu::U32x4 (&w)[2], const float (&scale)[2][kScales],
                          const float (&offset)[2][kScales], const char* act, const float* sums) {
    float dot[2][S] = {};
    GPU_UNROLL
    for (int q = 0; q < kUnits; ++q) {
      const Unpacked<DT, Bits> x(w[0], q), y(w[1], q);
      GPU_UNROLL
      for (int s = 0; s < S; ++s) {
        const gpu::U32x4 b =
            *reinterpret_cast<const gpu::U32x4*>(act + s * kRowBytes + 16 * q * kLanesPerRow);
        GPU_UNROLL
        for (int i = 0; i < 4; ++i) {
          dot[0][s] = gpu::dot2(DT{}, x.pair[i], b.v[i], dot[0][s]);
          dot[1][s] = gpu::dot2(DT{}, y.pair[i], b.v[i], dot[1][s]);
        }
      }
    }
    GPU_UNROLL
    for (int s = 0; s < S; ++s) {
      float sum = 0.0f;
      if constexpr (Unpacked<DT, Bits>::kOffset != 0.0f || ZP) {
        sum = sums[s * kLanesPerRow + lane_k()];
      }
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) acc_[r][s] += scale[r][0] * (dot[r][s] - offset[r][0] * sum);
    }
  }
#endif

  // Passes on the tile's results and resets the sums.
  template <typename Visit>
  GPU_DEVICE void finish(const Visit& visit) {
    GPU_UNROLL
    for (int i = 0; i < kResults; ++i) {
      int slot = i;
      bool holds = lane_k() == 0;
#if GPU_HAS_MMA
      holds = true;
      if constexpr (kGroups == 1) {
        slot = 8 * (i / 2) + 2 * lane_k() + i % 2;
      } else if constexpr (kGroups == 2) {
        slot = 4 * i + lane_k();
      } else {
        slot = 2 * i + lane_k() / 2;
        holds = lane_k() % 2 == 0;
      }
#endif
      GPU_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = acc_[r][i];
        acc_[r][i] = 0.0f;
#if GPU_HAS_MMA
        if constexpr (kGroups == 4) sum += gpu::shuffle_xor<1>(sum);
#else
        sum += gpu::shuffle_xor<1>(sum);
        sum += gpu::shuffle_xor<2>(sum);
        sum += gpu::shuffle_xor<4>(sum);
#endif
        if (holds && slot < S) visit(done_, slot, r * kRowGroups + lane_row(), sum);
      }
    }
    ++done_;
  }

  const DenseMatrix& matrix_;
  const int blocks_, first_, last_, tiles_, step_;
  const int windows_;                         // of the share
  char* const staged_;                        // [block][slot][kRowBytes]
  float* const sums_;                         // [block][slot][kSums]
  const uint32_t last_weights_, last_group_;  // of a row, in bytes and in groups
  int next_tile_, next_base_;                 // of the window to request
  int base_;                                  // of the window to multiply
  int done_ = 0;                              // tiles
  WeightRows rows_;
  Window window_[kWindows];
  float acc_[2][kResults] = {};
};

}  // namespace moe_int4
