// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Kernel for AMX (tdpbf16ps): experts with kFewestRows or more rows. Fewer rows are left to the
// AVX512_BF16 kernels.
//
// A tile product is out^T[16 weight rows][16 activation rows] += w[16][32 k] * a^T[32 k][16]. In
// this orientation weights need no transposition: 16 pairs of a weight row are one row of a tile.
// They become q - zp in bf16, which is exact, by a look-up in a table that depends on the zero
// point. A tile holds pairs of one group only: those of its words j and of pair i of a word, i
// first, so many i as make 16 pairs. Products are scaled in fp32, group by group.
//
// Activations are transposed once per expert, in prepare(), to
// [16 rows][chunk of 128 k][plane][4] tiles of [pair][row]. fp16 has two planes, a = high + low.
#include <immintrin.h>

#include "kernels_common.h"
#include "transpose_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kFewestRows = 3;
constexpr int32_t kChunk = 128;  // weights in a vector of words
constexpr int32_t kTileBytes = 1024;
constexpr int32_t kChunkBytes = 4 * kTileBytes;  // of 16 rows, one plane
constexpr int32_t kColumns = 32;                 // weight rows dequantized together

bool uses_tiles(int32_t m) { return m >= kFewestRows; }

int32_t planes_of(DType dtype) { return dtype == DType::kHalf ? 2 : 1; }

int64_t row_bytes(DType dtype, int32_t k) { return kAvx512Bf16.row_bytes(dtype, k); }

int32_t rows_allocated(DType, int32_t m) { return uses_tiles(m) ? round_up(m, 16) : m; }

// 16 pairs of a row of activations from `a` on, of which `count` pairs exist.
inline void load_pairs(DType dtype, const uint16_t* a, int32_t count, __m512i (&planes)[2]) {
  const __m512i pairs = _mm512_maskz_loadu_epi32(first_lanes(count), a);
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
  // Infinities have no rest.
  const __mmask16 ok0 = _mm512_cmp_ps_mask(low0, low0, _CMP_ORD_Q);
  const __mmask16 ok1 = _mm512_cmp_ps_mask(low1, low1, _CMP_ORD_Q);
  planes[0] = high;
  planes[1] =
      (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_mov_ps(ok1, low1), _mm512_maskz_mov_ps(ok0, low0));
}

void prepare(const Source& source, const PreparedRows& rows) {
  if (!uses_tiles(source.m)) return kAvx512Bf16.prepare(source, rows);
  const int32_t planes = planes_of(source.dtype);
  const int32_t words = source.group_size / 8 < 16 ? source.group_size / 8 : 16;  // in a tile
  char* to = rows.data + source.begin * rows.stride;
  for (int32_t begin = 0; begin < source.k; begin += kChunk, to += planes * kChunkBytes) {
    for (int32_t part = 0; part < 4; ++part) {  // 4 words, 16 pairs
      __m512i v[2][16];
      for (int32_t r = 0; r < 16; ++r) {
        __m512i row[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        const int32_t k = begin + 32 * part;
        if (r < source.count) load_pairs(source.dtype, source.a[r] + k, (source.k - k) / 2, row);
        v[0][r] = row[0];
        v[1][r] = row[1];
      }
      for (int32_t p = 0; p < planes; ++p) {
        transpose(v[p]);
        for (int32_t pair = 0; pair < 16; ++pair) {
          const int32_t j = 4 * part + pair / 4, i = pair % 4, together = 16 / words;
          const int32_t tile = j / words * (words / 4) + i / together;
          const int32_t row = i % together * words + j % words;
          _mm512_store_si512(to + p * kChunkBytes + tile * kTileBytes + row * 64, v[p][pair]);
        }
      }
    }
  }
}

// Scratch of a tile: scales of 32 weight rows, sums of 32 x 32 results and of one group's, and the
// dequantized weights, [chunk][16 rows, twice][4] tiles.
struct Scratch {
  int64_t groups;
  float* scales;   // [row][group]
  float* totals;   // [4][16 weight rows][16 rows]
  float* results;  // the same
  char* weights;
  explicit Scratch(const Tile& t) : groups(groups_of(t)) {
    totals = static_cast<float*>(t.scratch);
    results = totals + 4 * 256;
    weights = reinterpret_cast<char*>(results + 4 * 256);
    scales = reinterpret_cast<float*>(weights + round_up<int64_t>(t.k, kChunk) * 2 * kColumns);
  }
};

int64_t scratch_bytes(int32_t k, int32_t group_size) {
  const int64_t tiles = round_up<int64_t>(k, kChunk) * 2 * kColumns + 4 * 8 * 256 +
                        int64_t{4} * kColumns * (k / group_size);
  const int64_t few = kAvx512Bf16.scratch_bytes(k, group_size);
  return tiles > few ? tiles : few;
}

// q - zp in bf16 for q = 0..15: the table of zero point zp begins at [15 - zp].
alignas(64) constexpr uint16_t kDifferences[31] = {
    0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
    0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
    0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};

inline __m256i table_of(uint32_t zero) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kDifferences + 15 - zero));
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Zero points of the G groups of a chunk of one weight row.
template <int32_t G>
struct Zeros {
  uint32_t of[G];
};

