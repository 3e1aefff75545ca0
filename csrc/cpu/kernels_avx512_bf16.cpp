// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Kernels for AVX-512 with BF16 dot products (vdpbf16ps).
//
// (words >> 4i) & 0x000f000f | 0x43004300 is the pair (v[2i], v[2i+1]) of 16 words as 128 + q in
// bf16, exactly. Activations are stored in the same order, [chunk of 128][plane][i 0..3][word
// 0..15] pairs, padded with zeros. bf16 has one plane; fp16 is split exactly into two bf16 planes,
// a = high + low. Products are summed per group and scaled in fp32; the 128 and the zero point
// leave as -scale * (128 + zp) * (sum of the group's activations), at the cost of five of fp32's
// 24 bits.
//
// Few rows: lanes are words of a weight row, which is read once for up to four activation rows.
// Many rows: 32 weight rows are transposed and dequantized so that lanes are weight rows, then
// multiplied for blocks of up to kMaxBlock activation rows.
#include <immintrin.h>

#include "kernels_common.h"
#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kChunk = 128;       // weights in a vector of words
constexpr int32_t kChunkWords = 16;   // words in it
constexpr int32_t kPlaneBytes = 256;  // activations of a chunk, one plane
constexpr int32_t kMaxFew = 4;        // activation rows per pass over a weight row
constexpr int32_t kManyRows = 5;      // from here on dequantizing first is faster
constexpr int32_t kColumns = 32;      // weight rows dequantized together
constexpr int32_t kBlockK = 256;      // of this many weights each: 16 KiB, stays in the first cache
constexpr int32_t kMaxBlock = 12;     // activation rows per block: 24 accumulators

int32_t planes_of(DType dtype) { return dtype == DType::kHalf ? 2 : 1; }

int64_t row_bytes(DType dtype, int32_t k) {
  return round_up<int64_t>(k, kChunk) / kChunk * kPlaneBytes * planes_of(dtype);
}

void store_plane(const uint16_t* values, char* to) {
  uint32_t words[64], ordered[64];
  memcpy(words, values, sizeof(words));
  for (int32_t i = 0; i < 4; ++i) {
    for (int32_t j = 0; j < 16; ++j) ordered[16 * i + j] = words[4 * j + i];
  }
  memcpy(to, ordered, sizeof(ordered));
}

void prepare_row(const Source& source, const uint16_t* a, char* row, float* sums) {
  const int32_t k = source.k, groups = k / source.group_size;
  for (int32_t g = 0; g < round_up(groups, kSumsPadding); ++g) sums[g] = 0;
  for (int32_t begin = 0; begin < k; begin += kChunk) {
    const int32_t count = k - begin < kChunk ? k - begin : kChunk;
    uint16_t high[kChunk] = {};
    float values[kChunk];
    memcpy(high, a + begin, 2 * count);
    to_float(source.dtype, high, kChunk, values);
    add_sums(values, begin, count, source.group_size, sums);
    if (source.dtype == DType::kHalf) {
      uint16_t low[kChunk];
      for (int32_t i = 0; i < kChunk; ++i) {
        high[i] = float_to_bf16(values[i]);
        const float rest = values[i] - bf16_to_float(high[i]);
        low[i] = rest == rest ? float_to_bf16(rest) : 0;  // infinities have no rest
      }
      store_plane(high, row);
      store_plane(low, row + kPlaneBytes);
      row += 2 * kPlaneBytes;
    } else {
      store_plane(high, row);
      row += kPlaneBytes;
    }
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  for (int32_t i = 0; i < source.count; ++i) {
    prepare_row(source, source.a[i], rows.data + (source.begin + i) * rows.stride,
                rows.sums + (source.begin + i) * rows.sums_stride);
  }
}

// Scratch of a tile. Few rows: scales and -scale * (128 + zp) of up to kMaxFew weight rows. Many
// rows: the same for kColumns weight rows, transposed, and the dequantized weights.
struct Scratch {
  int64_t groups;  // padded, so that a vector can be read from the last group on
  float *scales, *zeros, *row_scales, *row_zeros;
  char* weights;
  explicit Scratch(const Tile& t) : groups(padded_groups(t.k, t.group_size)) {
    scales = static_cast<float*>(t.scratch);
    zeros = scales + kColumns * groups;
    row_scales = zeros + kColumns * groups;
    row_zeros = row_scales + groups;
    weights = reinterpret_cast<char*>(row_zeros + groups);
  }
  static int64_t padded_groups(int32_t k, int32_t group_size) {
    return round_up<int64_t>(k / group_size, kSumsPadding) + kSumsPadding;
  }
};

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t) {
  return Scratch::padded_groups(k, group_size) * 4 * (2 * kColumns + 2) + 2 * kColumns * kBlockK;
}

