// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Few activation rows (decode) on AVX-512: lanes are the 16 words of a chunk of a weight row, which
// is read once for up to four activation rows. Pair i of every word is multiplied at once, so
// activations are stored as [chunk of 128][plane][i 0..3][word 0..15] pairs, padded with zeros.
//
// `Dot` says how pairs are multiplied: Sum and add() accumulate within a group, scaled() adds a
// chunk's sums to the totals. weights() are q + kOffset; offset and zero point leave by way of the
// sums. kSteps: activations are integers, in steps that stand after the row, one per group.
#pragma once

#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kChunk = 128;       // weights in a vector of words
constexpr int32_t kChunkWords = 16;   // words in it
constexpr int32_t kPlaneBytes = 256;  // activations of a chunk, one plane
constexpr int32_t kFewWeights = 4;    // weight rows at once

// Groups, padded so that a vector can be read from any group on.
inline int64_t padded_groups(int32_t k, int32_t group_size) {
  return round_up<int64_t>(k / group_size, 16) + 16;
}

// Scratch of a tile: scales and -scale * (kOffset + zp) of the weight rows at hand.
struct FewScratch {
  int64_t groups;
  float *scales, *zeros;
  explicit FewScratch(const Tile& t) : groups(padded_groups(t.k, t.group_size)) {
    scales = static_cast<float*>(t.scratch);
    zeros = scales + kFewWeights * groups;
  }
};

inline int64_t few_scratch_bytes(int32_t k, int32_t group_size) {
  return padded_groups(k, group_size) * 4 * 2 * kFewWeights;
}

// Orders the 64 pairs of a chunk, one plane.
inline void store_plane(const uint16_t* values, char* to) {
  uint32_t words[64], ordered[64];
  memcpy(words, values, sizeof(words));
  for (int32_t i = 0; i < 4; ++i) {
    for (int32_t j = 0; j < 16; ++j) ordered[16 * i + j] = words[4 * j + i];
  }
  memcpy(to, ordered, sizeof(ordered));
}

template <typename Dot, int32_t I, int32_t T, int32_t R>
inline void accumulate(const __m512i (&words)[R], const char* const (&a)[T],
                       typename Dot::Sum (&acc)[R][T]) {
  __m512i w[R];
  for (int32_t r = 0; r < R; ++r) w[r] = Dot::template weights<I>(words[r]);
  for (int32_t p = 0; p < Dot::kPlanes; ++p) {
    for (int32_t i = 0; i < T; ++i) {
      const __m512i x = _mm512_load_si512(a[i] + p * kPlaneBytes + I * 64);
      for (int32_t r = 0; r < R; ++r) acc[r][i] = Dot::add(acc[r][i], x, w[r]);
    }
  }
  if constexpr (I < 3) accumulate<Dot, I + 1, T, R>(words, a, acc);
}

// The sums of four vectors.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 abcd = _mm512_add_ps(low, high);  // sums of a, b, c and d in each quarter
  return _mm_add_ps(_mm_add_ps(_mm512_extractf32x4_ps(abcd, 0), _mm512_extractf32x4_ps(abcd, 1)),
                    _mm_add_ps(_mm512_extractf32x4_ps(abcd, 2), _mm512_extractf32x4_ps(abcd, 3)));
}

