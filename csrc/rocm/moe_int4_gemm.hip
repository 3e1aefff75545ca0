// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Grouped skinny GEMM: block b of up to T rows, all of one expert, that the caller sorted together.
// vLLM's decode step does not use it (it runs gate_up and down). The op stays because users of the
// first release call it.
// A block owns kRowsPerWave output columns; its waves share k and their sums meet in LDS in wave
// order.
#include "entry_points.h"
#include "slots.cuh"
#include "wave_tile.cuh"

namespace moe_int4 {

template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void gemm(MOE_INT4_GEMM_ARGS) {
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const int first_row = gpu::block_x() * kRowsPerWave;
  const int index0 = first_row + lane_row(), index1 = index0 + kRowGroups;
  const int row0 = index0 < n ? index0 : n - 1, row1 = index1 < n ? index1 : n - 1;
  const int first = gpu::wave() * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  char* const lds = gpu::dynamic_lds();
  const WaveLds mine = wave_lds(lds + gpu::wave() * wave_lds_bytes, T);

  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  const int expert = gpu::uniform(expert_ids[gpu::block_y()]);
  if (expert < 0 || expert >= num_experts) return;
  if (gpu::lane() < block_size_m) {
    const int64_t at = static_cast<int64_t>(gpu::block_y()) * block_size_m + gpu::lane();
    const int64_t id = sorted_token_ids == nullptr ? at : sorted_token_ids[at];
    const bool real = id >= 0 && id < num_rows;
    mine.out_row[gpu::lane()] = real ? static_cast<int>(id) : -1;
    mine.in_row[gpu::lane()] = real ? static_cast<int>(id) / top_k : -1;
  }
  gpu::wave_barrier();

  const auto multiply = [&](auto slots, int first_slot, int left) {
    const auto row_of = [&](int s) {
      const int row = s < left ? mine.in_row[first_slot + s] : -1;
      return row < 0 ? nullptr : static_cast<const uint16_t*>(a) + row * a_stride_m;
    };
    WaveTile<DT, G, ZP, decltype(slots)::value> tile(first, last, k);
    tile.start(row_of);
    tile.run(weights.at(expert, tile.row(weights, row0)),
             weights.at(expert, tile.row(weights, row1)), row_of, mine.staged);
    tile.for_each_result([&](int s, int r, float sum) {
      if (s < left) {
        mine.results[(first_slot + s) * kRowsPerWave + r * kRowGroups + lane_row()] = sum;
      }
    });
  };
  if constexpr (T == 1) {
    multiply(SlotCount<1>{}, 0, 1);
  } else {
    with_slots(block_size_m, multiply);
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

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                             \
  extern "C" GPU_KERNEL(moe_int4::kMaxWaves * 32) void MOE_INT4_NAME(OP, NAME, G, ZNAME,           \
                                                                     T)(MOE_INT4_GEMM_ARGS) {      \
    moe_int4::gemm<DT, G, ZP, T>(a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e,     \
                                 s_stride_n, zeros, z_stride_e, z_stride_n8, num_experts, n, k, c, \
                                 c_stride_m, expert_ids, sorted_token_ids, block_size_m, num_rows, \
                                 top_k, waves, wave_lds_bytes, blocks, blocks_per_wave);           \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, gemm)
