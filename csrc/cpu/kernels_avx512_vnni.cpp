// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Few activation rows (decode) with AVX512_VNNI: dot products of bytes (vpdpbusd). Many rows are
// left to the fp32 kernels.
//
// Activations become integers of 16 bits, per group in steps of max|a| / 32639, so that the error
// of a group is below 1e-4 of its norm: a twentieth of bf16's own rounding. An integer is
// 256 * high + low in signed bytes: sums within a group are exact. Activations below 1e-33 count
// as zero.
//
// Lanes are the 16 words of a chunk of a weight row, which is read once for up to four activation
// rows. Bits 0..3 of a word's bytes are the weights v0 v4 v1 v5 (half 0), bits 4..7 v2 v6 v3 v7
// (half 1). Activations are stored in that order, [chunk of 128][high, low][half][word], padded
// with zeros; behind the row stand the steps, one per group.
#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kManyRows = 8;      // from here on the fp32 kernels are faster
constexpr int32_t kChunk = 128;       // weights in a vector of words
constexpr int32_t kChunkWords = 16;   // words in it
constexpr int32_t kChunkBytes = 256;  // activations of a chunk
constexpr int32_t kWeightRows = 4;    // at once, neighbours
constexpr int32_t kTogether = 4;      // activation rows at once
constexpr int32_t kScalesAhead = 16;  // weight rows between prefetch and use of their scales

int64_t integer_bytes(int32_t k) { return round_up<int64_t>(k, kChunk) / kChunk * kChunkBytes; }

// Groups, padded so that a vector can be read from any group on.
int64_t padded_groups(int32_t k, int32_t group_size) {
  return round_up<int64_t>(k / group_size, 16) + 16;
}

int64_t row_bytes(DType dtype, int32_t k) {
  const int64_t few = integer_bytes(k) + 4 * padded_groups(k, 32);  // steps of the smallest groups
  const int64_t many = kAvx512.row_bytes(dtype, k);
  return many > few ? many : few;
}

// What weight rows at hand need of their groups, for up to kTogether activation rows.
struct Groups {
  float* products;  // scale * step, [activation row][weight row][group]
  float* totals;    // -scale * zp * sum, [activation row][weight row][16 lanes]
};

// Scratch of a tile: groups of the weight rows at hand and of those that come next, so that they
// are written long before they are read.
struct Scratch {
  int64_t groups;
  Groups of[2];
  explicit Scratch(const Tile& t) : groups(padded_groups(t.k, t.group_size)) {
    auto* next = static_cast<float*>(t.scratch);
    for (Groups& g : of) {
      g.products = next;
      g.totals = g.products + kTogether * kWeightRows * groups;
      next = g.totals + kTogether * kWeightRows * 16;
    }
  }
};

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t m) {
  const int64_t groups = padded_groups(k, group_size);
  const int64_t few = 4 * 2 * kTogether * kWeightRows * (groups + 16);
  const int64_t many = kAvx512.scratch_bytes(k, group_size, m);
  return many > few ? many : few;
}

// Integers of a group and their sum; returns the step.
float quantize(const float* values, int32_t count, int16_t* to, int32_t* sum) {
  constexpr float kLargest = 127 * 256 + 127;
  int32_t bits = 0;  // of the largest magnitude; those of a NaN are larger still
  for (int32_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits_as<int32_t>(values[i]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = bits_as<float>(bits);
  const float inverse = largest > 1e-33f ? kLargest / largest : 0.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  int32_t total = 0;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t value = bits_as<int32_t>(values[i] * inverse + kRound) - bits_as<int32_t>(kRound);
    to[i] = static_cast<int16_t>(value);
    total += to[i];
  }
  *sum = total;
  return largest / kLargest;
}

// Splits the integers of a chunk into bytes and orders those. A word's are one quarter of a vector.
void store_chunk(const int16_t* integers, char* to) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14));
  const __m512i half = _mm512_set1_epi16(0x80);
  __m512i v[4];
  for (int32_t i = 0; i < 4; ++i) {
    const __m512i x = _mm512_loadu_si512(integers + 32 * i);
    // + 128, then the low byte is low + 128 and the high byte is rounded
    v[i] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi16(x, half), half), order);
  }
  // From [4 words][4 kinds] in each of the four to [kind][16 words].
  const __m512i word_of =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i word_of_2 =
      _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  const __m512i a = _mm512_permutex2var_epi32(v[0], word_of, v[1]);    // kinds 0, 1 of words 0..7
  const __m512i b = _mm512_permutex2var_epi32(v[2], word_of, v[3]);    // of words 8..15
  const __m512i c = _mm512_permutex2var_epi32(v[0], word_of_2, v[1]);  // kinds 2, 3
  const __m512i d = _mm512_permutex2var_epi32(v[2], word_of_2, v[3]);
  _mm512_store_si512(to, _mm512_shuffle_i64x2(a, b, 0x44));
  _mm512_store_si512(to + 64, _mm512_shuffle_i64x2(a, b, 0xee));
  _mm512_store_si512(to + 128, _mm512_shuffle_i64x2(c, d, 0x44));
  _mm512_store_si512(to + 192, _mm512_shuffle_i64x2(c, d, 0xee));
}

