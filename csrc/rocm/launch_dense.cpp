// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dense_geometry.h"
#include "entry_points_dense.h"
#include "launch.h"

namespace moe_int4 {
namespace {

// Waves of a block, and blocks for each compute unit: enough loads in flight, and few enough to
// amortise a block's copy of the activations.
#if defined(HYBRID_W4A16_CUDA) || defined(HYBRID_W4A16_HIP)
constexpr int kWaves = 8;
#if GPU_HAS_MMA
constexpr int kBlocksPerUnit = 2;
#else
constexpr int kBlocksPerUnit = 3;
#endif
#else
constexpr int kWaves = 2;
constexpr int kBlocksPerUnit = 1;
#endif
constexpr int kRescoreWaves = kRescoreThreads / gpu::kWaveSize;

constexpr int kDenseRows = 16;  // of activations
#if GPU_HAS_MMA
constexpr int kMostDenseSlots = 16;
// Results of 8 columns per wave of rows(), in fp32.
constexpr int kRescoreResults = 2 * kRescoreWaves * kDenseRows * 8;
#else
constexpr int kMostDenseSlots = 8;
constexpr int kRescoreResults = 0;
#endif

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename DT>
constexpr DType dtype_of() {
  return std::is_same_v<DT, gpu::Half> ? DType::kHalf : DType::kBFloat16;
}

// How the waves share the tiles of kRowsPerWave rows.
struct DensePlan {
  int k_slices;  // waves of a block that share k of the block's tiles, or 1
  int grid, step, rounds;

  DensePlan(int n, int cu_count) {
    const int tiles = ceil_div(n, kRowsPerWave), units = cu_count * kBlocksPerUnit;
    // Few tiles: the waves of a block share k, so that there are as many waves.
    k_slices = tiles < units * kWaves / 2 ? kWaves : 1;
    const int at_once = k_slices == 1 ? kWaves : 1;
    rounds = ceil_div(tiles, units * at_once);
    // Many rounds: all waves end together. Few: all compute units begin.
    const int most = ceil_div(k_slices == 1 ? ceil_div(tiles, rounds) : tiles, at_once);
    grid = most < units ? most : units;
    step = grid * at_once;
  }
  // Results in LDS, of kRowsPerWave rows and a slot each.
  int results() const { return k_slices == 1 ? 0 : k_slices * rounds; }
};

struct Kernel {
  decltype(DENSE_NAME(f16, 4, 32, sym, 1))& entry;
  int lds_bytes;
};

// The kernel with room for `slots` activation rows, and what a block needs.
#define DENSE_CASE(NAME, DT, BITS, G, ZNAME, ZP, T)                          \
  if (args.dtype == dtype_of<DT>() && w.bits == BITS && w.group_size == G && \
      (w.zeros != nullptr) == ZP && slots == T) {                            \
    const int blocks = ceil_div(w.k, DenseShape<BITS, G>::kBlock);           \
    return {DENSE_NAME(NAME, BITS, G, ZNAME, T),                             \
            dense_lds_bytes<BITS, G>(T, blocks, plan.results())};            \
  }
Kernel kernel_for(const DenseArgs& args, int slots, const DensePlan& plan) {
  const Weights& w = args.w;
  DENSE_FOR_ALL(DENSE_CASE)
  throw std::runtime_error("wvSplitK_int_g: no kernel");
}

// Rows [begin, begin + rows), up to `slots`.
void launch_rows(const DenseArgs& args, const DensePlan& plan, int begin, int rows, int slots,
                 void* stream) {
  const Weights& w = args.w;
  const Kernel kernel = kernel_for(args, slots, plan);
  gpu::launch(kernel.entry, {plan.grid, 1, 1, kWaves * gpu::kWaveSize, kernel.lds_bytes, true},
              stream, static_cast<const uint16_t*>(args.a) + begin * args.a_stride_m,
              args.a_stride_m, rows, w.q, static_cast<int>(w.q_stride_n),
              static_cast<const uint16_t*>(w.scales), static_cast<int>(w.s_stride_n), w.zeros,
              static_cast<int>(w.z_stride_n8), w.n, w.k,
              static_cast<uint16_t*>(args.c) + begin * args.c_stride_m, args.c_stride_m, kWaves,
              plan.k_slices, plan.rounds, plan.step);
}

// Kernels find rows of weights, scales and zero points with 32 bits.
void check_extent(const char* name, int64_t rows, int64_t stride) {
  if (rows * stride <= std::numeric_limits<int>::max()) return;
  throw std::runtime_error(std::string("wvSplitK_int_g: ") + name +
                           ": expected rows times row stride below 2^31 words, got " +
                           std::to_string(rows) + " times " + std::to_string(stride));
}

}  // namespace

void launch_dense(const DenseArgs& args, void* stream) {
  check_extent("w", args.w.n, args.w.q_stride_n);
  check_extent("scales", args.w.n, args.w.s_stride_n);
  check_extent("zero_points", args.w.n / 8, args.w.z_stride_n8);
  const DensePlan plan(args.w.n, args.cu_count);
  for (int begin = 0; begin < args.m;) {
    const int left = args.m - begin;
    // The most rows whose activations fit: what is left reads the weights again.
    int slots = left == 1 ? 1 : left <= 4 ? 4 : left <= 8 ? 8 : kMostDenseSlots;
    while (slots > 1 && kernel_for(args, slots, plan).lds_bytes > gpu::max_lds_bytes()) {
      slots = slots == 4 ? 1 : slots / 2;
    }
    const int rows = left < slots ? left : slots;
    if (kernel_for(args, slots, plan).lds_bytes > gpu::max_lds_bytes()) {
      throw std::runtime_error("wvSplitK_int_g: a: expected a row of activations that fits into " +
                               std::to_string(gpu::max_lds_bytes()) + " bytes of LDS, got " +
                               std::to_string(args.w.k) + " columns");
    }
    launch_rows(args, plan, begin, rows, slots, stream);
    begin += rows;
  }
}

void launch_rescore(const RescoreArgs& args, void* stream) {
  if (args.m == 0) return;
  const int threads = kRescoreWaves * gpu::kWaveSize;
  const bool half = args.dtype == DType::kHalf;
  const int largest_lds = 4 * kDenseRows * (1 + 2 * kRescoreWaves);
  gpu::launch(half ? rescore_largest_f16 : rescore_largest_bf16,
              {kRescoreParts, 1, 1, threads, largest_lds, true}, stream, args.a, args.a_stride_m,
              args.m, args.k, args.errors, args.n, args.c, args.c_stride_m, args.partials,
              args.p_stride_m, args.bound, kRescoreWaves);
  // rows(): norms and bounds, results, bits and list of columns, a mask for every 32.
  const int columns = ceil_div(ceil_div(args.n, kRescoreParts), gpu::kWaveSize) * gpu::kWaveSize;
  const int lds = 4 * (3 * kDenseRows + kRescoreResults + 2 * columns + columns / gpu::kWaveSize);
  if (lds > gpu::max_lds_bytes()) {
    throw std::runtime_error("wvSplitK_int_g_rescore: w: expected fewer rows, got " +
                             std::to_string(args.n));
  }
  gpu::launch(half ? rescore_rows_f16 : rescore_rows_bf16,
              {kRescoreParts, 1, 1, threads, lds, true}, stream, args.a, args.a_stride_m, args.m,
              args.w, args.w_stride_n, args.k, args.errors, args.n, args.c, args.c_stride_m,
              args.partials, args.p_stride_m, args.window, args.bound, kRescoreWaves);
}

}  // namespace moe_int4