template <int32_t I, int32_t P, int32_t T, int32_t R>
inline void accumulate(const __m512i (&words)[R], const char* const (&a)[T], int64_t offset,
                       __m512 (&acc)[R][T]) {
  __m512bh b[R];
  for (int32_t r = 0; r < R; ++r) b[r] = (__m512bh)pairs<I>(words[r]);
  for (int32_t p = 0; p < P; ++p) {
    for (int32_t i = 0; i < T; ++i) {
      const __m512bh x = (__m512bh)_mm512_load_si512(a[i] + P * offset + p * kPlaneBytes + I * 64);
      for (int32_t r = 0; r < R; ++r) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], x, b[r]);
    }
  }
  if constexpr (I < 3) accumulate<I + 1, P, T, R>(words, a, offset, acc);
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

// R weight rows from n on times T activation rows from r0 on, P planes.
template <int32_t P, int32_t T, int32_t R>
void multiply_rows(const Tile& t, int32_t n, int32_t r0, const Scratch& scratch) {
  // Group of each word of a chunk, counted from the chunk's first group.
  const __m512i group_of_lane =
      _mm512_srlv_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        _mm512_set1_epi32(t.group_size == 32   ? 2
                                          : t.group_size == 64 ? 3
                                                               : 4));
  const int32_t groups_per_chunk = kChunk / t.group_size;
  const uint32_t* q = t.q + n * t.q_stride;
  const char* a[T];
  __m512 total[R][T] = {};
  for (int32_t i = 0; i < T; ++i) a[i] = t.a.data + (r0 + i) * t.a.stride;
  for (int32_t i = 0; i < T; ++i) {
    const float* sums = t.a.sums + (r0 + i) * t.a.sums_stride;
    for (int32_t g = 0; g < groups_of(t); g += 16) {
      for (int32_t r = 0; r < R; ++r) {
        total[r][i] = _mm512_fmadd_ps(_mm512_load_ps(scratch.zeros + r * scratch.groups + g),
                                      _mm512_load_ps(sums + g), total[r][i]);
      }
    }
  }
  const int32_t words_per_row = t.k / 8;
  const float* scales = scratch.scales;
  // The next R rows are fetched in the order of their addresses: that is what memory is best at.
  const char* ahead = row_ahead(t, n + R);
  int64_t offset = 0;
  for (int32_t word = 0; word < words_per_row; word += kChunkWords) {
    const __mmask16 mask = first_lanes(words_per_row - word);
    __m512i words[R];
    __m512 acc[R][T] = {};
    for (int32_t r = 0; r < R; ++r, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
    for (int32_t r = 0; r < R; ++r) {
      words[r] = _mm512_maskz_loadu_epi32(mask, q + r * t.q_stride + word);
    }
    accumulate<0, P, T, R>(words, a, offset, acc);
    for (int32_t r = 0; r < R; ++r) {
      const __m512 scale =
          _mm512_permutexvar_ps(group_of_lane, _mm512_loadu_ps(scales + r * scratch.groups));
      for (int32_t i = 0; i < T; ++i) total[r][i] = _mm512_fmadd_ps(acc[r][i], scale, total[r][i]);
    }
    scales += groups_per_chunk;
    offset += kPlaneBytes;
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

template <int32_t P, int32_t R>
void multiply_all(const Tile& t, int32_t n, const Scratch& scratch) {
  for (int32_t r = 0; r < R; ++r) {
    load_groups(t, n + r, scratch.scales + r * scratch.groups, scratch.zeros + r * scratch.groups);
  }
  constexpr int32_t kSome = R < 2 ? R : 2;  // weight rows at once beside 3 or 4 activation rows
  int32_t r = 0;
  for (; t.m - r >= 3; r += t.m - r == 3 ? 3 : 4) {
    for (int32_t i = 0; i < R; i += kSome) {
      Scratch shifted = scratch;
      shifted.scales += i * scratch.groups;
      shifted.zeros += i * scratch.groups;
      if (t.m - r == 3) {
        multiply_rows<P, 3, kSome>(t, n + i, r, shifted);
      } else {
        multiply_rows<P, 4, kSome>(t, n + i, r, shifted);
      }
    }
  }
  if (t.m - r == 2) multiply_rows<P, 2, R>(t, n, r, scratch);
  if (t.m - r == 1) multiply_rows<P, 1, R>(t, n, r, scratch);
}

template <int32_t P>
void multiply_few(const Tile& t, const Scratch& scratch) {
  const int32_t end = t.first + t.columns;
  int32_t n = t.first;
  for (; n + 4 <= end; n += 4) multiply_all<P, 4>(t, n, scratch);
  for (; n < end; ++n) multiply_all<P, 1>(t, n, scratch);
}

// Dequantizes words [word0, word0 + count) of kColumns weight rows from n on into
// [word][i 0..3][weight row 0..31] pairs. Rows past the last one repeat it.
void dequantize(const Tile& t, int32_t n, int32_t word0, int32_t count, char* to) {
  const int32_t last = t.first + t.columns - 1;
  for (int32_t half = 0; half < 2; ++half, to += 64) {
    const uint32_t* rows[16];
    for (int32_t i = 0; i < 16; ++i) {
      const int32_t row = n + 16 * half + i;
      rows[i] = t.q + (row < last ? row : last) * t.q_stride + word0;
    }
    for (int32_t word = 0; word < count; word += kChunkWords) {
      const __mmask16 mask = first_lanes(count - word);
      __m512i v[16];
      for (int32_t i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + word);
      transpose(v);
      for (int32_t j = 0; j < 16 && word + j < count; ++j) {
        char* out = to + (word + j) * 4 * 128;
        _mm512_store_si512(out, pairs<0>(v[j]));
        _mm512_store_si512(out + 128, pairs<1>(v[j]));
        _mm512_store_si512(out + 256, pairs<2>(v[j]));
        _mm512_store_si512(out + 384, pairs<3>(v[j]));
      }
    }
  }
}

// One block of dequantized weights: groups [g0, g1) of columns [column, column + 32).
struct Block {
  int32_t column, g0, g1;
  __mmask16 mask[2];
  const float *scales, *zeros;  // [group][32], from group 0
  const char* weights;          // [word][i][32] pairs, from group g0
  const char* ahead;            // weights to fetch meanwhile, ahead_step bytes a word
  int64_t ahead_step;
};

template <int32_t P, int32_t T>
void multiply_block(const Tile& t, int32_t r0, const Block& block) {
  const int32_t words = t.group_size / 8;
  const char* a[T];
  for (int32_t i = 0; i < T; ++i) a[i] = t.a.data + (r0 + i) * t.a.stride;
  const char* b = block.weights;
  const char* ahead = block.ahead;
  for (int32_t g = block.g0; g < block.g1; ++g) {
    __m512 acc[T][2] = {};
    const int32_t word0 = g * words;
    // A group is a run of words inside one chunk.
    const int64_t offset = int64_t{word0 / kChunkWords} * P * kPlaneBytes + word0 % kChunkWords * 4;
    for (int32_t word = 0; word < words; ++word, ahead += block.ahead_step) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int32_t i = 0; i < 4; ++i, b += 128) {
        const __m512bh b0 = (__m512bh)_mm512_load_si512(b);
        const __m512bh b1 = (__m512bh)_mm512_load_si512(b + 64);
        for (int32_t p = 0; p < P; ++p) {
          const int64_t at = offset + word * 4 + i * 64 + p * kPlaneBytes;
          for (int32_t r = 0; r < T; ++r) {
            int32_t pair;
            memcpy(&pair, a[r] + at, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, b0);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, b1);
          }
        }
      }
    }
    for (int32_t h = 0; h < 2; ++h) {
      const __m512 scale = _mm512_load_ps(block.scales + g * kColumns + 16 * h);
      for (int32_t r = 0; r < T; ++r) {
        float* out = t.out + (r0 + r) * t.out_stride + block.column + 16 * h;
        __m512 total = _mm512_maskz_loadu_ps(block.mask[h], out);
        total = _mm512_fmadd_ps(acc[r][h], scale, total);
        const float sum = t.a.sums[(r0 + r) * t.a.sums_stride + g];
        total = _mm512_fmadd_ps(_mm512_set1_ps(sum),
                                _mm512_load_ps(block.zeros + g * kColumns + 16 * h), total);
        _mm512_mask_storeu_ps(out, block.mask[h], total);
      }
    }
  }
}

