// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// First half of a decode step: gate and up projections of the experts that the router picked, with
// the activation function in the epilogue. A block computes kRowGroups indices of the intermediate
// size for one pair (token, t). A lane has gate row i and up row i + inter. The block's waves share
// k and their sums are added in LDS, in wave order. If an earlier token of the same T tokens picked
// the same expert, the block has nothing to do: that token's block computes both.
// fork: begin overlay
// multi_gate_up: a block of one pair computes several tiles of kRowGroups indices, so that the
// weights of the next tile are on their way while one is multiplied.
// fork: end
#include "activation.cuh"
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

#define MOE_INT4_GATE_UP_VALUES                                                                \
  a, a_stride_m, q, q_stride_e, q_stride_n, scales, s_stride_e, s_stride_n, zeros, z_stride_e, \
      z_stride_n8, num_experts, inter, k, c, c_stride_m, ids, ids_are_int64, ids_stride_m,     \
      expert_map, map_size, num_tokens, top_k, activation, alpha, beta, limit, waves,          \
      wave_lds_bytes, blocks, blocks_per_wave, MOE_INT4_SHARED_GATE_UP_VALUES

template <typename DT, int G, bool ZP, int T>
GPU_DEVICE void gate_up(MOE_INT4_GATE_UP_ARGS) {
  gpu::keep_arguments(MOE_INT4_GATE_UP_VALUES);
  // fork: begin token
  if (gpu::block_y() < shared_y) {
    constexpr int kLanes = shared_gate_up_lanes(false);
    return shared_gate_up<DT, kLanes>(a, a_stride_m, k, num_tokens, waves,
                                      MOE_INT4_SHARED_GATE_UP_VALUES);
  }
  // fork: end
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int token = gpu::block_z(), t = gpu::block_y() - shared_y;
  const int first_token = token / T * T;
  const int tokens = num_tokens - first_token < T ? num_tokens - first_token : T;
  const int first_row = gpu::block_x() * kRowGroups;
  const int index = first_row + lane_row(), row = index < inter ? index : inter - 1;
  const int first = gpu::wave() * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  char* const lds = gpu::dynamic_lds();
  const WaveLds mine = wave_lds(lds + gpu::wave() * wave_lds_bytes, T);
  const auto* const acts = static_cast<const uint16_t*>(a);

  int count = 1;
  const auto multiply = [&](auto& tile, int expert, const WeightRows& rows, int first_slot,
                            const auto& row_of) {
    tile.run(weights.at<ZP>(expert, rows), row_of, mine.staged);
    tile.finish();
    tile.for_each_result([&](int s, int r, float sum) {
      if (first_slot + s >= count) return;
      mine.results[(first_slot + s) * kRowsPerWave + r * kRowGroups + lane_row()] = sum;
    });
  };
  // fork: begin overlay
  if constexpr (T == 1 && kStreams) {
    char* const zeros = lds + waves * wave_lds_bytes;
    const auto row_of = [&](int) { return acts + token * a_stride_m; };
    StreamTile<DT, G, ZP, Items::kOnePair> tile(weights, row, row + inter, inter, first, last, k,
                                                mine.staged, zeros);
    gpu::block_barrier();
    gpu::wait_previous_grid();
    gpu::allow_next_grid();
    const uint32_t pairs = first < last;
    const int id = router.id(token, t);
    tile.template request_activations<false>(pairs, row_of);
    const int expert = gpu::uniform(router.local_expert(id));
    if (expert < 0) return gpu::wait_all_copies();
    tile.template request_weights<true>(pairs, expert);
    float sums[2] = {};
    tile.run(pairs, row_of, [&](int, const float (&acc)[2]) {
      sums[0] = acc[0];
      sums[1] = acc[1];
    });
    if (lane_k() == 0) {
      mine.results[lane_row()] = sums[0];
      mine.results[kRowGroups + lane_row()] = sums[1];
    }
    if (gpu::lane() == 0) mine.out_row[0] = token * top_k + t;
  } else {
    // fork: end
    gpu::wait_previous_grid();
    gpu::allow_next_grid();
    const WeightRows rows = weights.rows<ZP>(first_row, inter, first_row + inter, 2 * inter);
    if constexpr (T == 1) {
      const auto row_of = [&](int) { return acts + token * a_stride_m; };
      const int expert = router.uniform_expert(token, t);
      if (expert < 0) return;
      WaveTile<DT, G, ZP, 1> tile(first, last, k);
      multiply(tile, expert, rows, 0, row_of);
      if (gpu::lane() == 0) mine.out_row[0] = token * top_k + t;
    } else {
      const Picked picked(router, nullptr, 0, nullptr, first_token, tokens,
                          t / Picked::kPlaces * Picked::kPlaces);
      const int expert = picked.expert(token - first_token, t);
      if (expert < 0) return;
      count = list_slots(picked, token - first_token, t, expert,
                         [&](int slot, int slot_token, int slot_t, float) {
                           mine.in_row[slot] = first_token + slot_token;
                           mine.out_row[slot] = (first_token + slot_token) * top_k + slot_t;
                         });
      if (count == 0) return;
      gpu::wave_barrier();
      with_slots<true>(count, [&](auto slots, int first_slot, int left) {
        const auto row_of = [&](int s) {
          return acts + mine.in_row[first_slot + (s < left ? s : 0)] * a_stride_m;
        };
        using Slots = decltype(slots);
        WaveTile<DT, G, ZP, Slots::kSlots, Slots::kPasses> tile(first, last, k);
        multiply(tile, expert, rows, first_slot, row_of);
      });
    }
    // fork: begin overlay
  }
  // fork: end
  gpu::block_barrier();

  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < count * kRowGroups; i += waves * gpu::kWaveSize) {
    const int s = i / kRowGroups, r = i % kRowGroups;
    if (first_row + r >= inter) continue;
    float gate = 0.0f, up = 0.0f;
    for (int w = 0; w < waves; ++w) {
      const float* sums = wave_lds(lds + w * wave_lds_bytes, T).results + s * kRowsPerWave;
      gate += sums[r];
      up += sums[r + kRowGroups];
    }
    static_cast<uint16_t*>(c)[mine.out_row[s] * c_stride_m + first_row + r] =
        Format<DT>::from_float(activate(activation, gate, up, alpha, beta, limit));
  }
}