// Dequantizes a chunk of one weight row: 4 rows of tiles, kTileBytes apart. G groups in a chunk.
template <int32_t G>
inline void dequantize(__m512i words, const Zeros<G>& zeros, bool symmetric, char* to) {
  const __m512i w[4] = {words, _mm512_srli_epi32(words, 4), _mm512_srli_epi32(words, 8),
                        _mm512_srli_epi32(words, 12)};
  __m512i v[4];
  if (G == 1 || symmetric) {
    const __m256i half = table_of(zeros.of[0]);
    const __m512i table = join(half, half);  // twice, for the fifth bit of the index
    for (int32_t i = 0; i < 4; ++i) v[i] = _mm512_permutexvar_epi16(w[i], table);
  } else {
    // Bits 4 and 5 of an index: the group of the word.
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offset =
        _mm512_mullo_epi32(_mm512_srli_epi32(lanes, G == 2 ? 3 : 2), _mm512_set1_epi32(0x00100010));
    const __m512i nibble = _mm512_set1_epi32(0x000f000f);
    const __m512i low = join(table_of(zeros.of[0]), table_of(zeros.of[1 % G]));
    const __m512i high = join(table_of(zeros.of[2 % G]), table_of(zeros.of[3 % G]));
    for (int32_t i = 0; i < 4; ++i) {
      const __m512i index = _mm512_or_si512(_mm512_and_si512(w[i], nibble), offset);
      v[i] = G == 2 ? _mm512_permutexvar_epi16(index, low)
                    : _mm512_permutex2var_epi16(low, index, high);
    }
  }
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

// Dequantizes a chunk of kColumns weight rows from n on; rows past the last one repeat it.
template <int32_t G>
void dequantize_chunk(const Tile& t, int32_t n, int32_t chunk, const Scratch& scratch) {
  const int32_t last = t.first + t.columns - 1, word = chunk * kChunk / 8;
  const __mmask16 mask = first_lanes(t.k / 8 - word);
  char* to = scratch.weights + int64_t{chunk} * 2 * kChunkBytes;
  // The rows that come next, in the order of their addresses: two lines per word.
  const char* ahead = row_ahead(t, n + kColumns) + int64_t{chunk} * kColumns * 64;
  for (int32_t j = 0; j < kColumns; ++j) {
    const int32_t row = n + j < last ? n + j : last;
    _mm_prefetch(ahead + 64 * j, _MM_HINT_T1);
    Zeros<G> zeros;
    for (int32_t g = 0; g < G; ++g) {
      const int32_t group = chunk * G + g;
      zeros.of[g] = t.zeros == nullptr || group >= scratch.groups
                        ? 8
                        : t.zeros[row / 8 * t.z_stride + group] >> 4 * (row % 8) & 15;
    }
    dequantize<G>(_mm512_maskz_loadu_epi32(mask, t.q + row * t.q_stride + word), zeros,
                  t.zeros == nullptr, to + j / 16 * kChunkBytes + j % 16 * 64);
  }
}

// All tiles are 16 rows of 64 bytes. 0..3 hold results, 4 and 5 weights, 6 and 7 activations.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// gcc's tile intrinsics do not say that they access memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// The products of one group, N tiles of weights (of two blocks of 16 weight rows) times P planes
// of N tiles of 32 activation rows: results 0 and 1 are the first 16 weight rows.
template <int32_t N, int32_t P>
inline void multiply_two(const char* w, const char* a0, const char* a1) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int32_t i = 0; i < N; ++i, w += kTileBytes, a0 += kTileBytes, a1 += kTileBytes) {
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
}

