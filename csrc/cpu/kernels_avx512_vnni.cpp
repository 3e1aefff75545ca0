// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Int8 dot-product kernel on AVX512_VNNI (vpdpbusd), for few activation rows (decode).
//
// Activations are 16-bit integers, stored as two signed bytes (integers_avx512.h), so sums over a
// group are exact. A vector's lanes are the 16 words of a chunk of a weight row. The row is read
// once for up to four activation rows. A prepared activation row in memory, padded with zeros:
//     [chunk of 128][high, low][half][word][4 bytes], each chunk followed by
//                   [word] float: -8 * the sum of the word's integers, because the kernel
//                   multiplies by q = 0..15 instead of q - 8 (8 bits: -128 and 0..255)
//     [group] float: the step of the group's integers; the last one fills the padding
// 8-bit weights work the same way: a run of 8 weights counts as a word.
//
// A tile's weight rows are read as four streams that are far apart, one row of each at a time.
// Adjacent rows in one page defeat the hardware prefetcher. GB/s with 2 threads, four adjacent rows
// against four streams: 22 and 58 (Zen 4), 39 and 43 (Sapphire Rapids).
#include "integers_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kChunk = 128;         // weights in a vector of 16 words
constexpr int32_t kChunkWords = 16;     // words in it
constexpr int32_t kIntegerBytes = 256;  // bytes of a chunk's activations
constexpr int32_t kChunkBytes = kIntegerBytes + 64;
constexpr int32_t kWeightRows = 4;  // weight rows at once
constexpr int32_t kTogether = 4;    // activation rows at once
constexpr int32_t kRun = 8;         // rows of a stream whose scales are read together
// Bytes of a stream between prefetch and use: into the L2 cache, then into L1.
constexpr int32_t kBytesAhead = 2048, kBytesNear = 512;

int64_t integer_bytes(int32_t k) { return round_up<int64_t>(k, kChunk) / kChunk * kChunkBytes; }

// Number of groups, padded so that a vector can be loaded from any group on.
int64_t padded_groups(int32_t k, int32_t group_size) {
  return round_up<int64_t>(k / group_size, 16) + 16;
}

int64_t row_bytes(DType, int32_t k) {
  return integer_bytes(k) + 4 * padded_groups(k, 32);  // steps of the smallest groups
}

// Floats of scratch per activation row: scale * step for the groups of one run of each stream, plus
// what a vector load may read past them.
int64_t product_floats(int32_t groups) {
  return round_up<int64_t>(int64_t{kWeightRows} * kRun * groups, 16) + 16;
}

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t) {
  return 4 * kTogether * product_floats(k / group_size);
}

// -8 or -128 times the sum of each word's activations, computed from the bytes of their chunk.
template <int32_t Bits>
void store_offsets(const char* bytes, float* to) {
  constexpr float kMinusZero = Bits == 8 ? -128 : -8;
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_load_si512(bytes));
  sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(bytes + 64));
  sum = _mm512_slli_epi32(sum, 8);
  sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(bytes + 128));
  sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(bytes + 192));
  _mm512_store_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(kMinusZero)));
}

