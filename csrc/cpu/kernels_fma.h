// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// fp32 kernel on vectors of MOE_INT4_LANES floats, written with the vector extensions of gcc and
// clang: one source for portable C++, AVX2 and AVX-512.
//
// A vector of words holds a nibble position p of LANES words at once. (word & (15 << 4p)) is
// q * 16^p, exact as a float, so activations are stored divided by 16^p and no shift is needed:
// chunk of LANES words: [p 0..7][lane] = a[8 * (word of lane) + value at nibble p] / 16^p.
//
// Few rows: each packed row is multiplied as it is for up to four activation rows; zero points are
// subtracted by way of the activations' sums. Many rows: four weight rows are dequantized to fp32,
// then multiplied for all activation rows.
#pragma once

#include "kernels_common.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kLanes = MOE_INT4_LANES;
constexpr int32_t kChunk = 8 * kLanes;                // weights in one vector of words
constexpr int32_t kBlockRows = kLanes == 16 ? 4 : 2;  // activation rows per block: by registers
constexpr int32_t kWeightRows = 4;                    // dequantized weight rows per pass
constexpr int32_t kRowsAhead = 4;                     // weight rows between prefetch and use
constexpr int32_t kManyRows = 8;                      // from here on dequantizing first is faster

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr int32_t kValueAtNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // ExLlama order
constexpr float kNibbleWeight[8] = {1.0f, 0x1p4f, 0x1p8f, 0x1p12f, 0x1p16f, 0x1p20f, 0x1p24f, 1.0f};

template <typename Vector, typename T>
inline Vector load(const T* from) {
  Vector v;
  memcpy(&v, from, sizeof(v));
  return v;
}

