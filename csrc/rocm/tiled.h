// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The tiled kernels: gate_up and down for many tokens whose pairs another launch sorted by expert.
// For devices with matrix instructions. Launching follows launch.h.
#pragma once

#include "moe_int4_args.h"

namespace moe_int4 {

// The pairs (token, slot) in lists of one expert each, as vLLM's moe_align_block_size makes them.
struct SortedPairs {
  const int32_t* ids;         // [lists * tile.pairs]: token * top_k + slot; >= num_pairs: none
  const int32_t* expert_ids;  // [lists]: local expert, -1: not on this rank
  const int32_t* num_padded;  // [1]: entries of ids that are set
  int32_t lists, num_pairs, top_k;
};

// How the work is divided; a caller's choice, checked at launch.
struct TiledShape {
  int64_t pairs;      // of a list: 8, 16, 32 or 64
  int64_t waves;      // per block, each with rows of its own
  int64_t row_tiles;  // that a wave multiplies, one after another
};

// c[pair, i] = act(gate row i, up row i) of the pair's expert and token.
struct TiledGateUpArgs {
  DType dtype;
  const void* a;  // [M, K], rows aligned to 16 bytes
  int64_t a_stride_m;
  Weights w;  // n = 2 * I
  void* c;    // [M * top_k, I], rows aligned to 4 bytes
  int64_t c_stride_m;
  SortedPairs sorted;
  Activation activation;
  float alpha, beta, limit;
  TiledShape tile;
};

// c[pair] = topk_weights[pair] * w[expert of the pair] a[pair]
struct TiledDownArgs {
  DType dtype;
  const void* a;  // [M * top_k, K = I], rows aligned to 16 bytes
  int64_t a_stride_m;
  Weights w;  // n = hidden size
  void* c;    // [M * top_k, N], rows aligned to 4 bytes
  int64_t c_stride_m;
  SortedPairs sorted;
  const float* topk_weights;  // [M * top_k] or null: 1
  TiledShape tile;
};

void launch_tiled_gate_up(const TiledGateUpArgs& args, void* queue);
// If the previous grid of the stream lets the next one start early, the kernel may read the sorted
// pairs before that grid ends. They are not its output.
void launch_tiled_down(const TiledDownArgs& args, void* queue);

}  // namespace moe_int4
