// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Converts activations to 16-bit integers for the int8 dot-product kernels. The step of a group is
// max|a| / 32639, so the error is below 1e-4 of the group's norm, a twentieth of bf16's own
// rounding. An integer is 256 * high + low with two signed bytes. Activations below 1e-33 become
// zero.
#pragma once

#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

struct Quantized {
  float step;
  int32_t high, low;  // sums of the bytes
};

// Converts the values of one group.
inline Quantized quantize(const float* values, int32_t count, int16_t* to) {
  constexpr float kLargest = 127 * 256 + 127;
  int32_t bits = 0;  // of the largest magnitude; NaN counts as the largest
  for (int32_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits_as<int32_t>(values[i]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = bits_as<float>(bits);
  const float inverse = largest > 1e-33f ? kLargest / largest : 0.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  int32_t total = 0, high = 0;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t value = bits_as<int32_t>(values[i] * inverse + kRound) - bits_as<int32_t>(kRound);
    to[i] = static_cast<int16_t>(value);
    total += to[i];
    high += (to[i] + 128) >> 8;
  }
  return {largest / kLargest, high, total - 256 * high};
}

// Splits 128 integers into high and low bytes, as [half][run]: 16 runs of 8 weights. With 4 bits a
// run is one word: half 0 holds the activations of v0 v4 v1 v5 (bits 0..3 of the word's bytes),
// half 1 those of v2 v6 v3 v7 (bits 4..7). With 8 bits half 0 is v0 v1 v2 v3, half 1 is v4 v5 v6
// v7.
template <int32_t Bits = 4>
inline void split(const int16_t* integers, __m512i (&high)[2], __m512i (&low)[2]) {
  const __m512i order = _mm512_broadcast_i32x4(
      Bits == 4 ? _mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14)
                : _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14));
  const __m512i half = _mm512_set1_epi16(0x80);
  __m512i v[4];
  for (int32_t i = 0; i < 4; ++i) {
    const __m512i x = _mm512_loadu_si512(integers + 32 * i);
    // Adding 128 rounds the high byte and leaves low + 128 in the low byte; the xor undoes the
    // latter.
    v[i] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi16(x, half), half), order);
  }
  // From [4 words][4 kinds] in each of the four vectors to [kind][16 words]. A kind is a half's
  // high or low bytes.
  const __m512i word_of =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i word_of_2 =
      _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  const __m512i a = _mm512_permutex2var_epi32(v[0], word_of, v[1]);    // kinds 0, 1 of words 0..7
  const __m512i b = _mm512_permutex2var_epi32(v[2], word_of, v[3]);    // of words 8..15
  const __m512i c = _mm512_permutex2var_epi32(v[0], word_of_2, v[1]);  // kinds 2, 3
  const __m512i d = _mm512_permutex2var_epi32(v[2], word_of_2, v[3]);
  high[0] = _mm512_shuffle_i64x2(a, b, 0x44);
  high[1] = _mm512_shuffle_i64x2(a, b, 0xee);
  low[0] = _mm512_shuffle_i64x2(c, d, 0x44);
  low[1] = _mm512_shuffle_i64x2(c, d, 0xee);
}

}  // namespace
}  // namespace moe_int4::cpu
