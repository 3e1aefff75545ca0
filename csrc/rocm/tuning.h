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
  int max_blocks_k;        // the row is for reductions of up to this many blocks of kBlockK weights
  int gate_up_waves;       // waves that share k of one gate/up tile
  int down_waves;          // waves of a down block,
  int down_log2_k_slices;  // 2^this of which share k of one expert; divides down_waves
  int gemm_waves;          // waves that share k of one tile of the grouped GEMM
};

constexpr int kAnySize = 1 << 30;

// The first row that fits is used; gate_up, down and gemm each look up their own k.
constexpr Tuning kTuning[] = {
    // Not measured yet.
    {Family::kCuda, 4, 1, 8, 0, 1},
    {Family::kCuda, 8, 2, 16, 1, 2},
    {Family::kCuda, kAnySize, 4, 16, 1, 4},
    // Chosen from the resource report and the memory system's numbers; not measured.
    {Family::kRdna, 2, 1, 8, 0, 1},
    {Family::kRdna, kAnySize, 4, 8, 1, 4},
    // Small, and with every kind of sharing.
    {Family::kHost, 1, 1, 4, 0, 1},
    {Family::kHost, kAnySize, 3, 4, 1, 2},
};

constexpr const Tuning& tuning(Family family, int k) {
  const int blocks = (k + kBlockK - 1) / kBlockK;
  const Tuning* row = kTuning;
  while (row->family != family || row->max_blocks_k < blocks) ++row;
  return *row;
}

}  // namespace moe_int4
