// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Names and arguments of the kernels' entry points. A name gives the op, the dtype, the group size,
// whether there are zero points, and the most activation rows that share one pass over an expert's
// weights: moe_int4_down_bf16_g128_sym_t8. Arguments are scalars and pointers only, so that a code
// object can be loaded and launched on its own. moe_int4_args.h documents them, except for:
//   waves            waves of 32 lanes in the block (block size is 32 * waves)
//   wave_lds_bytes   dynamic LDS per wave, lds_bytes_per_wave of geometry.h
//   blocks           blocks of kBlockK weights along k
//   blocks_per_wave  blocks that each wave multiplies; the last waves may have fewer
//   log2_k_slices    2^this waves share one expert's k in the down kernels; divides waves
// fork: begin overlay
//   slots            most pairs of one expert that share a pass over its weights, up to T
//   row_tiles        tiles that each wave of grouped_gate_up, tiled_gate_up or tiled_down
//                    multiplies; a tile is kGateUpRows * kRowGroups indices of the intermediate
//                    size, in tiled_down kTiledDownRows * kRowsPerWave rows
// fork: end
// Grids:
//        gate_up ceil(inter / kRowGroups), top_k, num_tokens
//        down    ceil(n / kRowsPerWave), ceil(num_tokens / T), 1
//        gemm    ceil(n / kRowsPerWave), num_blocks, 1
// fork: begin overlay
//        multi_gate_up   ceil(inter / (row tiles of a block)), top_k, num_tokens; a block derives
//                        its row tiles from grid_x
//        grouped_gate_up ceil(inter / (waves * row_tiles tiles)), most lists of pairs,
//                        ceil(num_tokens / kGroupTokens)
//        grouped_down, wide_down  ceil(n / kRowsPerWave), ceil(n / (2 * kRowsPerWave));
//                        ceil(num_tokens / kGroupTokens), 1
//        tiled_gate_up   most lists of T pairs * ceil(inter / (waves * row_tiles tiles)), 1, 1
//        tiled_down      most lists of T pairs * ceil(n / (waves * row_tiles tiles)), 1, 1
// The last six exist only with matrix instructions; geometry.h has their LDS.
// fork: end
// With a shared expert the y dimension of these grids, except for gemm, starts with shared_y rows
// of blocks for it (shared_expert.cuh); shared_y is 0 without one. grid_x is the size of x. Its
// weights have shared_bits bits and groups of 2^shared_log2_group; q and its stride count words of
// 32 bits.
#pragma once

#include "geometry.h"

#define MOE_INT4_WEIGHT_ARGS                                                         \
  const uint32_t *q, int64_t q_stride_e, int q_stride_n, const uint16_t *scales,     \
      int64_t s_stride_e, int s_stride_n, const uint32_t *zeros, int64_t z_stride_e, \
      int z_stride_n8, int num_experts
#define MOE_INT4_ROUTER_ARGS                                                           \
  const void *ids, int ids_are_int64, int64_t ids_stride_m, const int32_t *expert_map, \
      int map_size, int num_tokens, int top_k

// The same arguments as the structs that kernels use.
#define MOE_INT4_WEIGHT_STACK \
  {q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros, z_stride_e, z_stride_n8}
#define MOE_INT4_ROUTER \
  {ids, ids_are_int64 != 0, ids_stride_m, expert_map, map_size, num_experts, top_k}

// The shared expert in gate_up and in down.
#define MOE_INT4_SHARED_WEIGHT_ARGS                                                      \
  const uint32_t *shared_q, int shared_q_stride, int shared_bits, int shared_log2_group, \
      const uint16_t *shared_scales, int shared_s_stride, const uint32_t *shared_zeros,  \
      int shared_z_stride
#define MOE_INT4_SHARED_WEIGHT_VALUES                                                        \
  shared_q, shared_q_stride, shared_bits, shared_log2_group, shared_scales, shared_s_stride, \
      shared_zeros, shared_z_stride
