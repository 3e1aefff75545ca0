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
constexpr int kLog2BlockK = gpu::kHasMma ? 7 : 8;
static_assert(1 << kLog2BlockK == kBlockK);

constexpr int kMaxSlots = 8;  // activation rows that a wave puts against an expert's weights
// ... in passes of this many over the weights in registers: the matrix instruction has room for 8,
// elsewhere registers run out.
constexpr int kSlotsPerPass = gpu::kHasMma ? 8 : 4;
constexpr int kLoadDepth = gpu::kHasMma ? 4 : 2;  // blocks of weights in flight per wave
constexpr int kMaxWaves = 16;                     // per block
constexpr int kMaxWavesSharingK = 8;              // ... of a gate_up or gemm block

// Blocks of activations that a wave holds in LDS at a time, for `slots` rows.
GPU_ANYWHERE constexpr int staged_blocks(int slots) { return slots == 1 ? kLoadDepth : 1; }

// Staged row: the pad keeps rows of neighbouring slots on different banks.
GPU_ANYWHERE constexpr int staged_row_bytes(int slots) {
  return staged_blocks(slots) * kBlockK * 2 + 64;
}

// Sums of the activations of each group, beside every staged row; room for the smallest groups.
GPU_ANYWHERE constexpr int staged_sums(int slots) { return staged_blocks(slots) * kLanesPerRow; }

// LDS of one wave: the slots' lists, fp32 results [slots][kRowsPerWave], staged rows and their
// sums, at the end of it the router weights of a kernel for several rows. A kernel for up to
// `slots` rows runs the code for 1 or for kSlotsPerPass of them.
constexpr int kSlotListBytes = 3 * kMaxSlots * 4;
constexpr int kKeptPlaces = 16;  // router weights of a token that a wave keeps at a time
constexpr int kKeptBytes = kMaxSlots * kKeptPlaces * 4;
GPU_ANYWHERE constexpr int result_bytes(int slots) { return slots * kRowsPerWave * 4; }
GPU_ANYWHERE constexpr int staged_bytes(int slots) {
  return slots * (staged_row_bytes(slots) + staged_sums(slots) * 4);
}

// Code for how many slots per pass serves `count` of them.
GPU_ANYWHERE constexpr int slots_for(int count) { return count <= 1 ? 1 : kSlotsPerPass; }

// Kernels for one activation row per expert: whether weights go through LDS (stream_tile.cuh).
constexpr bool kStreams = gpu::kHasMma && gpu::kHasAsyncCopy;

// StreamTile's LDS is a ring of windows, each the weights of kWindowBlocks blocks, 16 bytes a lane
// and row set, and their activations. Once a block, zeros for lanes without activations follow.
constexpr int kWindowBlocks = 4;
constexpr int kRingWindows = 2;
constexpr int kBlockWeightBytes = kRowsPerWave * kBlockK / 2;
constexpr int kWindowWeightBytes = kWindowBlocks * kBlockWeightBytes;
constexpr int kWindowBytes = kWindowWeightBytes + kWindowBlocks * kBlockK * 2;
constexpr int kStreamZeroBytes = kBlockK * 2;

// LDS of one wave that multiplies `pairs` pairs of `blocks` blocks each.
GPU_ANYWHERE constexpr int stream_lds_bytes_per_wave(int blocks, int pairs) {
  const int windows = pairs * ((blocks + kWindowBlocks - 1) / kWindowBlocks);
  return kSlotListBytes + result_bytes(1) +
         (windows < kRingWindows ? windows : kRingWindows) * kWindowBytes;
}

// Kernels grouped by expert (group_tile.cuh): tokens of a block, pairs (token, expert) that share
// one pass over the weights in gate_up and in down, waves of a block, experts per token.
constexpr int kGroupTokens = 64;
constexpr int kGateUpSlots = 16;
constexpr int kDownSlots = 8;
constexpr int kMaxGroupWaves = 16;
constexpr int kMaxGroupTopK = 64;
constexpr int kGateUpRows = 2;  // R of grouped_gate_up
// LDS: per wave of R * kRowsPerWave rows a ring of windows of 4 / R blocks of weights; per wave
// (down) or block (gate_up) the same of activation rows, one per slot. The pad keeps the rows of
// neighbouring slots on different banks.
constexpr int kGroupRing = 2;
GPU_ANYWHERE constexpr int group_window_blocks(int r) { return 4 / r; }
GPU_ANYWHERE constexpr int group_row_bytes(int r) {
  return group_window_blocks(r) * kBlockK * 2 + 64;
}
constexpr int kGroupWindowBytes = 4 * kBlockWeightBytes;
constexpr int kGroupWeightBytes = kGroupRing * kGroupWindowBytes;
GPU_ANYWHERE constexpr int group_row_ring_bytes(int r, int slots) {
  return kGroupRing * slots * group_row_bytes(r);
}
// fp32 results of a wave of down.
GPU_ANYWHERE constexpr int group_result_bytes(int r, int tokens) {
  return tokens * r * kRowsPerWave * 4;
}
// Lists of up to `slots` pairs, each of one expert, that a block's pairs make at most.
GPU_ANYWHERE constexpr int most_lists(int pairs, int experts, int slots) {
  const int most = experts + pairs / slots;
  return pairs < most ? pairs : most;
}
// What sort_pairs works in.
GPU_ANYWHERE constexpr int group_list_bytes(int pairs, int experts, int slots) {
  const int distinct = pairs < experts ? pairs : experts;
  const int halves = pairs + experts + 3 * distinct + 2 * most_lists(pairs, experts, slots) + 1;
  return (4 * (pairs + 1) + 2 * halves + 15) / 16 * 16;
}

// For an entry point _tT when at most `rows` activation rows meet one expert.
GPU_ANYWHERE constexpr int lds_bytes_per_wave(int t, int rows) {
  const int slots = slots_for(rows < t ? rows : t);
  return kSlotListBytes + result_bytes(t) +
         (staged_bytes(1) > staged_bytes(slots) ? staged_bytes(1) : staged_bytes(slots)) +
         (t > 1 ? kKeptBytes : 0);
}

}  // namespace moe_int4
