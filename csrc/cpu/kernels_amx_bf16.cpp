// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// bf16 kernel on AMX tiles (tdpbf16ps), for many activation rows.
//
// Weights become 128 + q in bf16, as in kernels_avx512_bf16.cpp, one pair at a time. As the left
// operand they need no transposition. Products are summed per group and scaled in fp32; the 128 and
// the zero points are subtracted through the sums of the activations. fp16 activations are split
// into two bf16 planes, a = high + low.
//
// One step multiplies 32 weight rows by 32 activation rows over 32 values of k. The numbers are
// tile registers. Each tile has 16 rows of 64 bytes: 16 pairs of bf16 or 16 fp32 results.
//
//                                  activations, transposed
//                                  r+0..15     r+16..31
//                                 +---------+ +---------+
//                        16 pairs |    6    | |    7    |
//                                 +---------+ +---------+
//      weights   16 pairs of k
//               +-------------+   +---------+ +---------+
//     n+0..15   |      4      |   |    0    | |    1    |    results, fp32
//               +-------------+   +---------+ +---------+
//     n+16..31  |      5      |   |    2    | |    3    |
//               +-------------+   +---------+ +---------+
//
// With at most 16 activation rows left, even groups use tiles 0 and 2 and odd groups 1 and 3, so
// that one group is multiplied while the previous one is stored.
//
// A tile holds pairs of one group only. A chunk is 128 weights of a row: 16 words of 4 pairs, in 4
// tiles. Pair i (0..3) of word j (0..15) goes to this tile of the chunk (0..3), at this pair of the
// tile (0..15):
//
//     group size   tile                pair of the tile
//     128          i                   j
//      64          2 * (j/8) + i/2     8 * (i%2) + j%8
//      32          j/4                 4 * i + j%4
//
// Prepared activations in memory: [16 rows][chunk][plane][4 tiles][16 pairs][16 rows]; their sums:
// [16 rows][group][16 rows].
#include <immintrin.h>

#include "kernels_common.h"
#include "vectors_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kChunk = 128;  // weights in a vector of 16 words
constexpr int32_t kTileBytes = 1024;
constexpr int32_t kChunkBytes = 4 * kTileBytes;  // 16 rows, one plane
constexpr int32_t kColumns = 32;                 // weight rows dequantized together

int32_t planes_of(DType dtype) { return dtype == DType::kHalf ? 2 : 1; }

int64_t row_bytes(DType dtype, int32_t k) {
  return round_up<int64_t>(k, kChunk) * 2 * planes_of(dtype);
}

int32_t rows_allocated(DType, int32_t m) { return round_up(m, 16); }

// Loads 16 pairs of an activation row, as one plane (bf16) or two (fp16).
inline void load_pairs(DType dtype, const uint16_t* a, __m512i (&planes)[2]) {
  const __m512i pairs = _mm512_loadu_si512(a);
  if (dtype == DType::kBFloat16) {
    planes[0] = pairs;
    return;
  }
  const __m512 x0 = _mm512_cvtph_ps(_mm512_castsi512_si256(pairs));
  const __m512 x1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pairs, 1));
  const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
  const __m512 high0 = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16));
  const __m512 high1 = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16));
  const __m512 low0 = _mm512_sub_ps(x0, high0), low1 = _mm512_sub_ps(x1, high1);
  // Where high is infinite, low is NaN; use 0.
  const __mmask16 ok0 = _mm512_cmp_ps_mask(low0, low0, _CMP_ORD_Q);
  const __mmask16 ok1 = _mm512_cmp_ps_mask(low1, low1, _CMP_ORD_Q);
  planes[0] = high;
  planes[1] =
      (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_mov_ps(ok1, low1), _mm512_maskz_mov_ps(ok0, low0));
}

