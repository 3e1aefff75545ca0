// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Helpers that the AVX-512 kernels share.
#pragma once

#include <immintrin.h>

#include "kernels_common.h"

namespace moe_int4::cpu {
namespace {

// Transposes 16 vectors of 16 words.
inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
  for (int32_t i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int32_t i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  for (int32_t i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int32_t i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
  }
}

// Pairs (v[2i], v[2i+1]) of 16 words as 128 + q, in bf16.
template <int32_t I>
inline __m512i pairs(__m512i words) {
  const __m512i shifted = I == 0 ? words : _mm512_srli_epi32(words, 4 * I);
  constexpr int kAndThenOr = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(0x000f000f),
                                   _mm512_set1_epi32(0x43004300), kAndThenOr);
}

inline __mmask16 first_lanes(int32_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// 16-bit values as floats; zeros where the mask is clear.
inline __m512 load_16(DType dtype, const uint16_t* from, __mmask16 mask) {
  const __m256i raw = _mm256_maskz_loadu_epi16(mask, from);
  return dtype == DType::kHalf
             ? _mm512_cvtph_ps(raw)
             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Zero points of weight row n, groups g .. g + 15, for the lanes of the mask.
inline __m512 zero_points(const Tile& t, int32_t n, int32_t g, __mmask16 mask) {
  if (t.zeros == nullptr) return _mm512_set1_ps(8);
  const __m512i words = _mm512_maskz_loadu_epi32(mask, t.zeros + n / 8 * t.z_stride + g);
  return _mm512_cvtepi32_ps(_mm512_and_si512(
      _mm512_srl_epi32(words, _mm_cvtsi32_si128(4 * (n % 8))), _mm512_set1_epi32(15)));
}

// Scales and -scale * (Offset + zp) of weight row n, groups g .. g + 15; zeros past the last group.
struct GroupVectors {
  __m512 scales, zeros;
};

template <int32_t Offset>
inline GroupVectors load_group_vectors(const Tile& t, int32_t n, int32_t g) {
  const auto* from = static_cast<const uint16_t*>(t.scales) + n * t.s_stride + g;
  const __mmask16 mask = first_lanes(groups_of(t) - g);
  const __m512 scales = load_16(t.dtype, from, mask);
  const __m512 offset = _mm512_sub_ps(_mm512_set1_ps(-Offset), zero_points(t, n, g, mask));
  return {scales, _mm512_mul_ps(scales, offset)};
}

// The same for all groups of a row, padded with zeros to a multiple of 16.
template <int32_t Offset>
inline void load_groups(const Tile& t, int32_t n, float* scales, float* zeros) {
  for (int32_t g = 0; g < groups_of(t); g += 16) {
    const GroupVectors groups = load_group_vectors<Offset>(t, n, g);
    _mm512_store_ps(scales + g, groups.scales);
    _mm512_store_ps(zeros + g, groups.zeros);
  }
}

}  // namespace
}  // namespace moe_int4::cpu