void prepare_row(const Source& source, const uint16_t* a, char* row, float* sums) {
  const int32_t k = source.k;
  auto* steps = reinterpret_cast<float*>(row + integer_bytes(k));
  for (int64_t g = 0; g < padded_groups(k, source.group_size); ++g) steps[g] = 0;
  for (int32_t g = 0; g < round_up(k / source.group_size, kSumsPadding); ++g) sums[g] = 0;
  for (int32_t begin = 0; begin < k; begin += kChunk, row += kChunkBytes) {
    const int32_t count = k - begin < kChunk ? k - begin : kChunk;
    float values[kChunk];
    int16_t integers[kChunk] = {};
    to_float(source.dtype, a + begin, count, values);
    for (int32_t i = 0; i < count; i += source.group_size) {
      const int32_t group = (begin + i) / source.group_size;
      int32_t sum;
      steps[group] = quantize(values + i, source.group_size, integers + i, &sum);
      sums[group] = steps[group] * static_cast<float>(sum);
    }
    store_chunk(integers, row);
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  if (source.m >= kManyRows) return kAvx512.prepare(source, rows);
  for (int32_t i = 0; i < source.count; ++i) {
    prepare_row(source, source.a[i], rows.data + (source.begin + i) * rows.stride,
                rows.sums + (source.begin + i) * rows.sums_stride);
  }
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

// Weight rows n, n + 1, ... (R of them) and activation rows r0, r0 + 1, ... (T of them).
struct Rows {
  int32_t n, r0;
};

template <int32_t T, int32_t R>
void load_groups_of(const Tile& t, const Rows& rows, const Scratch& scratch, const Groups& to) {
  const float *steps[T], *sums[T];
  for (int32_t i = 0; i < T; ++i) {
    const char* a = t.a.data + (rows.r0 + i) * t.a.stride;
    steps[i] = reinterpret_cast<const float*>(a + integer_bytes(t.k));
    sums[i] = t.a.sums + (rows.r0 + i) * t.a.sums_stride;
  }
  for (int32_t r = 0; r < R; ++r) {
    _mm_prefetch(scales_ahead(t, rows.n + r + kScalesAhead), _MM_HINT_T0);
    __m512 total[T] = {};
    for (int32_t g = 0; g < groups_of(t); g += 16) {
      const GroupVectors groups = load_group_vectors<0>(t, rows.n + r, g);
      for (int32_t i = 0; i < T; ++i) {
        total[i] = _mm512_fmadd_ps(groups.zeros, _mm512_load_ps(sums[i] + g), total[i]);
        _mm512_store_ps(to.products + (i * R + r) * scratch.groups + g,
                        _mm512_mul_ps(groups.scales, _mm512_load_ps(steps[i] + g)));
      }
    }
    for (int32_t i = 0; i < T; ++i) _mm512_store_ps(to.totals + (i * R + r) * 16, total[i]);
  }
}

// Adds to sums a quarter of a chunk: one byte of the activations and one half of the weights.
template <int32_t T, int32_t R>
inline void accumulate(const char* const (&a)[T], int32_t offset, const __m512i (&w)[R],
                       __m512i (&sums)[R][T]) {
  for (int32_t i = 0; i < T; ++i) {
    const __m512i x = _mm512_load_si512(a[i] + offset);
    for (int32_t r = 0; r < R; ++r) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], w[r], x);
  }
}

