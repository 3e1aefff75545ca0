// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Names and arguments of the dense kernels' entry points, as in entry_points.h. A name states
// dtype, bits, group size, zero points and how many activation rows it has room for:
// wvSplitK_int_g_bf16_b4_g128_sym_t8. Arguments are those of DenseArgs and RescoreArgs
// (moe_int4_args.h); in addition
//   waves     waves of 32 in the block
//   k_slices  1, or waves: the waves of a block share k of one tile of kRowsPerWave rows
//   tiles     that each wave (k_slices 1) or block multiplies, or one fewer at the end
//   step      from one of them to the next
// Grids: wvSplitK_int_g   blocks, 1, 1
//        rescore_largest  kRescoreParts, 1, 1
//        rescore_rows     kRescoreParts, 1, 1
#pragma once

#include "geometry.h"
#include "moe_int4_args.h"

#define DENSE_ARGS                                                                           \
  const void *a, int64_t a_stride_m, int m, const uint32_t *q, int q_stride_n,               \
      const uint16_t *scales, int s_stride_n, const uint32_t *zeros, int z_stride_n8, int n, \
      int k, void *c, int64_t c_stride_m, int waves, int k_slices, int tiles, int step
#define RESCORE_LARGEST_ARGS                                                                  \
  const void *a, int64_t a_stride_m, int m, int k, const float *errors, int n, const void *c, \
      int64_t c_stride_m, float *partials, int64_t p_stride_m, float bound, int waves
#define RESCORE_ROWS_ARGS                                                             \
  const void *a, int64_t a_stride_m, int m, const void *w, int64_t w_stride_n, int k, \
      const float *errors, int n, void *c, int64_t c_stride_m, const float *partials, \
      int64_t p_stride_m, float window, float bound, int waves

// X(dtype name, dtype tag, bits, group size, zero points name, has zero points, T)
// Activations of 16 rows need more LDS than AMD has, and sums of them more registers.
#if GPU_HAS_MMA
#define DENSE_FOR_T(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 4) X(__VA_ARGS__, 8) X(__VA_ARGS__, 16)
#else
#define DENSE_FOR_T(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 4) X(__VA_ARGS__, 8)
#endif
#define DENSE_FOR_4(X, NAME, DT, G) \
  DENSE_FOR_T(X, NAME, DT, 4, G, sym, false) DENSE_FOR_T(X, NAME, DT, 4, G, zp, true)
#define DENSE_FOR_BITS(X, NAME, DT)           \
  DENSE_FOR_4(X, NAME, DT, 32)                \
  DENSE_FOR_4(X, NAME, DT, 64)                \
  DENSE_FOR_4(X, NAME, DT, 128)               \
  DENSE_FOR_T(X, NAME, DT, 8, 32, sym, false) \
  DENSE_FOR_T(X, NAME, DT, 8, 64, sym, false) \
  DENSE_FOR_T(X, NAME, DT, 8, 128, sym, false)
#define DENSE_FOR_ALL(X) DENSE_FOR_BITS(X, f16, gpu::Half) DENSE_FOR_BITS(X, bf16, gpu::BFloat16)

#define DENSE_NAME(NAME, BITS, G, ZNAME, T) wvSplitK_int_g_##NAME##_b##BITS##_g##G##_##ZNAME##_t##T
constexpr int kDenseThreads = 256;
constexpr int kRescoreThreads = 512;
#define DENSE_DECLARE(NAME, DT, BITS, G, ZNAME, ZP, T) \
  GPU_DECLARE(kDenseThreads, DENSE_NAME(NAME, BITS, G, ZNAME, T), DENSE_ARGS)
DENSE_FOR_ALL(DENSE_DECLARE)

GPU_DECLARE(kRescoreThreads, rescore_largest_f16, RESCORE_LARGEST_ARGS)
GPU_DECLARE(kRescoreThreads, rescore_largest_bf16, RESCORE_LARGEST_ARGS)
GPU_DECLARE(kRescoreThreads, rescore_rows_f16, RESCORE_ROWS_ARGS)
GPU_DECLARE(kRescoreThreads, rescore_rows_bf16, RESCORE_ROWS_ARGS)
