// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Dense skinny GEMM for weights of 4 or 8 bits. Each wave processes every step-th tile of
// kRowsPerWave rows. For small matrices the waves of a block share k of its tiles instead, and
// their sums are added in LDS in wave order.
#include "dense_tile.cuh"
#include "entry_points_dense.h"

namespace moe_int4 {

#define DENSE_VALUES                                                                            \
  a, a_stride_m, m, q, q_stride_n, scales, s_stride_n, zeros, z_stride_n8, n, k, c, c_stride_m, \
      waves, k_slices, tiles, step

template <typename DT, int Bits, int G, bool ZP, int S>
GPU_DEVICE void dense(DENSE_ARGS) {
  gpu::keep_arguments(DENSE_VALUES);
  using Shape = DenseShape<Bits, G>;
  const DenseMatrix matrix = {
      {q, 0, q_stride_n, scales, 0, s_stride_n, zeros, 0, z_stride_n8}, n, k};
  const int blocks = (k + Shape::kBlock - 1) / Shape::kBlock;
  const int per_slice = (blocks + k_slices - 1) / k_slices;
  const int slice = k_slices == 1 ? 0 : gpu::wave();
  const int tile = k_slices == 1 ? gpu::block_x() * waves + gpu::wave() : gpu::block_x();
  const int first = slice * per_slice < blocks ? slice * per_slice : blocks;
  const int last = first + per_slice < blocks ? first + per_slice : blocks;
  char* const lds = gpu::dynamic_lds();
  float* const results = reinterpret_cast<float*>(lds + dense_lds_bytes<Bits, G>(S, blocks, 0));

  // The last round may have fewer tiles than waves.
  const int mine = (tile + (tiles - 1) * step) * kRowsPerWave < n ? tiles : tiles - 1;
  DenseTile<DT, Bits, G, ZP, S> product(matrix, blocks, first, last, tile, mine, step, lds);
  product.start();
  gpu::wait_previous_grid();
  product.stage(static_cast<const uint16_t*>(a), a_stride_m, m, waves * gpu::kWaveSize);
  gpu::allow_next_grid();
  gpu::block_barrier();

  const auto store = [&](int i, int slot, int row, float sum) {
    const int64_t column = static_cast<int64_t>(tile + i * step) * kRowsPerWave + row;
    if (slot >= m || column >= n) return;
    static_cast<uint16_t*>(c)[slot * c_stride_m + column] = Format<DT>::from_float(sum);
  };
  if (k_slices == 1) {
    product.run(store);
    return;
  }
  constexpr int kTile = S * kRowsPerWave;
  product.run([&](int i, int slot, int row, float sum) {
    results[(i * waves + slice) * kTile + slot * kRowsPerWave + row] = sum;
  });
  gpu::block_barrier();
  for (int j = gpu::wave() * gpu::kWaveSize + gpu::lane(); j < mine * kTile;
       j += waves * gpu::kWaveSize) {
    const int i = j / kTile, at = j % kTile;
    float sum = 0.0f;
    for (int w = 0; w < waves; ++w) sum += results[(i * waves + w) * kTile + at];
    store(i, at / kRowsPerWave, at % kRowsPerWave, sum);
  }
}

}  // namespace moe_int4

#define DENSE_DEFINE(NAME, DT, BITS, G, ZNAME, ZP, T)                                         \
  extern "C" GPU_KERNEL(kDenseThreads) void DENSE_NAME(NAME, BITS, G, ZNAME, T)(DENSE_ARGS) { \
    moe_int4::dense<DT, BITS, G, ZP, T>(DENSE_VALUES);                                        \
  }
DENSE_FOR_ALL(DENSE_DEFINE)
