// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Kernel for few activation rows with AMX (tdpbusd), which kernels_amx_bf16.cpp calls.
//
// Activations are integers of two signed bytes (integers_avx512.h). A tile product is
// results[16 weight rows][lane] += w[16][64 weights] * a[64][lane]: a lane is the high or the low
// bytes of one of up to 8 activation rows, a panel: first the high ones, then the low ones. Words
// of weights need nothing but a mask (half 0) or a shift and a mask (half 1) to become such rows
// of 64. Sums of a group are exact integers; they are scaled in fp32, group by group.
//
// Tiles hold weights of one group only. So 128 weights are one group's two tiles (half 0, half 1),
// or two groups of one tile (8 words' half 0, then their half 1), or four of half as many columns.
//
// A prepared panel is [chunk of 128 k][32 words, as above][lane][4 bytes]; then the steps of the
// lanes, a vector per group; then, likewise, -8 times the sums of the integers, from which results
// start: that makes weights signed.
#include <immintrin.h>

#include "integers_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kPanel = 8;        // activation rows
constexpr int32_t kChunk = 128;      // weights in a vector of words
constexpr int32_t kChunkWords = 16;
constexpr int32_t kTileBytes = 1024;
constexpr int32_t kBlockBytes = 2 * kTileBytes;  // unpacked weights of 16 weight rows
constexpr int32_t kRows = 32;                    // weight rows at once, two blocks
constexpr int32_t kTableGroups = 16;             // groups whose scales are converted together
#ifndef VAR_BATCH
#define VAR_BATCH 4
#endif
#ifndef VAR_ADJ
#define VAR_ADJ 4
#endif
#ifndef VAR_MID
#define VAR_MID 0
#endif
#ifndef VAR_L1
#define VAR_L1 0
#endif
#ifndef VAR_HINT
#define VAR_HINT _MM_HINT_T1
#endif
#ifndef VAR_DEPTH
#define VAR_DEPTH 2
#endif
constexpr int32_t kBatch = VAR_BATCH;  // groups scaled together
constexpr int32_t kDepth = VAR_DEPTH;  // chunks between unpacking and multiplication
constexpr int32_t kAdjacent = VAR_ADJ;

int32_t chunks_of(int32_t k) { return (k + kChunk - 1) / kChunk; }

// Lanes of a panel of an expert that has m rows: fewer take less memory.
int32_t lanes_of(int32_t m) { return m <= 2 ? 4 : m <= 4 ? 8 : 16; }

int32_t panels_of(int32_t m) { return (m + kPanel - 1) / kPanel; }

int64_t words_bytes(int32_t k, int32_t lanes) { return int64_t{chunks_of(k)} * kChunk * lanes; }

int64_t panel_bytes(int32_t k, int32_t group_size, int32_t lanes) {
  return words_bytes(k, lanes) + int64_t{k / group_size} * 128;
}

int64_t row_bytes(DType, int32_t k) { return int64_t{chunks_of(k)} * 4 * kChunk; }

// A chunk of a panel takes kChunk bytes per lane, and up to 4 groups' vectors as much as 4 lanes.
int32_t rows_allocated(DType, int32_t m) {
  const int32_t rows = panels_of(m) * (lanes_of(m) / 4 + 1);
  return rows > m ? rows : m;
}

