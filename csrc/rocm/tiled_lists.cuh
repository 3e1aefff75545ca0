// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// What the tiled kernels share: the list of a block, which another launch sorted by expert, and how
// its results are stored. A list is T entries of sorted_ids with the expert expert_ids[list]. An
// entry outside 0..num_pairs-1 is no pair. Lists from num_padded[0] / T on are not there.
#pragma once

#include "group_tile.cuh"

namespace moe_int4 {

struct TiledList {
  const int32_t* pairs;  // [T] in LDS, negative: no pair
  gpu::LdsAddress rows;  // [T] in LDS: the row of a that a pair multiplies; 0: no pair
  int expert;            // negative: nothing to do
  int count;             // the last pair is pairs[count - 1]
};

// Reads list `list`, whose pairs multiply row pair / top_k of a. All threads of the block must call
// it. `lds` has room for 2 * T integers.
template <int T>
GPU_DEVICE TiledList read_list(int list, const int32_t* sorted_ids, const int32_t* expert_ids,
                               const int32_t* num_padded, int num_pairs, int top_k, int num_experts,
                               char* lds) {
  auto* const pairs_of = reinterpret_cast<int32_t*>(lds);
  TiledList out = {pairs_of, gpu::lds_address(pairs_of + T), -1, 0};
  if (list * T >= num_padded[0]) return out;
  const int expert = expert_ids[list];
  if (expert < 0 || expert >= num_experts) return out;
  GPU_UNROLL
  for (int base = 0; base < T; base += gpu::kWaveSize) {  // each wave, for itself: same values
    const int slot = base + gpu::lane();
    int id = slot < T ? sorted_ids[list * T + slot] : -1;
    if (id >= num_pairs) id = -1;
    if (slot < T && gpu::wave() == 0) {
      pairs_of[slot] = id;
      pairs_of[T + slot] = id < 0 ? 0 : id / top_k;
    }
    const uint32_t pairs = gpu::wave_ballot(id >= 0);
    const uint32_t last = gpu::wave_ballot(pairs >> gpu::lane() == 1);
    if (pairs != 0) out.count = base + gpu::first_bit(last) + 1;
  }
  gpu::block_barrier();
  if (out.count > 0) out.expert = expert;
  return out;
}

// Stores two adjacent results, 4-byte aligned.
template <typename DT>
GPU_DEVICE void store_pair(uint16_t* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) =
      Format<DT>::from_float(low) | static_cast<uint32_t>(Format<DT>::from_float(high)) << 16;
}

}  // namespace moe_int4