inline float sum(Floats v) {
  float total = 0;
  for (int32_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// Nibble p of every word times kNibbleWeight[p].
template <int32_t P>
inline Floats nibble(Words w) {
  // The top nibble would be negative as a signed integer: shift that one down.
  const Words masked = P == 7 ? w >> 28 : w & (15u << (4 * (P % 7)));
  return __builtin_convertvector(reinterpret_cast<Ints>(masked), Floats);
}

// The chunk of words from `from`, of which `count` exist.
inline Words load_words(const uint32_t* from, int32_t count) {
  if (count >= kLanes) return load<Words>(from);
  uint32_t words[kLanes] = {};
  for (int32_t i = 0; i < count; ++i) words[i] = from[i];
  return load<Words>(words);
}

int64_t row_bytes(DType, int32_t k) { return round_up<int64_t>(k, kChunk) * 4; }

void prepare(const Source& source, const PreparedRows& rows) {
  const int32_t k = source.k, groups = k / source.group_size;
  for (int32_t r = 0; r < source.count; ++r) {
    auto* to = reinterpret_cast<float*>(rows.data + (source.begin + r) * rows.stride);
    float* sums = rows.sums + (source.begin + r) * rows.sums_stride;
    for (int32_t g = 0; g < round_up(groups, kSumsPadding); ++g) sums[g] = 0;
    for (int32_t begin = 0; begin < round_up(k, kChunk); begin += kChunk, to += kChunk) {
      float values[kChunk] = {};
      const int32_t count = k - begin < kChunk ? k - begin : kChunk;
      to_float(source.dtype, source.a[r] + begin, count, values);
      for (int32_t p = 0; p < 8; ++p) {
        for (int32_t lane = 0; lane < kLanes; ++lane) {
          to[p * kLanes + lane] = values[8 * lane + kValueAtNibble[p]] * (1.0f / kNibbleWeight[p]);
        }
      }
      add_sums(values, begin, count, source.group_size, sums);
    }
  }
}

// Scratch of a call: scales and zero points of the current weight row, by group and by word; for
// many rows also the dequantized weights.
struct Scratch {
  float *scales, *zeros, *word_scales, *word_zeros, *weights;
  explicit Scratch(const Tile& t) {
    const int32_t groups = round_up(groups_of(t), kSumsPadding);
    const int32_t words = round_up(round_up(t.k, kChunk) / 8, 16);
    scales = static_cast<float*>(t.scratch);
    zeros = scales + groups;
    word_scales = zeros + groups;
    word_zeros = word_scales + words;
    weights = word_zeros + words;
  }
};

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t) {
  const int64_t padded = round_up<int64_t>(k, kChunk);
  const int64_t groups = round_up<int64_t>(k / group_size, kSumsPadding);
  return 4 * (2 * groups + 2 * round_up<int64_t>(padded / 8, 16) + kWeightRows * padded);
}

// Repeats the value of each group for its words; zeros fill the last chunk.
inline void expand(const Tile& t, const float* groups, float* words) {
  const int32_t per_group = t.group_size / 8;
  for (int32_t g = 0; g < groups_of(t); ++g) {
    for (int32_t j = 0; j < per_group; ++j) words[g * per_group + j] = groups[g];
  }
  for (int32_t j = t.k / 8; j % kLanes != 0; ++j) words[j] = 0;
}

inline void load_row(const Tile& t, int32_t n, const Scratch& scratch) {
  load_scales(t, n, scratch.scales);
  load_zeros(t, n, scratch.zeros);
  expand(t, scratch.scales, scratch.word_scales);
}

template <int32_t P, int32_t T>
inline void accumulate(Words w, const float* const (&a)[T], int32_t offset, Floats (&acc)[T]) {
  const Floats b = nibble<P>(w);
  for (int32_t t = 0; t < T; ++t) acc[t] += b * load<Floats>(a[t] + offset + P * kLanes);
  if constexpr (P < 7) accumulate<P + 1, T>(w, a, offset, acc);
}

// One weight row times T activation rows.
template <int32_t T>
void multiply_row(const Tile& t, int32_t n, int32_t r0, const Scratch& scratch) {
  const uint32_t* q = t.q + n * t.q_stride;
  const float* a[T];
  Floats total[T];
  for (int32_t i = 0; i < T; ++i) {
    a[i] = reinterpret_cast<const float*>(t.a.data + (r0 + i) * t.a.stride);
    const float* sums = t.a.sums + (r0 + i) * t.a.sums_stride;
    total[i] = Floats{};
    for (int32_t g = 0; g < groups_of(t); g += kLanes) {
      total[i] -= load<Floats>(scratch.zeros + g) * load<Floats>(sums + g);
    }
  }
  const char* ahead = row_ahead(t, n + kRowsAhead);
  for (int32_t word = 0; word < t.k / 8; word += kLanes) {
    if (r0 == 0) __builtin_prefetch(ahead + 4 * word);
    Floats acc[T] = {};
    accumulate<0, T>(load_words(q + word, t.k / 8 - word), a, 8 * word, acc);
    const Floats scale = load<Floats>(scratch.word_scales + word);
    for (int32_t i = 0; i < T; ++i) total[i] += acc[i] * scale;
  }
  for (int32_t i = 0; i < T; ++i) t.out[(r0 + i) * t.out_stride + n - t.first] = sum(total[i]);
}

void multiply_few(const Tile& t, const Scratch& scratch) {
  const int32_t groups = groups_of(t);
  for (int32_t n = t.first; n < t.first + t.columns; ++n) {
    load_row(t, n, scratch);
    for (int32_t g = 0; g < groups; ++g) scratch.zeros[g] *= scratch.scales[g];
    for (int32_t g = groups; g % kSumsPadding != 0; ++g) scratch.zeros[g] = 0;
    int32_t r = 0;
    for (; r + 4 <= t.m; r += 4) multiply_row<4>(t, n, r, scratch);
    if (t.m - r == 3) multiply_row<3>(t, n, r, scratch);
    if (t.m - r == 2) multiply_row<2>(t, n, r, scratch);
    if (t.m - r == 1) multiply_row<1>(t, n, r, scratch);
  }
}

template <int32_t P>
inline void dequantize_chunk(Words w, Floats zero, Floats scale, float* to) {
  const Floats value = (nibble<P>(w) - zero * kNibbleWeight[P]) * scale;
  memcpy(to + P * kLanes, &value, sizeof(value));
  if constexpr (P < 7) dequantize_chunk<P + 1>(w, zero, scale, to);
}

void dequantize_row(const Tile& t, int32_t n, const Scratch& scratch, float* to) {
  const uint32_t* q = t.q + n * t.q_stride;
  load_row(t, n, scratch);
  expand(t, scratch.zeros, scratch.word_zeros);
  const char* ahead = row_ahead(t, n + kRowsAhead);
  for (int32_t word = 0; word < t.k / 8; word += kLanes) {
    __builtin_prefetch(ahead + 4 * word);
    dequantize_chunk<0>(load_words(q + word, t.k / 8 - word),
                        load<Floats>(scratch.word_zeros + word),
                        load<Floats>(scratch.word_scales + word), to + 8 * word);
  }
}

// T activation rows times N dequantized weight rows; both are in prepared order.
template <int32_t T, int32_t N>
void multiply_block(const Tile& t, int32_t r0, const float* weights, float* out) {
  const int64_t padded = round_up(t.k, kChunk);
  const float* a[T];
  for (int32_t i = 0; i < T; ++i) {
    a[i] = reinterpret_cast<const float*>(t.a.data + (r0 + i) * t.a.stride);
  }
  Floats acc[T][N] = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    Floats b[N];
    for (int32_t j = 0; j < N; ++j) b[j] = load<Floats>(weights + j * padded + k);
    for (int32_t i = 0; i < T; ++i) {
      const Floats x = load<Floats>(a[i] + k);
      for (int32_t j = 0; j < N; ++j) acc[i][j] += x * b[j];
    }
  }
  for (int32_t i = 0; i < T; ++i) {
    for (int32_t j = 0; j < N; ++j) out[(r0 + i) * t.out_stride + j] = sum(acc[i][j]);
  }
}

template <int32_t N>
void multiply_rows(const Tile& t, const float* weights, float* out) {
  int32_t r = 0;
  for (; r + kBlockRows <= t.m; r += kBlockRows) multiply_block<kBlockRows, N>(t, r, weights, out);
  for (; r < t.m; ++r) multiply_block<1, N>(t, r, weights, out);
}

void multiply_many(const Tile& t, const Scratch& scratch) {
  const int64_t padded = round_up(t.k, kChunk);
  for (int32_t j = 0; j < t.columns; j += kWeightRows) {
    const int32_t count = t.columns - j < kWeightRows ? t.columns - j : kWeightRows;
    for (int32_t i = 0; i < count; ++i) {
      dequantize_row(t, t.first + j + i, scratch, scratch.weights + i * padded);
    }
    if (count == kWeightRows) {
      multiply_rows<kWeightRows>(t, scratch.weights, t.out + j);
    } else {
      for (int32_t i = 0; i < count; ++i) {
        multiply_rows<1>(t, scratch.weights + i * padded, t.out + j + i);
      }
    }
  }
}

void multiply(const Tile& t) {
  const Scratch scratch(t);
  t.m < kManyRows ? multiply_few(t, scratch) : multiply_many(t, scratch);
}

}  // namespace
}  // namespace moe_int4::cpu
