// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Runs the GPU launchers on the host or, in a GPU build, on a GPU. Each record on stdin is one op
// call; each record on stdout is its result. A record is a uint32 number of fields. A field is a
// uint32 length and its name, then a uint64 size and its bytes. Scalars are int64 or double fields.
// Strides and shapes have the names of moe_int4_args.h, tiled.h and moe_router_args.h; "op" is
// gemm, gate_up, down, dense, rescore, tiled_gate_up, tiled_down or router, whose "c" are the
// weights. A missing tensor is a null pointer; "NAME.offset" moves a tensor that many bytes off a
// 16-byte boundary. The call runs once per order of lanes and waves (gpu::kOrders), and the outputs
// must be bitwise equal. The reply has "c", the outputs of a shared expert or router, and "kernels"
// (names of the launched kernels, one per line, where known). The op "prepare" loads the kernels
// for "arch" on "device" and makes it current; its reply is empty.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gpu_compat.cuh"
#include "launch.h"
#include "tiled.h"

namespace {

using namespace moe_int4;

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "runner: %s\n", message.c_str());
  std::exit(2);
}

// Memory for kernels of exactly the field's size, so that AddressSanitizer or compute-sanitizer
// reports an access to the first byte past it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const std::string& bytes, size_t offset) : size_(bytes.size()), offset_(offset) {
    const std::string all = std::string(offset, '\xff') + bytes;
    block_.reset(static_cast<char*>(gpu::allocate(all.size())));
    gpu::copy_in(block_.get(), all.data(), all.size());
  }
  char* data() const { return block_.get() + offset_; }
  std::string bytes() const {
    std::string out(size_, '\0');
    gpu::copy_out(out.data(), data(), size_);
    return out;
  }

 private:
  struct Release {
    void operator()(char* p) const { gpu::release(p); }
  };
  std::unique_ptr<char, Release> block_;
  size_t size_ = 0, offset_ = 0;
};

bool read_exactly(void* to, size_t size) {
  const size_t got = std::fread(to, 1, size, stdin);
  if (got != size && got != 0) die("the input ends inside a record");
  return got == size;
}

template <typename T>
T read_value() {
  T value;
  if (!read_exactly(&value, sizeof(value))) die("the input ends inside a record");
  return value;
}

std::string read_string(size_t size) {
  std::string text(size, '\0');
  if (size != 0 && !read_exactly(text.data(), size)) die("the input ends inside a record");
  return text;
}

class Call {
 public:
  // Reads the next record; false at the end of the input.
  bool read() {
    uint32_t count;
    if (!read_exactly(&count, sizeof(count))) return false;
    fields_.clear();
    buffers_.clear();
    for (uint32_t i = 0; i < count; ++i) {
      const std::string name = read_string(read_value<uint32_t>());
      fields_[name] = read_string(read_value<uint64_t>());
    }
    return true;
  }

  const std::string& text(const std::string& name) const {
    const auto found = fields_.find(name);
    if (found == fields_.end()) die("field " + name + " is missing");
    return found->second;
  }

  bool has(const std::string& name) const { return fields_.count(name) != 0; }

  template <typename T>
  T scalar(const std::string& name) const {
    const std::string& bytes = text(name);
    T value;
    if (bytes.size() != sizeof(T)) die("field " + name + " has the wrong size");
    std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
  }
  int64_t i64(const std::string& name) const { return scalar<int64_t>(name); }
  int32_t i32(const std::string& name) const { return static_cast<int32_t>(i64(name)); }

  // A fresh copy of the tensor, or null if it is missing.
  template <typename T>
  T* tensor(const std::string& name) {
    if (fields_.count(name) == 0) return nullptr;
    const size_t offset = fields_.count(name + ".offset") ? i64(name + ".offset") : 0;
    return reinterpret_cast<T*>((buffers_[name] = Buffer(text(name), offset)).data());
  }
  std::string bytes(const std::string& name) const { return buffers_.at(name).bytes(); }

  // Fields whose names begin with `prefix`.
  Weights weights(const std::string& prefix = "") {
    Weights w{};
    w.q = tensor<uint32_t>(prefix + "q");
    if (w.q == nullptr) return w;
    w.q_stride_e = i64(prefix + "q_stride_e");
    w.q_stride_n = i64(prefix + "q_stride_n");
    w.scales = tensor<void>(prefix + "scales");
    w.s_stride_e = i64(prefix + "s_stride_e");
    w.s_stride_n = i64(prefix + "s_stride_n");
    w.zeros = tensor<uint32_t>(prefix + "zeros");
    w.z_stride_e = i64(prefix + "z_stride_e");
    w.z_stride_n8 = i64(prefix + "z_stride_n8");
    w.num_experts = i32(prefix + "num_experts");
    w.n = i32(prefix + "n");
    w.k = i32(prefix + "k");
    w.group_size = i32(prefix + "group_size");
    if (has(prefix + "bits")) w.bits = i32(prefix + "bits");
    return w;
  }

