// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Int8 dot-product kernel on AMX tiles (tdpbusd), for few activation rows.
//
// Activations are 16-bit integers, stored as two signed bytes, high and low (integers_avx512.h).
// Weights are unsigned bytes 0..15. A mask extracts four of a word's weights (half 0); a shift and
// a mask extract the other four (half 1). Sums over a group are exact integers and are then scaled
// in fp32.
//
// One tile product, 64 weights deep:
//
//     results               weights                  activations
//     16 lanes              64 bytes                 16 lanes of 4 bytes
//    +----------+          +----------------+       +----------+
//    | int32    | 16       | 16 words' half | 16    |          | 16 words' half
//    |          | weight +=| (4 weights     | weight|          | (4 activations
//    |          | rows     | each)          | rows  |          | each)
//    +----------+          +----------------+       +----------+
//
// A lane holds the high or the low bytes of one activation row. With few rows a product has lanes
// to spare, so several groups share it. Each group has its own set of lanes, and its activations
// are zero in the lanes of the other groups. With 2 rows (r0, r1; h = high bytes, l = low bytes):
//
//     lanes        0  1  2  3   4  5  6  7   8  9 10 11  12 13 14 15
//     group g     h0 h1 l0 l1   0  0  0  0   0  0  0  0   0  0  0  0
//     group g+1    0  0  0  0  h0 h1 l0 l1   0  0  0  0   0  0  0  0
//     group g+2    0  0  0  0   0  0  0  0  h0 h1 l0 l1   0  0  0  0
//     group g+3    0  0  0  0   0  0  0  0   0  0  0  0  h0 h1 l0 l1
//
// Activation rows are processed in panels of up to 8. A unit is the set of groups whose results
// share a pair of result tiles:
//
//     rows of the panel                1, 2      3, 4      5 to 8
//     lanes per group (L)              4         8         16
//     groups per unit (16 / L)         4         2         1
//     size of a unit, in chunks of 128 weights:
//       group size 128                 4         2         1
//       group size  64                 2         1         1/2
//       group size  32                 1         1/2       1/4
//
// Weight tiles of one chunk and unit:
//     unit of 1 chunk or more          2 tiles: half 0 of the chunk's 16 words; their half 1
//     half a chunk                     1 tile:  half 0 of 8 words, then their half 1
//     quarter of a chunk               1 tile of 32-byte rows: half 0 of 4 words, then their half 1
//
// A prepared panel in memory:
//     [chunk][32 half words, in the order of the weight tiles][16 lanes][4 bytes]
//     [unit][16 lanes]  float: the step of each lane's integers; 256 times the step for high bytes
//     [unit][16 lanes]  int32: -8 * the sum of the lane's bytes. Results start from it, because the
//                       kernel multiplies by q = 0..15 instead of q - 8.
#include <immintrin.h>

#include "integers_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kPanel = 8;    // activation rows in a panel
constexpr int32_t kChunk = 128;  // weights in a vector of words
constexpr int32_t kChunkWords = 16;
constexpr int32_t kTileBytes = 1024;
constexpr int32_t kChunkBytes = 2 * kTileBytes;  // a panel's chunk, or 16 unpacked weight rows
constexpr int32_t kRows = 32;                    // weight rows per pass, two blocks of 16
constexpr int32_t kTableGroups = 16;             // groups whose scales are converted together
// Of these, rows that are adjacent in memory. One store writes this many outputs.
constexpr int32_t kAdjacent = 4;

// L lanes per group, G groups in a chunk (the table above).
template <int32_t G, int32_t L>
struct Shape {
  static constexpr int32_t kSets = 16 / L;                       // groups in a unit
  static constexpr int32_t kUnits = G > kSets ? G / kSets : 1;   // in a chunk
  static constexpr int32_t kChunks = kSets > G ? kSets / G : 1;  // in a unit
};

int32_t chunks_of(int32_t k) { return (k + kChunk - 1) / kChunk; }

// Lanes per group for an expert with m rows.
int32_t lanes_of(int32_t m) { return m <= 2 ? 4 : m <= 4 ? 8 : 16; }