// Orders words of two halves as tiles want them. G groups in a chunk.
template <int32_t G>
inline void arrange(__m512i (&v)[2]) {
  if constexpr (G == 1) return;
  const __m512i a = v[0], b = v[1];
  if constexpr (G == 2) {
    v[0] = _mm512_shuffle_i64x2(a, b, 0x44);
    v[1] = _mm512_shuffle_i64x2(a, b, 0xee);
  } else {
    v[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
    v[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
  }
}

// Transposes 4 vectors of 4 quarters.
inline void transpose_quarters(__m512i (&v)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// Stores the words of L lanes as [16 words][L].
template <int32_t L>
inline void store_lanes(__m512i (&v)[L], char* to) {
  if constexpr (L == 4) {
    const __m512i ab0 = _mm512_unpacklo_epi32(v[0], v[1]), ab1 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i cd0 = _mm512_unpacklo_epi32(v[2], v[3]), cd1 = _mm512_unpackhi_epi32(v[2], v[3]);
    __m512i w[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0),
                    _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
    transpose_quarters(w);
    for (int32_t i = 0; i < 4; ++i) _mm512_store_si512(to + 64 * i, w[i]);
  } else {
    __m512i w[16];
    for (int32_t i = 0; i < 16; ++i) w[i] = i < L ? v[i] : _mm512_setzero_si512();
    transpose(w);
    for (int32_t i = 0; i < 16; ++i) {
      if constexpr (L == 16) {
        _mm512_store_si512(to + 64 * i, w[i]);
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32 * i), _mm512_castsi512_si256(w[i]));
      }
    }
  }
}

// Rows [begin, end) of the source as a panel. G groups in a chunk, L lanes.
template <int32_t G, int32_t L>
void prepare_panel(const Source& source, int32_t begin, int32_t end, char* to) {
  const int32_t k = source.k;
  auto* steps = reinterpret_cast<float*>(to + words_bytes(k, L));
  auto* starts = reinterpret_cast<int32_t*>(steps + 16 * (k / source.group_size));
  for (int32_t chunk = 0; chunk < k; chunk += kChunk, to += kChunk * L) {
    const int32_t count = k - chunk < kChunk ? k - chunk : kChunk;
    __m512i words[2][L];
    for (int32_t lane = 0; lane < L; ++lane) {
      words[0][lane] = words[1][lane] = _mm512_setzero_si512();
    }
    for (int32_t i = 0; i < count; i += source.group_size, steps += 16, starts += 16) {
      _mm512_store_si512(steps, _mm512_setzero_si512());
      _mm512_store_si512(starts, _mm512_setzero_si512());
    }
    for (int32_t r = begin; r < end; ++r) {
      float values[kChunk];
      int16_t integers[kChunk] = {};
      to_float(source.dtype, source.a[r] + chunk, count, values);
      const int32_t high_lane = r - begin, low_lane = high_lane + L / 2;
      float* step = steps - 16 * (count / source.group_size);
      int32_t* start = starts - 16 * (count / source.group_size);
      for (int32_t i = 0; i < count; i += source.group_size, step += 16, start += 16) {
        const Quantized group = quantize(values + i, source.group_size, integers + i);
        for (int32_t lane = 0; lane < 16; lane += L) {
          step[lane + high_lane] = 256 * group.step;
          step[lane + low_lane] = group.step;
          start[lane + high_lane] = -8 * group.high;
          start[lane + low_lane] = -8 * group.low;
        }
      }
      __m512i high[2], low[2];
      split(integers, high, low);
      arrange<G>(high);
      arrange<G>(low);
      for (int32_t i = 0; i < 2; ++i) {
        words[i][high_lane] = high[i];
        words[i][low_lane] = low[i];
      }
    }
    for (int32_t i = 0; i < 2; ++i) store_lanes<L>(words[i], to + i * 64 * L);
  }
}

template <int32_t G, int32_t L>
void prepare_panels(const Source& source, const PreparedRows& rows) {
  for (int32_t r = 0; r < source.count; r += kPanel) {
    const int32_t end = r + kPanel < source.count ? r + kPanel : source.count;
    const int64_t panel = (source.begin + r) / kPanel;
    prepare_panel<G, L>(source, r, end,
                        rows.data + panel * panel_bytes(source.k, source.group_size, L));
  }
}

template <int32_t G>
void prepare_groups(const Source& source, const PreparedRows& rows) {
  switch (lanes_of(source.m)) {
    case 4:
      return prepare_panels<G, 4>(source, rows);
    case 8:
      return prepare_panels<G, 8>(source, rows);
    default:
      return prepare_panels<G, 16>(source, rows);
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  switch (source.group_size) {
    case 32:
      return prepare_groups<4>(source, rows);
    case 64:
      return prepare_groups<2>(source, rows);
    default:
      return prepare_groups<1>(source, rows);
  }
}

// Scratch of a tile.
struct Scratch {
  char* weights;  // kDepth + 1 chunks of unpacked weights, [2 blocks][64 or 32 bytes wide tiles]
  float* scales;  // of kTableGroups groups, [group][kRows] or, of 16 lanes, transposed
  float* zeros;   // the same of scale * (8 - zero point)
  float* totals;  // [panel][kRows][lane]
  char* results;  // [panel][kBatch][kRows][lane]
  Scratch(void* scratch, int32_t lanes, int32_t panels) {
    weights = static_cast<char*>(scratch);
    scales = reinterpret_cast<float*>(weights + (kDepth + 1) * 2 * kBlockBytes);
    zeros = scales + kTableGroups * kRows;
    totals = zeros + kTableGroups * kRows;
    results = reinterpret_cast<char*>(totals + panels * kRows * lanes);
  }
};

int64_t scratch_bytes(int32_t, int32_t, int32_t m) {
  const int64_t tables = (kDepth + 1) * 2 * kBlockBytes + int64_t{4} * 2 * kTableGroups * kRows;
  return tables + int64_t{4} * panels_of(m) * kRows * 16 * (1 + kBatch);
}

// Tiles 0..3 hold results, 4 and 5 weights, 6 and 7 activations. G groups in a chunk, L lanes.
template <int32_t G, int32_t L>
struct alignas(64) TileConfig {
  static constexpr uint16_t kWeights = G == 4 ? 32 : 64;
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {4 * L, 4 * L, 4 * L, 4 * L, kWeights, kWeights, 4 * L, 4 * L};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, kWeights / 4, kWeights / 4};
};

// gcc's tile intrinsics do not say that they access memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Weight rows of a part of a tile: `passes` times kRows, or one time fewer. A pass takes kAdjacent
// rows from each of several streams, which go on with the next pass: memory is read best so.
struct Part {
  int32_t first, columns, passes;
  const uint32_t* next;     // what is read afterwards
  const void* next_scales;  // and its scales

  // Row j of pass 0; rows past the last one repeat it.
  int32_t row(int32_t j) const {
    const int32_t at = j / kAdjacent * kAdjacent * passes + j % kAdjacent;
    return first + (at < columns ? at : columns - 1);
  }
};

// Multiplies a part. G groups in a chunk, L lanes, Z: has zero points.
//
// Work goes from unit to unit, a group of kRows weight rows times one panel. Tiles must not be
// read from memory that was just written, nor results soon after their product. So a unit's turn
// stores results of the unit before, multiplies its own, unpacks weights of the chunk after next
// and scales results.
template <int32_t G, int32_t L, bool Z>
class Multiplier {
 public:
  Multiplier(const Tile& t, const Part& part)
      : t_(t),
        part_(part),
        scratch_(t.scratch, L, panels_of(t.m)),
        panels_(panels_of(t.m)),
        groups_(groups_of(t)),
        chunks_(chunks_of(t.k)),
        vectors_at_(words_bytes(t.k, L)),
        panel_bytes_(panel_bytes(t.k, t.group_size, L)),
        next_scales_(static_cast<const char*>(part.next_scales)) {
    for (int32_t j = 0; j < kRows; ++j) {
      rows_[j] = part.row(j);
      offsets_[j] = rows_[j] * t.q_stride;
      ahead_offsets_[j] =
          j / kAdjacent * kAdjacent * part.passes * t.q_stride * 4 + j % kAdjacent * 64;
    }
  }

  void run() {
    memset(scratch_.totals, 0, sizeof(float) * panels_ * kRows * L);
    for (int32_t i = 0; i < kDepth; ++i) {
      next_source();
      unpack(0, 4);
    }
    for (int32_t pass = 0; pass < part_.passes; ++pass) {
      for (int32_t chunk = 0; chunk < chunks_; ++chunk) multiply_chunk(pass, chunk);
    }
    store_results();
    scale_results();
  }

 private:
  // A group of a pass times a panel.
  struct Unit {
    int32_t pass, group, panel;
  };

  char* buffer(int32_t i) const { return scratch_.weights + i * 2 * kBlockBytes; }

  static void advance(int32_t& buffer) { buffer = buffer == kDepth ? 0 : buffer + 1; }

  void multiply_chunk(int32_t pass, int32_t chunk) {
    const char* weights = buffer(multiplied_);
    advance(multiplied_);
    next_source();
    const int32_t end = (chunk + 1) * G < groups_ ? (chunk + 1) * G : groups_;
    int32_t quarter = 0;
    for (int32_t group = chunk * G; group < end; ++group) {
      const char* w = weights + (G == 4 ? group % 4 / 2 * kTileBytes + group % 2 * 32
                                        : group % G * kTileBytes);
      for (int32_t panel = 0; panel < panels_; ++panel) {
        const char* a = t_.a.data + panel * panel_bytes_;
        const char* words = a + (int64_t{chunk} * 32 + group % G * (32 / G)) * 4 * L;
        const char* start = a + vectors_at_ + int64_t{groups_ + group} * 64;
        if (pending_) store_results();
        memory_barrier();
        start_results(start);
        multiply_tiles(false, w, words);
        if constexpr (G == 1) {
          if (panel == 0) unpack(0, 2);
          if (VAR_MID && waiting_ > 0) scale_results();
          memory_barrier();
          multiply_tiles(true, w + kTileBytes, words + 64 * L);
          if (panel == 0) unpack(2, 4);
        } else if (panel == 0) {
          unpack(quarter, quarter + 4 / G);
          quarter += 4 / G;
        }
        if (waiting_ > 0) scale_results();
        if (panel == 0) load_tables(pass, group);
        pending_ = true;
        unit_ = {pass, group, panel};
        odd_ = !odd_;
      }
    }
    if constexpr (G > 1) {
      if (quarter < 4) unpack(quarter, 4);
    }
  }

  // Results of the unit at hand are in tiles 0 (first block) and 1, or 2 and 3 if odd.
  void start_results(const char* start) const {
    if (odd_) {
      _tile_loadd(2, start, 0);
      _tile_loadd(3, start, 0);
    } else {
      _tile_loadd(0, start, 0);
      _tile_loadd(1, start, 0);
    }
  }

  void multiply_tiles(bool second, const char* w, const char* a) const {
    if (odd_ != second) {
      _tile_loadd(7, a, 4 * L);
    } else {
      _tile_loadd(6, a, 4 * L);
    }
    _tile_loadd(4, w, 64);
    _tile_loadd(5, w + kBlockBytes, 64);
    if (odd_) {
      if (second) {
        _tile_dpbusd(2, 4, 6);
        _tile_dpbusd(3, 5, 6);
      } else {
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
      }
    } else {
      if (second) {
        _tile_dpbusd(0, 4, 7);
        _tile_dpbusd(1, 5, 7);
      } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
      }
    }
  }

  // Stores results of the unit before.
  void store_results() {
    char* to =
        scratch_.results + (unit_.panel * kBatch + unit_.group % kBatch) * int64_t{kRows} * L * 4;
    memory_barrier();
    if (odd_) {  // so the unit before was even
      _tile_stored(0, to, 4 * L);
      _tile_stored(1, to + 64 * L, 4 * L);
    } else {
      _tile_stored(2, to, 4 * L);
      _tile_stored(3, to + 64 * L, 4 * L);
    }
    memory_barrier();
    const bool full = unit_.group % kBatch == kBatch - 1 || unit_.group + 1 == groups_;
    if (unit_.panel + 1 == panels_ && full) {
      waiting_ = unit_.group % kBatch + 1;
      waiting_pass_ = unit_.pass;
      waiting_group_ = unit_.group - unit_.group % kBatch;
    }
  }

  // Goes on to the next chunk to unpack; past the end, to the last one again.
  void next_source() {
    source_ = t_.q + int64_t{source_pass_} * kAdjacent * t_.q_stride + source_chunk_ * kChunkWords;
    mask_ = first_lanes(t_.k / 8 - source_chunk_ * kChunkWords);
    unpacked_ = buffer(filled_);
    advance(filled_);
    const bool more = source_pass_ + 1 < part_.passes;
    const uint32_t* ahead =
        more ? t_.q + (part_.first + (source_pass_ + 1) * kAdjacent) * t_.q_stride : part_.next;
    ahead_ = reinterpret_cast<const char*>(ahead) + int64_t{source_chunk_} * kAdjacent * 64;
    if (source_chunk_ + 1 < chunks_) {
      ++source_chunk_;
    } else if (more) {
      source_chunk_ = 0;
      ++source_pass_;
    }
  }

  // Unpacks quarters of the chunk's weight rows. In quarters, so that other work finds its way in
  // between.
  void unpack(int32_t begin, int32_t end) const {
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    const uint32_t* source = source_;  // the compiler cannot know that stores leave members alone
    const char* ahead = ahead_;
    char* to = unpacked_;
    const __mmask16 mask = mask_;
    for (int32_t j = begin * (kRows / 4); j < end * (kRows / 4); ++j) {
      _mm_prefetch(ahead + ahead_offsets_[j], VAR_HINT);
      if (VAR_L1) _mm_prefetch(source + offsets_[j] + 16 * VAR_L1, _MM_HINT_T0);
      const __m512i words = _mm512_maskz_loadu_epi32(mask, source + offsets_[j]);
      __m512i v[2] = {_mm512_and_si512(words, nibbles),
                      _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles)};
      arrange<G>(v);
      char* row = to + j / 16 * kBlockBytes + j % 16 * 64;
      _mm512_store_si512(row, v[0]);
      _mm512_store_si512(row + kTileBytes, v[1]);
    }
  }

  // Converts scales and zero points of kTableGroups groups when the first of them is met.
  void load_tables(int32_t pass, int32_t group) {
    _mm_prefetch(next_scales_, _MM_HINT_T0);
    next_scales_ += 2 * kRows;
    if (group % kTableGroups != 0) return;
    const __mmask16 mask = first_lanes(groups_ - group);
    const auto* from = static_cast<const uint16_t*>(t_.scales) + group;
    const int64_t stride = t_.s_stride;
    const bool half = t_.dtype == DType::kHalf;
    for (int32_t block = 0; block < 2; ++block) {
      __m512i scales[16], zeros[16];
      for (int32_t j = 0; j < 16; ++j) {
        const int32_t row = rows_[16 * block + j] + pass * kAdjacent;
        const __m256i raw = _mm256_maskz_loadu_epi16(mask, from + row * stride);
        scales[j] = half ? _mm512_castps_si512(_mm512_cvtph_ps(raw))
                         : _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
        if constexpr (Z) {
          const uint32_t* words = t_.zeros + row / 8 * t_.z_stride + group;
          const __m512i zero = _mm512_and_si512(
              _mm512_srl_epi32(_mm512_maskz_loadu_epi32(mask, words),
                               _mm_cvtsi32_si128(4 * (row % 8))),
              _mm512_set1_epi32(15));
          const __m512 offset = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), zero));
          zeros[j] =
              _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(scales[j]), offset));
        }
      }
      store_table(scales, scratch_.scales, block);
      if constexpr (Z) store_table(zeros, scratch_.zeros, block);
    }
  }

  static void store_table(__m512i (&rows)[16], float* table, int32_t block) {
    if constexpr (L == 16) {
      for (int32_t j = 0; j < 16; ++j) _mm512_store_si512(table + (16 * block + j) * 16, rows[j]);
    } else {
      transpose(rows);
      for (int32_t g = 0; g < 16; ++g) _mm512_store_si512(table + g * kRows + 16 * block, rows[g]);
    }
  }

  void scale_results() {
    for (int32_t panel = 0; panel < panels_; ++panel) {
      switch (waiting_) {
        case 1:
          scale_groups<1>(panel);
          break;
        case 2:
          scale_groups<2>(panel);
          break;
        case 3:
          scale_groups<3>(panel);
          break;
        default:
          scale_groups<4>(panel);
      }
    }
    if (waiting_group_ + waiting_ == groups_) {
      for (int32_t panel = 0; panel < panels_; ++panel) finish(panel);
    }
    waiting_ = 0;
  }

  // totals += scale * step * results + scale * (8 - zero point) * step * sum, for N groups.
  template <int32_t N>
  void scale_groups(int32_t panel) const {
    const char* vectors = t_.a.data + panel * panel_bytes_ + vectors_at_;
    const int32_t group = waiting_group_ % kTableGroups;
    const char* results = scratch_.results + panel * int64_t{kBatch} * kRows * L * 4;
    float* totals = scratch_.totals + panel * kRows * L;
    __m512 steps[N], sums[N];
    for (int32_t g = 0; g < N; ++g) {
      const char* at = vectors + int64_t{waiting_group_ + g} * 64;
      steps[g] = _mm512_load_ps(at);
      if constexpr (Z) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(at + int64_t{groups_} * 64));
        sums[g] = _mm512_mul_ps(steps[g], _mm512_mul_ps(sum, _mm512_set1_ps(-0.125f)));
      }
    }
    const auto add = [&](__m512 total, int32_t g, int32_t i, __m512 scale, __m512 zero) {
      const __m512i result = _mm512_load_si512(results + (g * 2 * L + i) * 64);
      total =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(result), _mm512_mul_ps(scale, steps[g]), total);
      if constexpr (Z) total = _mm512_fmadd_ps(zero, sums[g], total);
      return total;
    };
    if constexpr (L == 16) {
      const float* scales = scratch_.scales + group;
      const float* zeros = scratch_.zeros + group;
      for (int32_t j = 0; j < kRows; ++j) {
        __m512 total = _mm512_load_ps(totals + 16 * j);
        for (int32_t g = 0; g < N; ++g) {
          total = add(total, g, j, _mm512_set1_ps(scales[16 * j + g]),
                      Z ? _mm512_set1_ps(zeros[16 * j + g]) : _mm512_setzero_ps());
        }
        _mm512_store_ps(totals + 16 * j, total);
      }
    } else {
      constexpr int32_t kShift = L == 8 ? 3 : 2;  // log2(L)
      const __m512i lane = _mm512_srli_epi32(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kShift);
      for (int32_t block = 0; block < 2; ++block) {
        float* to = totals + block * 16 * L;
        __m512 total[L];
        for (int32_t i = 0; i < L; ++i) total[i] = _mm512_load_ps(to + 16 * i);
        for (int32_t g = 0; g < N; ++g) {
          const int32_t at = (group + g) * kRows + 16 * block;
          const __m512 scales = _mm512_load_ps(scratch_.scales + at);
          const __m512 zeros = Z ? _mm512_load_ps(scratch_.zeros + at) : _mm512_setzero_ps();
          for (int32_t i = 0; i < L; ++i) {
            const __m512i rows = _mm512_add_epi32(lane, _mm512_set1_epi32(i * (16 / L)));
            total[i] = add(total[i], g, block * L + i, _mm512_permutexvar_ps(rows, scales),
                           Z ? _mm512_permutexvar_ps(rows, zeros) : _mm512_setzero_ps());
          }
        }
        for (int32_t i = 0; i < L; ++i) _mm512_store_ps(to + 16 * i, total[i]);
      }
    }
  }

  // out = total of high bytes + total of low bytes; totals become zero again.
  void finish(int32_t panel) const {
    for (int32_t block = 0; block < 2; ++block) {
      float* total = scratch_.totals + (panel * 2 + block) * 16 * L;
      __m512i v[L];
      for (int32_t i = 0; i < L; ++i) {
        v[i] = _mm512_load_si512(total + 16 * i);
        _mm512_store_ps(total + 16 * i, _mm512_setzero_ps());
      }
      const auto add = [](__m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
      };
      if constexpr (L == 16) {
        transpose(v);
        for (int32_t r = 0; r < kPanel; ++r) v[r] = add(v[r], v[kPanel + r]);
      } else {
        __m512i w[4];  // [4 weight rows][4 activation rows]
        for (int32_t i = 0; i < 4; ++i) {
          if constexpr (L == 4) {
            w[i] = add(v[i], _mm512_shuffle_epi32(v[i], _MM_PERM_BADC));
          } else {
            const __m512i high = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88);
            const __m512i low = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xdd);
            w[i] = add(high, low);
          }
          w[i] = _mm512_permutexvar_epi32(
              _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), w[i]);
        }
        transpose_quarters(w);
        for (int32_t i = 0; i < 4; ++i) v[i] = w[i];
      }
      const int32_t rows = t_.m - panel * kPanel < L / 2 ? t_.m - panel * kPanel : L / 2;
      float* out = t_.out + int64_t{panel} * kPanel * t_.out_stride + part_.first - t_.first;
      for (int32_t r = 0; r < rows; ++r) store_columns(v[r], block, out + r * t_.out_stride);
    }
  }

  // Stores outputs of 16 weight rows.
  void store_columns(__m512i v, int32_t block, float* out) const {
    if (part_.passes == 1) {
      const __mmask16 mask = first_lanes(part_.columns - 16 * block);
      return _mm512_mask_storeu_epi32(out + 16 * block, mask, v);
    }
#if VAR_ADJ == 4
    const int64_t stream = part_.passes * kAdjacent;
    out += 4 * block * stream + waiting_pass_ * kAdjacent;
    _mm_storeu_ps(out, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 0)));
    _mm_storeu_ps(out + stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 1)));
    _mm_storeu_ps(out + 2 * stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 2)));
    _mm_storeu_ps(out + 3 * stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 3)));
