// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Argument checks of the int4 MoE ops: they turn tensors into the structs of moe_int4_args.h. A
// failed check throws std::runtime_error (RuntimeError in Python) with this message:
//   <op>: <argument>: expected <what>, got <what>
// Values inside tensors (expert ids) are not checked,
// because reading them would synchronise a GPU. Kernels skip ids that are out of range.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe_int4_args.h"
#include "row_invariance.h"

namespace moe_int4 {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::DeviceType;
using torch::stable::Tensor;

// A dimension of an expected shape: its name in messages and its size (kAny: unchecked).
struct Dim {
  static constexpr int64_t kAny = -1;
  const char* name;
  int64_t size = kAny;
};

class ArgumentChecks {
 public:
  // `a` sets the device and the dtype of the call; `device` is the type that the kernels run on.
  ArgumentChecks(const char* op, DeviceType device, const Tensor& a)
      : op_(op), device_(a.device()), dtype_(a.scalar_type()) {
    if (device_.type() != device) {
      fail("a", "a tensor on " + name(Device(device)), name(device_));
    }
    if (dtype_ != ScalarType::Half && dtype_ != ScalarType::BFloat16) {
      fail("a", "dtype Half or BFloat16", torch::headeronly::toString(dtype_));
    }
  }

  DType dtype() const { return dtype_ == ScalarType::Half ? DType::kHalf : DType::kBFloat16; }

  // Checks device, dtype, shape and innermost stride.
  void tensor(const char* argument, const Tensor& t, std::initializer_list<ScalarType> dtypes,
              std::initializer_list<Dim> dims) const {
    if (t.device() != device_)
      fail(argument, "device " + name(device_) + " as a", name(t.device()));
    check_dtype(argument, t, dtypes);
    check_shape(argument, t, dims);
    const int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) {
      fail(argument, "innermost stride 1", std::to_string(t.stride(last)));
    }
  }

