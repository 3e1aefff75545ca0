// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// How a wave lays itself over weights of 4 or 8 bits, as geometry.h for the dense kernels.
#pragma once

#include "geometry.h"

namespace moe_int4 {

template <int Bits, int G>
struct DenseShape {
  static constexpr int kRun = 128 / Bits;  // weights in 16 bytes
  static constexpr int kUnits = kRun / 8;  // of 8 weights
  static constexpr int kBlock = kRun * kLanesPerRow;
  static constexpr int kGroups = G < kBlock ? kBlock / G : 1;  // in a block, or it is part of one
  static constexpr int kDepth = 2;                             // blocks in a window
  // A row of activations in a block; the pad keeps neighbouring slots on different banks.
  static constexpr int kRowBytes = kBlock * 2 + 64;
  // Sums of activations, per slot.
#if GPU_HAS_MMA
  static constexpr int kSums = kGroups;
#else
  // Of the lane's run.
  static constexpr int kSums = kLanesPerRow;
#endif
};

// LDS of a block: activations and sums of `blocks` blocks, and `tiles` results per slot and row.
template <int Bits, int G>
GPU_ANYWHERE constexpr int dense_lds_bytes(int slots, int blocks, int tiles) {
  using Shape = DenseShape<Bits, G>;
  return blocks * slots * (Shape::kRowBytes + Shape::kSums * 4) + tiles * slots * kRowsPerWave * 4;
}

}  // namespace moe_int4
