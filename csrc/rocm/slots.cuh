// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Which activation rows a wave puts against one expert's weights.
#pragma once

#include "geometry.h"

namespace moe_int4 {

// The wave's LDS, see geometry.h.
struct WaveLds {
  int* in_row;     // [kMaxSlots] row of the activations, -1: empty slot
  int* out_row;    // [kMaxSlots] row of the output
  float* weight;   // [kMaxSlots] factor of the result
  float* results;  // [slots][kRowsPerWave]
  char* staged;
};

GPU_DEVICE WaveLds wave_lds(char* base, int max_slots) {
  return {reinterpret_cast<int*>(base), reinterpret_cast<int*>(base + 4 * kMaxSlots),
          reinterpret_cast<float*>(base + 8 * kMaxSlots),
          reinterpret_cast<float*>(base + kSlotListBytes),
          base + kSlotListBytes + result_bytes(max_slots)};
}

// Router output as kernels see it, see moe_int4_args.h.
struct Router {
  const void* ids;
  bool ids_are_int64;
  int64_t ids_stride_m;
  const int32_t* expert_map;
  int map_size, num_experts, top_k;

  // The id as the router gave it; what does not fit a non-negative int32 becomes -1.
  GPU_DEVICE int id(int token, int t) const {
    const int64_t at = token * ids_stride_m + t;
    if (!ids_are_int64) return static_cast<const int32_t*>(ids)[at];
    const int64_t id = static_cast<const int64_t*>(ids)[at];
    return id >= 0 && id <= 0x7fffffff ? static_cast<int>(id) : -1;
  }

  // The expert's place here, -1: not here.
  GPU_DEVICE int local_expert(int id) const {
    if (expert_map != nullptr) id = id >= 0 && id < map_size ? expert_map[id] : -1;
    return id >= 0 && id < num_experts ? id : -1;
  }
};

// Sum of eight hexadecimal digits that are 0 or 1 each.
GPU_DEVICE int digit_sum(uint32_t digits) {
  return static_cast<int>((digits + (digits >> 16)) * 0x1111u >> 12 & 15);
}

// Lists the pairs (token, t) of a block of tokens that the pair (token, t) at hand is to serve, so
// that an expert's weights are read once for all tokens of the block: the first token that picked
// the expert serves all, the others none. A token that picked the expert twice gets the second pair
// served on its own. Wave-collective; returns the number of pairs. `visit(slot, token, t)` runs in
// one lane per pair.
template <int MaxSlots, typename Visit>
GPU_DEVICE int list_slots(const Router& router, int first_token, int tokens, int token, int t,
                          int id, const Visit& visit) {
  constexpr int kLanesPerToken = gpu::kWaveSize / MaxSlots;
  static_assert(kLanesPerToken == 4, "the masks below hold one token per hexadecimal digit");
  const int my_token = gpu::lane() / kLanesPerToken;
  int found = router.top_k;
  if (my_token < tokens) {
    for (int i = gpu::lane() % kLanesPerToken; i < router.top_k; i += kLanesPerToken) {
      if (found == router.top_k && router.id(first_token + my_token, i) == id) found = i;
    }
  }
  int other = gpu::shuffle_xor<1>(found);
  found = other < found ? other : found;
  other = gpu::shuffle_xor<2>(found);
  found = other < found ? other : found;

  const int local = token - first_token;
  const bool leads = gpu::lane() % kLanesPerToken == 0;
  const uint32_t picked = gpu::wave_ballot(leads && found < router.top_k);
  const uint32_t later = gpu::wave_ballot(leads && my_token == local && found != t);
  if (later != 0) {
    if (gpu::lane() == 0) visit(0, token, t);
    return 1;
  }
  const uint32_t self = 1u << (kLanesPerToken * local);
  if ((picked & (self - 1)) != 0) return 0;
  const uint32_t before = picked & ((1u << gpu::lane()) - 1);
  if (leads && found < router.top_k) {
    visit(digit_sum(before), first_token + my_token, found);
  }
  return digit_sum(picked);
}

// Calls body with the smallest compiled number of slots that serves `count`.
template <int S>
struct SlotCount {
  static constexpr int value = S;
};
template <typename Body>
GPU_DEVICE void with_slots(int count, const Body& body) {
  if (count <= 1) {
    body(SlotCount<1>{});
  } else if (count <= 4) {
    body(SlotCount<4>{});
  } else {
    body(SlotCount<8>{});
  }
}

}  // namespace moe_int4