// R weight rows from n on times T activation rows from r0 on.
template <typename Dot, int32_t T, int32_t R>
void multiply_rows(const Tile& t, int32_t n, int32_t r0, const FewScratch& scratch) {
  // Group of each word of a chunk, counted from the chunk's first group.
  const __m512i group_of_lane =
      _mm512_srlv_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        _mm512_set1_epi32(t.group_size == 32   ? 2
                                          : t.group_size == 64 ? 3
                                                               : 4));
  const int32_t groups_per_chunk = kChunk / t.group_size;
  const int32_t words_per_row = t.k / 8;
  const int64_t row_bytes = round_up<int64_t>(t.k, kChunk) / kChunk * Dot::kPlanes * kPlaneBytes;
  const uint32_t* q = t.q + n * t.q_stride;
  const char* a[T];
  const float* steps[T];
  __m512 total[R][T] = {};
  for (int32_t i = 0; i < T; ++i) {
    a[i] = t.a.data + (r0 + i) * t.a.stride;
    steps[i] = reinterpret_cast<const float*>(a[i] + row_bytes);
    const float* sums = t.a.sums + (r0 + i) * t.a.sums_stride;
    for (int32_t g = 0; g < groups_of(t); g += 16) {
      for (int32_t r = 0; r < R; ++r) {
        total[r][i] = _mm512_fmadd_ps(_mm512_load_ps(scratch.zeros + r * scratch.groups + g),
                                      _mm512_load_ps(sums + g), total[r][i]);
      }
    }
  }
  // The next R rows are fetched in the order of their addresses: that is what memory is best at.
  const char* ahead = row_ahead(t, n + R);
  for (int32_t word = 0, group = 0; word < words_per_row;
       word += kChunkWords, group += groups_per_chunk) {
    const __mmask16 mask = first_lanes(words_per_row - word);
    __m512i words[R];
    typename Dot::Sum acc[R][T] = {};
    for (int32_t r = 0; r < R; ++r, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
    for (int32_t r = 0; r < R; ++r) {
      words[r] = _mm512_maskz_loadu_epi32(mask, q + r * t.q_stride + word);
    }
    accumulate<Dot, 0, T, R>(words, a, acc);
    __m512 step[T] = {};
    for (int32_t i = 0; i < T; ++i) {
      a[i] += Dot::kPlanes * kPlaneBytes;
      if constexpr (Dot::kSteps) {
        step[i] = _mm512_permutexvar_ps(group_of_lane, _mm512_loadu_ps(steps[i] + group));
      }
    }
    for (int32_t r = 0; r < R; ++r) {
      const __m512 scale = _mm512_permutexvar_ps(
          group_of_lane, _mm512_loadu_ps(scratch.scales + r * scratch.groups + group));
      for (int32_t i = 0; i < T; ++i) {
        total[r][i] = Dot::scaled(acc[r][i], scale, step[i], total[r][i]);
      }
    }
  }
  for (int32_t i = 0; i < T; ++i) {
    float* out = t.out + (r0 + i) * t.out_stride + n - t.first;
    if constexpr (R == 4) {
      _mm_storeu_ps(out, sums_of(total[0][i], total[1][i], total[2][i], total[3][i]));
    } else {
      for (int32_t r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(total[r][i]);
    }
  }
}

// R weight rows from n on times all activation rows.
template <typename Dot, int32_t R>
void multiply_all(const Tile& t, int32_t n, const FewScratch& scratch) {
  for (int32_t r = 0; r < R; ++r) {
    load_groups<Dot::kOffset>(t, n + r, scratch.scales + r * scratch.groups,
                              scratch.zeros + r * scratch.groups);
  }
  constexpr int32_t kSome = R < 2 ? R : 2;  // weight rows at once beside 3 or 4 activation rows
  int32_t r = 0;
  for (; t.m - r >= 3; r += t.m - r == 3 ? 3 : 4) {
    for (int32_t i = 0; i < R; i += kSome) {
      FewScratch shifted = scratch;
      shifted.scales += i * scratch.groups;
      shifted.zeros += i * scratch.groups;
      if (t.m - r == 3) {
        multiply_rows<Dot, 3, kSome>(t, n + i, r, shifted);
      } else {
        multiply_rows<Dot, 4, kSome>(t, n + i, r, shifted);
      }
    }
  }
  if (t.m - r == 2) multiply_rows<Dot, 2, R>(t, n, r, scratch);
  if (t.m - r == 1) multiply_rows<Dot, 1, R>(t, n, r, scratch);
}

template <typename Dot>
void multiply_few(const Tile& t) {
  const FewScratch scratch(t);
  const int32_t end = t.first + t.columns;
  int32_t n = t.first;
  for (; n + kFewWeights <= end; n += kFewWeights) multiply_all<Dot, kFewWeights>(t, n, scratch);
  for (; n < end; ++n) multiply_all<Dot, 1>(t, n, scratch);
}

}  // namespace
}  // namespace moe_int4::cpu
