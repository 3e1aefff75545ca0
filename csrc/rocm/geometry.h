// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// How a wave lays itself over packed weights; kernels and launchers agree on it here.
//
// A lane reads 16 bytes, 32 weights, of one row at a time. kLanesPerRow lanes sit side by side
// along k, so a wave covers kRowGroups rows by kBlockK weights with one load, and it always works
// on two such row sets: gate and up rows of the same index, or two neighbouring sets of output
// rows.
#pragma once

#include "gpu_compat.cuh"

namespace moe_int4 {

// The matrix instruction fixes 4 lanes along k. Elsewhere 8 lanes make every request a whole
// 128-byte cache line of gfx11 and gfx12.
constexpr int kLanesPerRow = gpu::kHasMma ? 4 : 8;
constexpr int kRowGroups = gpu::kWaveSize / kLanesPerRow;
constexpr int kRowsPerWave = 2 * kRowGroups;
constexpr int kBlockK = 32 * kLanesPerRow;

constexpr int kMaxSlots = 8;  // activation rows that one pass over an expert's weights serves
constexpr int kLoadDepth = gpu::kHasMma ? 4 : 2;  // blocks of weights in flight per wave
constexpr int kMaxWaves = 16;                     // per block

// Blocks of activations that a wave holds in LDS at a time, for `slots` rows.
GPU_ANYWHERE constexpr int staged_blocks(int slots) {
  return slots <= 4 ? kLoadDepth : kLoadDepth / 2;
}

// Staged row: the pad keeps rows of neighbouring slots on different banks.
GPU_ANYWHERE constexpr int staged_row_bytes(int slots) {
  return staged_blocks(slots) * kBlockK * 2 + 64;
}

// Sums of 32 activations each, as many as one lane multiplies in a block, beside every staged row.
GPU_ANYWHERE constexpr int staged_sums(int slots) { return staged_blocks(slots) * kLanesPerRow; }

// LDS of one wave: the slots' lists, fp32 results [slots][kRowsPerWave], staged rows and their
// sums. A kernel for up to `slots` rows runs the code for 1, 4 or 8 of them, whichever suffices.
constexpr int kSlotListBytes = 3 * kMaxSlots * 4;
GPU_ANYWHERE constexpr int result_bytes(int slots) { return slots * kRowsPerWave * 4; }
GPU_ANYWHERE constexpr int staged_bytes(int slots) {
  return slots * (staged_row_bytes(slots) + staged_sums(slots) * 4);
}

// Code for how many slots serves `count` of them.
constexpr int slots_for(int count) { return count <= 1 ? 1 : count <= 4 ? 4 : 8; }

// For an entry point _tT when at most `rows` activation rows meet one expert.
GPU_ANYWHERE constexpr int lds_bytes_per_wave(int t, int rows) {
  const int slots = slots_for(rows < t ? rows : t);
  return kSlotListBytes + result_bytes(t) +
         (slots > 4 && staged_bytes(4) > staged_bytes(slots) ? staged_bytes(4)
                                                             : staged_bytes(slots));
}

}  // namespace moe_int4
