// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The int4 MoE ops for GPUs; torch calls HIP devices CUDA too. torch_bindings.cpp, a folder above,
// has the schemas.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "gpu_compat.cuh"
#include "launch.h"
#include "moe_int4_checks.h"
// fork: begin token
#include "moe_router_checks.h"
// fork: end
// fork: begin lm_head
#include "wvSplitK_int_g_checks.h"
// fork: end
// fork: begin overlay
#if GPU_HAS_MMA
#include "tiled_checks.h"
#endif
// fork: end

namespace moe_int4::gpu {
namespace {

// Makes a tensor's device current and finds its stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    require_current_device();
    stream_ = current_stream(t.get_device_index());
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void gemm_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& expert_ids, int64_t block_size_m, int64_t cu_count, int64_t group_size,
             const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& sorted_token_ids, int64_t top_k) {
  const GemmArgs args = check_gemm(DeviceType::CUDA, a, w, scales, c, expert_ids, block_size_m,
                                   cu_count, group_size, zero_points, sorted_token_ids, top_k);
  launch_gemm(args, OnDeviceOf(a).stream());
}

void gate_up_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
                const Tensor& topk_ids, std::string activation, int64_t cu_count,
                int64_t group_size, const std::optional<Tensor>& zero_points,
                const std::optional<Tensor>& expert_map, double alpha, double beta,
                std::optional<double> limit, const std::optional<std::vector<int64_t>>& plan,
                const std::optional<Tensor>& shared_w, const std::optional<Tensor>& shared_gate,
                const std::optional<Tensor>& shared_c, const std::optional<Tensor>& shared_factors,
                const std::optional<Tensor>& shared_scales,
                const std::optional<Tensor>& shared_zero_points) {
  const GateUpArgs args =
      check_gate_up(DeviceType::CUDA, a, w, scales, c, topk_ids, activation, cu_count, group_size,
                    zero_points, expert_map, alpha, beta, limit, plan, shared_w, shared_gate,
                    shared_c, shared_factors, shared_scales, shared_zero_points);
  launch_gate_up(args, OnDeviceOf(a).stream());
}

void down_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& topk_ids, const std::optional<Tensor>& topk_weights, int64_t cu_count,
             int64_t group_size, const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& expert_map,
             const std::optional<std::vector<int64_t>>& plan, const std::optional<Tensor>& shared_a,
             const std::optional<Tensor>& shared_w, const std::optional<Tensor>& shared_factors,
             const std::optional<Tensor>& shared_c, const std::optional<Tensor>& shared_scales,
             const std::optional<Tensor>& shared_zero_points) {
  const DownArgs args =
      check_down(DeviceType::CUDA, a, w, scales, c, topk_ids, topk_weights, cu_count, group_size,
                 zero_points, expert_map, plan, shared_a, shared_w, shared_factors, shared_c,
                 shared_scales, shared_zero_points);
  launch_down(args, OnDeviceOf(a).stream());
}

// fork: begin lm_head
void dense_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
              int64_t cu_count, int64_t group_size, int64_t bits,
              const std::optional<Tensor>& zero_points) {
  const DenseArgs args =
      check_dense(DeviceType::CUDA, a, w, scales, c, cu_count, group_size, bits, zero_points);
  launch_dense(args, OnDeviceOf(a).stream());
}

void rescore_op(const Tensor& a, const Tensor& w, const Tensor& errors, const Tensor& c,
                const Tensor& partials, double window, double bound) {
  const RescoreArgs args =
      check_rescore(DeviceType::CUDA, a, w, errors, c, partials, window, bound);
  launch_rescore(args, OnDeviceOf(a).stream());
}

// fork: end
// fork: begin overlay
#if GPU_HAS_MMA
void tiled_gate_up_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
                      const Tensor& sorted_ids, const Tensor& expert_ids, const Tensor& num_padded,
                      int64_t top_k, std::string activation, int64_t group_size,
                      std::vector<int64_t> tile, const std::optional<Tensor>& zero_points,
                      double alpha, double beta, std::optional<double> limit) {
  const TiledGateUpArgs args =
      check_tiled_gate_up(DeviceType::CUDA, a, w, scales, c, {sorted_ids, expert_ids, num_padded},
                          top_k, activation, group_size, tile, zero_points, alpha, beta, limit);
  launch_tiled_gate_up(args, OnDeviceOf(a).stream());
}

