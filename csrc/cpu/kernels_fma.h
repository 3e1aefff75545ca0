// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// fp32 kernel on vectors of MOE_INT4_LANES floats. It uses the vector extensions of gcc and clang,
// so one source serves portable C++, AVX2 and AVX-512.
//
// A vector holds one word per lane. Masking nibble p of the words gives q * 16^p, which is exact as
// a float. Activations are stored divided by 16^p, so no shift is needed. A chunk of LANES words
// has the activations [p 0..7][lane] = a[8 * (word of the lane) + weight at nibble p] / 16^p. 8-bit
// weights work the same way: a run of 8 weights counts as a word, and a second vector holds its
// upper half.
//
// Few rows: each packed row is multiplied directly with up to four activation rows, and the zero
// points are subtracted through the sums of the activations. Many rows: four weight rows are
// dequantized to fp32, then multiplied with all activation rows.
#pragma once

#include "epilogue.h"
#include "kernels_common.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kLanes = MOE_INT4_LANES;
constexpr int32_t kChunk = 8 * kLanes;                // weights in one vector of words
constexpr int32_t kBlockRows = kLanes == 16 ? 4 : 2;  // activation rows per block (registers)
constexpr int32_t kWeightRows = 4;                    // dequantized weight rows per pass
constexpr int32_t kRowsAhead = 4;                     // weight rows between prefetch and use
constexpr int32_t kManyRows = 8;  // from this many rows on, dequantizing first is faster

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// For each position in a word: which of the word's weights is there, and the factor that masking
// without a shift leaves on it.
template <int32_t Bits>
struct Places {
  static constexpr int32_t kValue[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // ExLlama order
  static constexpr float kFactor[8] = {1.0f,    0x1p4f,  0x1p8f,  0x1p12f,
                                       0x1p16f, 0x1p20f, 0x1p24f, 1.0f};
};
template <>
struct Places<8> {
  static constexpr int32_t kValue[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr float kFactor[8] = {1.0f, 0x1p8f, 0x1p16f, 1.0f, 1.0f, 0x1p8f, 0x1p16f, 1.0f};
};

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

// One word of 4 or 8 bytes per lane.
template <int32_t Bits>
struct Chunk {
  Words part[Bits / 4];
};

// The weight at position P of every word, times Places::kFactor[P].
template <int32_t P, int32_t Bits>
inline Floats weight_at(const Chunk<Bits>& chunk) {
  constexpr int32_t kShift = P * Bits % 32;
  const Words w = chunk.part[P * Bits / 32];
  // The topmost bits would be negative as a signed integer, so they are shifted down.
  const Words masked =
      kShift + Bits == 32 ? w >> kShift : w & (((1u << Bits) - 1) << (kShift % (32 - Bits)));
  return __builtin_convertvector(reinterpret_cast<Ints>(masked), Floats);
}

// Loads a chunk of words, of which `count` exist; the rest are zeros.
template <int32_t Bits>
inline Chunk<Bits> load_words(const uint32_t* from, int32_t count) {
  constexpr int32_t kParts = Bits / 4;
  if (kParts == 1 && count >= kLanes) return {{load<Words>(from)}};
  uint32_t words[kParts][kLanes] = {};
  const int32_t real = count < kLanes ? count : kLanes;
  for (int32_t i = 0; i < real; ++i) {
    for (int32_t j = 0; j < kParts; ++j) words[j][i] = from[kParts * i + j];
  }
  Chunk<Bits> chunk;
  for (int32_t j = 0; j < kParts; ++j) chunk.part[j] = load<Words>(words[j]);
  return chunk;
}

int64_t row_bytes(DType, int32_t k) { return round_up<int64_t>(k, kChunk) * 4; }

template <int32_t Bits>
void prepare_rows(const Source& source, const PreparedRows& rows) {
  using P = Places<Bits>;
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
          to[p * kLanes + lane] = values[8 * lane + P::kValue[p]] * (1.0f / P::kFactor[p]);
        }
      }
      add_sums(values, begin, count, source.group_size, sums);
    }
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  source.bits == 8 ? prepare_rows<8>(source, rows) : prepare_rows<4>(source, rows);
}

// Scratch of a call: scales and zero points of the current weight row, per group and per word; with
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

// Repeats the value of each group for the group's words; zeros fill the last chunk.
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

template <int32_t P, int32_t T, int32_t Bits>
inline void accumulate(const Chunk<Bits>& w, const float* const (&a)[T], int32_t offset,
                       Floats (&acc)[T]) {
  const Floats b = weight_at<P>(w);
  for (int32_t t = 0; t < T; ++t) acc[t] += b * load<Floats>(a[t] + offset + P * kLanes);
  if constexpr (P < 7) accumulate<P + 1, T, Bits>(w, a, offset, acc);
}

// One weight row times T activation rows.
template <int32_t Bits, int32_t T>
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
    if (r0 == 0) __builtin_prefetch(ahead + Bits * word);
    Floats acc[T] = {};
    accumulate<0, T, Bits>(load_words<Bits>(q + Bits / 4 * word, t.k / 8 - word), a, 8 * word, acc);
    const Floats scale = load<Floats>(scratch.word_scales + word);
    for (int32_t i = 0; i < T; ++i) total[i] += acc[i] * scale;
  }
  for (int32_t i = 0; i < T; ++i) t.out[(r0 + i) * t.out_stride + n - t.first] = sum(total[i]);
}

