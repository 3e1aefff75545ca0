// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Tuning choices of the decode kernels, by architecture family and shape class. Results do not
// depend on them except for the order of fp32 sums.
#pragma once

#include "geometry.h"

namespace moe_int4 {

enum class Family { kCuda, kRdna, kHost };

struct Tuning {
  Family family;
  int max_blocks_k;  // the row is for reductions of up to this many blocks of kBlockK weights
  int waves_per_cu;  // gate_up and gemm split k over more waves until a compute unit has these
  int down_waves;    // waves of a down block,
  int down_log2_k_slices;  // at least 2^this of which share k of one expert; divides down_waves
  // Up to this many tokens each token's experts get blocks of their own (the _t1 kernels), above it
  // tokens that picked the same expert share its weights (_t8).
  int gate_up_single;
  int down_single;
};

constexpr int kAnySize = 1 << 30;

// The first row that fits is used; gate_up, down and gemm each look up their own k.
constexpr Tuning kTuning[] = {
    // H100, hidden 2048, top-8, 1 to 16 tokens: 768 x 128 experts (blocks of k 16 and 6) and
    // 512 x 256 experts (16 and 4); figures in README.md. Fewer waves starve the memory at
    // 1 token, more cost prologues. Reading shared weights again, from the L2, costs less than
    // finding out who shares them.
    {Family::kCuda, 2, 16, 16, 0, 24, 24},
    {Family::kCuda, kAnySize, 16, 16, 1, 24, 24},
    // Not measured. By the resource report a SIMD has room for 10 to 16 waves: 24 a compute unit
    // leave
    // none idle. Four waves a down block: with eight, the down grid of a model with hidden 2048 is
    // 1.6 times what 40 compute units hold, and its second round runs half empty. Down up to 8
    // tokens without sharing: its _t8 kernel runs pairs one after the other, and the last-level
    // cache
    // (32 MB or more) holds an expert that tokens share.
    {Family::kRdna, 2, 24, 4, 0, 1, 8},
    {Family::kRdna, kAnySize, 24, 4, 1, 1, 8},
    // Small, and with every kind of sharing.
    {Family::kHost, 1, 1, 4, 0, 1, 3},
    {Family::kHost, kAnySize, 12, 4, 1, 2, 1},
};

constexpr const Tuning& tuning(Family family, int blocks_k) {
  const Tuning* row = kTuning;
  while (row->family != family || row->max_blocks_k < blocks_k) ++row;
  return *row;
}

// Waves that share k of a tile, a power of two: `tiles` of them run on `compute_units`. Each has at
// least `min_blocks` of the k.
constexpr int waves_sharing_k(const Tuning& tuned, int blocks_k, int min_blocks, int64_t tiles,
                              int compute_units) {
  int waves = 1;
  while (2 * waves <= kMaxWavesSharingK && 2 * waves * min_blocks <= blocks_k &&
         tiles * waves < static_cast<int64_t>(tuned.waves_per_cu) * compute_units) {
    waves *= 2;
  }
  return waves;
}

// Waves of a down block for one token: as many as leave a power of two to each token.
constexpr int waves_of_single_down(const Tuning& tuned, int tokens) {
  int waves = tuned.down_waves;
  while (waves > 1 && waves * tokens > tuned.down_waves) waves /= 2;
  return waves;
}

// Base-2 logarithm of the waves that share an expert's k in a down block of `waves` for `pairs`
// (token, expert): more than the table's where pairs are too few to occupy the waves.
constexpr int log2_down_k_slices(const Tuning& tuned, int blocks_k, int waves, int pairs) {
  int log2 = tuned.down_log2_k_slices;
  while (1 << log2 > waves) --log2;
  while (pairs << log2 < waves && 2 << log2 <= blocks_k) ++log2;
  return log2;
}

}  // namespace moe_int4
