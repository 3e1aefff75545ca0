// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Grouped skinny GEMM on blocks of up to T rows; the caller sorts the rows so that all rows of a
// block belong to one expert. The op is for callers with rows of their own: a decode step of the
// MoE layer runs gate_up and down instead. A block computes kRowsPerWave output columns. Its waves
// share k, and their sums are added in LDS in wave order.
#include "entry_points.h"
#include "slots.cuh"
#include "wave_tile.cuh"

namespace moe_int4 {

#define MOE_INT4_GEMM_VALUES                                                                     \
  a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros, z_stride_e,   \
      z_stride_n8, num_experts, n, k, c, c_stride_m, expert_ids, sorted_token_ids, block_size_m, \
      num_rows, top_k, waves, wave_lds_bytes, blocks, blocks_per_wave

template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void gemm(MOE_INT4_GEMM_ARGS) {
  gpu::keep_arguments(MOE_INT4_GEMM_VALUES);
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const int first_row = gpu::block_x() * kRowsPerWave;
  const int first = gpu::wave() * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  char* const lds = gpu::dynamic_lds();
  const WaveLds mine = wave_lds(lds + gpu::wave() * wave_lds_bytes, T);

  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  // Padding reads the same row as the block's first row and writes nothing.
  const int row = gpu::lane() < block_size_m ? gpu::lane() : 0;
  const int64_t at = static_cast<int64_t>(gpu::block_y()) * block_size_m + row;
  const int64_t id = sorted_token_ids == nullptr ? at : sorted_token_ids[at];
  const int expert = gpu::load_uniform(expert_ids + gpu::block_y());
  if (expert < 0 || expert >= num_experts) return;
  const bool real = id >= 0 && id < num_rows;
  const uint32_t real_rows = gpu::wave_ballot(real);
  if (real_rows == 0) return;
  const int out_row = real ? static_cast<int>(id) : -1;
  const int some_row = gpu::from_lane(out_row, gpu::first_bit(real_rows));
  if (gpu::lane() < block_size_m) {
    mine.out_row[gpu::lane()] = out_row;
    mine.in_row[gpu::lane()] = (real ? out_row : some_row) / top_k;
  }
  gpu::wave_barrier();

  const WeightRows rows =
      weights.at<ZP>(expert, weights.rows<ZP>(first_row, n, first_row + kRowGroups, n));
  const auto multiply = [&](auto slots, int first_slot, int left) {
    const auto row_of = [&](int s) {
      const int slot = first_slot + (s < left ? s : 0);
      return static_cast<const uint16_t*>(a) + mine.in_row[slot] * a_stride_m;
    };
    using Slots = decltype(slots);
    WaveTile<DT, G, ZP, Slots::kSlots, Slots::kPasses> tile(first, last, k);
    tile.run(rows, row_of, mine.staged);
    tile.finish();
    tile.for_each_result([&](int s, int r, float sum) {
      if (s < left) {
        mine.results[(first_slot + s) * kRowsPerWave + r * kRowGroups + lane_row()] = sum;
      }
    });
  };
  if constexpr (T == 1) {
    multiply(SlotCount<1, 1>{}, 0, 1);
  } else {
    with_slots<true>(block_size_m, multiply);
  }
  gpu::block_barrier();

  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < block_size_m * kRowsPerWave; i += waves * gpu::kWaveSize) {
    const int s = i / kRowsPerWave, column = first_row + i % kRowsPerWave;
    if (column >= n || mine.out_row[s] < 0) continue;
    float sum = 0.0f;
    for (int w = 0; w < waves; ++w) sum += wave_lds(lds + w * wave_lds_bytes, T).results[i];
    static_cast<uint16_t*>(c)[mine.out_row[s] * c_stride_m + column] = Format<DT>::from_float(sum);
  }
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                        \
  extern "C" GPU_KERNEL(moe_int4::kMaxWaves * 32) void MOE_INT4_NAME(OP, NAME, G, ZNAME,      \
                                                                     T)(MOE_INT4_GEMM_ARGS) { \
    moe_int4::gemm<DT, G, ZP, T>(MOE_INT4_GEMM_VALUES);                                       \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, gemm)
