// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Schemas of the int4 MoE ops. They form a fragment of the _rocm_C namespace, whichever library
// they are linked into. csrc/cpu and csrc/rocm register the implementations. hybrid_w4a16_ops.py in
// vllm/model_executor/layers/fused_moe documents each argument.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "row_invariance.h"

// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
#include "cpu/isa.h"
#endif
// fork: end
#if defined(HYBRID_W4A16_HIP) || defined(HYBRID_W4A16_CUDA)
#include "rocm/device.h"
#endif

namespace {

// One line per device type that the library has kernels for: its name, then the CPU's instruction
// sets (best first) or the GPU architectures.
std::string build_info() {
  std::string info;
// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
  info += "cpu " + moe_int4::cpu::available_isas() + "\n";
#endif
// fork: end
#if defined(HYBRID_W4A16_HIP) || defined(HYBRID_W4A16_CUDA)
  info += moe_int4::gpu::build_info() + "\n";
#endif
  return info;
}

std::string refusal(std::string arch) {
// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
  if (arch == "cpu") return "";
#endif
// fork: end
#if defined(HYBRID_W4A16_HIP) || defined(HYBRID_W4A16_CUDA)
  return moe_int4::gpu::refusal(arch);
#else
  return "hybrid_w4a16 has no kernels for " + arch + "; it was built for the CPU";
#endif
}

// Sets row invariance unless `on` is missing; returns whether it is on.
bool row_invariance(std::optional<bool> on) {
  if (on.has_value()) moe_int4::row_invariance() = *on;
  return moe_int4::row_invariance();
}

// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
std::string cpu_isa(std::string isa) { return moe_int4::cpu::select_isa(isa); }

std::string cpu_kernels(int64_t group_size, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const auto fail = [](const std::string& what) {
    throw std::runtime_error("hybrid_w4a16_cpu_kernels: " + what);
  };
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    fail("group_size: expected 32, 64 or 128, got " + std::to_string(group_size));
  }
  if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    fail(std::string("dtype: expected Half or BFloat16, got ") +
         torch::headeronly::toString(dtype));
  }
  return moe_int4::cpu::kernels_by_rows(
      static_cast<int32_t>(group_size),
      dtype == ScalarType::Half ? moe_int4::DType::kHalf : moe_int4::DType::kBFloat16);
}
#endif
// fork: end

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_rocm_C, m) {
  // For callers that sort the rows themselves; the MoE layer runs gate_up and down instead.
  m.def(
      "fused_moe_wvSplitK_int4_gemm(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, "
      "Tensor expert_ids, int block_size_m, int cu_count, int group_size, "
      "Tensor? zero_points=None, Tensor? sorted_token_ids=None, int top_k=1) -> ()");
  m.def(
      "fused_moe_wvSplitK_int4_gate_up(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, "
      "Tensor topk_ids, str activation, int cu_count, int group_size, "
      "Tensor? zero_points=None, Tensor? expert_map=None, "
      "float alpha=1.0, float beta=0.0, float? limit=None, int[]? plan=None, "
      "Tensor? shared_w=None, Tensor? shared_gate=None, Tensor(d!)? shared_c=None, "
      "Tensor(e!)? shared_factors=None, Tensor? shared_scales=None, "
      "Tensor? shared_zero_points=None) -> ()");
  m.def(
      "fused_moe_wvSplitK_int4_down(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, "
      "Tensor topk_ids, Tensor? topk_weights, int cu_count, int group_size, "
      "Tensor? zero_points=None, Tensor? expert_map=None, int[]? plan=None, "
      "Tensor? shared_a=None, Tensor? shared_w=None, Tensor? shared_factors=None, "
      "Tensor(d!)? shared_c=None, Tensor? shared_scales=None, "
      "Tensor? shared_zero_points=None) -> ()");
  // fork: begin lm_head
  m.def(
      "wvSplitK_int_g(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, int cu_count, "
      "int group_size, int bits, Tensor? zero_points=None) -> ()");
  m.def(
      "wvSplitK_int_g_rescore(Tensor a, Tensor w, Tensor errors, Tensor(c!) c, "
      "Tensor(p!) partials, float window, float bound) -> ()");
  // fork: end
  // fork: begin token
  m.def(
      "fused_moe_router_topk(Tensor a, Tensor w, Tensor(c!) logits, Tensor(d!) topk_weights, "
      "Tensor(e!) topk_ids, Tensor(f!) arrived, str scoring, bool renormalize, int cu_count, "
      "Tensor? bias=None, Tensor? is_padding=None, float scale=1.0) -> ()");
  // fork: end
  m.def("hybrid_w4a16_build_info() -> str");
  // An empty string if the library has kernels for `arch` ("cpu", "gfx1151", "sm_90"); otherwise a
  // sentence that names what it was built for.
  m.def("hybrid_w4a16_refusal(str arch) -> str");
  // Sets, unless `on` is missing, and returns whether a row of a call gets the same bits whatever
  // other rows the call has. For the whole process.
  m.def("hybrid_w4a16_row_invariance(bool? on=None) -> bool");
// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
  // For tests and benchmarks: selects the CPU's instruction set ("": the best one) and returns its
  // name.
  m.def("hybrid_w4a16_cpu_isa(str isa) -> str");
  // The kernels of the selected instruction set, one per line: the name and the smallest number of
  // rows of an expert for which it runs.
  m.def("hybrid_w4a16_cpu_kernels(int group_size, ScalarType dtype) -> str");
#endif
  // fork: end
}

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CompositeExplicitAutograd, m) {
  m.impl("hybrid_w4a16_build_info", TORCH_BOX(&build_info));
  m.impl("hybrid_w4a16_refusal", TORCH_BOX(&refusal));
  m.impl("hybrid_w4a16_row_invariance", TORCH_BOX(&row_invariance));
// fork: begin cpu
#if defined(HYBRID_W4A16_CPU)
  m.impl("hybrid_w4a16_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("hybrid_w4a16_cpu_kernels", TORCH_BOX(&cpu_kernels));
#endif
  // fork: end
}
