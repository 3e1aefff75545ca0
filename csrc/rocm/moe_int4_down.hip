// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Second half of a decode step: down projection, router weights and the sum over the picked
// experts. A block computes kRowsPerWave output columns for a block of T tokens. Its waves share
// the pairs (token, t), and 2^log2_k_slices waves share the k of each pair. A wave adds the results
// of its pairs to its own sums in LDS in pair order, and the sums of the waves are added in wave
// order, so every run gives the same bits.
#include "entry_points.h"
// fork: begin token
#include "shared_expert.cuh"
// fork: end
#include "slots.cuh"
// fork: begin overlay
#include "stream_tile.cuh"
// fork: end
#include "wave_tile.cuh"

namespace moe_int4 {

// fork: begin overlay
// The kernel for one token per block where weights stream through LDS. It reads router ids, expert
// map and weights before the previous grid has ended. That is safe: the previous grid is gate_up,
// or one that lets this grid start only after its own end, so everything earlier is complete.
static_assert(!kStreams || gpu::kWaveSize == 2 * kRowsPerWave);
template <typename DT, int G, bool ZP>
GPU_DEVICE void down_stream(MOE_INT4_DOWN_ARGS) {
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int token = gpu::block_y() - shared_y, first_row = gpu::block_x() * kRowsPerWave;
  const int index0 = first_row + lane_row(), index1 = index0 + kRowGroups;
  const int row0 = index0 < n ? index0 : n - 1, row1 = index1 < n ? index1 : n - 1;
  const int first = (gpu::wave() & ((1 << log2_k_slices) - 1)) * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  const int share = gpu::wave() >> log2_k_slices, shares = waves >> log2_k_slices;
  char* const lds = gpu::dynamic_lds();
  const WaveLds mine = wave_lds(lds + gpu::wave() * wave_lds_bytes, 1);
  char* const empty = lds + waves * wave_lds_bytes;
  StreamTile<DT, G, ZP, Items::kPairs> tile(weights, row0, row1, n, first, last, k, mine.staged,
                                            empty);
  gpu::block_barrier();

  float sums[2] = {};
  for (int chunk = 0; chunk < top_k; chunk += gpu::kWaveSize) {
    const int t = chunk + gpu::lane();
    int expert = -1;
    if (t < top_k && t % shares == share) expert = router.local_expert(router.id(token, t));
    const uint32_t picked = gpu::wave_ballot(expert >= 0), pairs = first < last ? picked : 0;
    tile.template request_weights<false>(pairs, expert);
    if (chunk == 0) {
      gpu::wait_previous_grid();
      gpu::allow_next_grid();
    }
    float weight = 1.0f;
    if (topk_weights != nullptr && t < top_k) weight = topk_weights[token * tw_stride_m + t];
    const auto row_of = [&](int pair) {
      return static_cast<const uint16_t*>(a) +
             (static_cast<int64_t>(token) * top_k + chunk + pair) * a_stride_m;
    };
    tile.template request_activations<true>(pairs, row_of);
    tile.run(pairs, row_of, [&](int pair, const float (&acc)[2]) {
      const float w = gpu::shuffle(weight, pair);
      sums[0] += w * acc[0];
      sums[1] += w * acc[1];
    });
  }
  if (lane_k() == 0) {
    mine.results[lane_row()] = sums[0];
    mine.results[kRowGroups + lane_row()] = sums[1];
  }
  gpu::block_barrier();

  if (gpu::wave() != 0) return;
  const int column = first_row + gpu::lane() % kRowsPerWave;
  float sum = 0.0f;  // half of the waves in the lower lanes, half in the upper lanes
  for (int w = gpu::lane() / kRowsPerWave; w < waves; w += gpu::kWaveSize / kRowsPerWave) {
    sum += wave_lds(lds + w * wave_lds_bytes, 1).results[column - first_row];
  }
  sum += gpu::shuffle_xor<kRowsPerWave>(sum);
  if (gpu::lane() < kRowsPerWave && column < n) {
    static_cast<uint16_t*>(c)[token * c_stride_m + column] = Format<DT>::from_float(sum);
  }
}

// fork: end
#define MOE_INT4_ROUTED_DOWN_VALUES                                                                \
  a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros, z_stride_e,     \
      z_stride_n8, num_experts, n, k, c, c_stride_m, ids, ids_are_int64, ids_stride_m, expert_map, \
      map_size, num_tokens, top_k, topk_weights, tw_stride_m, waves, wave_lds_bytes, blocks,       \
      blocks_per_wave, log2_k_slices
#define MOE_INT4_DOWN_VALUES MOE_INT4_ROUTED_DOWN_VALUES, MOE_INT4_SHARED_DOWN_VALUES

// fork: begin overlay
// The other kernels.
// fork: end
template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void down_tiles(MOE_INT4_DOWN_ARGS) {
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int first_token = (gpu::block_y() - shared_y) * T;
  const int tokens = num_tokens - first_token < T ? num_tokens - first_token : T;
  const int first_row = gpu::block_x() * kRowsPerWave;
  const int first = (gpu::wave() & ((1 << log2_k_slices) - 1)) * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  const int share = gpu::wave() >> log2_k_slices, shares = waves >> log2_k_slices;
  char* const lds = gpu::dynamic_lds();
  const WaveLds mine = wave_lds(lds + gpu::wave() * wave_lds_bytes, T);
  const auto* const acts = static_cast<const uint16_t*>(a);
  const WeightRows rows = weights.rows<ZP>(first_row, n, first_row + kRowGroups, n);
  for (int i = gpu::lane(); i < tokens * kRowsPerWave; i += gpu::kWaveSize) mine.results[i] = 0.0f;

  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  if constexpr (T == 1) {
    int t = first < last ? share : top_k;
    for (int chunk = 0; t < top_k; chunk += gpu::kWaveSize) {
      // The lane's pair; this requests all pairs of the chunk.
      const int own[1] = {chunk + gpu::lane() < top_k ? chunk + gpu::lane() : top_k - 1};
      float weight = 1.0f;
      if (topk_weights != nullptr) weight = topk_weights[first_token * tw_stride_m + own[0]];
      int expert[1];
      router.local_experts(first_token, own, expert);
      for (; t < top_k && t < chunk + gpu::kWaveSize; t += shares) {
        const int e = gpu::from_lane(expert[0], t - chunk);
        if (e < 0) continue;
        const auto row_of = [&](int) {
          return acts + (static_cast<int64_t>(first_token) * top_k + t) * a_stride_m;
        };
        WaveTile<DT, G, ZP, 1> tile(first, last, k);
        tile.run(weights.at<ZP>(e, rows), row_of, mine.staged);
        tile.finish();
        const float factor = gpu::from_lane(weight, t - chunk);
        tile.for_each_result([&](int, int r, float sum) {
          mine.results[r * kRowGroups + lane_row()] += factor * sum;
        });
      }
    }
  } else {
    auto* const kept =
        reinterpret_cast<float*>(lds + (gpu::wave() + 1) * wave_lds_bytes - kKeptBytes);
    for (int chunk = 0; first < last && chunk < top_k; chunk += Picked::kPlaces) {
      const Picked picked(router, topk_weights, tw_stride_m, kept, first_token, tokens, chunk);
      const int places = top_k - chunk < Picked::kPlaces ? top_k - chunk : Picked::kPlaces;
      int token = 0, place = share;
      for (;; place += shares) {
        for (; place >= places; place -= places) ++token;
        if (token >= tokens) break;
        const int t = chunk + place, expert = picked.expert(token, t);
        if (expert < 0) continue;
        gpu::wave_barrier();  // all reads of the previous pair's lists and results are done
        const int count = list_slots(
            picked, token, t, expert, [&](int slot, int slot_token, int slot_t, float weight) {
              mine.in_row[slot] = (first_token + slot_token) * top_k + slot_t;
              mine.out_row[slot] = slot_token;
              mine.weight[slot] = weight;
            });
        if (count == 0) continue;
        gpu::wave_barrier();
        // Not `Once`: that takes 144 registers, and spills with the cap.
        with_slots<false>(count, [&](auto slots, int first_slot, int left) {
          const auto row_of = [&](int s) {
            return acts + mine.in_row[first_slot + (s < left ? s : 0)] * a_stride_m;
          };
          using Slots = decltype(slots);
          WaveTile<DT, G, ZP, Slots::kSlots, Slots::kPasses> tile(first, last, k);
          tile.run(weights.at<ZP>(expert, rows), row_of, mine.staged);
          tile.finish();
          tile.for_each_result([&](int s, int r, float sum) {
            if (s >= left) return;
            mine.results[mine.out_row[first_slot + s] * kRowsPerWave + r * kRowGroups +
                         lane_row()] += mine.weight[first_slot + s] * sum;
          });
        });
      }
    }
  }
  gpu::block_barrier();

  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < tokens * kRowsPerWave; i += waves * gpu::kWaveSize) {
    const int column = first_row + i % kRowsPerWave;
    if (column >= n) continue;
    float sum = 0.0f;
    for (int w = 0; w < waves; ++w) sum += wave_lds(lds + w * wave_lds_bytes, T).results[i];
    static_cast<uint16_t*>(c)[(first_token + i / kRowsPerWave) * c_stride_m + column] =
        Format<DT>::from_float(sum);
  }
}