template <int32_t Bits>
void multiply_few(const Tile& t, const Scratch& scratch) {
  const int32_t groups = groups_of(t);
  for (int32_t n = t.first; n < t.first + t.columns; ++n) {
    load_row(t, n, scratch);
    for (int32_t g = 0; g < groups; ++g) scratch.zeros[g] *= scratch.scales[g];
    for (int32_t g = groups; g % kSumsPadding != 0; ++g) scratch.zeros[g] = 0;
    int32_t r = 0;
    for (; r + 4 <= t.m; r += 4) multiply_row<Bits, 4>(t, n, r, scratch);
    if (t.m - r == 3) multiply_row<Bits, 3>(t, n, r, scratch);
    if (t.m - r == 2) multiply_row<Bits, 2>(t, n, r, scratch);
    if (t.m - r == 1) multiply_row<Bits, 1>(t, n, r, scratch);
  }
}

template <int32_t P, int32_t Bits>
inline void dequantize_chunk(const Chunk<Bits>& w, Floats zero, Floats scale, float* to) {
  const Floats value = (weight_at<P>(w) - zero * Places<Bits>::kFactor[P]) * scale;
  memcpy(to + P * kLanes, &value, sizeof(value));
  if constexpr (P < 7) dequantize_chunk<P + 1, Bits>(w, zero, scale, to);
}

template <int32_t Bits>
void dequantize_row(const Tile& t, int32_t n, const Scratch& scratch, float* to) {
  const uint32_t* q = t.q + n * t.q_stride;
  load_row(t, n, scratch);
  expand(t, scratch.zeros, scratch.word_zeros);
  const char* ahead = row_ahead(t, n + kRowsAhead);
  for (int32_t word = 0; word < t.k / 8; word += kLanes) {
    __builtin_prefetch(ahead + Bits * word);
    dequantize_chunk<0, Bits>(load_words<Bits>(q + Bits / 4 * word, t.k / 8 - word),
                              load<Floats>(scratch.word_zeros + word),
                              load<Floats>(scratch.word_scales + word), to + 8 * word);
  }
}

// T activation rows times N dequantized weight rows, both in prepared order.
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

template <int32_t Bits>
void multiply_many(const Tile& t, const Scratch& scratch) {
  const int64_t padded = round_up(t.k, kChunk);
  for (int32_t j = 0; j < t.columns; j += kWeightRows) {
    const int32_t count = t.columns - j < kWeightRows ? t.columns - j : kWeightRows;
    for (int32_t i = 0; i < count; ++i) {
      dequantize_row<Bits>(t, t.first + j + i, scratch, scratch.weights + i * padded);
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

template <int32_t Bits>
void multiply_tile(const Tile& t) {
  const Scratch scratch(t);
  t.m < kManyRows ? multiply_few<Bits>(t, scratch) : multiply_many<Bits>(t, scratch);
}

void load(DType dtype, const void* from, int32_t n, float* to) { to_float(dtype, from, n, to); }

void dot(DType dtype, const uint16_t* w, const float* const* a, int32_t rows, int32_t k,
         float* out) {
  for (int32_t r = 0; r < rows; ++r) out[r] = 0;
  for (int32_t begin = 0; begin < k; begin += kDotBlock) {
    float weights[kDotBlock] = {};
    to_float(dtype, w + begin, k - begin < kDotBlock ? k - begin : kDotBlock, weights);
    for (int32_t r = 0; r < rows; ++r) {
      Floats total[4] = {};
      for (int32_t i = 0; i < kDotBlock; i += 4 * kLanes) {
        for (int32_t j = 0; j < 4; ++j) {
          const int32_t at = i + j * kLanes;
          total[j] += load<Floats>(weights + at) * load<Floats>(a[r] + begin + at);
        }
      }
      out[r] += sum((total[0] + total[1]) + (total[2] + total[3]));
    }
  }
}

// fork: begin lm_head
struct ProductVector {
  Floats value, reach;
  Ints counts;  // all bits or none
};

inline ProductVector load(const Products& products, int32_t i) {
  const Floats value = load<Floats>(products.values + i);
  const Floats error = load<Floats>(products.errors + i);
  const Floats size = value < 0.0f ? -value : value;
  return {value, products.norm * error + kRounding * size, error >= 0.0f};
}

void raise_bounds(const Products& products, float* largest, float* reached) {
  Floats top = Floats{} + *largest, bound = Floats{} + *reached;
  for (int32_t i = 0; i < kDotBlock; i += kLanes) {
    const auto [value, reach, counts] = load(products, i);
    const Floats low = value - reach;
    top = counts & (value > top) ? value : top;
    bound = counts & (low > bound) ? low : bound;
  }
  for (int32_t i = 0; i < kLanes; ++i) {
    *largest = top[i] > *largest ? top[i] : *largest;
    *reached = bound[i] > *reached ? bound[i] : *reached;
  }
}

void ask(const Products& products, float from, float reached, uint32_t bit, uint32_t* asked) {
  for (int32_t i = 0; i < kDotBlock; i += kLanes) {
    const auto [value, reach, counts] = load(products, i);
    const Ints matters = counts & ((value + reach >= reached) | (value >= from));
    const Words now = load<Words>(asked + i) | (reinterpret_cast<Words>(matters) & bit);
    memcpy(asked + i, &now, sizeof(now));
  }
}

// fork: end
void multiply(const Tile& t) { t.bits == 8 ? multiply_tile<8>(t) : multiply_tile<4>(t); }

void multiply_as_few(const Tile& t) {
  const Scratch scratch(t);
  t.bits == 8 ? multiply_few<8>(t, scratch) : multiply_few<4>(t, scratch);
}

constexpr Epilogue kEpilogue = {
    activate,
    store,
    load,
    dot,
    // fork: begin lm_head
    raise_bounds,
    ask,
    // fork: end
};

}  // namespace
}  // namespace moe_int4::cpu