int32_t panels_of(int32_t m) { return (m + kPanel - 1) / kPanel; }

int32_t units_of(int32_t groups, int32_t lanes) {
  const int32_t sets = 16 / lanes;
  return (groups + sets - 1) / sets;
}

int64_t words_bytes(int32_t k) { return int64_t{chunks_of(k)} * kChunkBytes; }

int64_t panel_bytes(int32_t k, int32_t group_size, int32_t lanes) {
  return words_bytes(k) + int64_t{units_of(k / group_size, lanes)} * 128;
}

int64_t row_bytes(DType, int32_t k) { return int64_t{chunks_of(k)} * (kChunkBytes / 4); }

// The steps and sums of up to 4 units add a quarter to a chunk's size.
int32_t rows_allocated(DType, int32_t m) {
  const int32_t rows = 5 * panels_of(m);
  return rows > m ? rows : m;
}

// Puts the halves of the words in the order of the weight tiles. A chunk has U units.
template <int32_t U>
inline void arrange(__m512i (&v)[2]) {
  if constexpr (U == 1) return;
  const __m512i a = v[0], b = v[1];
  if constexpr (U == 2) {
    v[0] = _mm512_shuffle_i64x2(a, b, 0x44);
    v[1] = _mm512_shuffle_i64x2(a, b, 0xee);
  } else {
    v[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
    v[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
  }
}

// The group, of G in a chunk, of half word p (0..31) in the order of arrange<U>.
template <int32_t G, int32_t U>
constexpr int32_t group_of_word(int32_t p) {
  constexpr int32_t kWords = 16 / U;  // of a unit
  return (p / (2 * kWords) * kWords + p % kWords) * G / 16;
}

// Stores 16 words of L lanes as [word][16 lanes]: each word in its group's lanes, zeros in the
// others.
template <int32_t L>
inline void store_lanes(const __m512i (&v)[L], const int32_t* sets, char* to) {
  const auto lanes = [&](int32_t p) {
    return static_cast<__mmask16>(((1u << L) - 1) << (L * sets[p]));
  };
  if constexpr (L == 4) {
    const __m512i ab0 = _mm512_unpacklo_epi32(v[0], v[1]), ab1 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i cd0 = _mm512_unpacklo_epi32(v[2], v[3]), cd1 = _mm512_unpackhi_epi32(v[2], v[3]);
    // Quarter q of w[i] is word 4 * q + i.
    const __m512i w[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0),
                          _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
    const auto store_word = [&](int32_t p, __m512i word) {
      _mm512_store_si512(to + 64 * p, _mm512_maskz_mov_epi32(lanes(p), word));
    };
    for (int32_t i = 0; i < 4; ++i) {
      store_word(i, _mm512_shuffle_i32x4(w[i], w[i], 0x00));
      store_word(4 + i, _mm512_shuffle_i32x4(w[i], w[i], 0x55));
      store_word(8 + i, _mm512_shuffle_i32x4(w[i], w[i], 0xaa));
      store_word(12 + i, _mm512_shuffle_i32x4(w[i], w[i], 0xff));
    }
  } else {
    __m512i w[16];
    for (int32_t i = 0; i < 16; ++i) w[i] = i < L ? v[i] : _mm512_setzero_si512();
    transpose(w);
    for (int32_t p = 0; p < 16; ++p) {
      if constexpr (L == 8) {
        w[p] = _mm512_maskz_mov_epi32(lanes(p), _mm512_shuffle_i32x4(w[p], w[p], 0x44));
      }
      _mm512_store_si512(to + 64 * p, w[p]);
    }
  }
}

// Prepares rows [begin, end) of the source as one panel.
template <int32_t G, int32_t L>
void prepare_panel(const Source& source, int32_t begin, int32_t end, char* to) {
  using S = Shape<G, L>;
  const int32_t k = source.k;
  const int32_t units = units_of(k / source.group_size, L);
  auto* steps = reinterpret_cast<float*>(to + words_bytes(k));
  auto* starts = reinterpret_cast<int32_t*>(steps + 16 * units);
  memset(steps, 0, 128 * units);
  for (int32_t chunk = 0; chunk < chunks_of(k); ++chunk, to += kChunkBytes) {
    const int32_t count = k - chunk * kChunk < kChunk ? k - chunk * kChunk : kChunk;
    __m512i words[2][L];
    for (int32_t lane = 0; lane < L; ++lane) {
      words[0][lane] = words[1][lane] = _mm512_setzero_si512();
    }
    for (int32_t r = begin; r < end; ++r) {
      float values[kChunk];
      int16_t integers[kChunk] = {};
      to_float(source.dtype, source.a[r] + chunk * kChunk, count, values);
      const int32_t high_lane = r - begin, low_lane = high_lane + L / 2;
      for (int32_t i = 0; i < count; i += source.group_size) {
        const Quantized group = quantize(values + i, source.group_size, integers + i);
        const int32_t at = (chunk * G + i / source.group_size) * L;
        steps[at + high_lane] = 256 * group.step;
        steps[at + low_lane] = group.step;
        starts[at + high_lane] = -8 * group.high;
        starts[at + low_lane] = -8 * group.low;
      }
      __m512i high[2], low[2];
      split(integers, high, low);
      arrange<S::kUnits>(high);
      arrange<S::kUnits>(low);
      for (int32_t i = 0; i < 2; ++i) {
        words[i][high_lane] = high[i];
        words[i][low_lane] = low[i];
      }
    }
    int32_t sets[32];
    for (int32_t p = 0; p < 32; ++p) {
      sets[p] = (chunk * G + group_of_word<G, S::kUnits>(p)) % S::kSets;
    }
    for (int32_t i = 0; i < 2; ++i) store_lanes<L>(words[i], sets + 16 * i, to + i * kTileBytes);
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
  char* weights;     // two chunks, unpacked: [2 blocks][tiles]
  float* scales;     // [kRows][kTableGroups]
  float* zeros;      // the same shape: scale * (8 - zero point)
  float* totals;     // [panel][kRows][16 lanes]
  int32_t* results;  // [kRows][16 lanes], for one unit and panel
  Scratch(void* scratch, int32_t panels) {
    weights = static_cast<char*>(scratch);
    scales = reinterpret_cast<float*>(weights + 2 * 2 * kChunkBytes);
    zeros = scales + kTableGroups * kRows;
    totals = zeros + kTableGroups * kRows;
    results = reinterpret_cast<int32_t*>(totals + panels * kRows * 16);
  }
};

int64_t scratch_bytes(int32_t, int32_t, int32_t m) {
  const int64_t tables = 2 * 2 * kChunkBytes + int64_t{4} * 2 * kTableGroups * kRows;
  return tables + int64_t{4} * (panels_of(m) + 1) * kRows * 16;
}

// Tile registers: 0..3 results, 4 and 5 weights, 6 and 7 activations. A chunk has U units.
template <int32_t U>
struct alignas(64) TileConfig {
  static constexpr uint16_t kWeights = U == 4 ? 32 : 64;
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, kWeights, kWeights, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, kWeights / 4, kWeights / 4};
};

// gcc does not know that its tile intrinsics access memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Weight rows that one Multiplier handles: kRows per pass, or fewer in a single pass. A pass takes
// kAdjacent rows from each of several streams, and the next pass continues the streams, because
// long runs of memory are read fastest.
struct Part {
  int32_t first, columns, passes;
  const uint32_t* next;     // weights that the thread reads after this part
  const void* next_scales;  // and its scales

  // Row j of pass 0; past the last row, that row again.
  int32_t row(int32_t j) const {
    const int32_t at = j / kAdjacent * kAdjacent * passes + j % kAdjacent;
    return first + (at < columns ? at : columns - 1);
  }
};

// Multiplies a part. A chunk has G groups, a group has L lanes; Z: there are zero points.
//
// Loading a tile from memory that was just written stalls, and so does storing a result right after
// its product. Therefore the work overlaps: the first step of a unit multiplies it, unpacks weights
// of a later chunk, and stores and scales the results of the previous unit.
template <int32_t G, int32_t L, bool Z>
class Multiplier {
 public:
  Multiplier(const Tile& t, const Part& part)
      : t_(t),
        part_(part),
        scratch_(t.scratch, panels_of(t.m)),
        panels_(panels_of(t.m)),
        groups_(groups_of(t)),
        units_(units_of(groups_, L)),
        chunks_(chunks_of(t.k)),
        vectors_at_(words_bytes(t.k)),
        panel_bytes_(panel_bytes(t.k, t.group_size, L)),
        next_scales_(static_cast<const char*>(part.next_scales)) {
    for (int32_t j = 0; j < kRows; ++j) {
      rows_[j] = part.row(j);
      offsets_[j] = rows_[j] * t.q_stride;
    }
  }

  void run() {
    memset(scratch_.totals, 0, sizeof(float) * panels_ * kRows * 16);
    next_source();
    unpack(0, 4);
    for (int32_t pass = 0; pass < part_.passes; ++pass) {
      for (int32_t chunk = 0; chunk < chunks_; ++chunk) multiply_chunk(pass, chunk);
    }
    store_results();
    scale_results();
  }

 private:
  using S = Shape<G, L>;

  // One unit in one pass for one panel.
  struct Unit {
    int32_t pass, unit, panel;
  };

  void multiply_chunk(int32_t pass, int32_t chunk) {
    const char* weights = unpacked_;
    next_source();
    const bool first = chunk % S::kChunks == 0;
    const bool last = chunk % S::kChunks == S::kChunks - 1 || chunk + 1 == chunks_;
    int32_t quarter = 0;
    for (int32_t i = 0; i < S::kUnits; ++i) {
      const int32_t unit = chunk / S::kChunks * S::kUnits + i;
      if (unit == units_) break;
      const char* w = weights + (S::kUnits == 4 ? i / 2 * kTileBytes + i % 2 * 32 : i * kTileBytes);
      for (int32_t panel = 0; panel < panels_; ++panel) {
        const char* a = t_.a.data + panel * panel_bytes_;
        const char* words = a + int64_t{chunk} * kChunkBytes + i * (kChunkBytes / S::kUnits);
        if (first && pending_) store_results();
        memory_barrier();
        if (first) start_results(a + vectors_at_ + int64_t{units_ + unit} * 64);
        multiply_tiles(w, words);
        if constexpr (S::kUnits == 1) {
          if (panel == 0) unpack(0, 2);
          memory_barrier();
          multiply_tiles(w + kTileBytes, words + kTileBytes);
          if (panel == 0) unpack(2, 4);
        } else if (panel == 0) {
          unpack(quarter, quarter + 4 / S::kUnits);
          quarter += 4 / S::kUnits;
        }
        if (first) {
          if (waiting_) scale_results();
          if (panel == 0) load_tables(pass, unit * S::kSets);
        }
        if (last) {
          pending_ = true;
          unit_ = {pass, unit, panel};
          odd_ = !odd_;
        }
      }
    }
    if constexpr (S::kUnits > 1) {
      if (quarter < 4) unpack(quarter, 4);
    }
  }

  // The current unit's results are in tiles 0 (first 16 weight rows) and 1; in 2 and 3 if it is
  // odd.
  void start_results(const char* start) const {
    if (odd_) {
      _tile_loadd(2, start, 0);
      _tile_loadd(3, start, 0);
    } else {
      _tile_loadd(0, start, 0);
      _tile_loadd(1, start, 0);
    }
  }

  void multiply_tiles(const char* w, const char* a) const {
    _tile_loadd(4, w, 64);
    _tile_loadd(5, w + kChunkBytes, 64);
    _tile_loadd(6, a, 64);
    if (odd_) {
      _tile_dpbusd(2, 4, 6);
      _tile_dpbusd(3, 5, 6);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
    }
  }

  // Stores the results of the previous unit.
  void store_results() {
    int32_t* to = scratch_.results;
    memory_barrier();
    if (odd_) {  // the previous unit was even
      _tile_stored(0, to, 64);
      _tile_stored(1, to + 256, 64);
    } else {
      _tile_stored(2, to, 64);
      _tile_stored(3, to + 256, 64);
    }
    memory_barrier();
    waiting_ = true;
  }

  // Selects the next chunk to unpack; past the end, the last one again.
  void next_source() {
    source_ = t_.q + int64_t{source_pass_} * kAdjacent * t_.q_stride + source_chunk_ * kChunkWords;
    mask_ = first_lanes(t_.k / 8 - source_chunk_ * kChunkWords);
    char* first = scratch_.weights;
    unpacked_ = unpacked_ == first ? first + 2 * kChunkBytes : first;
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

  // Unpacks quarters [begin, end) of the chunk's weight rows. Working in quarters lets the compiler
  // interleave the tile products.
  void unpack(int32_t begin, int32_t end) const {
    const __m512i nibbles = _mm512_set1_epi32(0x0f0f0f0f);
    const uint32_t* source = source_;  // a copy: stores below might alias members
    const char* ahead = ahead_;
    const int64_t stream = int64_t{4} * part_.passes * kAdjacent * t_.q_stride;
    char* to = unpacked_;
    const __mmask16 mask = mask_;
    for (int32_t j = begin * (kRows / 4); j < end * (kRows / 4); ++j) {
      // Prefetches the stream's following rows in address order.
      _mm_prefetch(ahead + j / kAdjacent * stream + j % kAdjacent * 64, _MM_HINT_T1);
      const __m512i words = _mm512_maskz_loadu_epi32(mask, source + offsets_[j]);
      __m512i v[2] = {_mm512_and_si512(words, nibbles),
                      _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles)};
      arrange<S::kUnits>(v);
      char* row = to + j / 16 * kChunkBytes + j % 16 * 64;
      _mm512_store_si512(row, v[0]);
      _mm512_store_si512(row + kTileBytes, v[1]);
    }
  }

  // Converts the scales and zero points of kTableGroups groups when it reaches the first of them.
  void load_tables(int32_t pass, int32_t group) {
    for (int32_t i = 0; i < S::kSets; ++i, next_scales_ += 2 * kRows) {
      _mm_prefetch(next_scales_, _MM_HINT_T0);
    }
    if (group % kTableGroups != 0) return;
    const __mmask16 mask = first_lanes(groups_ - group);
    const auto* from = static_cast<const uint16_t*>(t_.scales) + group;
    const int64_t stride = t_.s_stride;
    const DType dtype = t_.dtype;
    for (int32_t j = 0; j < kRows; ++j) {
      const int32_t row = rows_[j] + pass * kAdjacent;
      const __m512 scales = load_16(dtype, from + row * stride, mask);
      _mm512_store_ps(scratch_.scales + j * kTableGroups, scales);
      if constexpr (Z) {
        const __m512 offset = _mm512_sub_ps(_mm512_set1_ps(8), zero_points(t_, row, group, mask));
        _mm512_store_ps(scratch_.zeros + j * kTableGroups, _mm512_mul_ps(scales, offset));
      }
    }
  }

  // totals += scale * step * results + scale * (8 - zero point) * step * sum, for the previous
  // unit.
  void scale_results() {
    waiting_ = false;
    const char* vectors =
        t_.a.data + unit_.panel * panel_bytes_ + vectors_at_ + int64_t{unit_.unit} * 64;
    const __m512 steps = _mm512_load_ps(vectors);
    const __m512i start = _mm512_load_si512(vectors + int64_t{units_} * 64);
    const __m512 sums =
        _mm512_mul_ps(steps, _mm512_mul_ps(_mm512_cvtepi32_ps(start), _mm512_set1_ps(-0.125f)));
    const __m512i set = _mm512_srli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), L == 4 ? 2 : 3);
    const auto of_lanes = [&](const float* table) {
      return S::kSets == 1
                 ? _mm512_set1_ps(*table)
                 : _mm512_permutexvar_ps(set, _mm512_castps128_ps512(_mm_loadu_ps(table)));
    };
    const int32_t group = unit_.unit * S::kSets % kTableGroups;
    const float *scales = scratch_.scales + group, *zeros = scratch_.zeros + group;
    const int32_t* results = scratch_.results;
    float* totals = scratch_.totals + unit_.panel * kRows * 16;
    for (int32_t j = 0; j < kRows; ++j) {
      const __m512i result = _mm512_load_si512(results + 16 * j);
      const __m512 scale = _mm512_mul_ps(of_lanes(scales + j * kTableGroups), steps);
      __m512 total = _mm512_load_ps(totals + 16 * j);
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(result), scale, total);
      if constexpr (Z) {
        total = _mm512_fmadd_ps(of_lanes(zeros + j * kTableGroups), sums, total);
      }
      _mm512_store_ps(totals + 16 * j, total);
    }
    if (unit_.unit + 1 == units_) finish();
  }

  // out = totals of the high bytes + totals of the low bytes, summed over the groups' lanes; clears
  // the totals.
  void finish() const {
    const int32_t first = unit_.panel * kPanel;
    const int32_t rows = t_.m - first < kPanel ? t_.m - first : kPanel;
    float* out = t_.out + first * t_.out_stride + part_.first - t_.first;
    for (int32_t block = 0; block < 2; ++block) {
      float* total = scratch_.totals + (unit_.panel * 2 + block) * 256;
      __m512i v[16];
      for (int32_t j = 0; j < 16; ++j) {
        v[j] = _mm512_load_si512(total + 16 * j);
        _mm512_store_ps(total + 16 * j, _mm512_setzero_ps());
      }
      transpose(v);
      for (int32_t r = 0; r < L / 2; ++r) {
        __m512 sum = _mm512_setzero_ps();
        for (int32_t lane = r; lane < 16; lane += L / 2) {
          sum = _mm512_add_ps(sum, _mm512_castsi512_ps(v[lane]));
        }
        if (r < rows) store_columns(_mm512_castps_si512(sum), block, out + r * t_.out_stride);
      }
    }
  }

  // Stores outputs of 16 weight rows.
  void store_columns(__m512i v, int32_t block, float* out) const {
    if (part_.passes == 1) {
      const __mmask16 mask = first_lanes(part_.columns - 16 * block);
      return _mm512_mask_storeu_epi32(out + 16 * block, mask, v);
    }
    const int64_t stream = part_.passes * kAdjacent;
    out += 4 * block * stream + unit_.pass * kAdjacent;
    _mm_storeu_ps(out, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 0)));
    _mm_storeu_ps(out + stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 1)));
    _mm_storeu_ps(out + 2 * stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 2)));
    _mm_storeu_ps(out + 3 * stream, _mm_castsi128_ps(_mm512_extracti32x4_epi32(v, 3)));
  }

  const Tile& t_;
  const Part& part_;
  const Scratch scratch_;
  const int32_t panels_, groups_, units_, chunks_;
  const int64_t vectors_at_, panel_bytes_;  // of a panel: offset of its steps, and size
  int32_t rows_[kRows];                     // weight rows of pass 0
  int64_t offsets_[kRows];
  const char *next_scales_, *ahead_ = nullptr;
  const uint32_t* source_ = nullptr;
  char* unpacked_ = nullptr;
  __mmask16 mask_ = 0;
  int32_t source_pass_ = 0, source_chunk_ = 0;
  bool odd_ = false;
  bool pending_ = false, waiting_ = false;  // unit_'s results are in tiles; in memory
  Unit unit_{};
};

template <int32_t G, int32_t L, bool Z>
void multiply_parts(const Tile& t) {
  const TileConfig<Shape<G, L>::kUnits> config;
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

const Kernel kAmxInt8 = {"amx_int8", row_bytes, rows_allocated, scratch_bytes, prepare, multiply};

}  // namespace moe_int4::cpu
