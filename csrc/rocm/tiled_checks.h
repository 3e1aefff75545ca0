// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Argument checks of the tiled ops, as in moe_int4_checks.h.
#pragma once

#include "moe_int4_checks.h"
#include "tiled.h"

namespace moe_int4 {

struct SortedTensors {
  const Tensor &ids, &expert_ids, &num_padded;
};

// c has `top_k` rows per row of a, and a column per `rows_per_column` rows of w.
template <typename Args>
Args check_tiled(const ArgumentChecks& check, const Tensor& a, const Tensor& w,
                 const Tensor& scales, const Tensor& c, const SortedTensors& sorted, int64_t top_k,
                 int64_t group_size, const std::vector<int64_t>& tile,
                 const std::optional<Tensor>& zero_points, int64_t rows_per_column) {
  Args out{};
  out.dtype = check.dtype();
  check.activation("a", a, {{"M"}, {"K"}});
  out.a = a.const_data_ptr();
  out.a_stride_m = a.stride(0);
  if (reinterpret_cast<uintptr_t>(out.a) % 16 != 0 || (a.size(0) > 1 && out.a_stride_m % 8 != 0)) {
    check.fail("a", "rows aligned to 16 bytes", "other rows");
  }
  // a and c may have more columns: workspaces are padded.
  const int64_t k = scales.dim() == 3 ? scales.size(2) * group_size : a.size(1);
  out.w = check.weights(w, scales, zero_points, k, group_size);
  if (a.size(1) < k) {
    check.fail("a", std::to_string(k) + " columns or more", std::to_string(a.size(1)));
  }
  if (out.w.n % (2 * rows_per_column) != 0) {
    check.fail("w", "N a multiple of " + std::to_string(2 * rows_per_column),
               std::to_string(out.w.n));
  }
  out.sorted.top_k = check.positive("top_k", top_k);
  check.positive("a", a.size(0) * top_k + 1);  // pairs are counted in int32
  out.sorted.num_pairs = static_cast<int32_t>(a.size(0) * top_k);
  check.output("c", c, {{"pairs", out.sorted.num_pairs}, {"columns"}});
  if (c.size(1) < out.w.n / rows_per_column) {
    check.fail("c", std::to_string(out.w.n / rows_per_column) + " columns or more",
               std::to_string(c.size(1)));
  }
  out.c = c.mutable_data_ptr();
  out.c_stride_m = c.stride(0);
  if (reinterpret_cast<uintptr_t>(out.c) % 4 != 0 || (c.size(0) > 1 && out.c_stride_m % 2 != 0)) {
    check.fail("c", "rows aligned to 4 bytes", "other rows");
  }
  if (tile.size() != 3) {
    check.fail("tile", "3 integers: pairs, waves, row_tiles", std::to_string(tile.size()));
  }
  out.tile = {tile[0], tile[1], tile[2]};
  check.tensor("expert_ids", sorted.expert_ids, {ScalarType::Int}, {{"lists"}});
  out.sorted.expert_ids = static_cast<const int32_t*>(sorted.expert_ids.const_data_ptr());
  out.sorted.lists = check.integer("expert_ids", sorted.expert_ids.size(0), 0,
                                   std::numeric_limits<int32_t>::max());
  const int64_t entries = sorted.expert_ids.size(0) * tile[0];
  check.integer("expert_ids", entries, 0, std::numeric_limits<int32_t>::max());
  check.tensor("sorted_ids", sorted.ids, {ScalarType::Int}, {{"lists*pairs"}});
  if (sorted.ids.size(0) <= entries - tile[0]) {  // the last list may be cut
    check.fail("sorted_ids", "about " + std::to_string(entries) + " entries (lists*pairs)",
               std::to_string(sorted.ids.size(0)));
  }
  out.sorted.ids = static_cast<const int32_t*>(sorted.ids.const_data_ptr());
  check.tensor("num_padded", sorted.num_padded, {ScalarType::Int}, {{"1", 1}});
  out.sorted.num_padded = static_cast<const int32_t*>(sorted.num_padded.const_data_ptr());
  return out;
}

inline TiledGateUpArgs check_tiled_gate_up(DeviceType device, const Tensor& a, const Tensor& w,
                                           const Tensor& scales, const Tensor& c,
                                           const SortedTensors& sorted, int64_t top_k,
                                           const std::string& activation, int64_t group_size,
                                           const std::vector<int64_t>& tile,
                                           const std::optional<Tensor>& zero_points, double alpha,
                                           double beta, std::optional<double> limit) {
  const ArgumentChecks check("fused_moe_wvSplitK_int4_tiled_gate_up", device, a);
  auto out = check_tiled<TiledGateUpArgs>(check, a, w, scales, c, sorted, top_k, group_size, tile,
                                          zero_points, 2);
  check.gated_activation(activation, alpha, beta, limit, out);
  return out;
}

inline TiledDownArgs check_tiled_down(DeviceType device, const Tensor& a, const Tensor& w,
                                      const Tensor& scales, const Tensor& c,
                                      const SortedTensors& sorted,
                                      const std::optional<Tensor>& topk_weights, int64_t group_size,
                                      const std::vector<int64_t>& tile,
                                      const std::optional<Tensor>& zero_points) {
  const ArgumentChecks check("fused_moe_wvSplitK_int4_tiled_down", device, a);
  auto out = check_tiled<TiledDownArgs>(check, a, w, scales, c, sorted, 1, group_size, tile,
                                        zero_points, 1);
  if (topk_weights.has_value()) {
    check.tensor("topk_weights", *topk_weights, {ScalarType::Float}, {{"M"}, {"top_k"}});
    if (topk_weights->numel() != out.sorted.num_pairs ||
        (topk_weights->size(0) > 1 && topk_weights->stride(0) != topk_weights->size(1))) {
      check.fail("topk_weights",
                 "a contiguous tensor of " + std::to_string(out.sorted.num_pairs) + " numbers",
                 std::to_string(topk_weights->numel()));
    }
    out.topk_weights = static_cast<const float*>(topk_weights->const_data_ptr());
  }
  return out;
}

}  // namespace moe_int4
