// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Plain loops for 16-bit conversions and for the scales and zero points of a weight row. Every
// kernels_*.cpp compiles them for its own instruction set; they are written so that compilers
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
  // In a float's bit position the exponent is 112 too low. The product is exact and normalises
  // subnormals.
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
  // Below 2^-14 the unit in the last place is 2^-24. Adding 0.5 makes the addition round there.
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

// Adds `count` values that start at `begin` (both multiples of 32) to the sums of their groups.
inline void add_sums(const float* values, int32_t begin, int32_t count, int32_t group_size,
                     float* sums) {
  for (int32_t i = 0; i < count; i += 32) sums[(begin + i) / group_size] += sum_of_32(values + i);
}

// Weight row n, for prefetching. Past the tile's last row: rows of the thread's next tile.
inline const char* row_ahead(const Tile& t, int32_t n) {
  const int32_t past = n - (t.first + t.columns);
  return reinterpret_cast<const char*>(past < 0 ? t.q + n * t.q_stride
                                                : t.next + past * t.q_stride);
}

// The scales of weight row n, in the same way.
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

}  // namespace
}  // namespace moe_int4::cpu
