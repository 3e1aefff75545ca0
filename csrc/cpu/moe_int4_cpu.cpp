// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The int4 MoE ops on the CPU: groups rows by expert, converts activations once, cuts the work
// into tiles of output columns and hands those to the kernels of the instruction set in force.
//
// Each element of an output is computed by one thread and in an order that depends neither on the
// number of threads nor on how the work was cut, so results are bitwise repeatable.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "moe_int4_checks.h"

namespace moe_int4::cpu {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line and the widest vector

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(int64_t bytes) {
  char* p =
      static_cast<char*>(std::aligned_alloc(kAlignment, aligned(std::max<int64_t>(bytes, 1))));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

// A row to compute: which row of a goes in, and which row of the output (or which pair of token
// and slot) it belongs to.
struct Row {
  int32_t input, output;
};

// Rows sorted by expert; the rows of an expert keep their order.
struct Grouping {
  struct Expert {
    int32_t id, begin, count;
  };
  std::vector<Expert> experts;
  std::vector<int32_t> inputs, outputs;  // of the rows, sorted
  int32_t max_count = 0;

  // `experts_of[i]` is the expert of rows[i], or negative: skipped.
  Grouping(const std::vector<int32_t>& experts_of, const std::vector<Row>& rows,
           int32_t num_experts) {
    std::vector<int32_t> next(num_experts + 1, 0);
    for (int32_t e : experts_of) {
      if (e >= 0) ++next[e + 1];
    }
    for (int32_t e = 0; e < num_experts; ++e) {
      const int32_t count = next[e + 1];
      next[e + 1] += next[e];
      if (count > 0) experts.push_back({e, next[e], count});
      max_count = std::max(max_count, count);
    }
    inputs.resize(next[num_experts]);
    outputs.resize(next[num_experts]);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (experts_of[i] < 0) continue;
      const int32_t at = next[experts_of[i]]++;
      inputs[at] = rows[i].input;
      outputs[at] = rows[i].output;
    }
  }
};

// Local expert of an id, -1: not here.
int32_t local_expert(int64_t id, const Routing& routing, int32_t num_experts) {
  if (routing.expert_map != nullptr) {
    id = id >= 0 && id < routing.map_size ? routing.expert_map[id] : -1;
  }
  return id >= 0 && id < num_experts ? static_cast<int32_t>(id) : -1;
}

// One row per pair of token and slot; its input row is the token or the pair itself.
Grouping group_pairs(const Routing& routing, int32_t num_experts, bool input_is_token) {
  const int32_t pairs = routing.num_tokens * routing.top_k;
  std::vector<int32_t> experts_of(pairs);
  std::vector<Row> rows(pairs);
  for (int32_t m = 0, pair = 0; m < routing.num_tokens; ++m) {
    for (int32_t t = 0; t < routing.top_k; ++t, ++pair) {
      const int64_t at = m * routing.ids_stride_m + t;
      const int64_t id = routing.ids_are_int64 ? static_cast<const int64_t*>(routing.ids)[at]
                                               : static_cast<const int32_t*>(routing.ids)[at];
      experts_of[pair] = local_expert(id, routing, num_experts);
      rows[pair] = {input_is_token ? m : pair, pair};
    }
  }
  return Grouping(experts_of, rows, num_experts);
}

Grouping group_blocks(const GemmArgs& args) {
  std::vector<int32_t> experts_of;
  std::vector<Row> rows;
  for (int32_t b = 0, slot = 0; b < args.num_blocks; ++b) {
    const int32_t expert = args.expert_ids[b];
    for (int32_t j = 0; j < args.block_size_m; ++j, ++slot) {
      const int32_t id = args.sorted_token_ids != nullptr ? args.sorted_token_ids[slot] : slot;
      if (id < 0 || id >= args.num_rows) continue;
      experts_of.push_back(expert < args.w.num_experts ? expert : -1);
      rows.push_back({id / args.top_k, id});
    }
  }
  return Grouping(experts_of, rows, args.w.num_experts);
}

// Runs work(begin, end, thread) over `units` units of work, cut evenly into one range per thread.
template <typename Work>
void for_each_thread(int64_t units, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = units * t / threads, end = units * (t + 1) / threads;
      if (begin < end) work(begin, end, t);
    }
  });
}

// Weight rows (columns of the output) of one expert.
struct Part {
  const Grouping::Expert* expert;
  int32_t first, columns;
};