// G groups in a chunk.
template <int32_t G, int32_t T, int32_t R>
void multiply_rows(const Tile& t, const Rows& rows, const Scratch& scratch, const Groups& groups) {
  constexpr int32_t kShift = G == 4 ? 2 : 3;  // log2 of the words of a group, where G > 1
  const __m512i group_of_lane = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kShift);
  const int32_t words_per_row = t.k / 8;
  const char* a[T];
  const uint32_t* q[R];
  __m512 total[R][T];
  for (int32_t r = 0; r < R; ++r) {
    q[r] = t.q + (rows.n + r) * t.q_stride;
    for (int32_t i = 0; i < T; ++i) total[r][i] = _mm512_load_ps(groups.totals + (i * R + r) * 16);
  }
  for (int32_t i = 0; i < T; ++i) a[i] = t.a.data + (rows.r0 + i) * t.a.stride;
  const float* products = groups.products;
  // The next R rows are fetched in the order of their addresses: that is what memory is best at.
  const char* ahead = row_ahead(t, rows.n + R);
  const auto chunk = [&](int32_t word, __mmask16 mask) {
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    __m512i low[R], high[R], sums[R][T] = {};
    for (int32_t r = 0; r < R; ++r) {
      _mm_prefetch(ahead, _MM_HINT_T0);
      ahead += 64;
      const __m512i words = _mm512_maskz_loadu_epi32(mask, q[r] + word);
      low[r] = _mm512_and_si512(words, nibbles);
      high[r] = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles);
    }
    accumulate<T, R>(a, 0, low, sums);
    accumulate<T, R>(a, 64, high, sums);
    for (int32_t r = 0; r < R; ++r) {
      for (int32_t i = 0; i < T; ++i) sums[r][i] = _mm512_slli_epi32(sums[r][i], 8);
    }
    accumulate<T, R>(a, 128, low, sums);
    accumulate<T, R>(a, 192, high, sums);
    for (int32_t i = 0; i < T; ++i) {
      for (int32_t r = 0; r < R; ++r) {
        const float* product = products + (i * R + r) * scratch.groups;
        const __m512 scale = G == 1
                                 ? _mm512_set1_ps(*product)
                                 : _mm512_permutexvar_ps(group_of_lane, _mm512_loadu_ps(product));
        total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][i]), scale, total[r][i]);
      }
      a[i] += kChunkBytes;
    }
    products += G;
  };
  int32_t word = 0;
  for (; word + kChunkWords <= words_per_row; word += kChunkWords) chunk(word, 0xffff);
  if (word < words_per_row) chunk(word, first_lanes(words_per_row - word));
  for (int32_t i = 0; i < T; ++i) {
    float* out = t.out + (rows.r0 + i) * t.out_stride + rows.n - t.first;
    if constexpr (R == 4) {
      _mm_storeu_ps(out, sums_of(total[0][i], total[1][i], total[2][i], total[3][i]));
    } else {
      for (int32_t r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(total[r][i]);
    }
  }
}

// Weight rows [n, end), R at once, times T activation rows; end - n is a multiple of R.
template <int32_t G, int32_t T, int32_t R>
void multiply_columns(const Tile& t, int32_t n, int32_t end, int32_t r0, const Scratch& scratch) {
  if (n == end) return;
  load_groups_of<T, R>(t, {n, r0}, scratch, scratch.of[0]);
  for (int32_t turn = 0; n < end; n += R, ++turn) {
    if (n + R < end) load_groups_of<T, R>(t, {n + R, r0}, scratch, scratch.of[(turn + 1) % 2]);
    multiply_rows<G, T, R>(t, {n, r0}, scratch, scratch.of[turn % 2]);
  }
}

// All weight rows of the tile times T activation rows.
template <int32_t G, int32_t T>
void multiply_together(const Tile& t, int32_t r0, const Scratch& scratch) {
  constexpr int32_t kRows = T <= 2 ? kWeightRows : 2;  // as the registers allow
  const int32_t end = t.first + t.columns, middle = end - t.columns % kRows;
  multiply_columns<G, T, kRows>(t, t.first, middle, r0, scratch);
  multiply_columns<G, T, 1>(t, middle, end, r0, scratch);
}

template <int32_t G>
void multiply_few(const Tile& t) {
  const Scratch scratch(t);
  int32_t r = 0;
  for (; t.m - r >= kTogether; r += kTogether) multiply_together<G, 4>(t, r, scratch);
  if (t.m - r == 3) multiply_together<G, 3>(t, r, scratch);
  if (t.m - r == 2) multiply_together<G, 2>(t, r, scratch);
  if (t.m - r == 1) multiply_together<G, 1>(t, r, scratch);
}

void multiply(const Tile& t) {
  if (t.m >= kManyRows) return kAvx512.multiply(t);
  switch (t.group_size) {
    case 32:
      return multiply_few<4>(t);
    case 64:
      return multiply_few<2>(t);
    default:
      return multiply_few<1>(t);
  }
}

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", row_bytes, as_many_rows, scratch_bytes,
                             prepare,       multiply,  activate,     store};

}  // namespace moe_int4::cpu
