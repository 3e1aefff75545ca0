// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The interface between the CPU ops' driver and their kernels. The driver (moe_int4_cpu.cpp) groups
// rows by expert, asks tuning.h for each expert's kernel, and cuts the work into tiles. A kernel
// multiplies one tile. It does not depend on torch, on threads, on routing or on other kernels.
//
// Each kernels_*.cpp is compiled with its own flags. It must not share inline functions with other
// files: the linker keeps one copy, which may use instructions that the processor lacks. So helpers
// live in anonymous namespaces, and kernels use no std:: function templates.
#pragma once

#include <cstdint>

#include "moe_int4_args.h"

namespace moe_int4::cpu {

// The activation rows of one expert, converted by prepare().
constexpr int32_t kPreparedTogether = 16;  // most rows that one call of prepare() converts
constexpr int32_t kSumsPadding = 16;
struct PreparedRows {
  char* data;      // the kernel's layout; calls of prepare() write kPreparedTogether * stride apart
  int64_t stride;  // bytes per row
  float* sums;     // per row and group, padded with zeros to kSumsPadding
  int64_t sums_stride;
};

// Rows [begin, begin + count) of an expert that has m rows; begin is a multiple of
// kPreparedTogether. a[i] is row begin + i.
struct Source {
  DType dtype;
  const uint16_t* a[kPreparedTogether];
  int32_t begin, count, m, k, group_size;
  int32_t bits;  // per weight, which determines the order of the activations
};

// out[r][j] = sum over k of dequantized w[first + j][k] * row r, for r < m, j < columns.
struct Tile {
  DType dtype;
  const uint32_t* q;  // packed weights, scales and zero points of one expert, starting at its row 0
  int64_t q_stride;
  const void* scales;
  int64_t s_stride;
  const uint32_t* zeros;  // null: symmetric
  int64_t z_stride;
  const uint32_t* next;     // the packed row that the thread reads after this tile
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
  int64_t (*row_bytes)(DType dtype, int32_t k);       // minimum stride of a prepared row
  int32_t (*rows_allocated)(DType dtype, int32_t m);  // for an expert that has m rows
  int64_t (*scratch_bytes)(int32_t k, int32_t group_size, int32_t m);
  void (*prepare)(const Source& source, const PreparedRows& rows);
  void (*multiply)(const Tile& tile);
};

// The step after a product.
constexpr int32_t kDotBlock = 256;

// fork: begin lm_head
// kDotBlock products of one activation row. Product i differs from its 16-bit counterpart by at
// most norm * errors[i] + kRounding * |values[i]|. One with a negative error does not count.
struct Products {
  const float *values, *errors;
  float norm;
};
// Rounding to 16 bits changes a product by less than this fraction in bf16; fp16 is finer.
constexpr float kRounding = 0x1p-7f;

// fork: end
struct Epilogue {
  // c[i] = act(min(gate[i], limit)) * (clamp(up[i], -limit, limit) + beta), i < n.
  void (*activate)(const GateUpArgs& args, const float* gate, const float* up, int32_t n, void* c);
  void (*store)(DType dtype, const float* y, int32_t n, void* c);
  // to[i] = from[i], i < n.
  void (*load)(DType dtype, const void* from, int32_t n, float* to);
  // out[r] = sum over k of w[k] * a[r][k], in an order that depends on k alone. a is padded with
  // zeros to a multiple of kDotBlock.
  void (*dot)(DType dtype, const uint16_t* w, const float* const* a, int32_t rows, int32_t k,
              float* out);
  // fork: begin lm_head
  // Raises `largest` to the largest product and `reached` to the largest lower bound of one.
  void (*raise_bounds)(const Products& products, float* largest, float* reached);
  // asked[i] |= bit for the products that are at least `from`, or whose upper bound is at least
  // `reached`.
  void (*ask)(const Products& products, float from, float reached, uint32_t bit, uint32_t* asked);
  // fork: end
};

// kernels_fma.h. "Few": the path for few rows, whatever their number.
extern const Kernel kPortable, kPortableFew;
extern const Epilogue kPortableEpilogue;
#if defined(__x86_64__)
extern const Kernel kAvx2, kAvx2Few, kAvx512, kAvx512Few;
extern const Kernel kAvx512Vnni, kAvx512Bf16, kAmxInt8, kAmxBf16;
extern const Epilogue kAvx2Epilogue, kAvx512Epilogue;
#endif

}  // namespace moe_int4::cpu
