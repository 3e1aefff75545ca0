// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The interface between the CPU ops' driver and their kernels. The driver (moe_int4_cpu.cpp) groups
// rows by expert, asks tuning.h for a kernel for each expert, and cuts the work into tiles; a
// kernel multiplies one tile. Kernels know nothing of torch, of threads, of routing or of each
// other.
//
// Each kernels_*.cpp is compiled with its own flags, so it shares no inline function with other
// files: helpers live in anonymous namespaces, and std:: function templates are not used there.
#pragma once

#include <cstdint>

#include "moe_int4_args.h"

namespace moe_int4::cpu {

// The activation rows of one expert, converted by prepare().
constexpr int32_t kPreparedTogether = 16;  // rows a call of prepare() converts at most
constexpr int32_t kSumsPadding = 16;
struct PreparedRows {
  char* data;  // laid out as the kernel likes; calls of prepare() write kPreparedTogether * stride
               // apart
  int64_t stride;  // bytes
  float* sums;     // of each row's groups, padded with zeros to kSumsPadding
  int64_t sums_stride;
};

// Rows [begin, begin + count) of an expert that has m rows; begin is a multiple of
// kPreparedTogether. a[i] is row begin + i.
struct Source {
  DType dtype;
  const uint16_t* a[kPreparedTogether];
  int32_t begin, count, m, k, group_size;
  int32_t bits;  // of the weights: an order of activations goes with it
};

// out[r][j] = sum over k of dequantized w[first + j][k] * row r, for r < m, j < columns.
struct Tile {
  DType dtype;
  const uint32_t* q;  // packed weights, scales and zero points of one expert, from its row 0
  int64_t q_stride;
  const void* scales;
  int64_t s_stride;
  const uint32_t* zeros;  // null: symmetric
  int64_t z_stride;
  const uint32_t* next;     // the packed row that the thread will read after this tile
  const void* next_scales;  // and its scales
  int32_t first, columns, k, group_size, bits;
  PreparedRows a;
  int32_t m;
  float* out;
  int64_t out_stride;
  void* scratch;  // scratch_bytes(k, group_size, m), 64-byte aligned
};

struct Kernel {
  const char* name;
  int64_t (*row_bytes)(DType dtype, int32_t k);       // of a prepared row, stride at least
  int32_t (*rows_allocated)(DType dtype, int32_t m);  // for an expert that has m rows
  int64_t (*scratch_bytes)(int32_t k, int32_t group_size, int32_t m);
  void (*prepare)(const Source& source, const PreparedRows& rows);
  void (*multiply)(const Tile& tile);
};

// What follows a product.
constexpr int32_t kDotBlock = 256;
struct Epilogue {
  // c[i] = act(min(gate[i], limit)) * (clamp(up[i], -limit, limit) + beta), i < n.
  void (*activate)(const GateUpArgs& args, const float* gate, const float* up, int32_t n, void* c);
  void (*store)(DType dtype, const float* y, int32_t n, void* c);
  // to[i] = from[i], i < n.
  void (*load)(DType dtype, const void* from, int32_t n, float* to);
  // out[r] = sum over k of w[k] * a[r][k], in an order that depends on k alone; a is padded with
  // zeros to kDotBlock.
  void (*dot)(DType dtype, const uint16_t* w, const float* const* a, int32_t rows, int32_t k,
              float* out);
};

extern const Kernel kPortable;
extern const Epilogue kPortableEpilogue;
#if defined(__x86_64__)
extern const Kernel kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxInt8, kAmxBf16;
extern const Epilogue kAvx2Epilogue, kAvx512Epilogue;
#endif

}  // namespace moe_int4::cpu
