// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// wvSplitK_int_g_rescore, see hybrid_w4a16_dense_ops.py: blocks find the largest product and lower
// bound of a part of the vocabulary each; then every block computes those products of its own part
// again that the largest of all ask for, a wave a row of weights. Nothing but the values decides
// what is computed, and sums have an order that depends on k alone.
#include "dequant.cuh"
#include "entry_points_dense.h"

namespace moe_int4 {
namespace {

constexpr float kLowest = -3.0e38f;
// Rounding to 16 bits moves a product by less than this part of it, in bf16; fp16 is finer.
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

// Square of the norm of a row, by one wave, in all its lanes.
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

// The reach of a product: what it may be off by.
GPU_DEVICE float reach(float norm, float error, float product) {
  return norm * error + kRounding * absolute(product);
}

template <typename DT>
GPU_DEVICE void largest(RESCORE_LARGEST_ARGS) {
  float* const lds = reinterpret_cast<float*>(gpu::dynamic_lds());
  const int m = gpu::block_y(), part = gpu::block_x();
  gpu::wait_previous_grid();
  const float squares = squares_of_row<DT>(static_cast<const uint16_t*>(a) + m * a_stride_m, k);
  const float norm = bound * gpu::sqrt_of(squares);
  const auto* products = static_cast<const uint16_t*>(c) + m * c_stride_m;
  const int end = part_begin(n, part + 1);
  float value = kLowest, reached = kLowest;
  for (int i = part_begin(n, part) + thread(); i < end; i += waves * gpu::kWaveSize) {
    const float error = errors[i];
    if (error < 0.0f) continue;
    const float product = Format<DT>::to_float(products[i]);
    value = larger(product, value);
    reached = larger(product - reach(norm, error, product), reached);
  }
  gpu::allow_next_grid();
  value = largest_of_wave(value);
  reached = largest_of_wave(reached);
  if (gpu::lane() == 0) {
    lds[2 * gpu::wave()] = value;
    lds[2 * gpu::wave() + 1] = reached;
  }
  gpu::block_barrier();
  if (thread() != 0) return;
  for (int w = 1; w < waves; ++w) {
    value = larger(lds[2 * w], value);
    reached = larger(lds[2 * w + 1], reached);
  }
  partials[m * p_stride_m + 2 * part] = value;
  partials[m * p_stride_m + 2 * part + 1] = reached;
}

template <typename DT>
GPU_DEVICE void rows(RESCORE_ROWS_ARGS) {
  // [m] norms, lowest products and reached bounds; then a bit per activation row for each column.
  float* const norms = reinterpret_cast<float*>(gpu::dynamic_lds());
  float* const lowest = norms + kMaxRows;
  float* const reached = lowest + kMaxRows;
  uint32_t* const asked = reinterpret_cast<uint32_t*>(reached + kMaxRows);
  const int begin = part_begin(n, gpu::block_x());
  const int count = part_begin(n, gpu::block_x() + 1) - begin;
  const auto* activations = static_cast<const uint16_t*>(a);
  auto* products = static_cast<uint16_t*>(c);

  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  for (int i = gpu::wave(); i < m; i += waves) {
    const float squares = squares_of_row<DT>(activations + i * a_stride_m, k);
    float value = kLowest, bound_reached = kLowest;
    for (int part = gpu::lane(); part < kRescoreParts; part += gpu::kWaveSize) {
      value = larger(partials[i * p_stride_m + 2 * part], value);
      bound_reached = larger(partials[i * p_stride_m + 2 * part + 1], bound_reached);
    }
    value = largest_of_wave(value);
    bound_reached = largest_of_wave(bound_reached);
    if (gpu::lane() == 0) {
      norms[i] = bound * gpu::sqrt_of(squares);
      lowest[i] = value - window;
      reached[i] = bound_reached;
    }
  }
  gpu::block_barrier();

  const int padded = (count + gpu::kWaveSize - 1) / gpu::kWaveSize * gpu::kWaveSize;
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
    asked[j] = bits;
  }
  gpu::block_barrier();

  for (int base = gpu::wave() * gpu::kWaveSize; base < padded; base += waves * gpu::kWaveSize) {
    const uint32_t mine = asked[base + gpu::lane()];
    for (uint32_t left = gpu::wave_ballot(mine != 0); left != 0; left &= left - 1) {
      const int column = begin + base + gpu::first_bit(left);
      const uint32_t bits = asked[column - begin];
      const uint16_t* row = static_cast<const uint16_t*>(w) + column * w_stride_n;
      float sum[kMaxRows] = {};
      constexpr int kTogether = 4;  // loads of 16 bytes that are requested before the first use
      constexpr int kStep = 8 * gpu::kWaveSize;
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
          const uint16_t* x = activations + i * a_stride_m;
          GPU_UNROLL
          for (int t = 0; t < kTogether; ++t) {
            const int from = at + t * kStep;
            if (from >= k) continue;
            const gpu::U32x4 values = gpu::load_16_any(x + from);
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
        if (gpu::lane() == 0) {
          products[i * c_stride_m + column] = Format<DT>::from_float(total);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moe_int4

#define RESCORE_DEFINE(NAME, DT)                                                                   \
  extern "C" GPU_KERNEL(kRescoreThreads) void rescore_largest_##NAME(RESCORE_LARGEST_ARGS) {       \
    moe_int4::largest<DT>(a, a_stride_m, k, errors, n, c, c_stride_m, partials, p_stride_m, bound, \
                          waves);                                                                  \
  }                                                                                                \
  extern "C" GPU_KERNEL(kRescoreThreads) void rescore_rows_##NAME(RESCORE_ROWS_ARGS) {             \
    moe_int4::rows<DT>(a, a_stride_m, m, w, w_stride_n, k, errors, n, c, c_stride_m, partials,     \
                       p_stride_m, window, bound, waves);                                          \
  }
RESCORE_DEFINE(f16, gpu::Half)
RESCORE_DEFINE(bf16, gpu::BFloat16)