template <int32_t Bits>
void prepare_row(const Source& source, const uint16_t* a, char* row, float* sums) {
  const int32_t k = source.k, groups = k / source.group_size;
  auto* steps = reinterpret_cast<float*>(row + integer_bytes(k));
  for (int32_t g = 0; g < round_up(groups, kSumsPadding); ++g) sums[g] = 0;
  for (int32_t begin = 0; begin < k; begin += kChunk, row += kChunkBytes) {
    const int32_t count = k - begin < kChunk ? k - begin : kChunk;
    float values[kChunk];
    int16_t integers[kChunk] = {};
    to_float(source.dtype, a + begin, count, values);
    for (int32_t i = 0; i < count; i += source.group_size) {
      const int32_t group = (begin + i) / source.group_size;
      const Quantized of_group = quantize(values + i, source.group_size, integers + i);
      steps[group] = of_group.step;
      sums[group] = static_cast<float>(256 * of_group.high + of_group.low);
    }
    __m512i high[2], low[2];
    split<Bits>(integers, high, low);
    _mm512_store_si512(row, high[0]);
    _mm512_store_si512(row + 64, high[1]);
    _mm512_store_si512(row + 128, low[0]);
    _mm512_store_si512(row + 192, low[1]);
    store_offsets<Bits>(row, reinterpret_cast<float*>(row + kIntegerBytes));
  }
  for (int64_t g = groups; g < padded_groups(k, source.group_size); ++g) {
    steps[g] = steps[g - groups];
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  for (int32_t i = 0; i < source.count; ++i) {
    char* row = rows.data + (source.begin + i) * rows.stride;
    float* sums = rows.sums + (source.begin + i) * rows.sums_stride;
    source.bits == 8 ? prepare_row<8>(source, source.a[i], row, sums)
                     : prepare_row<4>(source, source.a[i], row, sums);
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

struct Sizes {
  int32_t groups, words;  // per row
  int32_t rows_ahead;     // between prefetch and use
  int64_t products;       // floats per activation row
  explicit Sizes(const Tile& t) : groups(groups_of(t)), words(t.k / 8) {
    const auto bytes = static_cast<int32_t>(4 * t.q_stride);
    rows_ahead = (kBytesAhead + bytes - 1) / bytes;
    products = product_floats(groups);
  }
};

// R streams of `apart` weight rows each: row n of stream r is weight row first + r * apart + n.
struct Streams {
  int32_t first, apart;
  int32_t row(int32_t r, int32_t n) const { return first + r * apart + n; }
};

// products[i] = scale * step for the groups of `rows` weight rows from n on.
inline void load_products(const Tile& t, const Sizes& sizes, int32_t n, int32_t rows,
                          const float* steps, float* products) {
  const int32_t groups = sizes.groups;
  const auto* scales = static_cast<const uint16_t*>(t.scales) + n * t.s_stride;
  const bool dense = t.s_stride == groups;
  const int32_t runs = dense ? 1 : rows, count = dense ? rows * groups : groups;
  for (int32_t run = 0; run < runs; ++run, scales += t.s_stride, products += groups) {
    for (int32_t i = 0, g = 0; i < count; i += 16) {
      const __m512 some = load_16(t.dtype, scales + i, first_lanes(count - i));
      _mm512_storeu_ps(products + i, _mm512_mul_ps(some, _mm512_loadu_ps(steps + g)));
      for (g += 16; g >= groups;) g -= groups;
    }
  }
}

// The products of rows [begin, end) of R streams for T activation rows from r0 on, as
// [activation row][stream][row][group].
template <int32_t T, int32_t R>
void load_run(const Tile& t, const Sizes& sizes, const Streams& streams, int32_t begin, int32_t end,
              int32_t r0) {
  auto* products = static_cast<float*>(t.scratch);
  for (int32_t r = 0; r < R; ++r) {
    const auto* ahead =
        end < streams.apart
            ? static_cast<const uint16_t*>(t.scales) + streams.row(r, end) * t.s_stride
            : static_cast<const uint16_t*>(t.next_scales) + r * streams.apart * t.s_stride;
    for (int32_t i = 0; i < kRun * sizes.groups; i += 32) _mm_prefetch(ahead + i, _MM_HINT_T0);
    for (int32_t i = 0; i < T; ++i) {
      const char* a = t.a.data + (r0 + i) * t.a.stride;
      load_products(t, sizes, streams.row(r, begin), end - begin,
                    reinterpret_cast<const float*>(a + integer_bytes(t.k)),
                    products + i * sizes.products + r * kRun * sizes.groups);
    }
  }
}

// Sum over the groups of weight row n of product * (8 - zero point) * sum, not yet summed over
// lanes.
inline __m512 offset_of(const Tile& t, int32_t groups, int32_t n, const float* products,
                        const float* sums) {
  __m512 total = _mm512_setzero_ps();
  if (t.zeros == nullptr) return total;
  for (int32_t g = 0; g < groups; g += 16) {
    const __mmask16 mask = first_lanes(groups - g);
    const __m512 offset = _mm512_sub_ps(_mm512_set1_ps(8), zero_points(t, n, g, mask));
    const __m512 weighted = _mm512_mul_ps(offset, _mm512_load_ps(sums + g));
    total = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, products + g), weighted, total);
  }
  return total;
}

// The state of R weight rows times T activation rows. A pragma unrolls the loops over it; without
// it gcc 12 keeps the totals in memory.
template <int32_t T, int32_t R>
struct Rows {
  const char* a[T];
  const uint32_t *q[R], *ahead[R];
  const float* products[R][T];
  __m512 total[R][T];
};

// The products of the G groups of a chunk, each in the lanes of its words. Lanes outside the mask
// are zero, as there may be no group.
template <int32_t G>
inline __m512 spread(const float* products, __mmask16 mask) {
  if constexpr (G == 1) return _mm512_set1_ps(*products);
  constexpr int32_t kShift = G == 4 ? 2 : 3;  // log2 of the words of a group
  const __m512i group_of_lane = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kShift);
  return _mm512_maskz_permutexvar_ps(mask, group_of_lane, _mm512_loadu_ps(products));
}

