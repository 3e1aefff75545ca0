// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The step after a product: the activation (formulas in moe_int4_args.h) and the conversion to the
// output's dtype. Each instruction set's fp32 kernel file compiles this header. The loops are
// written so that compilers vectorise them.
#pragma once

#include "kernels_common.h"

namespace moe_int4::cpu {
namespace {

void store(DType dtype, const float* y, int32_t n, void* to) {
  auto* c = static_cast<uint16_t*>(to);
  if (dtype == DType::kHalf) {
    for (int32_t i = 0; i < n; ++i) c[i] = float_to_half(y[i]);
  } else {
    for (int32_t i = 0; i < n; ++i) c[i] = float_to_bf16(y[i]);
  }
}

// exp by range reduction to |r| <= ln(2)/2 and a Taylor polynomial of degree 7 (truncation error
// below 1e-8 there). Arguments are clamped to the range in which the result is a normal float.
inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln(2) in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_clamped(-x)); }

// erf: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, |error| <= 1.5e-7.
inline float normal_cdf(float x) {
  const float z = (x < 0 ? -x : x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exp_clamped(-z * z);  // 1 - erf(z)
  return 0.5f * (x < 0 ? tail : 2.0f - tail);
}

template <typename Weight>
inline void activate_with(const GateUpArgs& args, const float* gate, const float* up, int32_t n,
                          void* c, const Weight& weight) {
  constexpr int32_t kBlock = 64;
  float y[kBlock];
  const float limit = args.limit, alpha = args.alpha, beta = args.beta;
  for (int32_t begin = 0; begin < n; begin += kBlock) {
    const int32_t count = n - begin < kBlock ? n - begin : kBlock;
    for (int32_t i = 0; i < count; ++i) {
      const float g = gate[begin + i] > limit ? limit : gate[begin + i];
      float u = up[begin + i] > limit ? limit : up[begin + i];
      u = u < -limit ? -limit : u;
      y[i] = g * weight(g, alpha) * (u + beta);
    }
    store(args.dtype, y, count, static_cast<uint16_t*>(c) + begin);
  }
}

void activate(const GateUpArgs& args, const float* gate, const float* up, int32_t n, void* c) {
  switch (args.activation) {
#define MOE_INT4_CASE(KIND, WEIGHT) \
  case Activation::KIND:            \
    return activate_with(           \
        args, gate, up, n, c,       \
        []([[maybe_unused]] float x, [[maybe_unused]] float alpha) { return WEIGHT; });
    MOE_INT4_ACTIVATIONS(MOE_INT4_CASE)
#undef MOE_INT4_CASE
  }
}

}  // namespace
}  // namespace moe_int4::cpu
