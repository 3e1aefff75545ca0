// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// How a wave covers packed weights. Kernels and launchers share these definitions.
//
// A lane reads 16 bytes (32 weights) of one row at a time. kLanesPerRow lanes are adjacent along k,
// so a wave covers kRowGroups rows by kBlockK weights with one load. It always works on two such
// sets of rows: gate and up rows of the same index, or two adjacent sets of output rows.
#pragma once

#include "gpu_compat.cuh"

namespace moe_int4 {

#if GPU_HAS_MMA
constexpr int kLanesPerRow = 4;  // the matrix instruction fixes it
constexpr int kLog2BlockK = 7;
constexpr int kSlotsPerPass = 8;  // the room that the instruction has
constexpr int kLoadDepth = 4;     // blocks of weights in flight per wave
#else
// 8 lanes make each request a whole 128-byte cache line of gfx11 and gfx12.
constexpr int kLanesPerRow = 8;
constexpr int kLog2BlockK = 8;
// Activation rows per pass over the weights in registers; with more, registers run out.
constexpr int kSlotsPerPass = 4;
constexpr int kLoadDepth = 2;  // blocks of weights in flight per wave
#endif
constexpr int kRowGroups = gpu::kWaveSize / kLanesPerRow;
constexpr int kRowsPerWave = 2 * kRowGroups;
constexpr int kBlockK = 32 * kLanesPerRow;
static_assert(1 << kLog2BlockK == kBlockK);

constexpr int kMaxSlots = 8;   // activation rows that a wave multiplies with an expert's weights
constexpr int kMaxWaves = 16;  // per block
constexpr int kMaxWavesSharingK = 8;  // per gate_up or gemm block

// Blocks of activations that a wave keeps in LDS at a time, for `slots` rows.
GPU_ANYWHERE constexpr int staged_blocks(int slots) { return slots == 1 ? kLoadDepth : 1; }

// Bytes of a staged row. The padding puts the rows of adjacent slots on different banks.
GPU_ANYWHERE constexpr int staged_row_bytes(int slots) {
  return staged_blocks(slots) * kBlockK * 2 + 64;
}

// Each staged row has the sums of its groups' activations beside it, with room for the smallest
// groups.
GPU_ANYWHERE constexpr int staged_sums(int slots) { return staged_blocks(slots) * kLanesPerRow; }

// LDS of one wave: the slots' lists, fp32 results [slots][kRowsPerWave], staged rows and their
// sums; a kernel for several rows also has the router weights at the end. A kernel for up to
// `slots` rows runs the code for 1 row or for kSlotsPerPass rows.
constexpr int kSlotListBytes = 3 * kMaxSlots * 4;
constexpr int kKeptPlaces = 16;  // router weights of a token that a wave keeps at a time
constexpr int kKeptBytes = kMaxSlots * kKeptPlaces * 4;
GPU_ANYWHERE constexpr int result_bytes(int slots) { return slots * kRowsPerWave * 4; }
GPU_ANYWHERE constexpr int staged_bytes(int slots) {
  return slots * (staged_row_bytes(slots) + staged_sums(slots) * 4);
}

// The number of slots per pass of the code that serves `count` slots.
GPU_ANYWHERE constexpr int slots_for(int count) { return count <= 1 ? 1 : kSlotsPerPass; }

// fork: begin overlay
// For one activation row per expert: whether weights pass through LDS (stream_tile.cuh).
constexpr bool kStreams = gpu::kHasMma && gpu::kHasAsyncCopy;

// StreamTile's LDS is a ring of windows. A window holds the weights of kWindowBlocks blocks (16
// bytes per lane and row set) and their activations. Zeros for lanes without activations follow
// once per block.
constexpr int kWindowBlocks = 4;
constexpr int kRingWindows = 2;
constexpr int kBlockWeightBytes = kRowsPerWave * kBlockK / 2;
constexpr int kWindowWeightBytes = kWindowBlocks * kBlockWeightBytes;
constexpr int kWindowBytes = kWindowWeightBytes + kWindowBlocks * kBlockK * 2;
constexpr int kStreamZeroBytes = kBlockK * 2;

constexpr int kMaxStreamTiles = 16;  // of rows, in a gate_up block

// LDS of one wave that multiplies `pairs` pairs (or tiles) over `blocks` blocks each.
GPU_ANYWHERE constexpr int stream_lds_bytes_per_wave(int blocks, int pairs) {
  const int windows = pairs * ((blocks + kWindowBlocks - 1) / kWindowBlocks);
  return kSlotListBytes + result_bytes(1) +
         (windows < kRingWindows ? windows : kRingWindows) * kWindowBytes;
}

// Kernels grouped by expert (group_tile.cuh): tokens per block, pairs (token, expert) that share
// one pass over the weights in gate_up and in down, waves per block, experts per token.
constexpr int kGroupTokens = 64;
constexpr int kGateUpSlots = 16;
constexpr int kDownSlots = 8;
constexpr int kMaxGroupWaves = 16;
constexpr int kMaxGroupTopK = 64;
constexpr int kGateUpRows = 2;  // R of grouped_gate_up
// LDS: each wave of R * kRowsPerWave rows has a ring of windows of 4 / R blocks of weights. Each
// wave (down) or block (gate_up) has the same ring of activation rows, one per slot. The padding
// puts the rows of adjacent slots on different banks.
constexpr int kGroupRing = 2;
// Kernels for pairs that another launch sorted by expert (moe_int4_tiled_*.hip): a list is a block
// of T rows. Sums of 64 rows leave registers for 8 waves.
constexpr int kMaxTiledWaves = 8;
constexpr int kTiledDownRows = 2;  // R of tiled_down
GPU_ANYWHERE constexpr int group_window_blocks(int r) { return 4 / r; }
GPU_ANYWHERE constexpr int group_row_bytes(int r) {
  return group_window_blocks(r) * kBlockK * 2 + 64;
}
constexpr int kGroupWindowBytes = 4 * kBlockWeightBytes;
constexpr int kGroupWeightBytes = kGroupRing * kGroupWindowBytes;
GPU_ANYWHERE constexpr int group_row_ring_bytes(int r, int slots) {
  return kGroupRing * slots * group_row_bytes(r);
}
// LDS of a block of a tiled kernel; the pairs and their rows come last.
GPU_ANYWHERE constexpr int tiled_lds_bytes(int r, int t, int waves) {
  return waves * kGroupWeightBytes + group_row_ring_bytes(r, t) + 8 * t;
}
// fp32 results of a wave of the down kernel.
GPU_ANYWHERE constexpr int group_result_bytes(int r, int tokens) {
  return tokens * r * kRowsPerWave * 4;
}
// The most lists of up to `slots` pairs, each of a single expert, that a block's pairs can form.
GPU_ANYWHERE constexpr int most_lists(int pairs, int experts, int slots) {
  const int most = experts + pairs / slots;
  return pairs < most ? pairs : most;
}
// The workspace of sort_pairs.
GPU_ANYWHERE constexpr int group_list_bytes(int pairs, int experts, int slots) {
  const int distinct = pairs < experts ? pairs : experts;
  const int halves = pairs + experts + 3 * distinct + 2 * most_lists(pairs, experts, slots) + 1;
  return (4 * (pairs + 1) + 2 * halves + 15) / 16 * 16;
}

// fork: end
// The shared expert (shared_expert.cuh): activation rows per pass over its weights, at most
// kSharedSlots. Its sums take the LDS of the other blocks' waves.
constexpr int kSharedSlots = 4;
GPU_ANYWHERE constexpr int shared_slots(int tokens, int bits) {
  return tokens == 1 ? 1 : bits == 16 ? kSharedSlots : 2;
}
constexpr int kSharedBytesPerWave = kSharedSlots * kRowsPerWave * 4;
// Lanes along k of a row of the shared expert's gate and up weights. A block has as many waves as
// the routed experts' blocks; with few of them, more lanes per row make more blocks of fewer
// dependent loads each.
#if GPU_HAS_MMA
GPU_ANYWHERE constexpr int shared_gate_up_lanes(bool grouped) { return grouped ? 32 : 8; }
#else
GPU_ANYWHERE constexpr int shared_gate_up_lanes(bool) { return kLanesPerRow; }
#endif

// For an entry point _tT when at most `rows` activation rows share an expert.
GPU_ANYWHERE constexpr int lds_bytes_per_wave(int t, int rows) {
  const int slots = slots_for(rows < t ? rows : t);
  return kSlotListBytes + result_bytes(t) +
         (staged_bytes(1) > staged_bytes(slots) ? staged_bytes(1) : staged_bytes(slots)) +
         (t > 1 ? kKeptBytes : 0);
}

}  // namespace moe_int4
