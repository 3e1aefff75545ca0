// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Selects the activation rows that a wave multiplies with one expert's weights.
#pragma once

#include "geometry.h"

namespace moe_int4 {

// The wave's LDS; geometry.h has the sizes.
struct WaveLds {
  int* in_row;     // [kMaxSlots] row of the activations, -1: empty slot
  int* out_row;    // [kMaxSlots] row of the output
  float* weight;   // [kMaxSlots] router weight, a factor of the result
  float* results;  // [slots][kRowsPerWave]
  char* staged;
};

GPU_DEVICE WaveLds wave_lds(char* base, int max_slots) {
  return {reinterpret_cast<int*>(base), reinterpret_cast<int*>(base + 4 * kMaxSlots),
          reinterpret_cast<float*>(base + 8 * kMaxSlots),
          reinterpret_cast<float*>(base + kSlotListBytes),
          base + kSlotListBytes + result_bytes(max_slots)};
}

// The router's output as kernels see it; moe_int4_args.h has the meaning.
struct Router {
  const void* ids;
  bool ids_are_int64;
  int64_t ids_stride_m;
  const int32_t* expert_map;
  int map_size, num_experts, top_k;

  // The router's id for the pair (token, t), or a negative number if it does not fit a non-negative
  // int32. Both id widths are read 32 bits at a time, so that no branch precedes the load.
  GPU_DEVICE int id(int token, int t) const {
    const int* at = id_address(token, t);
    return id_of(at[0], at[ids_are_int64 ? 1 : 0]);
  }

  // The local index of an expert, -1 if it is not on this rank.
  GPU_DEVICE int local_expert(int id) const {
    if (expert_map != nullptr) {
      const bool mapped = id >= 0 && id < map_size;
      const int local = map_size > 0 ? expert_map[mapped ? id : 0] : -1;
      id = mapped ? local : -1;
    }
    return id >= 0 && id < num_experts ? id : -1;
  }

  // The local expert of a pair that is equal in all lanes.
  GPU_DEVICE int uniform_expert(int token, int t) const {
    const int* at = id_address(token, t);
    int id = id_of(gpu::load_uniform(at), gpu::load_uniform(at + (ids_are_int64 ? 1 : 0)));
    if (expert_map != nullptr) {
      id = id >= 0 && id < map_size ? gpu::load_uniform(expert_map + id) : -1;
    }
    return id >= 0 && id < num_experts ? id : -1;
  }

  // The local experts of the lane's pairs (token, t[j]). All ids are requested at once, then all
  // entries of the expert map.
  template <int N>
  GPU_DEVICE void local_experts(int token, const int (&t)[N], int (&experts)[N]) const {
    int low[N], high[N];
    GPU_UNROLL
    for (int j = 0; j < N; ++j) {
      const int* at = id_address(token, t[j]);
      low[j] = at[0];
      high[j] = at[ids_are_int64 ? 1 : 0];
    }
    gpu::order_requests();
    GPU_UNROLL
    for (int j = 0; j < N; ++j) experts[j] = id_of(low[j], high[j]);
    if (expert_map != nullptr && map_size > 0) {
      int local[N];
      GPU_UNROLL
      for (int j = 0; j < N; ++j) {
        local[j] = expert_map[experts[j] >= 0 && experts[j] < map_size ? experts[j] : 0];
      }
      gpu::order_requests();
      GPU_UNROLL
      for (int j = 0; j < N; ++j) {
        experts[j] = experts[j] >= 0 && experts[j] < map_size ? local[j] : -1;
      }
    }
    GPU_UNROLL
    for (int j = 0; j < N; ++j) {
      experts[j] = experts[j] >= 0 && experts[j] < num_experts ? experts[j] : -1;
    }
  }