// The halves of a chunk of weights, in the order in which split() puts activations; zeros outside
// the mask.
template <int32_t Bits>
inline __attribute__((always_inline)) void load_halves(const uint32_t* q, __mmask16 mask,
                                                       __m512i& half0, __m512i& half1) {
  if constexpr (Bits == 4) {
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    const __m512i words = _mm512_maskz_loadu_epi32(mask, q);
    half0 = _mm512_and_si512(words, nibbles);
    half1 = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles);
  } else {
    const int32_t count = 2 * __builtin_popcount(mask);
    const __m512i a = _mm512_maskz_loadu_epi32(first_lanes(count), q);
    const __m512i b = _mm512_maskz_loadu_epi32(first_lanes(count - 16), q + 16);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    half0 = _mm512_permutex2var_epi32(a, even, b);
    half1 = _mm512_permutex2var_epi32(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b);
  }
}

// Adds the chunk that starts at word `word` of the rows.
template <int32_t G, int32_t Bits, int32_t T, int32_t R>
inline __attribute__((always_inline)) void add_chunk(Rows<T, R>& rows, int64_t word,
                                                     __mmask16 mask) {
  const int64_t chunk = word / kChunkWords, at = word * (Bits / 4);
  __m512i half0[R], half1[R];
#pragma GCC unroll 4
  for (int32_t r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int32_t line = 0; line < Bits / 4; ++line) {
      _mm_prefetch(rows.ahead[r] + at + 16 * line, _MM_HINT_T1);
      _mm_prefetch(rows.q[r] + at + 16 * line + kBytesNear / 4, _MM_HINT_T0);
    }
    load_halves<Bits>(rows.q[r] + at, mask, half0[r], half1[r]);
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < T; ++i) {
    const char* a = rows.a[i] + chunk * kChunkBytes;
    const __m512i high0 = _mm512_load_si512(a), high1 = _mm512_load_si512(a + 64);
    const __m512i low0 = _mm512_load_si512(a + 128), low1 = _mm512_load_si512(a + 192);
    const __m512 offset = _mm512_load_ps(a + kIntegerBytes);
#pragma GCC unroll 4
    for (int32_t r = 0; r < R; ++r) {
      __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), half0[r], high0);
      sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, half1[r], high1), 8);
      sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, half0[r], low0), half1[r], low1);
      const __m512 value = _mm512_add_ps(_mm512_cvtepi32_ps(sum), offset);
      rows.total[r][i] = _mm512_fmadd_ps(value, spread<G>(rows.products[r][i] + chunk * G, mask),
                                         rows.total[r][i]);
    }
  }
}