  Routing routing() {
    Routing r{};
    r.ids = tensor<void>("ids");
    r.ids_are_int64 = i64("ids_are_int64") != 0;
    r.ids_stride_m = i64("ids_stride_m");
    r.expert_map = tensor<int32_t>("expert_map");
    r.map_size = i32("map_size");
    r.num_tokens = i32("num_tokens");
    r.top_k = i32("top_k");
    return r;
  }

  template <typename Args>
  void matrices(Args& args) {
    args.dtype = static_cast<DType>(i64("dtype"));
    args.a = tensor<void>("a");
    args.a_stride_m = i64("a_stride_m");
    args.w = weights();
    args.c = tensor<void>("c");
    args.c_stride_m = i64("c_stride_m");
  }

  template <typename Args>
  void common(Args& args) {
    matrices(args);
    args.cu_count = i32("cu_count");
    args.row_invariant = fields_.count("row_invariant") != 0;
  }

  template <typename Args>
  void activation(Args& args) const {
    args.activation = static_cast<Activation>(i64("activation"));
    args.alpha = static_cast<float>(scalar<double>("alpha"));
    args.beta = static_cast<float>(scalar<double>("beta"));
    args.limit = static_cast<float>(scalar<double>("limit"));
  }

  SortedPairs sorted() {
    SortedPairs s{};
    s.ids = tensor<int32_t>("sorted_ids");
    s.expert_ids = tensor<int32_t>("expert_ids");
    s.num_padded = tensor<int32_t>("num_padded");
    s.lists = i32("lists");
    s.num_pairs = i32("num_pairs");
    s.top_k = i32("top_k");
    return s;
  }
  TiledShape tile() const { return {i64("pairs"), i64("waves"), i64("row_tiles")}; }

  // "plan" holds int64 values; without it there is no plan.
  Plan plan() const {
    Plan out{};
    const auto found = fields_.find("plan");
    if (found == fields_.end()) return out;
    if (found->second.size() > sizeof(out.values)) die("field plan is too long");
    std::memcpy(out.values, found->second.data(), found->second.size());
    out.size = static_cast<int32_t>(found->second.size() / sizeof(int64_t));
    return out;
  }