void prepare(const Source& source, const PreparedRows& rows) {
  const int32_t planes = planes_of(source.dtype);
  const int32_t words = source.group_size / 8 < 16 ? source.group_size / 8 : 16;  // in a tile
  char* to = rows.data + source.begin * rows.stride;
  float* sums = rows.sums + source.begin * rows.sums_stride;
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int32_t g = 0; g < source.k / source.group_size; ++g) {
    _mm512_store_ps(sums + 16 * g, _mm512_setzero_ps());
  }
  for (int32_t begin = 0; begin < source.k; begin += kChunk, to += planes * kChunkBytes) {
    for (int32_t part = 0; part < 4 && begin + 32 * part < source.k; ++part) {  // 4 words, 16 pairs
      const int32_t k = begin + 32 * part;
      __m512i v[2][16];
      for (int32_t r = 0; r < 16; ++r) {
        __m512i row[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (r < source.count) load_pairs(source.dtype, source.a[r] + k, row);
        v[0][r] = row[0];
        v[1][r] = row[1];
      }
      float* group_sums = sums + 16 * (k / source.group_size);
      __m512 sum = _mm512_load_ps(group_sums);
      for (int32_t p = 0; p < planes; ++p) {
        transpose(v[p]);
        for (int32_t pair = 0; pair < 16; ++pair) {
          const int32_t j = 4 * part + pair / 4, i = pair % 4, together = 16 / words;
          const int32_t tile = j / words * (words / 4) + i / together;
          const int32_t row = i % together * words + j % words;
          _mm512_store_si512(to + p * kChunkBytes + tile * kTileBytes + row * 64, v[p][pair]);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)v[p][pair], ones);
        }
      }
      _mm512_store_ps(group_sums, sum);
    }
  }
}

// Scratch of a call:
//   weights        two chunks of dequantized weights, each [2 blocks of 16 rows][4 tiles]
//   results        one step's results, four tiles
//   totals         sums for all activation rows: [block of 32][4 tiles][16 weight rows][16]
//   scales, zeros  scale and -scale * (128 + zp) of the weight rows
struct Scratch {
  int64_t groups;  // padded count
  char* weights;
  float* results;
  float* scales;  // [row][group]
  float* zeros;   // the same
  float* totals;
  explicit Scratch(const Tile& t) : groups(round_up(groups_of(t), 16)) {
    weights = static_cast<char*>(t.scratch);
    results = reinterpret_cast<float*>(weights + 4 * kChunkBytes);
    scales = results + 4 * 256;
    zeros = scales + kColumns * groups;
    totals = zeros + kColumns * groups;
  }
  char* chunk(int32_t i) const { return weights + i % 2 * 2 * kChunkBytes; }
};

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t m) {
  const int64_t floats = 4 * 256 + int64_t{2} * kColumns * round_up(k / group_size, 16) +
                         int64_t{kColumns} * round_up(m, 32);
  return 4 * kChunkBytes + 4 * floats;
}

// Dequantizes a chunk of one weight row into one row of each of its 4 tiles. A chunk has G groups.
template <int32_t G>
inline void dequantize(__m512i words, char* to) {
  __m512i v[4] = {pairs<0>(words), pairs<1>(words), pairs<2>(words), pairs<3>(words)};
  if constexpr (G >= 2) {  // halves of v[0] and v[1], of v[2] and v[3]
    const __m512i a = v[0], c = v[2];
    v[0] = _mm512_shuffle_i64x2(a, v[1], 0x44);
    v[2] = _mm512_shuffle_i64x2(a, v[1], 0xee);
    v[1] = _mm512_shuffle_i64x2(c, v[3], 0x44);
    v[3] = _mm512_shuffle_i64x2(c, v[3], 0xee);
  }
  if constexpr (G == 4) {  // then quarters
    const __m512i a = v[0], c = v[2];
    v[0] = _mm512_shuffle_i64x2(a, v[1], 0x88);
    v[1] = _mm512_shuffle_i64x2(a, v[1], 0xdd);
    v[2] = _mm512_shuffle_i64x2(c, v[3], 0x88);
    v[3] = _mm512_shuffle_i64x2(c, v[3], 0xdd);
  }
  for (int32_t i = 0; i < 4; ++i) _mm512_store_si512(to + i * kTileBytes, v[i]);
}

// Weight rows from `n` on; past the tile's last row, that row again.
struct RowsFrom {
  const Tile& t;
  int32_t n;
  int32_t operator[](int32_t j) const {
    const int32_t last = t.first + t.columns - 1;
    return n + j < last ? n + j : last;
  }
};