 private:
  GPU_DEVICE const int* id_address(int token, int t) const {
    const int64_t at = token * ids_stride_m + t;
    return static_cast<const int*>(ids) + (ids_are_int64 ? 2 * at : at);
  }
  GPU_DEVICE int id_of(int low, int high) const { return !ids_are_int64 || high == 0 ? low : -1; }
};

// The experts of kHeld * kLanesPerToken places t, starting at `first_t`, for a block of tokens, and
// optionally their router weights. They are spread over the wave, four lanes per token, and loaded
// once, all at the same time, for any number of list_slots calls.
struct Picked {
  static constexpr int kLanesPerToken = gpu::kWaveSize / kMaxSlots;
  static constexpr int kHeld = 4;  // per lane
  static constexpr int kPlaces = kHeld * kLanesPerToken;
  static_assert(kPlaces == kKeptPlaces);

  const Router& router;
  const float* router_weights;  // or null: 1
  int64_t weights_stride_m;
  float* kept;  // [kMaxSlots][kPlaces] of the wave's LDS, or null: no weights
  int first_token, tokens, first_t;
  int experts[kHeld];  // -1: not on this rank

  GPU_DEVICE Picked(const Router& router, const float* router_weights, int64_t weights_stride_m,
                    float* kept, int first_token, int tokens, int first_t)
      : router(router),
        router_weights(router_weights),
        weights_stride_m(weights_stride_m),
        kept(kept),
        first_token(first_token),
        tokens(tokens),
        first_t(first_t) {
    const int own = token() < tokens ? token() : tokens - 1;
    int t[kHeld];
    GPU_UNROLL
    for (int j = 0; j < kHeld; ++j) t[j] = place(j) < router.top_k ? place(j) : router.top_k - 1;
    float weights[kHeld];
    if (kept != nullptr)
      load_weights(own, t, weights);  // before the ids, so that both have arrived
    router.local_experts(first_token + own, t, experts);
    GPU_UNROLL
    for (int j = 0; j < kHeld; ++j) {
      if (token() >= tokens || place(j) >= router.top_k) experts[j] = -1;
    }
    if (kept == nullptr) return;
    gpu::wave_barrier();  // previous contents have been read
    GPU_UNROLL
    for (int j = 0; j < kHeld; ++j) kept[token() * kPlaces + place(j) - first_t] = weights[j];
    gpu::wave_barrier();
  }

  static GPU_DEVICE int token() { return gpu::lane() / kLanesPerToken; }
  GPU_DEVICE int place(int j) const {
    return first_t + gpu::lane() % kLanesPerToken + j * kLanesPerToken;
  }

  // The expert of the pair (first_token + token, t), which must be equal in all lanes.
  GPU_DEVICE int expert(int token, int t) const {
    t -= first_t;
    int value = experts[0];
    GPU_UNROLL
    for (int j = 1; j < kHeld; ++j) value = t / kLanesPerToken == j ? experts[j] : value;
    return gpu::from_lane(value, token * kLanesPerToken + t % kLanesPerToken);
  }

  // The weight of a pair, which may differ between lanes; t is one of the places held.
  GPU_DEVICE float weight(int token, int t) const {
    return kept == nullptr ? 1.0f : kept[token * kPlaces + t - first_t];
  }

  // Where the lane's token picked `expert`. All lanes of a token get the same result.
  struct Found {
    int t;  // the first place; top_k if none
    float weight;
  };
  GPU_DEVICE Found find(int expert) const {
    int first = router.top_k;
    GPU_UNROLL
    for (int j = kHeld - 1; j >= 0; --j) {
      if (experts[j] == expert) first = place(j);
    }
    Found found = {first, weight(token(), first < router.top_k ? first : first_t)};
    if (router.top_k > kPlaces && token() < tokens) {
      for (int t = gpu::lane() % kLanesPerToken; t < found.t; t += kLanesPerToken) {
        if (t >= first_t && t < first_t + kPlaces) continue;
        if (router.local_expert(router.id(first_token + token(), t)) != expert) continue;
        const int at[1] = {t};
        float weight[1] = {1.0f};
        if (kept != nullptr) load_weights(token(), at, weight);
        found = {t, weight[0]};
      }
    }
    found = earlier(found, {gpu::shuffle_xor<1>(found.t), gpu::shuffle_xor<1>(found.weight)});
    return earlier(found, {gpu::shuffle_xor<2>(found.t), gpu::shuffle_xor<2>(found.weight)});
  }