  void run() {
    const std::string& op = text("op");
    if (op == "gemm") {
      GemmArgs args{};
      common(args);
      args.expert_ids = tensor<int32_t>("expert_ids");
      args.sorted_token_ids = tensor<int32_t>("sorted_token_ids");
      args.num_blocks = i32("num_blocks");
      args.block_size_m = i32("block_size_m");
      args.num_rows = i32("num_rows");
      args.top_k = i32("top_k");
      launch_gemm(args, nullptr);
    } else if (op == "gate_up") {
      GateUpArgs args{};
      common(args);
      args.routing = routing();
      activation(args);
      args.plan = plan();
      args.shared.w = weights("shared_");
      if (args.shared.w.q != nullptr) {
        args.shared.gate = tensor<void>("shared_gate");
        args.shared.c = tensor<void>("shared_c");
        args.shared.c_stride_m = i64("shared_c_stride_m");
        args.shared.factors = tensor<float>("shared_factors");
      }
      launch_gate_up(args, nullptr);
    } else if (op == "down") {
      DownArgs args{};
      common(args);
      args.routing = routing();
      args.topk_weights = tensor<float>("topk_weights");
      args.tw_stride_m = i64("tw_stride_m");
      args.plan = plan();
      args.shared.w = weights("shared_");
      if (args.shared.w.q != nullptr) {
        args.shared.a = tensor<void>("shared_a");
        args.shared.a_stride_m = i64("shared_a_stride_m");
        args.shared.factors = tensor<float>("shared_factors");
        args.shared.c = tensor<void>("shared_c");
        args.shared.c_stride_m = i64("shared_c_stride_m");
      }
      launch_down(args, nullptr);
    } else if (op == "dense") {
      DenseArgs args{};
      common(args);
      args.m = i32("m");
      launch_dense(args, nullptr);
    } else if (op == "rescore") {
      RescoreArgs args{};
      args.dtype = static_cast<DType>(i64("dtype"));
      args.a = tensor<void>("a");
      args.a_stride_m = i64("a_stride_m");
      args.m = i32("m");
      args.w = tensor<void>("w");
      args.w_stride_n = i64("w_stride_n");
      args.errors = tensor<float>("errors");
      args.n = i32("n");
      args.k = i32("k");
      args.c = tensor<void>("c");
      args.c_stride_m = i64("c_stride_m");
      args.partials = tensor<float>("partials");
      args.p_stride_m = i64("p_stride_m");
      args.window = static_cast<float>(scalar<double>("window"));
      args.bound = static_cast<float>(scalar<double>("bound"));
      launch_rescore(args, nullptr);
#if GPU_HAS_MMA
    } else if (op == "tiled_gate_up") {
      TiledGateUpArgs args{};
      matrices(args);
      args.sorted = sorted();
      activation(args);
      args.tile = tile();
      launch_tiled_gate_up(args, nullptr);
    } else if (op == "tiled_down") {
      TiledDownArgs args{};
      matrices(args);
      args.sorted = sorted();
      args.topk_weights = tensor<float>("topk_weights");
      args.tile = tile();
      launch_tiled_down(args, nullptr);
#endif
    } else if (op == "router") {
      RouterArgs args{};
      args.dtype = static_cast<DType>(i64("dtype"));
      args.a = tensor<void>("a");
      args.a_stride_m = i64("a_stride_m");
      args.m = i32("m");
      args.k = i32("k");
      args.w = tensor<void>("w");
      args.w_stride_e = i64("w_stride_e");
      args.w_is_float = i64("w_is_float") != 0;
      args.experts = i32("experts");
      args.logits = tensor<void>("logits");
      args.logits_are_float = i64("logits_are_float") != 0;
      args.bias = tensor<float>("bias");
      args.padding = tensor<uint8_t>("padding");
      args.topk_weights = tensor<float>("c");
      args.topk_ids = tensor<int32_t>("topk_ids");
      args.arrived = tensor<int32_t>("arrived");
      args.scoring = static_cast<Scoring>(i64("scoring"));
      args.renormalize = i64("renormalize") != 0;
      args.scale = static_cast<float>(scalar<double>("scale"));
      args.top_k = i32("top_k");
      args.cu_count = i32("cu_count");
      launch_router(args, nullptr);
    } else {
      die("unknown op " + op);
    }
  }

 private:
  std::map<std::string, std::string> fields_;
  std::map<std::string, Buffer> buffers_;
};

void write_field(const std::string& name, const std::string& bytes) {
  const uint32_t length = static_cast<uint32_t>(name.size());
  const uint64_t size = bytes.size();
  std::fwrite(&length, sizeof(length), 1, stdout);
  std::fwrite(name.data(), 1, length, stdout);
  std::fwrite(&size, sizeof(size), 1, stdout);
  std::fwrite(bytes.data(), 1, size, stdout);
}

// Beside "c".
constexpr const char* kMoreOutputs[] = {"shared_c", "shared_factors", "logits", "topk_ids",
                                        "arrived"};

void run_calls() {
  Call call;
  while (call.read()) {
    if (call.text("op") == "prepare") {
      gpu::prepare_device(call.i32("device"), call.text("arch"));
      const uint32_t none = 0;
      std::fwrite(&none, sizeof(none), 1, stdout);
      continue;
    }
    std::string result;
    for (int order = 0; order < gpu::kOrders; ++order) {
      gpu::set_order(order);
      call.run();
      std::string now = call.bytes("c");
      for (const char* name : kMoreOutputs) {
        if (call.has(name)) now += call.bytes(name);
      }
      if (order > 0 && now != result) {
        die("the result of " + call.text("op") + " is another one in order " +
            std::to_string(order));
      }
      result = now;
    }
    std::vector<std::string> outputs = {"c"};
    for (const char* name : kMoreOutputs) {
      if (call.has(name)) outputs.push_back(name);
    }
    const auto fields = static_cast<uint32_t>(outputs.size() + 1);
    std::fwrite(&fields, sizeof(fields), 1, stdout);
    for (const std::string& name : outputs) write_field(name, call.bytes(name));
    write_field("kernels", gpu::take_launched());
    std::fflush(stdout);
  }
}

}  // namespace

int main() {
  try {
    run_calls();
  } catch (const std::exception& error) {
    die(error.what());
  }
  return 0;
}