// fork: begin overlay
#if GPU_HAS_MMA
template <typename DT, int G, bool ZP>
GPU_DEVICE void multi_gate_up(MOE_INT4_GATE_UP_ARGS) {
  if (gpu::block_y() < shared_y) {
    constexpr int kLanes = shared_gate_up_lanes(false);
    return shared_gate_up<DT, kLanes>(a, a_stride_m, k, num_tokens, waves,
                                      MOE_INT4_SHARED_GATE_UP_VALUES);
  }
  const WeightStack weights = MOE_INT4_WEIGHT_STACK;
  const Router router = MOE_INT4_ROUTER;
  const int token = gpu::block_z(), t = gpu::block_y() - shared_y;
  const int all = (inter + kRowGroups - 1) / kRowGroups, per_block = (all + grid_x - 1) / grid_x;
  const int begin = gpu::block_x() * per_block, left = all - begin;
  const int tiles = left < per_block ? left : per_block;
  if (tiles <= 0) return;
  const int first = gpu::wave() * blocks_per_wave;
  const int last = first + blocks_per_wave < blocks ? first + blocks_per_wave : blocks;
  const uint32_t items = first < last ? (2u << (tiles - 1)) - 1 : 0;
  char* const lds = gpu::dynamic_lds();
  char* const empty = lds + waves * wave_lds_bytes;
  float* const results = reinterpret_cast<float*>(empty + kStreamZeroBytes);  // [tile][wave]
  const auto row_of = [&](int) { return static_cast<const uint16_t*>(a) + token * a_stride_m; };
  const int index = begin * kRowGroups + lane_row(), row = index < inter ? index : inter - 1;
  StreamTile<DT, G, ZP, Items::kTiles> tile(weights, row, row + inter, inter, first, last, k,
                                            wave_lds(lds + gpu::wave() * wave_lds_bytes, 1).staged,
                                            empty);
  gpu::block_barrier();
  gpu::wait_previous_grid();
  gpu::allow_next_grid();
  const int id = router.id(token, t);
  tile.template request_activations<false>(items, row_of);
  const int expert = gpu::uniform(router.local_expert(id));
  if (expert < 0) return gpu::wait_all_copies();
  tile.template request_weights<true>(items, expert);
  const auto keep = [&](int i, const float (&sums)[2]) {
    if (lane_k() != 0) return;
    float* const of_tile = results + (i * waves + gpu::wave()) * kRowsPerWave;
    of_tile[lane_row()] = sums[0];
    of_tile[kRowGroups + lane_row()] = sums[1];
  };
  if (items == 0) {
    for (int i = 0; i < tiles; ++i) keep(i, {0.0f, 0.0f});
  }
  tile.run(items, row_of, keep);
  gpu::block_barrier();

  auto* const out = static_cast<uint16_t*>(c) + (token * top_k + t) * c_stride_m;
  const int thread = gpu::wave() * gpu::kWaveSize + gpu::lane();
  for (int i = thread; i < tiles * kRowGroups; i += waves * gpu::kWaveSize) {
    const int at = begin * kRowGroups + i;
    if (at >= inter) continue;
    float gate = 0.0f, up = 0.0f;
    for (int w = 0; w < waves; ++w) {
      const float* const sums = results + (i / kRowGroups * waves + w) * kRowsPerWave;
      gate += sums[i % kRowGroups];
      up += sums[i % kRowGroups + kRowGroups];
    }
    out[at] = Format<DT>::from_float(activate(activation, gate, up, alpha, beta, limit));
  }
}
#endif
// fork: end
}  // namespace moe_int4

#define MOE_INT4_DEFINE(OP, NAME, DT, G, ZNAME, ZP, T)                                           \
  extern "C" GPU_KERNEL(moe_int4::kMaxWaves * 32) void MOE_INT4_NAME(OP, NAME, G, ZNAME,         \
                                                                     T)(MOE_INT4_GATE_UP_ARGS) { \
    moe_int4::gate_up<DT, G, ZP, T>(MOE_INT4_GATE_UP_VALUES);                                    \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE, gate_up)
// fork: begin overlay
#if GPU_HAS_MMA
#define MOE_INT4_DEFINE_MULTI(OP, NAME, DT, G, ZNAME, ZP, T)                  \
  extern "C" GPU_KERNEL(moe_int4::kMaxWavesSharingK * 32) void MOE_INT4_NAME( \
      OP, NAME, G, ZNAME, T)(MOE_INT4_GATE_UP_ARGS) {                         \
    moe_int4::multi_gate_up<DT, G, ZP>(MOE_INT4_GATE_UP_VALUES);              \
  }
MOE_INT4_FOR_ALL(MOE_INT4_DEFINE_MULTI, multi_gate_up)
#endif
// fork: end