#define MOE_INT4_SHARED_GATE_UP_ARGS                                                              \
  MOE_INT4_SHARED_WEIGHT_ARGS, int shared_inter, const uint16_t *shared_gate, uint16_t *shared_c, \
      int64_t shared_c_stride, float *shared_factors, int shared_y, int grid_x
#define MOE_INT4_SHARED_DOWN_ARGS                                                               \
  MOE_INT4_SHARED_WEIGHT_ARGS, const uint16_t *shared_a, int64_t shared_a_stride, int shared_k, \
      const float *shared_factors, uint16_t *shared_c, int64_t shared_c_stride, int shared_y,   \
      int grid_x
#define MOE_INT4_SHARED_GATE_UP_VALUES                                                 \
  MOE_INT4_SHARED_WEIGHT_VALUES, shared_inter, shared_gate, shared_c, shared_c_stride, \
      shared_factors, shared_y, grid_x
#define MOE_INT4_SHARED_DOWN_VALUES                                                             \
  MOE_INT4_SHARED_WEIGHT_VALUES, shared_a, shared_a_stride, shared_k, shared_factors, shared_c, \
      shared_c_stride, shared_y, grid_x

#define MOE_INT4_GATE_UP_ARGS                                                            \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int inter, int k, void *c,    \
      int64_t c_stride_m, MOE_INT4_ROUTER_ARGS, int activation, float alpha, float beta, \
      float limit, int waves, int wave_lds_bytes, int blocks, int blocks_per_wave,       \
      MOE_INT4_SHARED_GATE_UP_ARGS
#define MOE_INT4_DOWN_ARGS                                                                      \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int n, int k, void *c,               \
      int64_t c_stride_m, MOE_INT4_ROUTER_ARGS, const float *topk_weights, int64_t tw_stride_m, \
      int waves, int wave_lds_bytes, int blocks, int blocks_per_wave, int log2_k_slices,        \
      MOE_INT4_SHARED_DOWN_ARGS
// fork: begin overlay
#define MOE_INT4_GROUPED_GATE_UP_ARGS                                                    \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int inter, int k, void *c,    \
      int64_t c_stride_m, MOE_INT4_ROUTER_ARGS, int activation, float alpha, float beta, \
      float limit, int waves, int slots, int blocks, int row_tiles, MOE_INT4_SHARED_GATE_UP_ARGS
#define MOE_INT4_GROUPED_DOWN_ARGS                                                              \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int n, int k, void *c,               \
      int64_t c_stride_m, MOE_INT4_ROUTER_ARGS, const float *topk_weights, int64_t tw_stride_m, \
      int waves, int slots, int wave_lds_bytes, int blocks, int blocks_per_wave,                \
      int log2_k_slices, MOE_INT4_SHARED_DOWN_ARGS
#define MOE_INT4_SORTED_ARGS \
  const int32_t *sorted_ids, const int32_t *expert_ids, const int32_t *num_padded, int num_pairs
#define MOE_INT4_TILED_GATE_UP_ARGS                                                     \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int inter, int k, void *c,   \
      int64_t c_stride_m, MOE_INT4_SORTED_ARGS, int top_k, int activation, float alpha, \
      float beta, float limit, int waves, int blocks, int row_tiles
#define MOE_INT4_TILED_DOWN_ARGS                                                                  \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int n, int k, void *c,                 \
      int64_t c_stride_m, MOE_INT4_SORTED_ARGS, const float *topk_weights, int waves, int blocks, \
      int row_tiles
// fork: end
#define MOE_INT4_GEMM_ARGS                                                                  \
  const void *a, int64_t a_stride_m, MOE_INT4_WEIGHT_ARGS, int n, int k, void *c,           \
      int64_t c_stride_m, const int32_t *expert_ids, const int32_t *sorted_token_ids,       \
      int block_size_m, int num_rows, int top_k, int waves, int wave_lds_bytes, int blocks, \
      int blocks_per_wave

