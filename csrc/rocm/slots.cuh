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

// The ids that a block of tokens picked, spread over the wave: four lanes share a token. Loaded
// once, all at the same time, for any number of list_slots calls.
struct PickedIds {
  static constexpr int kLanesPerToken = gpu::kWaveSize / kMaxSlots;
  static constexpr int kHeld =
      4;  // per lane: 16 per token; with more, the rest is loaded when needed

  int ids[kHeld];

  GPU_DEVICE PickedIds(const Router& router, int first_token, int tokens) {
    GPU_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      ids[j] = token() < tokens && slot(j) < router.top_k
                   ? router.id(first_token + token(), slot(j))
                   : -1;
    }
  }

  static GPU_DEVICE int token() { return gpu::lane() / kLanesPerToken; }
  static GPU_DEVICE int slot(int j) { return gpu::lane() % kLanesPerToken + j * kLanesPerToken; }

  // First t at which the lane's token picked `id`, top_k: nowhere. All lanes of a token know it.
  GPU_DEVICE int find(const Router& router, int first_token, int tokens, int id) const {
    int found = router.top_k;
    GPU_UNROLL
    for (int j = kHeld - 1; j >= 0; --j) {
      if (ids[j] == id) found = slot(j);
    }
    for (int j = kHeld; j * kLanesPerToken < router.top_k && found == router.top_k; ++j) {
      if (token() < tokens && slot(j) < router.top_k &&
          router.id(first_token + token(), slot(j)) == id) {
        found = slot(j);
      }
    }
    int other = gpu::shuffle_xor<1>(found);
    found = other < found ? other : found;
    other = gpu::shuffle_xor<2>(found);
    return other < found ? other : found;
  }
};

// Sum of eight hexadecimal digits that are 0 or 1 each.
GPU_DEVICE int digit_sum(uint32_t digits) {
  return static_cast<int>((digits + (digits >> 16)) * 0x1111u >> 12 & 15);
}

// Lists the pairs (token, t) of a block of tokens that the pair (token, t) at hand is to serve, so
// that an expert's weights are read once for all tokens of the block: the first token that picked
// the expert serves all, the others none. A token that picked the expert twice gets the second pair
// served on its own. `id`, at least 0, is the pair's. Wave-collective; returns the number of pairs.
// `visit(slot, token, t)` runs in one lane per pair.
template <typename Visit>
GPU_DEVICE int list_slots(const PickedIds& picked_ids, const Router& router, int first_token,
                          int tokens, int token, int t, int id, const Visit& visit) {
  static_assert(PickedIds::kLanesPerToken == 4, "the masks below hold one token per hex digit");
  const int found = picked_ids.find(router, first_token, tokens, id);
  const int local = token - first_token;
  const bool leads = gpu::lane() % PickedIds::kLanesPerToken == 0;
  const uint32_t picked = gpu::wave_ballot(leads && found < router.top_k);
  const uint32_t later = gpu::wave_ballot(leads && PickedIds::token() == local && found != t);
  if (later != 0) {
    if (gpu::lane() == 0) visit(0, token, t);
    return 1;
  }
  const uint32_t self = 1u << (PickedIds::kLanesPerToken * local);
  if ((picked & (self - 1)) != 0) return 0;
  const uint32_t before = picked & ((1u << gpu::lane()) - 1);
  if (leads && found < router.top_k) {
    visit(digit_sum(before), first_token + PickedIds::token(), found);
  }
  return digit_sum(picked);
}

// Runs body(SlotCount<S>, first slot, slots) over `count` slots with the smallest compiled S that
// serves.
template <int S>
struct SlotCount {
  static constexpr int value = S;
};
template <typename Body>
GPU_DEVICE void with_slots(int count, const Body& body) {
  if (count <= 1) {
    body(SlotCount<1>{}, 0, count);
  } else {
    for (int first = 0; first < count; first += kSlotsPerPass) {
      const int left = count - first;
      body(SlotCount<kSlotsPerPass>{}, first, left < kSlotsPerPass ? left : kSlotsPerPass);
    }
  }
}

}  // namespace moe_int4