 private:
  // Without weights it loads an id instead, to avoid a branch.
  template <int N>
  GPU_DEVICE void load_weights(int token, const int (&t)[N], float (&out)[N]) const {
    const bool have = router_weights != nullptr;
    const void* from = have ? static_cast<const void*>(router_weights) : router.ids;
    const int64_t row = have ? (first_token + token) * weights_stride_m : 0;
    GPU_UNROLL
    for (int j = 0; j < N; ++j) {
      const uint32_t bits = static_cast<const uint32_t*>(from)[have ? row + t[j] : 0];
      out[j] = have ? __builtin_bit_cast(float, bits) : 1.0f;
    }
  }

  static GPU_DEVICE Found earlier(const Found& a, const Found& b) { return b.t < a.t ? b : a; }
};

// Sum of eight hexadecimal digits, each 0 or 1.
GPU_DEVICE int digit_sum(uint32_t digits) {
  return static_cast<int>((digits + (digits >> 16)) * 0x1111u >> 12 & 15);
}

// Lists the pairs (token, t) that the given pair serves, so that an expert's weights are read
// once for all tokens of a block. The first token that picked the expert serves all pairs with that
// expert; the others serve none. If a token picked the expert twice, its second pair is served
// separately. `expert` (at least 0), `token` (counted from the block's first) and t (a place that
// `picked` holds) are the given pair. Wave-collective; returns the number of pairs. `visit(slot,
// token, t, router weight)` runs in one lane per pair.
template <typename Visit>
GPU_DEVICE int list_slots(const Picked& picked, int token, int t, int expert, const Visit& visit) {
  static_assert(Picked::kLanesPerToken == 4, "the masks below hold one token per hex digit");
  const int top_k = picked.router.top_k;
  const Picked::Found found = picked.find(expert);
  const bool leads = gpu::lane() % Picked::kLanesPerToken == 0;
  const uint32_t sharers = gpu::wave_ballot(leads && found.t < top_k);
  const uint32_t later = gpu::wave_ballot(leads && Picked::token() == token && found.t != t);
  if (later != 0) {
    const float weight = picked.weight(token, t);
    if (gpu::lane() == 0) visit(0, token, t, weight);
    return 1;
  }
  const uint32_t self = 1u << (Picked::kLanesPerToken * token);
  if ((sharers & (self - 1)) != 0) return 0;
  const uint32_t before = sharers & ((1u << gpu::lane()) - 1);
  if (leads && found.t < top_k) {
    visit(digit_sum(before), Picked::token(), found.t, found.weight);
  }
  return digit_sum(sharers);
}

// Runs body(SlotCount<S, P>, first slot, slots) over `count` slots, with the smallest compiled S *
// P that is large enough; see WaveTile. Without `Once` P is 1, and further slots read the weights
// again.
template <int S, int P>
struct SlotCount {
  static constexpr int kSlots = S, kPasses = P;
};
template <bool Once, typename Body>
GPU_DEVICE void with_slots(int count, const Body& body) {
  if (count <= 1) {
    body(SlotCount<1, 1>{}, 0, count);
  } else if (Once && kSlotsPerPass < kMaxSlots && count > kSlotsPerPass) {
    body(SlotCount<kSlotsPerPass, kMaxSlots / kSlotsPerPass>{}, 0, count);
  } else {
    for (int first = 0; first < count; first += kSlotsPerPass) {
      const int left = count - first;
      body(SlotCount<kSlotsPerPass, 1>{}, first, left < kSlotsPerPass ? left : kSlotsPerPass);
    }
  }
}

}  // namespace moe_int4
