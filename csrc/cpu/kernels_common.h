// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Plain loops that every kernels_*.cpp compiles for its own instruction set: 16-bit conversions,
// scales and zero points of a weight row, activation functions. Written so that compilers
// vectorise them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace moe_int4::cpu {
namespace {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline T round_up(T value, T multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline float bf16_to_float(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t x = bits_as<uint32_t>(f);
  const uint32_t rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float half_to_float(uint16_t h) {
  // Shifted into a float's place the exponent is 112 too low; the product is exact and makes
  // subnormals normal.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const float scaled = bits_as<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bits_as<uint32_t>(scaled);
  const uint32_t value = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return bits_as<float>(value | static_cast<uint32_t>(h & 0x8000) << 16);
}

inline uint16_t float_to_half(float f) {
  const uint32_t x = bits_as<uint32_t>(f) & 0x7fffffff;
  const uint32_t sign = (bits_as<uint32_t>(f) >> 16) & 0x8000;
  const uint32_t normal = (x - (112u << 23) + 0xfff + ((x >> 13) & 1)) >> 13;
  // Below 2^-14 the last place is 2^-24: adding 0.5 lets the addition round there.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(x) + 0.5f) - 0x3f000000;
  const uint32_t special = x > 0x7f800000 ? 0x7e00 : 0x7c00;
  uint32_t value = x < 0x38800000 ? subnormal : normal;
  value = x >= 0x47800000 ? special : value;
  return static_cast<uint16_t>(value | sign);
}

inline void to_float(DType dtype, const void* from, int32_t n, float* to) {
  const auto* x = static_cast<const uint16_t*>(from);
  if (dtype == DType::kHalf) {
    for (int32_t i = 0; i < n; ++i) to[i] = half_to_float(x[i]);
  } else {
    for (int32_t i = 0; i < n; ++i) to[i] = bf16_to_float(x[i]);
  }
}

void store(DType dtype, const float* y, int32_t n, void* to) {
  auto* c = static_cast<uint16_t*>(to);
  if (dtype == DType::kHalf) {
    for (int32_t i = 0; i < n; ++i) c[i] = float_to_half(y[i]);
  } else {
    for (int32_t i = 0; i < n; ++i) c[i] = float_to_bf16(y[i]);
  }
}

inline int32_t as_many_rows(DType, int32_t m) { return m; }

// Sum of 32 values, in an order that vectorises.
inline float sum_of_32(const float* values) {
  float lanes[8] = {};
  for (int32_t i = 0; i < 32; i += 8) {
    for (int32_t j = 0; j < 8; ++j) lanes[j] += values[i + j];
  }
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Adds the group sums of `count` values that start at `begin` (both multiples of 32).
inline void add_sums(const float* values, int32_t begin, int32_t count, int32_t group_size,
                     float* sums) {
  for (int32_t i = 0; i < count; i += 32) sums[(begin + i) / group_size] += sum_of_32(values + i);
}

// Weight row n, for prefetching: past its last row the tile goes on with the next one.
inline const char* row_ahead(const Tile& t, int32_t n) {
  const int32_t past = n - (t.first + t.columns);
  return reinterpret_cast<const char*>(past < 0 ? t.q + n * t.q_stride
                                                : t.next + past * t.q_stride);
}

// Scales of weight row n, likewise.
inline const char* scales_ahead(const Tile& t, int32_t n) {
  const int32_t past = n - (t.first + t.columns);
  const void* from = past < 0 ? t.scales : t.next_scales;
  return static_cast<const char*>(from) + 2 * (past < 0 ? n : past) * t.s_stride;
}

inline int32_t groups_of(const Tile& t) { return t.k / t.group_size; }

// Scales of weight row n, one per group.
inline void load_scales(const Tile& t, int32_t n, float* scales) {
  to_float(t.dtype, static_cast<const uint16_t*>(t.scales) + n * t.s_stride, groups_of(t), scales);
}

// Zero points of weight row n, one per group.
inline void load_zeros(const Tile& t, int32_t n, float* zeros) {
  const int32_t groups = groups_of(t);
  if (t.zeros == nullptr) {
    const float middle = t.bits == 8 ? 128.0f : 8.0f;
    for (int32_t g = 0; g < groups; ++g) zeros[g] = middle;
    return;
  }
  const uint32_t* words = t.zeros + (n / 8) * t.z_stride;
  const int32_t shift = 4 * (n % 8);
  for (int32_t g = 0; g < groups; ++g) {
    zeros[g] = static_cast<float>(static_cast<int32_t>((words[g] >> shift) & 15));
  }
}

// exp by range reduction to |r| <= ln(2)/2 and a Taylor polynomial of degree 7 (truncation below
// 1e-8 there); arguments are clamped to the range in which the result is a normal float.
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

inline float silu(float x, float alpha) { return x / (1.0f + exp_clamped(-alpha * x)); }

// erf: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, |error| <= 1.5e-7.
inline float gelu(float x, float) {
  const float z = (x < 0 ? -x : x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exp_clamped(-z * z);  // 1 - erf(z)
  return 0.5f * x * (x < 0 ? tail : 2.0f - tail);
}

// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
inline float gelu_tanh(float x, float) { return silu(x, 1.59576912f * (1.0f + 0.044715f * x * x)); }

template <float (*Act)(float, float)>
inline void activate_with(const GateUpArgs& args, const float* gate, const float* up, int32_t n,
                          void* c) {
  constexpr int32_t kBlock = 64;
  float y[kBlock];
  const float limit = args.limit, alpha = args.alpha, beta = args.beta;
  for (int32_t begin = 0; begin < n; begin += kBlock) {
    const int32_t count = n - begin < kBlock ? n - begin : kBlock;
    for (int32_t i = 0; i < count; ++i) {
      const float g = gate[begin + i] > limit ? limit : gate[begin + i];
      float u = up[begin + i] > limit ? limit : up[begin + i];
      u = u < -limit ? -limit : u;
      y[i] = Act(g, alpha) * (u + beta);
    }
    store(args.dtype, y, count, static_cast<uint16_t*>(c) + begin);
  }
}

void activate(const GateUpArgs& args, const float* gate, const float* up, int32_t n, void* c) {
  switch (args.activation) {
    case Activation::kSilu:
      return activate_with<silu>(args, gate, up, n, c);
    case Activation::kGelu:
      return activate_with<gelu>(args, gate, up, n, c);
    case Activation::kGeluTanh:
      return activate_with<gelu_tanh>(args, gate, up, n, c);
  }
}

}  // namespace
}  // namespace moe_int4::cpu