// Dequantizes a quarter of a chunk's kColumns weight rows. Working in quarters lets the compiler
// interleave the tile products.
template <int32_t G>
inline void dequantize_quarter(const RowsFrom& rows, int32_t chunk, int32_t quarter,
                               const Scratch& scratch) {
  constexpr int32_t kRows = kColumns / 4;
  const Tile& t = rows.t;
  const int32_t word = chunk * kChunk / 8;
  const __mmask16 mask = first_lanes(t.k / 8 - word);
  char* to = scratch.chunk(chunk);
  // Prefetches the following rows in address order, 64 bytes for each row dequantized here.
  const char* ahead = row_ahead(t, rows.n + kColumns) + int64_t{chunk} * kColumns * 64;
  for (int32_t j = quarter * kRows; j < (quarter + 1) * kRows; ++j) {
    _mm_prefetch(ahead + 64 * j, _MM_HINT_T1);
    dequantize<G>(_mm512_maskz_loadu_epi32(mask, t.q + rows[j] * t.q_stride + word),
                  to + j / 16 * kChunkBytes + j % 16 * 64);
  }
}

// All tiles are 16 rows of 64 bytes. 0..3 hold results, 4 and 5 weights, 6 and 7 activations.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// gcc does not know that its tile intrinsics access memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Multiplies one tile of a group's weights (both blocks of 16 weight rows) by 32 activation rows in
// P planes. `first`: it is the group's first tile.
template <int32_t P>
inline void multiply_two(bool first, const char* w, const char* a0, const char* a1) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  _tile_loadd(4, w, 64);
  _tile_loadd(5, w + kChunkBytes, 64);
  for (int32_t p = 0; p < P; ++p) {
    _tile_loadd(6, a0 + p * kChunkBytes, 64);
    _tile_loadd(7, a1 + p * kChunkBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The same with up to 16 activation rows.
template <int32_t P>
inline void multiply_one(bool first, bool odd, const char* w, const char* a) {
  _tile_loadd(4, w, 64);
  _tile_loadd(5, w + kChunkBytes, 64);
  if (first) {
    if (odd) {
      _tile_zero(1);
      _tile_zero(3);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
  }
  for (int32_t p = 0; p < P; ++p) {
    _tile_loadd(6, a + p * kChunkBytes, 64);
    if (odd) {
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(3, 5, 6);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
}

// totals[j][r] += scale of weight row j * results[j][r] - scale * (128 + zp) * sums[r].
inline void add_scaled(const Scratch& scratch, int32_t group, int32_t block, const float* results,
                       const float* sums, float* totals) {
  const __m512 sum = _mm512_load_ps(sums);
  const float* scale = scratch.scales + 16 * block * scratch.groups + group;
  const float* zero = scratch.zeros + 16 * block * scratch.groups + group;
  for (int32_t j = 0; j < 16; ++j, scale += scratch.groups, zero += scratch.groups) {
    __m512 total = _mm512_load_ps(totals + 16 * j);
    total = _mm512_fmadd_ps(_mm512_load_ps(results + 16 * j), _mm512_set1_ps(*scale), total);
    total = _mm512_fmadd_ps(sum, _mm512_set1_ps(*zero), total);
    _mm512_store_ps(totals + 16 * j, total);
  }
}

// Adds the results of the first (or only) 16 activation rows, which are in tiles 0 and 2, or in 1
// and 3 if the group is odd.
inline void add_first(const Scratch& scratch, int32_t group, bool odd, const float* sums,
                      float* totals) {
  if (odd) {
    _tile_stored(1, scratch.results, 64);
    _tile_stored(3, scratch.results + 256, 64);
  } else {
    _tile_stored(0, scratch.results, 64);
    _tile_stored(2, scratch.results + 256, 64);
  }
  memory_barrier();
  add_scaled(scratch, group, 0, scratch.results, sums, totals);
  add_scaled(scratch, group, 1, scratch.results + 256, sums, totals + 512);
}

inline void add_second(const Scratch& scratch, int32_t group, const float* sums, float* totals) {
  _tile_stored(1, scratch.results + 512, 64);
  _tile_stored(3, scratch.results + 768, 64);
  memory_barrier();
  add_scaled(scratch, group, 0, scratch.results + 512, sums, totals + 256);
  add_scaled(scratch, group, 1, scratch.results + 768, sums, totals + 768);
}

// out[r][j] = total[j][r], r < rows, j < columns.
void store_totals(const float* total, float* out, int64_t stride, int32_t rows, int32_t columns) {
  __m512i v[16];
  for (int32_t j = 0; j < 16; ++j) v[j] = _mm512_load_si512(total + 16 * j);
  transpose(v);
  const __mmask16 mask = first_lanes(columns);
  for (int32_t r = 0; r < rows && r < 16; ++r) {
    _mm512_mask_storeu_epi32(out + r * stride, mask, v[r]);
  }
}

// Adds a chunk of kColumns weight rows times up to 32 activation rows, from r on, to the totals. A
// chunk has G groups; activations have P planes. The call with r = 0 also dequantizes the next
// chunk.
template <int32_t G, int32_t P>
void multiply_chunk(const RowsFrom& rows, int32_t chunk, int32_t r, const Scratch& scratch) {
  constexpr int32_t kTiles = 4 / G;  // of a group
  const Tile& t = rows.t;
  const int32_t groups = groups_of(t);
  const bool two = t.m - r > 16;
  const bool alone = t.m <= 16;  // a single block of rows: results may stay in their tiles
  const bool dequantizing = r == 0 && (chunk + 1) * kChunk < t.k;
  const char* a0 = t.a.data + r * t.a.stride + int64_t{chunk} * P * kChunkBytes;
  const char* a1 = a0 + 16 * t.a.stride;
  const float* sums0 = t.a.sums + r * t.a.sums_stride;
  const float* sums1 = sums0 + 16 * t.a.sums_stride;
  float* totals = scratch.totals + r * kColumns;
  for (int32_t g = chunk * G; g < (chunk + 1) * G && g < groups; ++g) {
    for (int32_t i = 0; i < kTiles; ++i) {
      const int32_t tile = g % G * kTiles + i;
      const char* w = scratch.chunk(chunk) + tile * kTileBytes;
      memory_barrier();
      if (two) {
        multiply_two<P>(i == 0, w, a0 + tile * kTileBytes, a1 + tile * kTileBytes);
      } else {
        multiply_one<P>(i == 0, g % 2 == 1, w, a0 + tile * kTileBytes);
      }
      if (dequantizing) dequantize_quarter<G>(rows, chunk + 1, tile, scratch);
    }
    if (two) {
      add_first(scratch, g, false, sums0 + 16 * g, totals);
      add_second(scratch, g, sums1 + 16 * g, totals);
    } else if (!alone) {
      add_first(scratch, g, g % 2 == 1, sums0 + 16 * g, totals);
    } else if (g > 0) {
      add_first(scratch, g - 1, g % 2 == 0, sums0 + 16 * (g - 1), totals);
    }
  }
  if (alone && (chunk + 1) * G >= groups) {
    add_first(scratch, groups - 1, groups % 2 == 0, sums0 + 16 * (groups - 1), totals);
  }
}

template <int32_t G, int32_t P>
void multiply_tiles(const Tile& t) {
  const Scratch scratch(t);
  const TileConfig config;
  memory_barrier();
  _tile_loadconfig(&config);
  for (int32_t column = 0; column < t.columns; column += kColumns) {
    const RowsFrom rows{t, t.first + column};
    for (int32_t j = 0; j < kColumns; ++j) {
      load_groups<128>(t, rows[j], scratch.scales + j * scratch.groups,
                       scratch.zeros + j * scratch.groups);
    }
    memset(scratch.totals, 0, int64_t{4} * kColumns * round_up(t.m, 32));
    for (int32_t quarter = 0; quarter < 4; ++quarter) {
      dequantize_quarter<G>(rows, 0, quarter, scratch);
    }
    for (int32_t chunk = 0; chunk * kChunk < t.k; ++chunk) {
      for (int32_t r = 0; r < t.m; r += 32) multiply_chunk<G, P>(rows, chunk, r, scratch);
    }
    for (int32_t r = 0; r < t.m; r += 32) {
      for (int32_t block = 0; block < 2; ++block) {
        const float* total = scratch.totals + r * kColumns + 512 * block;
        float* out = t.out + r * t.out_stride + column + 16 * block;
        const int32_t columns = t.columns - column - 16 * block;
        store_totals(total, out, t.out_stride, t.m - r, columns);
        store_totals(total + 256, out + 16 * t.out_stride, t.out_stride, t.m - r - 16, columns);
      }
    }
  }
  _tile_release();
}

template <int32_t G>
void multiply_groups(const Tile& t) {
  planes_of(t.dtype) == 1 ? multiply_tiles<G, 1>(t) : multiply_tiles<G, 2>(t);
}

void multiply(const Tile& t) {
  switch (t.group_size) {
    case 32:
      return multiply_groups<4>(t);
    case 64:
      return multiply_groups<2>(t);
    default:
      return multiply_groups<1>(t);
  }
}

}  // namespace

const Kernel kAmxBf16 = {"amx_bf16", row_bytes, rows_allocated, scratch_bytes, prepare, multiply};

}  // namespace moe_int4::cpu