template <int32_t P, int32_t T = kMaxBlock>
inline void multiply_block_of(int32_t rows, const Tile& t, int32_t r0, const Block& block) {
  if (rows == T) return multiply_block<P, T>(t, r0, block);
  if constexpr (T > 1) multiply_block_of<P, T - 1>(rows, t, r0, block);
}

template <int32_t P>
void multiply_many(const Tile& t, const Scratch& scratch) {
  const int32_t groups = groups_of(t), groups_per_block = kBlockK / t.group_size;
  for (int32_t r = 0; r < t.m; ++r) memset(t.out + r * t.out_stride, 0, 4 * t.columns);
  for (int32_t column = 0; column < t.columns; column += kColumns) {
    const int32_t count = t.columns - column < kColumns ? t.columns - column : kColumns;
    for (int32_t j = 0; j < kColumns; ++j) {
      load_groups(t, t.first + column + (j < count ? j : count - 1), scratch.row_scales,
                  scratch.row_zeros);
      for (int32_t g = 0; g < groups; ++g) {
        scratch.scales[g * kColumns + j] = scratch.row_scales[g];
        scratch.zeros[g * kColumns + j] = scratch.row_zeros[g];
      }
    }
    Block block{};
    block.column = column;
    block.mask[0] = first_lanes(count);
    block.mask[1] = first_lanes(count - 16);
    block.scales = scratch.scales;
    block.zeros = scratch.zeros;
    block.weights = scratch.weights;
    for (; block.g0 < groups; block.g0 = block.g1) {
      block.g1 = block.g0 + groups_per_block < groups ? block.g0 + groups_per_block : groups;
      const int32_t words = t.group_size / 8;
      dequantize(t, t.first + column, block.g0 * words, (block.g1 - block.g0) * words,
                 scratch.weights);
      // A word of kColumns rows is two cache lines; the next rows come in the order of addresses.
      block.ahead = row_ahead(t, t.first + column + kColumns) + block.g0 * words * 4 * kColumns;
      block.ahead_step = 4 * kColumns;
      const int32_t blocks = (t.m + kMaxBlock - 1) / kMaxBlock;
      for (int32_t i = 0; i < blocks; ++i) {  // as even as possible
        const int32_t begin = t.m * i / blocks, end = t.m * (i + 1) / blocks;
        multiply_block_of<P>(end - begin, t, begin, block);
        block.ahead_step = 0;  // fetched
      }
    }
  }
}

void multiply(const Tile& t) {
  const Scratch scratch(t);
  if (t.m < kManyRows) {
    planes_of(t.dtype) == 1 ? multiply_few<1>(t, scratch) : multiply_few<2>(t, scratch);
  } else {
    planes_of(t.dtype) == 1 ? multiply_many<1>(t, scratch) : multiply_many<2>(t, scratch);
  }
}

}  // namespace

const Kernels kAvx512Bf16 = {"avx512_bf16", row_bytes, as_many_rows, scratch_bytes,
                             prepare,       multiply,  activate,     store};

}  // namespace moe_int4::cpu