// The same with 16 activation rows. Groups take turns with results 0 and 2, and 1 and 3: one is
// multiplied while the other is stored.
template <int32_t N, int32_t P>
inline void multiply_one(int32_t group, const char* w, const char* a) {
  if (group % 2 == 0) {
    _tile_zero(0);
    _tile_zero(2);
    for (int32_t i = 0; i < N; ++i, w += kTileBytes, a += kTileBytes) {
      _tile_loadd(4, w, 64);
      _tile_loadd(5, w + kChunkBytes, 64);
      for (int32_t p = 0; p < P; ++p) {
        _tile_loadd(6, a + p * kChunkBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
  } else {
    _tile_zero(1);
    _tile_zero(3);
    for (int32_t i = 0; i < N; ++i, w += kTileBytes, a += kTileBytes) {
      _tile_loadd(4, w, 64);
      _tile_loadd(5, w + kChunkBytes, 64);
      for (int32_t p = 0; p < P; ++p) {
        _tile_loadd(6, a + p * kChunkBytes, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
}

// Totals of tiles `tile` and `tile` + 2 += scale of the weight row * results.
inline void add_scaled(const Scratch& scratch, int32_t group, int32_t tile, float* totals) {
  for (int32_t half = 0; half < 2; ++half) {
    const float* scale = scratch.scales + 16 * half * scratch.groups + group;
    const float* result = scratch.results + 256 * (tile + 2 * half);
    float* total = totals + 512 * half;
    for (int32_t j = 0; j < 16; ++j) {
      const __m512 sum = _mm512_fmadd_ps(_mm512_load_ps(result + 16 * j),
                                         _mm512_set1_ps(scale[j * scratch.groups]),
                                         _mm512_load_ps(total + 16 * j));
      _mm512_store_ps(total + 16 * j, sum);
    }
  }
}

inline void store_and_add(const Scratch& scratch, int32_t group, bool two) {
  if (two || group % 2 == 0) {
    _tile_stored(0, scratch.results, 64);
    _tile_stored(2, scratch.results + 512, 64);
    memory_barrier();
    add_scaled(scratch, group, 0, scratch.totals);
  }
  if (two || group % 2 == 1) {
    _tile_stored(1, scratch.results + 256, 64);
    _tile_stored(3, scratch.results + 768, 64);
    memory_barrier();
    add_scaled(scratch, group, 1, two ? scratch.totals + 256 : scratch.totals);
  }
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

// G groups in a chunk, P planes.
template <int32_t G, int32_t P>
void multiply_tiles(const Tile& t) {
  constexpr int32_t kTiles = 4 / G;  // of a group
  const Scratch scratch(t);
  const auto groups = static_cast<int32_t>(scratch.groups);
  const int32_t chunks = round_up(t.k, kChunk) / kChunk;
  const TileConfig config;
  memory_barrier();
  _tile_loadconfig(&config);
  for (int32_t column = 0; column < t.columns; column += kColumns) {
    const int32_t n = t.first + column, last = t.first + t.columns - 1;
    for (int32_t j = 0; j < kColumns; ++j) {
      load_scales(t, n + j < last ? n + j : last, scratch.scales + j * scratch.groups);
    }
    dequantize_chunk<G>(t, n, 0, scratch);
    for (int32_t r = 0; r < t.m; r += 32) {
      const bool two = t.m - r > 16;
      const char* a0 = t.a.data + r * t.a.stride;
      const char* a1 = a0 + 16 * t.a.stride;
      memset(scratch.totals, 0, 4 * 4 * 256);
      for (int32_t g = 0; g < groups; ++g) {
        const int32_t chunk = g / G, tile = g % G * kTiles * kTileBytes;
        // Beside the products of the first rows, a chunk ahead of them.
        if (r == 0 && g % G == 0 && chunk + 1 < chunks) {
          dequantize_chunk<G>(t, n, chunk + 1, scratch);
        }
        const char* w = scratch.weights + int64_t{chunk} * 2 * kChunkBytes + tile;
        const int64_t at = int64_t{chunk} * P * kChunkBytes + tile;
        memory_barrier();
        if (two) {
          multiply_two<kTiles, P>(w, a0 + at, a1 + at);
          store_and_add(scratch, g, two);
        } else {
          multiply_one<kTiles, P>(g, w, a0 + at);
          if (g > 0) store_and_add(scratch, g - 1, two);
        }
      }
      if (!two) store_and_add(scratch, groups - 1, two);
      for (int32_t half = 0; half < 2; ++half) {
        const float* total = scratch.totals + 512 * half;
        float* out = t.out + r * t.out_stride + column + 16 * half;
        const int32_t columns = t.columns - column - 16 * half;
        store_totals(total, out, t.out_stride, t.m - r, columns);
        if (two) {
          store_totals(total + 256, out + 16 * t.out_stride, t.out_stride, t.m - r - 16, columns);
        }
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
  if (!uses_tiles(t.m)) return kAvx512Bf16.multiply(t);
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

const Kernels kAmxBf16 = {"amx_bf16", row_bytes, rows_allocated, scratch_bytes,
                          prepare,    multiply,  activate,       store};

}  // namespace moe_int4::cpu