// A call's converted activations and per-thread scratch, and the tile that all its tiles start
// from.
class Call {
 public:
  Call(DType dtype, const void* a, int64_t a_stride_m, int64_t a_rows, const Weights& w,
       const Grouping& grouping, int64_t floats_per_thread)
      : kernels_(kernels()), w_(w), grouping_(grouping) {
    const int64_t row_bytes = aligned(kernels_.row_bytes(dtype, w.k));
    const int64_t sums = (w.k / w.group_size + kSumsPadding - 1) / kSumsPadding * kSumsPadding;
    rows_ = allocate(a_rows * (row_bytes + sums * 4));
    auto* all_sums = reinterpret_cast<float*>(rows_.get() + a_rows * row_bytes);
    std::vector<bool> used(a_rows, false);
    for (int32_t row : grouping.inputs) used[row] = true;
    constexpr int64_t kRowsPerThread = 8;  // fewer are not worth another thread
    torch::stable::parallel_for(0, a_rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!used[r]) continue;
        kernels_.prepare(dtype, static_cast<const uint16_t*>(a) + r * a_stride_m, w.k, w.group_size,
                         rows_.get() + r * row_bytes, all_sums + r * sums);
      }
    });
    kernel_scratch_ = aligned(kernels_.scratch_bytes(w.k, w.group_size));
    thread_bytes_ = kernel_scratch_ + aligned(4 * floats_per_thread);
    scratch_ = allocate(thread_bytes_ * torch::stable::get_num_threads());
    tile_ = {};
    tile_.dtype = dtype;
    tile_.q_stride = w.q_stride_n;
    tile_.s_stride = w.s_stride_n;
    tile_.z_stride = w.z_stride_n8;
    tile_.k = w.k;
    tile_.group_size = w.group_size;
    tile_.a = {rows_.get(), row_bytes, all_sums, sums};
  }

  const Kernels& isa() const { return kernels_; }

  float* floats(int64_t thread) const {
    return reinterpret_cast<float*>(scratch_.get() + thread * thread_bytes_ + kernel_scratch_);
  }

  // out[r][j] for all rows r of the expert and columns first + j. `next` is what this thread will
  // multiply afterwards.
  void multiply(const Part& part, const Part& next, float* out, int64_t out_stride,
                int64_t thread) const {
    const Grouping::Expert& expert = *part.expert;
    Tile tile = tile_;
    tile.q = w_.q + expert.id * w_.q_stride_e;
    tile.scales = static_cast<const uint16_t*>(w_.scales) + expert.id * w_.s_stride_e;
    tile.zeros = w_.zeros == nullptr ? nullptr : w_.zeros + expert.id * w_.z_stride_e;
    tile.next = w_.q + next.expert->id * w_.q_stride_e + next.first * w_.q_stride_n;
    tile.first = part.first;
    tile.columns = part.columns;
    tile.rows = grouping_.inputs.data() + expert.begin;
    tile.m = expert.count;
    tile.out = out;
    tile.out_stride = out_stride;
    tile.scratch = scratch_.get() + thread * thread_bytes_;
    kernels_.multiply(tile);
  }

 private:
  const Kernels& kernels_;
  const Weights& w_;
  const Grouping& grouping_;
  Buffer rows_, scratch_;
  int64_t kernel_scratch_, thread_bytes_;
  Tile tile_;
};

constexpr int32_t kTileColumns = 32;

uint16_t* row_of(void* c, int64_t stride, int64_t row) {
  return static_cast<uint16_t*>(c) + row * stride;
}

// Runs work(part, next, thread) over parts of kTileColumns output columns, expert by expert.
template <typename Work>
void for_each_part(const Grouping& grouping, int32_t columns, const Work& work) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const auto part = [&](int64_t i) {
    const auto first = static_cast<int32_t>(i % tiles * kTileColumns);
    return Part{&grouping.experts[i / tiles], first, std::min(kTileColumns, columns - first)};
  };
  for_each_thread(tiles * grouping.experts.size(), [&](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t i = begin; i < end; ++i) work(part(i), part(std::min(i + 1, end - 1)), thread);
  });
}

void gemm(const GemmArgs& args) {
  const Grouping grouping = group_blocks(args);
  if (grouping.experts.empty()) return;
  const Call call(args.dtype, args.a, args.a_stride_m, args.num_rows / args.top_k, args.w, grouping,
                  int64_t{grouping.max_count} * kTileColumns);
  for_each_part(grouping, args.w.n, [&](const Part& part, const Part& next, int64_t thread) {
    float* y = call.floats(thread);
    call.multiply(part, next, y, kTileColumns, thread);
    for (int32_t r = 0; r < part.expert->count; ++r) {
      const int32_t row = grouping.outputs[part.expert->begin + r];
      call.isa().store(args.dtype, y + r * kTileColumns, part.columns,
                       row_of(args.c, args.c_stride_m, row) + part.first);
    }
  });
}

