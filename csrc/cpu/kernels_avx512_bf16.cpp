// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// bf16 kernel on AVX-512 (vdpbf16ps), for many activation rows.
//
// (words >> 4i) & 0x000f000f | 0x43004300 is the pair (v[2i], v[2i+1]) of 16 words as 128 + q in
// bf16, exactly. bf16 activations have one plane; fp16 is split exactly into two bf16 planes,
// a = high + low. Products are summed per group and scaled in fp32. The 128 and the zero point are
// subtracted as scale * (128 + zp) * (sum of the group's activations), which costs five of fp32's
// 24 bits.
//
// 32 weight rows are dequantized and transposed so that each lane is a weight row. They are then
// multiplied with blocks of up to kMaxBlock activation rows.
#include <immintrin.h>

#include "kernels_common.h"
#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kChunk = 128;      // weights (and activations) in a chunk
constexpr int32_t kChunkWords = 16;  // words in a chunk
constexpr int32_t kPlaneBytes = 256;
constexpr int32_t kColumns = 32;   // weight rows dequantized together
constexpr int32_t kBlockK = 256;   // weights of each: 16 KiB in all, fits the L1 cache
constexpr int32_t kMaxBlock = 12;  // activation rows per block: 24 accumulators

int32_t planes_of(DType dtype) { return dtype == DType::kHalf ? 2 : 1; }

int64_t row_bytes(DType dtype, int32_t k) {
  return round_up<int64_t>(k, kChunk) / kChunk * kPlaneBytes * planes_of(dtype);
}

// Stores the 64 pairs of a chunk of one plane as [i 0..3][word 0..15]: pair i of each word.
inline void store_plane(const uint16_t* values, char* to) {
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
        low[i] = rest == rest ? float_to_bf16(rest) : 0;  // NaN where a is infinite
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

// Scratch of a call: scales and -scale * (128 + zp) of kColumns weight rows, transposed; the same
// for one weight row; the dequantized weights.
struct Scratch {
  int64_t groups;
  float *scales, *zeros, *row_scales, *row_zeros;
  char* weights;
  explicit Scratch(const Tile& t) : groups(round_up(groups_of(t), 16)) {
    scales = static_cast<float*>(t.scratch);
    zeros = scales + kColumns * groups;
    row_scales = zeros + kColumns * groups;
    row_zeros = row_scales + groups;
    weights = reinterpret_cast<char*>(row_zeros + groups);
  }
};

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t) {
  return int64_t{8} * (kColumns + 1) * round_up(k / group_size, 16) + 2 * kColumns * kBlockK;
}

// Dequantizes words [word0, word0 + count) of kColumns weight rows from n on into pairs
// [word][i 0..3][weight row 0..31]. Past the tile's last row, that row is repeated.
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

// A block of dequantized weights: groups [g0, g1) of columns [column, column + 32).
struct Block {
  int32_t column, g0, g1;
  __mmask16 mask[2];
  const float *scales, *zeros;  // [group][32], from group 0
  const char* weights;          // [word][i][32] pairs, from group g0
  const char* ahead;            // weights to prefetch in the loop, ahead_step bytes per word
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
      load_groups<128>(t, t.first + column + (j < count ? j : count - 1), scratch.row_scales,
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
      // Prefetches the next rows in address order: a word of kColumns rows is two cache lines.
      block.ahead = row_ahead(t, t.first + column + kColumns) + block.g0 * words * 4 * kColumns;
      block.ahead_step = 4 * kColumns;
      const int32_t blocks = (t.m + kMaxBlock - 1) / kMaxBlock;
      for (int32_t i = 0; i < blocks; ++i) {  // as evenly as possible
        const int32_t begin = t.m * i / blocks, end = t.m * (i + 1) / blocks;
        multiply_block_of<P>(end - begin, t, begin, block);
        block.ahead_step = 0;  // prefetched already
      }
    }
  }
}

void multiply(const Tile& t) {
  t.dtype == DType::kHalf ? multiply_many<2>(t, Scratch(t)) : multiply_many<1>(t, Scratch(t));
}

}  // namespace

const Kernel kAvx512Bf16 = {"avx512_bf16", row_bytes, as_many_rows,
                            scratch_bytes, prepare,   multiply};

}  // namespace moe_int4::cpu
