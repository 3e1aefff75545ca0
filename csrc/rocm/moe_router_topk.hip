// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// fused_moe_router_topk, see hybrid_w4a16_router.py. Each block computes the logits of some experts
// for all tokens. The block that finishes last reads them all back and selects the experts, one
// wave per token. Which block is last has no influence on the result.
#include "dequant.cuh"
#include "entry_points_router.h"

namespace moe_int4 {
namespace {

GPU_DEVICE int thread() { return gpu::wave() * gpu::kWaveSize + gpu::lane(); }

// The same order as in vLLM's softmax: lanes 16 apart first.
GPU_DEVICE float sum_of_wave(float x) {
  x += gpu::shuffle_xor<16>(x);
  x += gpu::shuffle_xor<8>(x);
  x += gpu::shuffle_xor<4>(x);
  x += gpu::shuffle_xor<2>(x);
  return x + gpu::shuffle_xor<1>(x);
}

GPU_DEVICE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Unsigned numbers in the order of the floats; never 0, the key of what is not there.
GPU_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t key = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return key == 0 ? 1 : key;
}

GPU_DEVICE float float_of(uint32_t key) {
  return as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

GPU_DEVICE float finite_or_zero(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : x;
}

// 8 weights of a row.
template <typename DT, int Bits>
struct EightWeights {
  gpu::U32x4 v[Bits / 16];

  GPU_DEVICE void load(const void* row, int at) {
    const char* p = static_cast<const char*>(row) + at * (Bits / 8);
    GPU_UNROLL
    for (int i = 0; i < Bits / 16; ++i) v[i] = gpu::load_weights(p + 16 * i);
  }

  GPU_DEVICE float dot(const gpu::U32x4& a, float sum) const {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (Bits == 16) {
        sum = gpu::dot2(DT{}, v[0].v[i], a.v[i], sum);
      } else {
        const uint16_t low = static_cast<uint16_t>(a.v[i]);
        const uint16_t high = static_cast<uint16_t>(a.v[i] >> 16);
        sum += as_float(v[i / 2].v[i % 2 * 2]) * Format<DT>::to_float(low);
        sum += as_float(v[i / 2].v[i % 2 * 2 + 1]) * Format<DT>::to_float(high);
      }
    }
    return sum;
  }
};

// The products of a wave's part of a row with all tokens, in all lanes. Requests the first weights
// before it waits for the previous grid, and the activations of all tokens before it uses one.
// Aligned: of with_alignment.
template <typename DT, int Bits, int T, bool Aligned>
GPU_DEVICE void products(const void* a, int64_t a_stride, int m, int k, const void* row, int slice,
                         int k_slices, float (&sums)[T]) {
  constexpr int kTogether = Bits == 16 ? 4 : 2;   // steps whose weights are requested at once
  constexpr int kSteps = T == 8 ? 2 : kTogether;  // and whose activations are, by registers
  const int step = 8 * gpu::kWaveSize * k_slices;
  const uint16_t* const acts = static_cast<const uint16_t*>(a);
  GPU_UNROLL
  for (int i = 0; i < T; ++i) sums[i] = 0.0f;
  bool waited = false;
  for (int at = 8 * (slice * gpu::kWaveSize + gpu::lane()), base = 0; base < k;
       at += kTogether * step, base += kTogether * step) {
    EightWeights<DT, Bits> weights[kTogether];
    GPU_UNROLL
    for (int t = 0; t < kTogether; ++t) {
      const int from = at + t * step;
      weights[t].load(row, from < k ? from : k - 8);
    }
    gpu::order_requests();
    if (!waited) {
      gpu::wait_previous_grid();
      gpu::allow_next_grid();
      waited = true;
    }
    GPU_UNROLL
    for (int begin = 0; begin < kTogether; begin += kSteps) {
      if (base + begin * step >= k) break;
      gpu::U32x4 values[T][kSteps];
      GPU_UNROLL
      for (int i = 0; i < T; ++i) {
        const uint16_t* const of = acts + (i < m ? i : m - 1) * a_stride;
        GPU_UNROLL
        for (int t = 0; t < kSteps; ++t) {
          const int from = at + (begin + t) * step;
          values[i][t] = load_activations<Aligned>(of + (from < k ? from : k - 8));
        }
      }
      gpu::order_requests();
      GPU_UNROLL
      for (int t = 0; t < kSteps; ++t) {
        const bool real = at + (begin + t) * step < k;
        GPU_UNROLL
        for (int i = 0; i < T; ++i) {
          const float sum = weights[begin + t].dot(values[i][t], sums[i]);
          sums[i] = real ? sum : sums[i];
        }
      }
    }
  }
  GPU_UNROLL
  for (int i = 0; i < T; ++i) sums[i] = sum_of_wave(sums[i]);
}

template <typename DT>
GPU_DEVICE void store_logit(void* logits, int logits_are_float, int at, float x) {
  if (logits_are_float != 0) {
    static_cast<float*>(logits)[at] = x;
  } else {
    static_cast<uint16_t*>(logits)[at] = Format<DT>::from_float(x);
  }
}

// Selects the experts of one token, by one wave. A lane holds N logits; expert_of(i) grows with i.
template <typename DT, int N>
GPU_DEVICE void select(const void* logits, int logits_are_float, int experts, const float* bias,
                       bool is_padding, float* topk_weights, int32_t* topk_ids, int sigmoid,
                       int renormalize, float scale, int top_k, int log2_together) {
  const auto expert_of = [&](int i) {
    const int together = 1 << log2_together;
    return ((i >> log2_together) * gpu::kWaveSize + gpu::lane()) * together + (i & (together - 1));
  };
  const auto is_real = [&](int i) { return expert_of(i) < experts; };
  float score[N];
  GPU_UNROLL
  for (int i = 0; i < N; ++i) {
    const int at = is_real(i) ? expert_of(i) : experts - 1;
    score[i] = logits_are_float != 0
                   ? static_cast<const float*>(logits)[at]
                   : Format<DT>::to_float(static_cast<const uint16_t*>(logits)[at]);
  }
  if (sigmoid != 0) {
    GPU_UNROLL
    for (int i = 0; i < N; ++i) score[i] = 1.0f / (1.0f + gpu::exp_fast(-score[i]));
  } else {
    float largest = as_float(0xff800000u);  // -inf; comparisons ignore NaN
    GPU_UNROLL
    for (int i = 0; i < N; ++i) largest = score[i] > largest ? score[i] : largest;
    largest = float_of(gpu::wave_max(key_of(largest)));
    float sum = 0.0f;
    GPU_UNROLL
    for (int i = 0; i < N; ++i) {
      score[i] = gpu::exp_of(score[i] - largest);
      if (is_real(i)) sum += score[i];
    }
    const float inverse = 1.0f / sum_of_wave(sum);
    GPU_UNROLL
    for (int i = 0; i < N; ++i) score[i] *= inverse;
  }
  uint32_t key[N];
  GPU_UNROLL
  for (int i = 0; i < N; ++i) {
    score[i] = finite_or_zero(score[i]);
    const float choice =
        bias == nullptr ? score[i] : score[i] + bias[is_real(i) ? expert_of(i) : 0];
    key[i] = is_real(i) ? key_of(choice) : 0;
  }

  float sum = 0.0f, mine = 0.0f;
  int my_expert = 0;
  for (int place = 0; place < top_k; ++place) {
    uint32_t best = 0;
    int expert = 0;
    float weight = 0.0f;
    GPU_UNROLL
    for (int i = 0; i < N; ++i) {
      if (key[i] <= best) continue;
      best = key[i];
      expert = expert_of(i);
      weight = score[i];
    }
    const uint32_t winner = gpu::wave_max(best);
    const uint32_t lowest = gpu::wave_max(best == winner ? ~static_cast<uint32_t>(expert) : 0);
    const int chosen = static_cast<int>(~lowest);
    weight = gpu::from_lane(weight, gpu::uniform(chosen >> log2_together) % gpu::kWaveSize);
    GPU_UNROLL
    for (int i = 0; i < N; ++i) key[i] = expert_of(i) == chosen ? 0 : key[i];
    sum += weight;
    if (gpu::lane() == place) {
      mine = weight;
      my_expert = chosen;
    }
  }
  if (renormalize != 0) scale /= sum > 0.0f ? sum : 1.0f;
  if (gpu::lane() >= top_k) return;
  topk_weights[gpu::lane()] = mine * scale;
  topk_ids[gpu::lane()] = is_padding ? -1 : my_expert;
}

template <typename DT, int Bits, int T>
GPU_DEVICE void route(ROUTER_ARGS) {
  gpu::keep_arguments(ROUTER_VALUES);
  float* const parts = reinterpret_cast<float*>(gpu::dynamic_lds());  // [wave][token]
  int* const place = reinterpret_cast<int*>(parts + waves * kRouterTokens);
  const int rows = waves / k_slices;
  const int slice = gpu::wave() % k_slices, row = gpu::wave() / k_slices;
  const int expert = gpu::block_x() * rows + row;
  // A wave past the last expert repeats it; its results are discarded.
  const int64_t from = (expert < experts ? expert : experts - 1) * w_stride_e;
  float sums[T];
  const char* const weights = static_cast<const char*>(w) + from * (Bits / 8);
  with_alignment(a, a_stride_m, [&](auto aligned) {
    products<DT, Bits, T, decltype(aligned)::kValue>(a, a_stride_m, m, k, weights, slice, k_slices,
                                                     sums);
  });
  if (gpu::lane() == 0) {
    GPU_UNROLL
    for (int i = 0; i < T; ++i) parts[gpu::wave() * kRouterTokens + i] = sums[i];
  }
  gpu::block_barrier();
  if (thread() < rows * m) {
    const int of = thread() / m, token = thread() % m;
    float sum = 0.0f;
    for (int i = 0; i < k_slices; ++i) sum += parts[(of * k_slices + i) * kRouterTokens + token];
    const int e = gpu::block_x() * rows + of;
    if (e < experts) store_logit<DT>(logits, logits_are_float, token * experts + e, sum);
  }

  gpu::release_writes();
  gpu::block_barrier();
  if (thread() == 0) *place = gpu::fetch_add(arrived, 1);
  gpu::block_barrier();
  if (gpu::uniform(*place) != blocks - 1) return;
  gpu::acquire_writes();
  if (thread() == 0) *arrived = 0;
  const int token = gpu::wave();
  if (token >= m) return;
  const auto* of_token =
      static_cast<const char*>(logits) + int64_t{token} * experts * (logits_are_float != 0 ? 4 : 2);
  const bool is_padding = padding != nullptr && padding[token] != 0;
  const int at = token * top_k;
  if (experts <= kRouterExperts / 2) {
    select<DT, kRouterExperts / 2 / gpu::kWaveSize>(
        of_token, logits_are_float, experts, bias, is_padding, topk_weights + at, topk_ids + at,
        sigmoid, renormalize, scale, top_k, log2_together);
  } else {
    select<DT, kRouterExperts / gpu::kWaveSize>(of_token, logits_are_float, experts, bias,
                                                is_padding, topk_weights + at, topk_ids + at,
                                                sigmoid, renormalize, scale, top_k, log2_together);
  }
}

}  // namespace
}  // namespace moe_int4

#define ROUTER_DEFINE(NAME, DT, BITS, T)                                               \
  extern "C" GPU_KERNEL(kRouterThreads) void ROUTER_NAME(NAME, BITS, T)(ROUTER_ARGS) { \
    moe_int4::route<DT, BITS, T>(ROUTER_VALUES);                                       \
  }
ROUTER_FOR_ALL(ROUTER_DEFINE)