// X(op, dtype name, dtype tag, group size, zero points name, has zero points, T)
#define MOE_INT4_FOR_T(X, OP, ...) MOE_INT4_FOR_T_##OP(X, OP, __VA_ARGS__)
#define MOE_INT4_FOR_T_gate_up(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 8)
#define MOE_INT4_FOR_T_down(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 8)
#define MOE_INT4_FOR_T_gemm(X, ...) X(__VA_ARGS__, 1) X(__VA_ARGS__, 8)
// fork: begin overlay
#define MOE_INT4_FOR_T_grouped_gate_up(X, ...) X(__VA_ARGS__, 8) X(__VA_ARGS__, 16)
#define MOE_INT4_FOR_T_grouped_down(X, ...) X(__VA_ARGS__, 8)
#define MOE_INT4_FOR_T_multi_gate_up(X, ...) X(__VA_ARGS__, 1)
#define MOE_INT4_FOR_T_wide_down(X, ...) X(__VA_ARGS__, 8)
#define MOE_INT4_FOR_T_tiled_gate_up(X, ...) \
  X(__VA_ARGS__, 8) X(__VA_ARGS__, 16) X(__VA_ARGS__, 32) X(__VA_ARGS__, 64)
#define MOE_INT4_FOR_T_tiled_down(X, ...) \
  X(__VA_ARGS__, 8) X(__VA_ARGS__, 16) X(__VA_ARGS__, 32) X(__VA_ARGS__, 64)
// fork: end
#define MOE_INT4_FOR_ZP(X, OP, NAME, DT, G)      \
  MOE_INT4_FOR_T(X, OP, NAME, DT, G, sym, false) \
  MOE_INT4_FOR_T(X, OP, NAME, DT, G, zp, true)
#define MOE_INT4_FOR_GROUP(X, OP, NAME, DT) \
  MOE_INT4_FOR_ZP(X, OP, NAME, DT, 32)      \
  MOE_INT4_FOR_ZP(X, OP, NAME, DT, 64)      \
  MOE_INT4_FOR_ZP(X, OP, NAME, DT, 128)
#define MOE_INT4_FOR_ALL(X, OP)             \
  MOE_INT4_FOR_GROUP(X, OP, f16, gpu::Half) \
  MOE_INT4_FOR_GROUP(X, OP, bf16, gpu::BFloat16)

#define MOE_INT4_NAME(OP, NAME, G, ZNAME, T) moe_int4_##OP##_##NAME##_g##G##_##ZNAME##_t##T

#define MOE_INT4_DECLARE_gate_up MOE_INT4_GATE_UP_ARGS
#define MOE_INT4_DECLARE_down MOE_INT4_DOWN_ARGS
#define MOE_INT4_DECLARE_gemm MOE_INT4_GEMM_ARGS
#define MOE_INT4_DECLARE(OP, NAME, DT, G, ZNAME, ZP, T) \
  GPU_DECLARE(moe_int4::kMaxWaves * 32, MOE_INT4_NAME(OP, NAME, G, ZNAME, T), MOE_INT4_DECLARE_##OP)

MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, gate_up)
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, down)
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, gemm)
#if GPU_HAS_MMA
#define MOE_INT4_DECLARE_grouped_gate_up MOE_INT4_GROUPED_GATE_UP_ARGS
#define MOE_INT4_DECLARE_grouped_down MOE_INT4_GROUPED_DOWN_ARGS
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, grouped_gate_up)
#define MOE_INT4_DECLARE_multi_gate_up MOE_INT4_GATE_UP_ARGS
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, multi_gate_up)
#define MOE_INT4_DECLARE_wide_down MOE_INT4_GROUPED_DOWN_ARGS
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, grouped_down)
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, wide_down)
#define MOE_INT4_DECLARE_tiled_gate_up MOE_INT4_TILED_GATE_UP_ARGS
#define MOE_INT4_DECLARE_tiled_down MOE_INT4_TILED_DOWN_ARGS
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, tiled_gate_up)
MOE_INT4_FOR_ALL(MOE_INT4_DECLARE, tiled_down)
#endif