template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void down(MOE_INT4_DOWN_ARGS) {
  // All of them would not fit the scalar registers at once; shared_down reads the rest.
  gpu::keep_arguments(MOE_INT4_ROUTED_DOWN_VALUES, shared_y);
  // fork: begin token
  if (gpu::block_y() < shared_y) {
    return shared_down<DT>(n, num_tokens, waves, MOE_INT4_SHARED_DOWN_VALUES);
  }
  // fork: end
  // fork: begin overlay
  if constexpr (T == 1 && kStreams) {
    down_stream<DT, G, ZP>(MOE_INT4_DOWN_VALUES);
    return;
  }
  // fork: end
#if GPU_HAS_MMA
  if constexpr (T > 1) down_tiles<DT, G, ZP, T>(MOE_INT4_DOWN_VALUES);
#else
  down_tiles<DT, G, ZP, T>(MOE_INT4_DOWN_VALUES);
#endif
}

}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                     \
  extern "C" GPU_8_WAVES_PER_SIMD GPU_KERNEL(moe_int4::kMaxWaves * 32) void MOE_INT4_NAME( \
      OP, NAME, G, ZNAME, T)(MOE_INT4_DOWN_ARGS) {                                         \
    moe_int4::down<DT, G, ZP, T>(MOE_INT4_DOWN_VALUES);                                    \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, down)