void gate_up(const GateUpArgs& args) {
  const Grouping grouping = group_pairs(args.routing, args.w.num_experts, true);
  if (grouping.experts.empty()) return;
  const int64_t half = int64_t{grouping.max_count} * kTileColumns;
  const int32_t columns = args.w.n / 2;
  const Call call(args.dtype, args.a, args.a_stride_m, args.routing.num_tokens, args.w, grouping,
                  2 * half);
  for_each_part(grouping, columns, [&](const Part& part, const Part& next, int64_t thread) {
    float* gate = call.floats(thread);
    float* up = gate + half;
    const Part up_part{part.expert, columns + part.first, part.columns};
    call.multiply(part, up_part, gate, kTileColumns, thread);
    call.multiply(up_part, next, up, kTileColumns, thread);
    for (int32_t r = 0; r < part.expert->count; ++r) {
      const int32_t row = grouping.outputs[part.expert->begin + r];
      call.isa().activate(args, gate + r * kTileColumns, up + r * kTileColumns, part.columns,
                          row_of(args.c, args.c_stride_m, row) + part.first);
    }
  });
}

// A thread owns columns of the output and adds the experts to them in ascending order.
void down(const DownArgs& args) {
  const int32_t tokens = args.routing.num_tokens, top_k = args.routing.top_k, n = args.w.n;
  if (tokens == 0) return;
  const Grouping grouping = group_pairs(args.routing, args.w.num_experts, false);
  const auto experts = static_cast<int64_t>(grouping.experts.size());
  const int64_t sums = int64_t{tokens} * kTileColumns;
  const Call call(args.dtype, args.a, args.a_stride_m, int64_t{tokens} * top_k, args.w, grouping,
                  sums + int64_t{grouping.max_count} * kTileColumns);
  const auto weight_of = [&](int32_t pair) {
    return args.topk_weights == nullptr
               ? 1.0f
               : args.topk_weights[pair / top_k * args.tw_stride_m + pair % top_k];
  };
  const auto add_expert = [&](const Part& part, const float* y, float* total) {
    for (int32_t r = 0; r < part.expert->count; ++r) {
      const int32_t pair = grouping.outputs[part.expert->begin + r];
      const float weight = weight_of(pair);
      float* to = total + pair / top_k * kTileColumns;
      for (int32_t j = 0; j < part.columns; ++j) to[j] += weight * y[r * kTileColumns + j];
    }
  };
  const int64_t tiles = (n + kTileColumns - 1) / kTileColumns;
  for_each_thread(tiles, [&](int64_t begin, int64_t end, int64_t thread) {
    float* total = call.floats(thread);
    float* y = total + sums;
    const auto part = [&](int64_t tile, int64_t expert) {
      if (expert == experts) {
        expert = 0;
        tile = std::min(tile + 1, end - 1);
      }
      const auto first = static_cast<int32_t>(tile * kTileColumns);
      return Part{&grouping.experts[expert], first, std::min(kTileColumns, n - first)};
    };
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto first = static_cast<int32_t>(tile * kTileColumns);
      std::fill_n(total, sums, 0.0f);
      for (int64_t e = 0; e < experts; ++e) {
        call.multiply(part(tile, e), part(tile, e + 1), y, kTileColumns, thread);
        add_expert(part(tile, e), y, total);
      }
      for (int32_t m = 0; m < tokens; ++m) {
        call.isa().store(args.dtype, total + m * kTileColumns, std::min(kTileColumns, n - first),
                         row_of(args.c, args.c_stride_m, m) + first);
      }
    }
  });
}

void gemm_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& expert_ids, int64_t block_size_m, int64_t cu_count, int64_t group_size,
             const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& sorted_token_ids, int64_t top_k) {
  gemm(check_gemm(DeviceType::CPU, a, w, scales, c, expert_ids, block_size_m, cu_count, group_size,
                  zero_points, sorted_token_ids, top_k));
}

void gate_up_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
                const Tensor& topk_ids, std::string activation, int64_t cu_count,
                int64_t group_size, const std::optional<Tensor>& zero_points,
                const std::optional<Tensor>& expert_map, double alpha, double beta,
                std::optional<double> limit) {
  gate_up(check_gate_up(DeviceType::CPU, a, w, scales, c, topk_ids, activation, cu_count,
                        group_size, zero_points, expert_map, alpha, beta, limit));
}

void down_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& topk_ids, const std::optional<Tensor>& topk_weights, int64_t cu_count,
             int64_t group_size, const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& expert_map) {
  down(check_down(DeviceType::CPU, a, w, scales, c, topk_ids, topk_weights, cu_count, group_size,
                  zero_points, expert_map));
}

}  // namespace
}  // namespace moe_int4::cpu

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CPU, m) {
  m.impl("fused_moe_wvSplitK_int4_gemm", TORCH_BOX(&moe_int4::cpu::gemm_op));
  m.impl("fused_moe_wvSplitK_int4_gate_up", TORCH_BOX(&moe_int4::cpu::gate_up_op));
  m.impl("fused_moe_wvSplitK_int4_down", TORCH_BOX(&moe_int4::cpu::down_op));
}