void tiled_down_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
                   const Tensor& sorted_ids, const Tensor& expert_ids, const Tensor& num_padded,
                   const std::optional<Tensor>& topk_weights, int64_t group_size,
                   std::vector<int64_t> tile, const std::optional<Tensor>& zero_points) {
  const TiledDownArgs args =
      check_tiled_down(DeviceType::CUDA, a, w, scales, c, {sorted_ids, expert_ids, num_padded},
                       topk_weights, group_size, tile, zero_points);
  launch_tiled_down(args, OnDeviceOf(a).stream());
}
#endif

// fork: end
// fork: begin token
void router_op(const Tensor& a, const Tensor& w, const Tensor& logits, const Tensor& topk_weights,
               const Tensor& topk_ids, const Tensor& arrived, std::string scoring, bool renormalize,
               int64_t cu_count, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& is_padding, double scale) {
  const RouterArgs args =
      check_router(DeviceType::CUDA, a, w, logits, topk_weights, topk_ids, arrived, scoring,
                   renormalize, cu_count, bias, is_padding, scale);
  launch_router(args, OnDeviceOf(a).stream());
}

// fork: end
void load_device_op(int64_t device, std::string arch) {
  load_device(static_cast<int>(device), arch);
}

}  // namespace
}  // namespace moe_int4::gpu

STABLE_TORCH_LIBRARY_FRAGMENT(_rocm_C, m) {
  m.def("hybrid_w4a16_load_device(int device, str arch) -> ()");
  // fork: begin overlay
#if GPU_HAS_MMA
  m.def(
      "fused_moe_wvSplitK_int4_tiled_gate_up(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, "
      "Tensor sorted_ids, Tensor expert_ids, Tensor num_padded, int top_k, str activation, "
      "int group_size, int[] tile, Tensor? zero_points=None, float alpha=1.0, float beta=0.0, "
      "float? limit=None) -> ()");
  m.def(
      "fused_moe_wvSplitK_int4_tiled_down(Tensor a, Tensor w, Tensor scales, Tensor(c!) c, "
      "Tensor sorted_ids, Tensor expert_ids, Tensor num_padded, Tensor? topk_weights, "
      "int group_size, int[] tile, Tensor? zero_points=None) -> ()");
#endif
  // fork: end
}

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CompositeExplicitAutograd, m) {
  m.impl("hybrid_w4a16_load_device", TORCH_BOX(&moe_int4::gpu::load_device_op));
}

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CUDA, m) {
  m.impl("fused_moe_wvSplitK_int4_gemm", TORCH_BOX(&moe_int4::gpu::gemm_op));
  m.impl("fused_moe_wvSplitK_int4_gate_up", TORCH_BOX(&moe_int4::gpu::gate_up_op));
  m.impl("fused_moe_wvSplitK_int4_down", TORCH_BOX(&moe_int4::gpu::down_op));
  // fork: begin lm_head
  m.impl("wvSplitK_int_g", TORCH_BOX(&moe_int4::gpu::dense_op));
  m.impl("wvSplitK_int_g_rescore", TORCH_BOX(&moe_int4::gpu::rescore_op));
  // fork: end
  // fork: begin overlay
#if GPU_HAS_MMA
  m.impl("fused_moe_wvSplitK_int4_tiled_gate_up", TORCH_BOX(&moe_int4::gpu::tiled_gate_up_op));
  m.impl("fused_moe_wvSplitK_int4_tiled_down", TORCH_BOX(&moe_int4::gpu::tiled_down_op));
#endif
  // fork: end
  // fork: begin token
  m.impl("fused_moe_router_topk", TORCH_BOX(&moe_int4::gpu::router_op));
  // fork: end
}