#else
    alignas(64) int32_t at[16];
    for (int32_t j = 0; j < 16; ++j) at[j] = part_.row(16 * block + j) - part_.first;
    _mm512_i32scatter_epi32(out + waiting_pass_ * kAdjacent, _mm512_load_si512(at), v, 4);
#endif
  }

  const Tile& t_;
  const Part& part_;
  const Scratch scratch_;
  const int32_t panels_, groups_, chunks_;
  const int64_t vectors_at_, panel_bytes_;  // of a panel: where its steps lie
  int32_t rows_[kRows];
  int64_t offsets_[kRows], ahead_offsets_[kRows];  // of weight rows, from row 0 on; of prefetches
  const char *next_scales_, *ahead_ = nullptr;
  const uint32_t* source_ = nullptr;
  char* unpacked_ = nullptr;
  __mmask16 mask_ = 0;
  int32_t filled_ = 0, multiplied_ = 0;  // buffers: next ones
  int32_t source_pass_ = 0, source_chunk_ = 0;
  bool odd_ = false, pending_ = false;  // pending: results of unit_ are in tiles
  Unit unit_{};
  int32_t waiting_ = 0, waiting_pass_ = 0, waiting_group_ = 0;  // groups to be scaled
};

template <int32_t G, int32_t L, bool Z>
void multiply_parts(const Tile& t) {
  const TileConfig<G, L> config;
  memory_barrier();
  _tile_loadconfig(&config);
  const int32_t rest = t.columns % kRows, main = t.columns - rest;
  if (main > 0) {
    Part part{t.first, main, main / kRows, t.next, t.next_scales};
    if (rest > 0) {
      part.next = t.q + (t.first + main) * t.q_stride;
      part.next_scales = static_cast<const uint16_t*>(t.scales) + (t.first + main) * t.s_stride;
    }
    Multiplier<G, L, Z>(t, part).run();
  }
  if (rest > 0) {
    const Part part{t.first + main, rest, 1, t.next, t.next_scales};
    Multiplier<G, L, Z>(t, part).run();
  }
  _tile_release();
}

template <int32_t G, int32_t L>
void multiply_lanes(const Tile& t) {
  t.zeros == nullptr ? multiply_parts<G, L, false>(t) : multiply_parts<G, L, true>(t);
}

template <int32_t G>
void multiply_groups(const Tile& t) {
  switch (lanes_of(t.m)) {
    case 4:
      return multiply_lanes<G, 4>(t);
    case 8:
      return multiply_lanes<G, 8>(t);
    default:
      return multiply_lanes<G, 16>(t);
  }
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

const Kernels kAmxInt8 = {"amx_int8", row_bytes, rows_allocated, scratch_bytes,
                          prepare,    multiply,  activate,       store};

}  // namespace moe_int4::cpu