  void activation(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const {
    tensor(argument, t, {dtype_}, dims);
  }

  // Rows of an output must not overlap.
  void output(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const {
    activation(argument, t, dims);
    if (t.size(0) > 1 && t.stride(0) < t.size(1)) {
      fail(argument, "row stride of at least " + std::to_string(t.size(1)),
           std::to_string(t.stride(0)));
    }
  }

  int32_t integer(const char* argument, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) {
      const bool open = value < low && high == std::numeric_limits<int32_t>::max();
      fail(argument,
           open ? "at least " + std::to_string(low)
                : std::to_string(low) + " to " + std::to_string(high),
           std::to_string(value));
    }
    return static_cast<int32_t>(value);
  }

  int32_t positive(const char* argument, int64_t value) const {
    return integer(argument, value, 1, std::numeric_limits<int32_t>::max());
  }

  // Checks packed weights, scales and zero points; `k` is the number of columns of a.
  Weights weights(const Tensor& w, const Tensor& scales, const std::optional<Tensor>& zero_points,
                  int64_t k, int64_t group_size) const {
    if (group_size != 32 && group_size != 64 && group_size != 128) {
      fail("group_size", "32, 64 or 128", std::to_string(group_size));
    }
    if (k <= 0 || k % group_size != 0) {
      fail("a", "columns a multiple of group_size " + std::to_string(group_size),
           std::to_string(k));
    }
    tensor("w", w, {ScalarType::Int}, {{"E"}, {"N"}, {"K//8", k / 8}});
    Weights out{};
    out.num_experts = positive("w", w.size(0));
    out.n = positive("w", w.size(1));
    out.k = positive("a", k);
    out.group_size = static_cast<int32_t>(group_size);
    out.q = static_cast<const uint32_t*>(w.const_data_ptr());
    out.q_stride_e = w.stride(0);
    out.q_stride_n = w.stride(1);
    if (out.n > 1 && (out.q_stride_n < k / 8 || out.q_stride_n % 4 != 0)) {
      fail("w", "row stride a multiple of 4 words and at least " + std::to_string(k / 8),
           std::to_string(out.q_stride_n));
    }
    if (out.num_experts > 1 && out.q_stride_e % 4 != 0) {
      fail("w", "expert stride a multiple of 4 words", std::to_string(out.q_stride_e));
    }
    if (reinterpret_cast<uintptr_t>(out.q) % 16 != 0) {
      fail("w", "data aligned to 16 bytes",
           "an address " + std::to_string(reinterpret_cast<uintptr_t>(out.q) % 16) + " past one");
    }

    const int64_t groups = k / group_size;
    activation("scales", scales, {{"E", out.num_experts}, {"N", out.n}, {"K//G", groups}});
    out.scales = scales.const_data_ptr();
    out.s_stride_e = scales.stride(0);
    out.s_stride_n = scales.stride(1);
    if (zero_points.has_value()) {
      if (out.n % 8 != 0) fail("w", "N a multiple of 8 with zero_points", std::to_string(out.n));
      tensor("zero_points", *zero_points, {ScalarType::Int},
             {{"E", out.num_experts}, {"N//8", out.n / 8}, {"K//G", groups}});
      out.zeros = static_cast<const uint32_t*>(zero_points->const_data_ptr());
      out.z_stride_e = zero_points->stride(0);
      out.z_stride_n8 = zero_points->stride(1);
    }
    return out;
  }

  // Checks that both arguments are given, or neither.
  void together(const char* argument, const std::optional<Tensor>& t, const char* with,
                const std::optional<Tensor>& other) const {
    if (t.has_value() == other.has_value()) return;
    fail(argument, std::string(other.has_value() ? "a tensor" : "None") + " as " + with,
         t.has_value() ? "a tensor" : "None");
  }

  void only_with_shared_w(const std::optional<Tensor>& w, const std::optional<Tensor>& scales,
                          const std::optional<Tensor>& zero_points) const {
    if (scales.has_value()) together("shared_w", w, "shared_scales", scales);
    if (zero_points.has_value()) together("shared_w", w, "shared_zero_points", zero_points);
  }

  // Checks the weights of a shared expert: 16-bit, or with scales packed in 4 or 8 bits.
  Weights shared_weights(const Tensor& w, const std::optional<Tensor>& scales,
                         const std::optional<Tensor>& zero_points, const char* rows, int64_t k,
                         int64_t n = Dim::kAny) const {
    Weights out{};
    const bool words = w.scalar_type() == ScalarType::Int;
    out.bits = words ? 4 : w.scalar_type() == ScalarType::Byte ? 8 : 16;
    if (scales.has_value() != (out.bits != 16)) {
      fail("shared_scales", out.bits == 16 ? "None with 16-bit shared_w" : "a tensor",
           scales.has_value() ? "a tensor" : "None");
    }
    if (zero_points.has_value() && !words) {
      fail("shared_zero_points", "None unless shared_w is Int", "a tensor");
    }
    const int64_t columns = words ? k / 8 : k, per_16_bytes = words ? 4 : 128 / out.bits;
    tensor("shared_w", w, {ScalarType::Int, ScalarType::Byte, dtype_},
           {{rows, n}, {words ? "K//8" : "K", columns}});
    check_wide("shared_w", w, k);
    if (w.size(0) > 1 && (w.stride(0) < columns || w.stride(0) % per_16_bytes != 0)) {
      fail("shared_w",
           "row stride a multiple of " + std::to_string(per_16_bytes) + " and at least " +
               std::to_string(columns),
           std::to_string(w.stride(0)));
    }
    out.num_experts = 1;
    out.n = positive("shared_w", w.size(0));
    out.k = positive("shared_w", k);
    out.q = static_cast<const uint32_t*>(w.const_data_ptr());
    out.q_stride_n = words ? w.stride(0) : w.stride(0) * out.bits / 32;
    if (!scales.has_value()) return out;
    activation("shared_scales", *scales, {{"N of shared_w", out.n}, {"K//G"}});
    const int64_t groups = scales->size(1);
    for (int32_t size : {32, 64, 128}) {
      if (groups * size == k) out.group_size = size;
    }
    if (out.group_size == 0) {
      fail("shared_scales", "groups of 32, 64 or 128 of K = " + std::to_string(k),
           std::to_string(groups) + " groups");
    }
    out.scales = scales->const_data_ptr();
    out.s_stride_n = scales->stride(0);
    if (zero_points.has_value()) {
      if (out.n % 8 != 0) {
        fail("shared_w", "N a multiple of 8 with shared_zero_points", std::to_string(out.n));
      }
      tensor("shared_zero_points", *zero_points, {ScalarType::Int},
             {{"N//8", out.n / 8}, {"K//G", groups}});
      out.zeros = static_cast<const uint32_t*>(zero_points->const_data_ptr());
      out.z_stride_n8 = zero_points->stride(0);
    }
    return out;
  }

  void wide_vector(const char* argument, const Tensor& w, int64_t k) const {
    activation(argument, w, {{"K", k}});
    check_wide(argument, w, k);
  }

  Routing routing(const Tensor& topk_ids, const std::optional<Tensor>& expert_map) const {
    tensor("topk_ids", topk_ids, {ScalarType::Int, ScalarType::Long}, {{"M"}, {"top_k"}});
    Routing out{};
    out.num_tokens = integer("topk_ids", topk_ids.size(0), 0, std::numeric_limits<int32_t>::max());
    out.top_k = positive("topk_ids", topk_ids.size(1));
    positive("topk_ids", topk_ids.size(0) * out.top_k + 1);  // pairs are counted in int32
    out.ids = topk_ids.const_data_ptr();
    out.ids_are_int64 = topk_ids.scalar_type() == ScalarType::Long;
    out.ids_stride_m = topk_ids.stride(0);
    if (expert_map.has_value()) {
      tensor("expert_map", *expert_map, {ScalarType::Int}, {{"global experts"}});
      out.expert_map = static_cast<const int32_t*>(expert_map->const_data_ptr());
      out.map_size = positive("expert_map", expert_map->size(0));
    }
    return out;
  }

  Activation activation_kind(const std::string& name) const {
    std::string names;
    for (const ActivationName& known : kActivationNames) {
      if (name == known.name) return known.kind;
      if (!names.empty()) names += &known + 1 == std::end(kActivationNames) ? " or " : ", ";
      names += known.name;
    }
    fail("activation", names, "'" + name + "'");
  }

  // Checks the arguments of the gated activation and sets the fields of `out`.
  template <typename Args>
  void gated_activation(const std::string& name, double alpha, double beta,
                        std::optional<double> limit, Args& out) const {
    out.activation = activation_kind(name);
    if (out.activation != Activation::kSilu && alpha != 1.0) {
      fail("alpha", "1.0 with activation " + name, std::to_string(alpha));
    }
    out.alpha = static_cast<float>(alpha);
    out.beta = static_cast<float>(beta);
    out.limit = static_cast<float>(limit.value_or(std::numeric_limits<double>::infinity()));
    if (!(out.limit > 0)) fail("limit", "a number above 0", std::to_string(out.limit));
  }

  // Only GPU launchers take a plan; the CPU has nothing to choose.
  Plan plan(const std::optional<std::vector<int64_t>>& plan) const {
    Plan out{};
    if (!plan.has_value()) return out;
    const auto size = static_cast<int64_t>(plan->size());
    if (device_.type() == DeviceType::CPU) {
      fail("plan", "None on the CPU", "a list of " + std::to_string(size) + " integers");
    }
    if (size < 1 || size > Plan::kMaxValues) {
      fail("plan", "None or 1 to " + std::to_string(Plan::kMaxValues) + " integers",
           std::to_string(size));
    }
    std::copy(plan->begin(), plan->end(), out.values);
    out.size = static_cast<int32_t>(size);
    return out;
  }

  [[noreturn]] void fail(const std::string& argument, const std::string& expected,
                         const std::string& got) const {
    std::ostringstream message;
    message << op_ << ": " << argument << ": expected " << expected << ", got " << got;
    throw std::runtime_error(message.str());
  }

 private:
  void check_wide(const char* argument, const Tensor& w, int64_t k) const {
    if (k % 8 != 0) fail(argument, "K a multiple of 8", std::to_string(k));
    const uintptr_t past = reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16;
    if (past != 0) {
      fail(argument, "data aligned to 16 bytes",
           "an address " + std::to_string(past) + " past one");
    }
  }

  static std::string name(const Device& device) {
    std::ostringstream out;
    if (device.type() == DeviceType::CPU) {
      out << "cpu";
      return out.str();
    }
    if (device.type() == DeviceType::CUDA) {  // HIP devices too
      out << "cuda";
    } else {
      out << "device type " << static_cast<int>(device.type());
    }
    if (device.index() >= 0) out << ':' << device.index();
    return out.str();
  }

  void check_dtype(const char* argument, const Tensor& t,
                   std::initializer_list<ScalarType> dtypes) const {
    std::ostringstream expected;
    const char* separator = "";
    for (ScalarType dtype : dtypes) {
      if (t.scalar_type() == dtype) return;
      expected << separator << torch::headeronly::toString(dtype);
      if (dtype == dtype_) expected << " as a";
      separator = " or ";
    }
    fail(argument, "dtype " + expected.str(), torch::headeronly::toString(t.scalar_type()));
  }

  void check_shape(const char* argument, const Tensor& t, std::initializer_list<Dim> dims) const {
    bool fits = t.dim() == static_cast<int64_t>(dims.size());
    int64_t i = 0;
    for (const Dim& dim : dims) {
      fits = fits && (dim.size == Dim::kAny || dim.size == t.size(i));
      ++i;
    }
    if (fits) return;
    std::ostringstream expected, got;
    const char* separator = "[";
    for (const Dim& dim : dims) {
      expected << separator << dim.name;
      if (dim.size != Dim::kAny) expected << " = " << dim.size;
      separator = ", ";
    }
    separator = "[";
    for (int64_t size : t.sizes()) {
      got << separator << size;
      separator = ", ";
    }
    expected << "]";
    got << (t.dim() == 0 ? "[]" : "]");
    fail(argument, "shape " + expected.str(), got.str());
  }

  const char* op_;
  Device device_;
  ScalarType dtype_;
};

inline GemmArgs check_gemm(DeviceType device, const Tensor& a, const Tensor& w,
                           const Tensor& scales, const Tensor& c, const Tensor& expert_ids,
                           int64_t block_size_m, int64_t cu_count, int64_t group_size,
                           const std::optional<Tensor>& zero_points,
                           const std::optional<Tensor>& sorted_token_ids, int64_t top_k) {
  const ArgumentChecks check("fused_moe_wvSplitK_int4_gemm", device, a);
  GemmArgs out{};
  out.dtype = check.dtype();
  check.activation("a", a, {{"M"}, {"K"}});
  out.a = a.const_data_ptr();
  out.a_stride_m = a.stride(0);
  out.w = check.weights(w, scales, zero_points, a.size(1), group_size);
  out.block_size_m = check.integer("block_size_m", block_size_m, 1, 5);
  out.cu_count = check.positive("cu_count", cu_count);
  out.row_invariant = row_invariance();
  out.top_k = check.positive("top_k", top_k);
  check.positive("a", a.size(0) * top_k + 1);  // rows are counted in int32
  out.num_rows = static_cast<int32_t>(a.size(0) * top_k);
  check.output("c", c, {{"M*top_k", out.num_rows}, {"N", out.w.n}});
  out.c = c.mutable_data_ptr();
  out.c_stride_m = c.stride(0);
  check.tensor("expert_ids", expert_ids, {ScalarType::Int}, {{"num_blocks"}});
  const int64_t slots = expert_ids.size(0) * block_size_m;
  check.positive("expert_ids", slots + 1);
  out.expert_ids = static_cast<const int32_t*>(expert_ids.const_data_ptr());
  out.num_blocks = static_cast<int32_t>(expert_ids.size(0));
  if (sorted_token_ids.has_value()) {
    check.tensor("sorted_token_ids", *sorted_token_ids, {ScalarType::Int},
                 {{"num_blocks*block_size_m"}});
    if (sorted_token_ids->size(0) < slots) {
      check.fail("sorted_token_ids",
                 "num_blocks*block_size_m = " + std::to_string(slots) + " entries or more",
                 std::to_string(sorted_token_ids->size(0)));
    }
    out.sorted_token_ids = static_cast<const int32_t*>(sorted_token_ids->const_data_ptr());
  }
  return out;
}

inline GateUpArgs check_gate_up(
    DeviceType device, const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
    const Tensor& topk_ids, const std::string& activation, int64_t cu_count, int64_t group_size,
    const std::optional<Tensor>& zero_points, const std::optional<Tensor>& expert_map, double alpha,
    double beta, std::optional<double> limit, const std::optional<std::vector<int64_t>>& plan,
    const std::optional<Tensor>& shared_w, const std::optional<Tensor>& shared_gate,
    const std::optional<Tensor>& shared_c, const std::optional<Tensor>& shared_factors,
    const std::optional<Tensor>& shared_scales, const std::optional<Tensor>& shared_zero_points) {
  const ArgumentChecks check("fused_moe_wvSplitK_int4_gate_up", device, a);
  GateUpArgs out{};
  out.dtype = check.dtype();
  out.routing = check.routing(topk_ids, expert_map);
  check.activation("a", a, {{"M", out.routing.num_tokens}, {"K"}});
  out.a = a.const_data_ptr();
  out.a_stride_m = a.stride(0);
  out.w = check.weights(w, scales, zero_points, a.size(1), group_size);
  if (out.w.n % 2 != 0) check.fail("w", "an even N (gate and up rows)", std::to_string(out.w.n));
  check.output(
      "c", c,
      {{"M*top_k", int64_t{out.routing.num_tokens} * out.routing.top_k}, {"I", out.w.n / 2}});
  out.c = c.mutable_data_ptr();
  out.c_stride_m = c.stride(0);
  check.gated_activation(activation, alpha, beta, limit, out);
  out.cu_count = check.positive("cu_count", cu_count);
  out.plan = check.plan(plan);
  out.row_invariant = row_invariance();
  check.together("shared_c", shared_c, "shared_w", shared_w);
  check.together("shared_factors", shared_factors, "shared_gate", shared_gate);
  if (shared_gate.has_value()) check.together("shared_w", shared_w, "shared_gate", shared_gate);
  check.only_with_shared_w(shared_w, shared_scales, shared_zero_points);
  if (!shared_w.has_value()) return out;
  out.shared.w = check.shared_weights(*shared_w, shared_scales, shared_zero_points,
                                      "2*I of the shared expert", out.w.k);
  if (out.shared.w.n % 2 != 0) {
    check.fail("shared_w", "an even number of rows (gate and up)", std::to_string(out.shared.w.n));
  }
  check.output("shared_c", *shared_c,
               {{"M", out.routing.num_tokens}, {"I of the shared expert", out.shared.w.n / 2}});
  out.shared.c = shared_c->mutable_data_ptr();
  out.shared.c_stride_m = shared_c->stride(0);
  if (shared_gate.has_value()) {
    check.wide_vector("shared_gate", *shared_gate, out.w.k);
    out.shared.gate = shared_gate->const_data_ptr();
    check.tensor("shared_factors", *shared_factors, {ScalarType::Float},
                 {{"M", out.routing.num_tokens}});
    out.shared.factors = static_cast<float*>(shared_factors->mutable_data_ptr());
  }
  return out;
}

inline DownArgs check_down(
    DeviceType device, const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
    const Tensor& topk_ids, const std::optional<Tensor>& topk_weights, int64_t cu_count,
    int64_t group_size, const std::optional<Tensor>& zero_points,
    const std::optional<Tensor>& expert_map, const std::optional<std::vector<int64_t>>& plan,
    const std::optional<Tensor>& shared_a, const std::optional<Tensor>& shared_w,
    const std::optional<Tensor>& shared_factors, const std::optional<Tensor>& shared_c,
    const std::optional<Tensor>& shared_scales, const std::optional<Tensor>& shared_zero_points) {
  const ArgumentChecks check("fused_moe_wvSplitK_int4_down", device, a);
  DownArgs out{};
  out.dtype = check.dtype();
  out.routing = check.routing(topk_ids, expert_map);
  const int64_t tokens = out.routing.num_tokens;
  check.activation("a", a, {{"M*top_k", tokens * out.routing.top_k}, {"K"}});
  out.a = a.const_data_ptr();
  out.a_stride_m = a.stride(0);
  out.w = check.weights(w, scales, zero_points, a.size(1), group_size);
  check.output("c", c, {{"M", tokens}, {"N", out.w.n}});
  out.c = c.mutable_data_ptr();
  out.c_stride_m = c.stride(0);
  if (topk_weights.has_value()) {
    check.tensor("topk_weights", *topk_weights, {ScalarType::Float},
                 {{"M", tokens}, {"top_k", out.routing.top_k}});
    out.topk_weights = static_cast<const float*>(topk_weights->const_data_ptr());
    out.tw_stride_m = topk_weights->stride(0);
  }
  out.cu_count = check.positive("cu_count", cu_count);
  out.plan = check.plan(plan);
  out.row_invariant = row_invariance();
  check.together("shared_a", shared_a, "shared_w", shared_w);
  check.together("shared_c", shared_c, "shared_w", shared_w);
  if (shared_factors.has_value())
    check.together("shared_w", shared_w, "shared_factors", shared_factors);
  check.only_with_shared_w(shared_w, shared_scales, shared_zero_points);
  if (!shared_w.has_value()) return out;
  check.activation("shared_a", *shared_a, {{"M", tokens}, {"K"}});
  out.shared.a = shared_a->const_data_ptr();
  out.shared.a_stride_m = shared_a->stride(0);
  out.shared.w = check.shared_weights(*shared_w, shared_scales, shared_zero_points, "N",
                                      shared_a->size(1), out.w.n);
  if (shared_factors.has_value()) {
    check.tensor("shared_factors", *shared_factors, {ScalarType::Float}, {{"M", tokens}});
    out.shared.factors = static_cast<const float*>(shared_factors->const_data_ptr());
  }
  check.output("shared_c", *shared_c, {{"M", tokens}, {"N", out.w.n}});
  out.shared.c = shared_c->mutable_data_ptr();
  out.shared.c_stride_m = shared_c->stride(0);
  return out;
}

}  // namespace moe_int4