// Multiplies R streams with T activation rows from r0 on. A chunk has G groups.
template <int32_t G, int32_t Bits, int32_t T, int32_t R>
void multiply_streams(const Tile& t, const Sizes& sizes, const Streams& streams, int32_t r0) {
  Rows<T, R> rows;
#pragma GCC unroll 4
  for (int32_t i = 0; i < T; ++i) rows.a[i] = t.a.data + (r0 + i) * t.a.stride;
#pragma GCC unroll 4
  for (int32_t r = 0; r < R; ++r) {
    rows.q[r] = t.q + streams.row(r, 0) * t.q_stride;
    rows.ahead[r] = rows.q[r] + sizes.rows_ahead * t.q_stride;
  }
  for (int32_t n = 0; n < streams.apart; ++n) {
    const int32_t in_run = n % kRun;
    if (in_run == 0) {
      const int32_t end = n + kRun < streams.apart ? n + kRun : streams.apart;
      load_run<T, R>(t, sizes, streams, n, end, r0);
    }
    const int32_t past = n + sizes.rows_ahead - streams.apart;
#pragma GCC unroll 4
    for (int32_t r = 0; r < R; ++r) {
      if (past == 0) rows.ahead[r] = t.next + r * streams.apart * t.q_stride;
#pragma GCC unroll 4
      for (int32_t i = 0; i < T; ++i) {
        rows.products[r][i] = static_cast<const float*>(t.scratch) + i * sizes.products +
                              (r * kRun + in_run) * sizes.groups;
        rows.total[r][i] = offset_of(t, sizes.groups, streams.row(r, n), rows.products[r][i],
                                     t.a.sums + (r0 + i) * t.a.sums_stride);
      }
    }
    int32_t word = 0;
    for (; word + kChunkWords <= sizes.words; word += kChunkWords) {
      add_chunk<G, Bits, T, R>(rows, word, 0xffff);
    }
    if (word < sizes.words) add_chunk<G, Bits, T, R>(rows, word, first_lanes(sizes.words - word));
#pragma GCC unroll 4
    for (int32_t i = 0; i < T; ++i) {
      float* out = t.out + (r0 + i) * t.out_stride - t.first;
      if constexpr (R == 4) {
        float sums[4];
        _mm_storeu_ps(
            sums, sums_of(rows.total[0][i], rows.total[1][i], rows.total[2][i], rows.total[3][i]));
        for (int32_t r = 0; r < 4; ++r) out[streams.row(r, n)] = sums[r];
      } else {
#pragma GCC unroll 4
        for (int32_t r = 0; r < R; ++r) {
          out[streams.row(r, n)] = _mm512_reduce_add_ps(rows.total[r][i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int32_t r = 0; r < R; ++r) {
      rows.q[r] += t.q_stride;
      rows.ahead[r] += t.q_stride;
    }
  }
}

// Multiplies all weight rows of the tile with T activation rows.
template <int32_t G, int32_t Bits, int32_t T>
void multiply_together(const Tile& t, const Sizes& sizes, int32_t r0) {
  const int32_t apart = t.columns / kWeightRows, rest = t.columns % kWeightRows;
  if (apart > 0) multiply_streams<G, Bits, T, kWeightRows>(t, sizes, {t.first, apart}, r0);
  if (rest > 0)
    multiply_streams<G, Bits, T, 1>(t, sizes, {t.first + apart * kWeightRows, rest}, r0);
}

template <int32_t G, int32_t Bits>
void multiply_few(const Tile& t) {
  const Sizes sizes(t);
  int32_t r = 0;
  for (; t.m - r >= kTogether; r += kTogether) multiply_together<G, Bits, 4>(t, sizes, r);
  if (t.m - r == 3) multiply_together<G, Bits, 3>(t, sizes, r);
  if (t.m - r == 2) multiply_together<G, Bits, 2>(t, sizes, r);
  if (t.m - r == 1) multiply_together<G, Bits, 1>(t, sizes, r);
}

template <int32_t Bits>
void multiply_groups(const Tile& t) {
  switch (t.group_size) {
    case 32:
      return multiply_few<4, Bits>(t);
    case 64:
      return multiply_few<2, Bits>(t);
    default:
      return multiply_few<1, Bits>(t);
  }
}

void multiply(const Tile& t) { t.bits == 8 ? multiply_groups<8>(t) : multiply_groups<4>(t); }

}  // namespace

const Kernel kAvx512Vnni = {"avx512_vnni", row_bytes, as_many_rows,
                            scratch_bytes, prepare,   multiply};

}  // namespace moe_int4::cpu
