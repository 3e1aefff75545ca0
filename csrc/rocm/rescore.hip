// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// wvSplitK_int_g_rescore, see hybrid_w4a16_dense_ops.py. First, each block finds the largest
// product and the largest lower bound in a part of the vocabulary. Then every block recomputes the
// products of its own part that could matter given the maximum over all parts: one row of weights
// per wave. Which products are recomputed depends only on the values, and the order of sums only on
// k.
// fork: begin overlay
// With matrix instructions: 8 rows of weights per block, whose waves share k.
// fork: end
#include "dequant.cuh"
#include "entry_points_dense.h"

namespace moe_int4 {
namespace {

constexpr float kLowest = -3.0e38f;
// Rounding to bf16 changes a product by less than this share of it; fp16 is finer.
constexpr float kRounding = 0x1p-7f;
constexpr int kMaxRows = 16;

GPU_DEVICE int thread() { return gpu::wave() * gpu::kWaveSize + gpu::lane(); }

GPU_DEVICE int part_begin(int n, int part) {
  return static_cast<int>(static_cast<int64_t>(n) * part / kRescoreParts);
}

GPU_DEVICE float absolute(float x) { return x < 0.0f ? -x : x; }

GPU_DEVICE float larger(float a, float b) { return a > b ? a : b; }

GPU_DEVICE float sum_of_wave(float x) {
  x += gpu::shuffle_xor<1>(x);
  x += gpu::shuffle_xor<2>(x);
  x += gpu::shuffle_xor<4>(x);
  x += gpu::shuffle_xor<8>(x);
  return x + gpu::shuffle_xor<16>(x);
}

GPU_DEVICE float largest_of_wave(float x) {
  x = larger(x, gpu::shuffle_xor<1>(x));
  x = larger(x, gpu::shuffle_xor<2>(x));
  x = larger(x, gpu::shuffle_xor<4>(x));
  x = larger(x, gpu::shuffle_xor<8>(x));
  return larger(x, gpu::shuffle_xor<16>(x));
}

// Squared norm of a row, computed by one wave, in all its lanes.
template <typename DT>
GPU_DEVICE float squares_of_row(const uint16_t* row, int k) {
  float sum = 0.0f;
  for (int i = 8 * gpu::lane(); i < k; i += 8 * gpu::kWaveSize) {
    const gpu::U32x4 x = gpu::load_16_any(row + i);
    GPU_UNROLL
    for (int j = 0; j < 4; ++j) sum = gpu::dot2(DT{}, x.v[j], x.v[j], sum);
  }
  return sum_of_wave(sum);
}

// The reach of a product: its largest possible error.
GPU_DEVICE float reach(float norm, float error, float product) {
  return norm * error + kRounding * absolute(product);
}

// norms[i] = bound * |row i of a|, one wave each. A block barrier has to follow.
template <typename DT>
GPU_DEVICE void find_norms(const void* a, int64_t stride, int m, int k, float bound, int waves,
                           float* norms) {
  for (int i = gpu::wave(); i < m; i += waves) {
    const float squares = squares_of_row<DT>(static_cast<const uint16_t*>(a) + i * stride, k);
    if (gpu::lane() == 0) norms[i] = bound * gpu::sqrt_of(squares);
  }
}

#define RESCORE_LARGEST_VALUES \
  a, a_stride_m, m, k, errors, n, c, c_stride_m, partials, p_stride_m, bound, waves
#define RESCORE_ROWS_VALUES                                                                   \
  a, a_stride_m, m, w, w_stride_n, k, errors, n, c, c_stride_m, partials, p_stride_m, window, \
      bound, waves

template <typename DT>
GPU_DEVICE void largest(RESCORE_LARGEST_ARGS) {
  gpu::keep_arguments(RESCORE_LARGEST_VALUES);
  float* const norms = reinterpret_cast<float*>(gpu::dynamic_lds());
  float* const of_waves = norms + kMaxRows;  // [wave][row][2]
  const int end = part_begin(n, gpu::block_x() + 1);
  const auto* products = static_cast<const uint16_t*>(c);
  gpu::wait_previous_grid();
  find_norms<DT>(a, a_stride_m, m, k, bound, waves, norms);
  gpu::block_barrier();

  float value[kMaxRows], reached[kMaxRows];
  GPU_UNROLL
  for (int i = 0; i < kMaxRows; ++i) value[i] = reached[i] = kLowest;
  for (int j = part_begin(n, gpu::block_x()) + thread(); j < end; j += waves * gpu::kWaveSize) {
    const float error = errors[j];
    if (error < 0.0f) continue;
    GPU_UNROLL
    for (int i = 0; i < kMaxRows; ++i) {
      if (i >= m) continue;
      const float product = Format<DT>::to_float(products[i * c_stride_m + j]);
      value[i] = larger(product, value[i]);
      reached[i] = larger(product - reach(norms[i], error, product), reached[i]);
    }
  }
  gpu::allow_next_grid();
  GPU_UNROLL
  for (int i = 0; i < kMaxRows; ++i) {
    if (i >= m) continue;
    const float most = largest_of_wave(value[i]), bound_reached = largest_of_wave(reached[i]);
    if (gpu::lane() == 0) {
      of_waves[2 * (gpu::wave() * kMaxRows + i)] = most;
      of_waves[2 * (gpu::wave() * kMaxRows + i) + 1] = bound_reached;
    }
  }
  gpu::block_barrier();
  if (thread() >= 2 * m) return;
  float most = kLowest;
  for (int w = 0; w < waves; ++w) most = larger(of_waves[2 * w * kMaxRows + thread()], most);
  partials[thread() / 2 * p_stride_m + 2 * gpu::block_x() + thread() % 2] = most;
}

// The columns of a part that have to be recomputed, in order.
struct Asked {
  uint32_t* bits;  // [column] one bit per activation row
  uint32_t* list;  // [total] columns
  int total;
};

// Products of one row of weights, computed by one wave.
template <typename DT>
GPU_DEVICE void rescore_row(const uint16_t* a, int64_t a_stride, const uint16_t* row, int k,
                            uint32_t bits, uint16_t* c, int64_t c_stride) {
  constexpr int kTogether = 4;  // loads of 16 bytes to request before the first use
  constexpr int kStep = 8 * gpu::kWaveSize;
  float sum[kMaxRows] = {};
  for (int at = 8 * gpu::lane(); at < k; at += kTogether * kStep) {
    gpu::U32x4 weights[kTogether];
    GPU_UNROLL
    for (int t = 0; t < kTogether; ++t) {
      const int from = at + t * kStep;
      weights[t] = gpu::load_weights(row + (from < k ? from : k - 8));
    }
    GPU_UNROLL
    for (int i = 0; i < kMaxRows; ++i) {
      if ((bits >> i & 1) == 0) continue;
      GPU_UNROLL
      for (int t = 0; t < kTogether; ++t) {
        const int from = at + t * kStep;
        if (from >= k) continue;
        const gpu::U32x4 values = gpu::load_16_any(a + i * a_stride + from);
        GPU_UNROLL
        for (int v = 0; v < 4; ++v) {
          sum[i] = gpu::dot2(DT{}, weights[t].v[v], values.v[v], sum[i]);
        }
      }
    }
  }
  GPU_UNROLL
  for (int i = 0; i < kMaxRows; ++i) {
    if ((bits >> i & 1) == 0) continue;
    const float total = sum_of_wave(sum[i]);
    if (gpu::lane() == 0) c[i * c_stride] = Format<DT>::from_float(total);
  }
}

#if GPU_HAS_MMA
GPU_DEVICE int bits_set(uint32_t x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return static_cast<int>((x + (x >> 4) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

constexpr int kColumns = 8;  // rows of weights at a time, the columns of the matrix instruction
constexpr int kResults = kMaxRows * kColumns;

// All products to recompute, by one block: each wave multiplies a range of k of kColumns rows of
// weights with all activation rows, then the sums of the waves are added in order. `results` is
// [2][wave][row][column].
template <typename DT, bool Aligned>
GPU_DEVICE void rescore_columns(const uint16_t* a, int64_t a_stride, int m, const uint16_t* w,
                                int64_t w_stride, int k, const Asked& asked, int waves,
                                float* results, uint16_t* c, int64_t c_stride) {
  constexpr int kTogether = 4;
  constexpr int kStep = 32;  // along k, 8 per lane
  const int row = gpu::lane() / 4, lane_k = gpu::lane() % 4 * 8;
  const int steps = (k + kStep - 1) / kStep, of_wave = (steps + waves - 1) / waves;
  const int first = gpu::wave() * of_wave;
  const int last = first + of_wave < steps ? first + of_wave : steps;
  // Activation rows that do not exist repeat the last one; their results are discarded.
  const uint16_t* const a0 = a + (row < m ? row : m - 1) * a_stride;
  const uint16_t* const a1 = a + (row + 8 < m ? row + 8 : m - 1) * a_stride;
  gpu::U32x4 weights[kTogether];
  const auto request = [&](int base, int step) {
    if (base >= asked.total || first >= last) return;
    const int place = base + row < asked.total ? base + row : asked.total - 1;
    const uint16_t* const column = w + asked.list[place] * w_stride;
    GPU_UNROLL
    for (int t = 0; t < kTogether; ++t) {
      const int at = (step + t) * kStep + lane_k;
      weights[t] = gpu::load_weights(column + (at < k ? at : k - 8));
    }
  };
  request(0, first);
  for (int base = 0; base < asked.total; base += kColumns) {
    float sum[4] = {};
    for (int step = first; step < last; step += kTogether) {
      GPU_UNROLL
      for (int t = 0; t < kTogether; ++t) {
        const int at = (step + t) * kStep + lane_k;
        gpu::U32x4 x = {{0, 0, 0, 0}}, y = {{0, 0, 0, 0}};
        if (step + t < last && at < k) {
          x = load_activations<Aligned>(a0 + at);
          if (m > 8) y = load_activations<Aligned>(a1 + at);
        }
        const gpu::U32x4& b = weights[t];
        mma_16x8x16(DT{}, sum, {x.v[0], y.v[0], x.v[1], y.v[1]}, {b.v[0], b.v[1]});
        mma_16x8x16(DT{}, sum, {x.v[2], y.v[2], x.v[3], y.v[3]}, {b.v[2], b.v[3]});
      }
      // The next weights are on their way during the sum over the waves.
      const bool more = step + kTogether < last;
      request(more ? base : base + kColumns, more ? step + kTogether : first);
    }
    float* const now = results + base / kColumns % 2 * (waves * kResults);
    float* const mine = now + gpu::wave() * kResults;
    const int at = row * kColumns + gpu::lane() % 4 * 2;
    mine[at] = sum[0];
    mine[at + 1] = sum[1];
    mine[at + 8 * kColumns] = sum[2];
    mine[at + 8 * kColumns + 1] = sum[3];
    gpu::block_barrier();
    if (thread() >= kResults) continue;
    const int i = thread() / kColumns, j = base + thread() % kColumns;
    if (i >= m || j >= asked.total || (asked.bits[asked.list[j]] >> i & 1) == 0) continue;
    float total = 0.0f;
    for (int v = 0; v < waves; ++v) total += now[v * kResults + thread()];
    c[i * c_stride + asked.list[j]] = Format<DT>::from_float(total);
  }
}
#endif

template <typename DT>
GPU_DEVICE void rows(RESCORE_ROWS_ARGS) {
  gpu::keep_arguments(RESCORE_ROWS_VALUES);
  const int begin = part_begin(n, gpu::block_x());
  const int count = part_begin(n, gpu::block_x() + 1) - begin;
  const int padded = (count + gpu::kWaveSize - 1) / gpu::kWaveSize * gpu::kWaveSize;
  float* const norms = reinterpret_cast<float*>(gpu::dynamic_lds());
  float* const lowest = norms + kMaxRows;
  float* const reached = lowest + kMaxRows;
  float* const results = reached + kMaxRows;
  Asked asked = {};
#if GPU_HAS_MMA
  asked.bits = reinterpret_cast<uint32_t*>(results + 2 * waves * kResults);
#else
  asked.bits = reinterpret_cast<uint32_t*>(results);
#endif
  asked.list = asked.bits + padded;
  uint32_t* const counts = asked.list + padded;  // per kWaveSize columns
  const auto* activations = static_cast<const uint16_t*>(a);
  auto* products = static_cast<uint16_t*>(c);

  // a is complete: the previous grid, largest(), started after it was written.
  find_norms<DT>(a, a_stride_m, m, k, bound, waves, norms);
  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  for (int i = gpu::wave(); i < m; i += waves) {
    float value = kLowest, bound_reached = kLowest;
    for (int part = gpu::lane(); part < kRescoreParts; part += gpu::kWaveSize) {
      value = larger(partials[i * p_stride_m + 2 * part], value);
      bound_reached = larger(partials[i * p_stride_m + 2 * part + 1], bound_reached);
    }
    value = largest_of_wave(value);
    bound_reached = largest_of_wave(bound_reached);
    if (gpu::lane() == 0) {
      lowest[i] = value - window;
      reached[i] = bound_reached;
    }
  }
  gpu::block_barrier();

  for (int j = thread(); j < padded; j += waves * gpu::kWaveSize) {
    uint32_t bits = 0;
    const float error = j < count ? errors[begin + j] : -1.0f;
    if (error >= 0.0f) {
      for (int i = 0; i < m; ++i) {
        const float product = Format<DT>::to_float(products[i * c_stride_m + begin + j]);
        const bool may_win = product + reach(norms[i], error, product) >= reached[i];
        if (may_win || product >= lowest[i]) bits |= 1u << i;
      }
    }
    asked.bits[j] = bits;
    const uint32_t found = gpu::wave_ballot(bits != 0);
    if (gpu::lane() == 0) counts[j / gpu::kWaveSize] = found;
  }
  gpu::block_barrier();

  products += begin;
  const uint16_t* const weights = static_cast<const uint16_t*>(w) + begin * w_stride_n;
#if GPU_HAS_MMA
  // Every wave counts the entries before its columns.
  for (int base = 0; base < padded; base += gpu::kWaveSize) {
    const uint32_t found = counts[base / gpu::kWaveSize];
    const uint32_t before = found & ((1u << gpu::lane()) - 1);
    if (base / gpu::kWaveSize % waves == gpu::wave() && (found >> gpu::lane() & 1) != 0) {
      asked.list[asked.total + bits_set(before)] = base + gpu::lane();
    }
    asked.total += bits_set(found);
  }
  gpu::block_barrier();
  with_alignment(a, a_stride_m, [&](auto aligned) {
    rescore_columns<DT, decltype(aligned)::kValue>(activations, a_stride_m, m, weights, w_stride_n,
                                                   k, asked, waves, results, products, c_stride_m);
  });
#else
  for (int base = gpu::wave() * gpu::kWaveSize; base < padded; base += waves * gpu::kWaveSize) {
    for (uint32_t left = counts[base / gpu::kWaveSize]; left != 0; left &= left - 1) {
      const int column = base + gpu::first_bit(left);
      rescore_row<DT>(activations, a_stride_m, weights + column * w_stride_n, k, asked.bits[column],
                      products + column, c_stride_m);
    }
  }
#endif
}

}  // namespace
}  // namespace moe_int4

#define RESCORE_DEFINE(NAME, DT)                                                             \
  extern "C" GPU_KERNEL(kRescoreThreads) void rescore_largest_##NAME(RESCORE_LARGEST_ARGS) { \
    moe_int4::largest<DT>(RESCORE_LARGEST_VALUES);                                           \
  }                                                                                          \
  extern "C" GPU_KERNEL(kRescoreThreads) void rescore_rows_##NAME(RESCORE_ROWS_ARGS) {       \
    moe_int4::rows<DT>(RESCORE_ROWS_VALUES);                                                 \
  }
RESCORE_DEFINE(f16, gpu::Half)
RESCORE_DEFINE(bf16, gpu::BFloat16)
