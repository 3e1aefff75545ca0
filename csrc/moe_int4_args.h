// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Argument structs of the int4 MoE ops. The checks in moe_int4_checks.h turn tensors into these
// structs, so CPU kernels and GPU launchers do not depend on torch.
//
// Weight layout (hybrid_w4a16_packing.py packs it):
//   weights      int32 [E, N, K/8], ExLlama-shuffled: word bits
//                v0 | v2<<4 | v4<<8 | v6<<12 | v1<<16 | v3<<20 | v5<<24 | v7<<28,
//                so that (word >> 4*i) & 0x000f000f is the pair (v[2i], v[2i+1])
//   scales       activation dtype, [E, N, K/G]
//   zero points  int32 [E, N/8, K/G], row n at word n/8, bits 4*(n%8); null: symmetric, 8
//   w[n, k] = (q[n, k] - zp[n, k/G]) * scale[n, k/G]
// Strides are in elements of the tensor's dtype; the innermost stride is 1 everywhere.
#pragma once

#include <cstdint>

namespace moe_int4 {

enum class DType : int32_t { kHalf = 0, kBFloat16 = 1 };

// Activations. A test compares this list with the Triton kernel and the Python map. The gated
// activation is act(min(gate, limit)) * (clamp(up, -limit, limit) + beta).
enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// X(kind, weight): act(x) = x * weight. epilogue.h (CPU) and activation.cuh (GPU) define the
// functions that the formulas call. For y = sqrt(2 / pi) * (x + 0.044715 x^3), tanh-GELU's factor
// 0.5 * (1 + tanh(y)) is sigmoid(2 * y).
#define MOE_INT4_ACTIVATIONS(X) \
  X(kSilu, sigmoid(alpha* x))   \
  X(kGelu, normal_cdf(x))       \
  X(kGeluTanh, sigmoid(1.5957691216057308f * x * (1.0f + 0.044715f * x * x)))

// Values of the op argument `activation`. swigluoai is silu with alpha 1.702, beta 1, limit 7.
struct ActivationName {
  const char* name;
  Activation kind;
};
constexpr ActivationName kActivationNames[] = {
    {"silu", Activation::kSilu},
    {"swigluoai", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},
};

// One stack of expert weights [E, N, K] in packed form.
struct Weights {
  const uint32_t* q;  // [E, N, K/8]
  int64_t q_stride_e, q_stride_n;
  const void* scales;  // [E, N, K/G], DType
  int64_t s_stride_e, s_stride_n;
  const uint32_t* zeros;  // [E, N/8, K/G] or null
  int64_t z_stride_e, z_stride_n8;
  int32_t num_experts;  // E: experts on this rank
  int32_t n, k, group_size;
  // Bits per weight. Other than 4 in dense weights and shared experts only: weights are in order of
  // k, q and its strides count words of 32 bits, and zeros is null. 8: bytes, zero point 128. 16
  // (shared experts): DType, without scales.
  int32_t bits = 4;
};

// Router output. The local expert of (token m, slot t) is map ? map[ids[m, t]] : ids[m, t]. A
// result outside 0..E-1 means that the expert is not on this rank; the pair is skipped.
struct Routing {
  const void* ids;  // [M, top_k], int32 or int64
  bool ids_are_int64;
  int64_t ids_stride_m;
  const int32_t* expert_map;  // [map_size] or null
  int32_t map_size;
  int32_t num_tokens;  // M
  int32_t top_k;
};

// The `plan` argument of gate_up and down: a GPU launch plan. Only the launcher interprets and
// checks the values.
struct Plan {
  static constexpr int32_t kMaxValues = 8;
  int64_t values[kMaxValues];
  int32_t size;  // 0: no plan given, the launcher chooses
};

// fork: begin ops
// The shared expert: an expert that every token uses, in the same launches as the routed experts.
// Its activation is silu(gate) * up. Without one, w.q is null.
struct SharedGateUp {
  Weights w;         // [1, 2 * I, K], rows 0..I-1 gate, I..2I-1 up
  const void* gate;  // [K], DType, or null
  void* c;           // [M, I]
  int64_t c_stride_m;
  float* factors;  // [M]: sigmoid(gate . a[m]); null without gate
};
struct SharedDown {
  const void* a;  // [M, K]: c of SharedGateUp
  int64_t a_stride_m;
  Weights w;             // [1, N, K]
  const float* factors;  // [M] or null: 1
  void* c;               // [M, N]: factors[m] * w a[m]
  int64_t c_stride_m;
};

// fork: end
// fused_moe_wvSplitK_int4_gemm: output row r is row r / top_k of a times the weights of the expert
// of r's block.
struct GemmArgs {
  DType dtype;
  const void* a;  // [M, K]
  int64_t a_stride_m;
  Weights w;
  void* c;  // [M * top_k, N]
  int64_t c_stride_m;
  const int32_t* expert_ids;        // [num_blocks], -1: skip the block
  const int32_t* sorted_token_ids;  // [num_blocks * block_size_m] or null (identity); an id >=
                                    // M*top_k is padding
  int32_t num_blocks;
  int32_t block_size_m;  // 1..5
  int32_t num_rows;      // M * top_k
  int32_t top_k;
  int32_t cu_count;    // compute units to spread over (GPU grid); ignored on the CPU
  bool row_invariant;  // see row_invariance.h; likewise below
};

// fused_moe_wvSplitK_int4_gate_up: c[m*top_k + t, i] = act(gate row i, up row i) of expert (m, t).
struct GateUpArgs {
  DType dtype;
  const void* a;  // [M, K]
  int64_t a_stride_m;
  Weights w;  // n = 2 * I: rows 0..I-1 gate, I..2I-1 up
  void* c;    // [M * top_k, I]; rows of skipped pairs are not written
  int64_t c_stride_m;
  Routing routing;
  Activation activation;
  float alpha, beta, limit;  // limit = +inf: no clamp
  int32_t cu_count;
  Plan plan;
  bool row_invariant;
  // fork: begin ops
  SharedGateUp shared;
  // fork: end
};

// fused_moe_wvSplitK_int4_down: c[m] is the sum over t of
//   topk_weights[m, t] * w[expert(m, t)] a[m*top_k + t]
// in fp32 and in a fixed order. Every element of c is written (0 when all pairs are skipped).
struct DownArgs {
  DType dtype;
  const void* a;  // [M * top_k, K = I]
  int64_t a_stride_m;
  Weights w;  // n = hidden size
  void* c;    // [M, N]
  int64_t c_stride_m;
  Routing routing;
  const float* topk_weights;  // [M, top_k] or null: all 1 (already applied to the input)
  int64_t tw_stride_m;
  int32_t cu_count;
  Plan plan;
  bool row_invariant;
  // fork: begin ops
  SharedDown shared;
  // fork: end
};

// wvSplitK_int_g: c = a w^T for one weight matrix (num_experts is 1).
struct DenseArgs {
  DType dtype;
  const void* a;  // [M, K]
  int64_t a_stride_m;
  int32_t m;
  Weights w;
  void* c;  // [M, N]
  int64_t c_stride_m;
  int32_t cu_count;
  bool row_invariant;
};

// wvSplitK_int_g_rescore: recomputes c[m, n] from the unquantized w where the error bounds do not
// rule out that it is the row's largest.
struct RescoreArgs {
  DType dtype;
  const void* a;  // [M, K]
  int64_t a_stride_m;
  int32_t m;
  const void* w;  // [N, K], DType
  int64_t w_stride_n;
  const float* errors;  // [N]
  int32_t n, k;
  void* c;  // [M, N]
  int64_t c_stride_m;
  float* partials;  // [M, kRescoreParts, 2]: largest product and largest lower bound per part
  int64_t p_stride_m;
  float window, bound;
};

// The vocabulary is cut into this many parts; each finds its largest values independently.
constexpr int32_t kRescoreParts = 256;

}  // namespace moe_int4
