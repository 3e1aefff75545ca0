// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The int4 MoE ops on the CPU. The driver groups rows by expert, converts activations once, and
// cuts the work into tiles of output columns. The kernels that tuning.h selects multiply the tiles.
//
// A single thread computes each output element, in an order that depends neither on the number of
// threads nor on how the work was cut. Results are therefore bitwise repeatable.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "moe_int4_checks.h"
#include "tuning.h"
// fork: begin lm_head
#include "wvSplitK_int_g_checks.h"
// fork: end

namespace moe_int4::cpu {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line and the widest vector

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Memory that a thread keeps between calls. The page faults of fresh memory would cost as much as
// the work itself.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  char* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(kAlignment, aligned(bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct Buffers {
  Buffer rows, sums, scratch;
};

Buffers& buffers() {
  thread_local Buffers of_this_thread;
  return of_this_thread;
}

// The rows of a call, sorted by expert; the rows of an expert keep their order.
struct Grouping {
  struct Expert {
    int32_t id, begin, count;
  };
  std::vector<Expert> experts;
  // For each row: its row of a, and its row of c (gemm, gate_up) or its (token, slot) pair (down).
  std::vector<int32_t> inputs, outputs;
  int32_t max_count = 0, num_inputs = 0;

  // Takes rows in any order: the expert (negative: skipped), input and output of each.
  Grouping(const std::vector<int32_t>& experts_of, const std::vector<int32_t>& input,
           const std::vector<int32_t>& output, int32_t num_experts) {
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
    for (size_t i = 0; i < experts_of.size(); ++i) {
      if (experts_of[i] < 0) continue;
      const int32_t at = next[experts_of[i]]++;
      inputs[at] = input[i];
      num_inputs = std::max(num_inputs, input[i] + 1);
      outputs[at] = output[i];
    }
  }
};

// The local expert of an id; -1 if it is not on this rank.
int32_t local_expert(int64_t id, const Routing& routing, int32_t num_experts) {
  if (routing.expert_map != nullptr) {
    id = id >= 0 && id < routing.map_size ? routing.expert_map[id] : -1;
  }
  return id >= 0 && id < num_experts ? static_cast<int32_t>(id) : -1;
}

// One row per (token, slot) pair; its input row is the token (gate_up) or the pair (down).
Grouping group_pairs(const Routing& routing, int32_t num_experts, bool input_is_token) {
  const int32_t pairs = routing.num_tokens * routing.top_k;
  std::vector<int32_t> experts_of(pairs), input(pairs), output(pairs);
  for (int32_t m = 0, pair = 0; m < routing.num_tokens; ++m) {
    for (int32_t t = 0; t < routing.top_k; ++t, ++pair) {
      const int64_t at = m * routing.ids_stride_m + t;
      const int64_t id = routing.ids_are_int64 ? static_cast<const int64_t*>(routing.ids)[at]
                                               : static_cast<const int32_t*>(routing.ids)[at];
      experts_of[pair] = local_expert(id, routing, num_experts);
      input[pair] = input_is_token ? m : pair;
      output[pair] = pair;
    }
  }
  return Grouping(experts_of, input, output, num_experts);
}

Grouping group_blocks(const GemmArgs& args) {
  std::vector<int32_t> experts_of, input, output;
  for (int32_t b = 0, slot = 0; b < args.num_blocks; ++b) {
    const int32_t expert = args.expert_ids[b];
    for (int32_t j = 0; j < args.block_size_m; ++j, ++slot) {
      const int32_t id = args.sorted_token_ids != nullptr ? args.sorted_token_ids[slot] : slot;
      if (id < 0 || id >= args.num_rows) continue;
      experts_of.push_back(expert < args.w.num_experts ? expert : -1);
      input.push_back(id / args.top_k);
      output.push_back(id);
    }
  }
  return Grouping(experts_of, input, output, args.w.num_experts);
}

// Runs work(begin, end, thread) over units of work. A thread takes many units at first (a long run
// of memory) and fewer towards the end, so that all threads finish together. It takes multiples of
// `together` while enough units are left.
template <typename Work>
void for_each_thread(int64_t units, int64_t together, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t turns = 2 * threads;  // a thread takes 1 / turns of the remaining units
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t begin = next.load(), end = 0;
      while (begin < units) {
        const int64_t some = std::max<int64_t>(1, (units - begin) / turns);
        end = begin + (some > together ? some - some % together : some);
        if (!next.compare_exchange_weak(begin, end)) continue;
        work(begin, end, thread);
        begin = next.load();
      }
    }
  });
}

// Weight rows (columns of the output) of one expert.
struct Part {
  const Grouping::Expert* expert;
  int32_t first, columns;
};

// A call's converted activations and its threads' scratch. Both use the buffers of the calling
// thread, so only one Call may exist per thread at a time.
class Call {
 public:
  Call(DType dtype, const void* a, int64_t a_stride_m, const Weights& w, const Grouping& grouping,
       bool row_invariant, int64_t floats_per_thread)
      : isa_(instruction_set()), dtype_(dtype), w_(w), grouping_(grouping) {
    int64_t row_bytes = 0, scratch_bytes = 0;
    for (const Grouping::Expert& expert : grouping.experts) {
      const Kernel& kernel = row_invariant
                                 ? *isa_.row_invariant
                                 : kernel_for(isa_, expert.count, w.group_size, dtype, w.bits);
      kernels_.push_back(&kernel);
      row_bytes = std::max(row_bytes, kernel.row_bytes(dtype, w.k));
      scratch_bytes =
          std::max(scratch_bytes, kernel.scratch_bytes(w.k, w.group_size, expert.count));
    }
    // An odd number of cache lines spreads equal offsets of several rows over the cache's sets.
    row_stride_ = aligned(row_bytes) + kAlignment;
    sums_stride_ = (w.k / w.group_size + kSumsPadding - 1) / kSumsPadding * kSumsPadding;
    const int64_t rows = place_rows();
    rows_ = buffers().rows.at_least(rows * row_stride_);
    sums_ = reinterpret_cast<float*>(buffers().sums.at_least(rows * sums_stride_ * 4));
    prepare(static_cast<const uint16_t*>(a), a_stride_m);
    kernel_scratch_ = aligned(scratch_bytes);
    thread_bytes_ = kernel_scratch_ + aligned(4 * floats_per_thread);
    scratch_ = buffers().scratch.at_least(thread_bytes_ * torch::stable::get_num_threads());
  }

  const Epilogue& epilogue() const { return *isa_.epilogue; }

  float* floats(int64_t thread) const {
    return reinterpret_cast<float*>(scratch_ + thread * thread_bytes_ + kernel_scratch_);
  }

  // Computes out[r][j] for all rows r of the expert and columns first + j. `next` is the part that
  // this thread multiplies afterwards.
  void multiply(const Part& part, const Part& next, float* out, int64_t out_stride,
                int64_t thread) const {
    const int32_t id = part.expert->id;
    Tile tile{};
    tile.dtype = dtype_;
    tile.q = w_.q + id * w_.q_stride_e;
    tile.q_stride = w_.q_stride_n;
    tile.scales = static_cast<const uint16_t*>(w_.scales) + id * w_.s_stride_e;
    tile.s_stride = w_.s_stride_n;
    tile.zeros = w_.zeros == nullptr ? nullptr : w_.zeros + id * w_.z_stride_e;
    tile.z_stride = w_.z_stride_n8;
    tile.next = w_.q + next.expert->id * w_.q_stride_e + next.first * w_.q_stride_n;
    tile.next_scales = static_cast<const uint16_t*>(w_.scales) + next.expert->id * w_.s_stride_e +
                       next.first * w_.s_stride_n;
    tile.first = part.first;
    tile.columns = part.columns;
    tile.k = w_.k;
    tile.group_size = w_.group_size;
    tile.bits = w_.bits;
    tile.a = prepared(*part.expert);
    tile.m = part.expert->count;
    tile.out = out;
    tile.out_stride = out_stride;
    tile.scratch = scratch_ + thread * thread_bytes_;
    kernel_of(*part.expert).multiply(tile);
  }

 private:
  int64_t index_of(const Grouping::Expert& expert) const {
    return &expert - grouping_.experts.data();
  }

  const Kernel& kernel_of(const Grouping::Expert& expert) const {
    return *kernels_[index_of(expert)];
  }

  // Places the experts' rows in rows_ and returns how many there are. Experts that have the same
  // input row as their only row share it.
  int64_t place_rows() {
    std::vector<int64_t> alone(grouping_.num_inputs, -1);  // of each input
    int64_t rows = 0;
    for (const Grouping::Expert& expert : grouping_.experts) {
      int64_t fresh = rows;
      int64_t& place = expert.count == 1 ? alone[grouping_.inputs[expert.begin]] : fresh;
      if (place < 0) place = rows;
      first_rows_.push_back(place);
      if (place == rows) rows += kernel_of(expert).rows_allocated(dtype_, expert.count);
    }
    return rows;
  }

  PreparedRows prepared(const Grouping::Expert& expert) const {
    const int64_t row = first_rows_[index_of(expert)];
    return {rows_ + row * row_stride_, row_stride_, sums_ + row * sums_stride_, sums_stride_};
  }

  void prepare(const uint16_t* a, int64_t a_stride_m) const {
    std::vector<std::pair<const Grouping::Expert*, int32_t>> blocks;
    int64_t placed = -1;
    for (const Grouping::Expert& expert : grouping_.experts) {
      const int64_t place = first_rows_[index_of(expert)];
      if (place <= placed) continue;  // shared
      placed = place;
      for (int32_t r = 0; r < expert.count; r += kPreparedTogether) blocks.push_back({&expert, r});
    }
    constexpr int64_t kBlocksPerThread = 16;  // fewer are not worth another thread
    const auto count = static_cast<int64_t>(blocks.size());
    torch::stable::parallel_for(0, count, kBlocksPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto& [expert, row] = blocks[i];
        Source source{};
        source.dtype = dtype_;
        source.begin = row;
        source.count = std::min(kPreparedTogether, expert->count - row);
        source.m = expert->count;
        source.k = w_.k;
        source.group_size = w_.group_size;
        source.bits = w_.bits;
        for (int32_t r = 0; r < source.count; ++r) {
          source.a[r] = a + grouping_.inputs[expert->begin + row + r] * a_stride_m;
        }
        kernel_of(*expert).prepare(source, prepared(*expert));
      }
    });
  }

  const InstructionSet& isa_;
  const DType dtype_;
  const Weights& w_;
  const Grouping& grouping_;
  std::vector<const Kernel*> kernels_;  // per expert
  std::vector<int64_t> first_rows_;     // per expert
  int64_t row_stride_, sums_stride_, kernel_scratch_, thread_bytes_;
  char *rows_, *scratch_;
  float* sums_;
};

// Threads take units of output columns. Adjacent units of an expert form a part: one kernel call
// and one contiguous run of memory. With few rows long parts are faster (one token on Zen 4, median
// us with 128, 256 and 512 columns: 515, 505, 488 for Qwen3-30B-A3B; 383, 376, 357 for
// Qwen3.5-35B-A3B). With many rows the results of a part have to fit the L1 and L2 caches.
constexpr int32_t kUnitColumns = 32;

int32_t units_of(int32_t columns) { return (columns + kUnitColumns - 1) / kUnitColumns; }

int32_t widest_part(const Grouping& grouping) {
  constexpr int32_t kWide = 512, kFewRows = 16;
  return grouping.max_count <= kFewRows ? kWide : kUnitColumns;
}

uint16_t* row_of(void* c, int64_t stride, int64_t row) {
  return static_cast<uint16_t*>(c) + row * stride;
}

const uint16_t* row_of(const void* a, int64_t stride, int64_t row) {
  return static_cast<const uint16_t*>(a) + row * stride;
}

// Runs work(part, next, thread) over parts of up to `wide` output columns, expert by expert.
template <typename Work>
void for_each_part(const Grouping& grouping, int32_t columns, int32_t wide, const Work& work) {
  const int64_t units = units_of(columns);
  // The part that starts at unit i; `end` becomes the unit after the part.
  const auto part = [&](int64_t i, int64_t& end) {
    const auto first = static_cast<int32_t>(i % units * kUnitColumns);
    end = std::min({end, i - i % units + units, i + wide / kUnitColumns});
    const auto past = static_cast<int32_t>((end - i) * kUnitColumns) + first;
    return Part{&grouping.experts[i / units], first, std::min(past, columns) - first};
  };
  const int64_t all = units * static_cast<int64_t>(grouping.experts.size());
  for_each_thread(all, wide / kUnitColumns, [&](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t i = begin, past = end; i < end; i = past, past = end) {
      const Part now = part(i, past);
      int64_t after = end;
      work(now, past < end ? part(past, after) : now, thread);
    }
  });
}

void gemm(const GemmArgs& args) {
  const Grouping grouping = group_blocks(args);
  if (grouping.experts.empty()) return;
  const int32_t wide = widest_part(grouping);
  const Call call(args.dtype, args.a, args.a_stride_m, args.w, grouping, args.row_invariant,
                  int64_t{grouping.max_count} * wide);
  for_each_part(grouping, args.w.n, wide, [&](const Part& part, const Part& next, int64_t thread) {
    float* y = call.floats(thread);
    call.multiply(part, next, y, wide, thread);
    for (int32_t r = 0; r < part.expert->count; ++r) {
      const int32_t row = grouping.outputs[part.expert->begin + r];
      call.epilogue().store(args.dtype, y + r * wide, part.columns,
                            row_of(args.c, args.c_stride_m, row) + part.first);
    }
  });
}

// Rows of 16-bit weights times all activation rows, for the shared expert. The activations are
// converted to fp32 once.
class SharedProduct {
 public:
  SharedProduct(DType dtype, const void* a, int64_t a_stride_m, int32_t m, int32_t k)
      : dtype_(dtype), kernels_(*instruction_set().epilogue), m_(m), k_(k) {
    stride_ = (k + kDotBlock - 1) / kDotBlock * kDotBlock;
    rows_ = reinterpret_cast<float*>(buffers().rows.at_least(4 * m * stride_));
    pointers_.resize(m);
    for (int32_t r = 0; r < m; ++r) {
      float* const row = rows_ + r * stride_;
      kernels_.load(dtype, row_of(a, a_stride_m, r), k, row);
      std::fill(row + k, row + stride_, 0.0f);
      pointers_[r] = row;
    }
  }

  const Epilogue& kernels() const { return kernels_; }

  // out[r] = w . activation row r
  void row(const void* w, float* out) const {
    kernels_.dot(dtype_, static_cast<const uint16_t*>(w), pointers_.data(), m_, k_, out);
  }

 private:
  const DType dtype_;
  const Epilogue& kernels_;
  const int32_t m_, k_;
  int64_t stride_;
  float* rows_;
  std::vector<const float*> pointers_;
};

void gate_up(const GateUpArgs& args);
void down(const DownArgs& args);

// A shared expert in 4 or 8 bits runs as a routed one that every token picked.
class EveryToken {
 public:
  explicit EveryToken(int32_t tokens) : ids_(tokens, 0) {}

  // The call of gate_up or down that computes args.shared from a.
  template <typename Args>
  Args call(const Args& args, const void* a, int64_t a_stride_m) const {
    Args out{};
    out.dtype = args.dtype;
    out.a = a;
    out.a_stride_m = a_stride_m;
    out.w = args.shared.w;
    out.c = args.shared.c;
    out.c_stride_m = args.shared.c_stride_m;
    out.routing.ids = ids_.data();
    out.routing.ids_stride_m = 1;
    out.routing.num_tokens = static_cast<int32_t>(ids_.size());
    out.routing.top_k = 1;
    out.row_invariant = args.row_invariant;
    return out;
  }

 private:
  std::vector<int32_t> ids_;
};

void shared_gate_up(const GateUpArgs& args) {
  const SharedGateUp& shared = args.shared;
  const int32_t m = args.routing.num_tokens, inter = shared.w.n / 2;
  if (shared.w.q == nullptr || m == 0) return;
  const EveryToken tokens(m);
  GateUpArgs silu = tokens.call(args, args.a, args.a_stride_m);
  silu.activation = Activation::kSilu;
  silu.alpha = 1.0f;
  silu.limit = std::numeric_limits<float>::infinity();
  if (shared.w.bits != 16) {
    gate_up(silu);
    if (shared.gate == nullptr) return;
  }
  const SharedProduct product(args.dtype, args.a, args.a_stride_m, m, args.w.k);
  if (shared.gate != nullptr) {
    product.row(shared.gate, shared.factors);
    for (int32_t r = 0; r < m; ++r) {
      shared.factors[r] = 1.0f / (1.0f + std::exp(-shared.factors[r]));
    }
  }
  if (shared.w.bits != 16) return;
  const int64_t units = units_of(inter);
  for_each_thread(units, 1, [&](int64_t begin, int64_t end, int64_t) {
    const auto past = std::min(static_cast<int32_t>(end) * kUnitColumns, inter);
    std::vector<float> sums(static_cast<size_t>(2 * m) * kUnitColumns + m);
    float* const gate = sums.data();
    float* const up = gate + int64_t{m} * kUnitColumns;
    float* const of_row = up + int64_t{m} * kUnitColumns;
    for (auto first = static_cast<int32_t>(begin) * kUnitColumns; first < past;
         first += kUnitColumns) {
      const int32_t count = std::min(kUnitColumns, past - first);
      for (float* half : {gate, up}) {
        for (int32_t i = 0; i < count; ++i) {
          const int64_t row = first + i + (half == up ? inter : 0);
          product.row(row_of(shared.w.q, 2 * shared.w.q_stride_n, row), of_row);
          for (int32_t r = 0; r < m; ++r) half[r * kUnitColumns + i] = of_row[r];
        }
      }
      for (int32_t r = 0; r < m; ++r) {
        product.kernels().activate(silu, gate + r * kUnitColumns, up + r * kUnitColumns, count,
                                   row_of(shared.c, shared.c_stride_m, r) + first);
      }
    }
  });
}

void shared_down(const DownArgs& args) {
  const SharedDown& shared = args.shared;
  const int32_t m = args.routing.num_tokens, n = args.w.n;
  if (shared.w.q == nullptr || m == 0) return;
  if (shared.w.bits != 16) {
    const EveryToken tokens(m);
    DownArgs packed = tokens.call(args, shared.a, shared.a_stride_m);
    packed.topk_weights = shared.factors;
    packed.tw_stride_m = 1;
    down(packed);
    return;
  }
  const SharedProduct product(args.dtype, shared.a, shared.a_stride_m, m, shared.w.k);
  for_each_thread(units_of(n), 1, [&](int64_t begin, int64_t end, int64_t) {
    const auto past = std::min(static_cast<int32_t>(end) * kUnitColumns, n);
    std::vector<float> sums(static_cast<size_t>(m) * (kUnitColumns + 1));
    float* const of_row = sums.data() + int64_t{m} * kUnitColumns;
    for (auto first = static_cast<int32_t>(begin) * kUnitColumns; first < past;
         first += kUnitColumns) {
      const int32_t count = std::min(kUnitColumns, past - first);
      for (int32_t i = 0; i < count; ++i) {
        product.row(row_of(shared.w.q, 2 * shared.w.q_stride_n, first + i), of_row);
        for (int32_t r = 0; r < m; ++r) {
          const float factor = shared.factors == nullptr ? 1.0f : shared.factors[r];
          sums[r * kUnitColumns + i] = factor * of_row[r];
        }
      }
      for (int32_t r = 0; r < m; ++r) {
        product.kernels().store(args.dtype, sums.data() + r * kUnitColumns, count,
                                row_of(shared.c, shared.c_stride_m, r) + first);
      }
    }
  });
}

// How many tokens one pass handles: as many as fit kMaxBytes of converted activations, but at least
// kFewestTokens, since every pass reads the weights again.
int32_t tokens_together(const Weights& w, int32_t top_k) {
  constexpr int64_t kMaxBytes = 64 << 20, kFewestTokens = 256;
  return static_cast<int32_t>(std::max(kMaxBytes / (2 * int64_t{w.k} * top_k), kFewestTokens));
}

// Tokens [begin, begin + count).
Routing slice(Routing routing, int32_t begin, int32_t count) {
  const int64_t at = begin * routing.ids_stride_m;
  routing.ids = routing.ids_are_int64
                    ? static_cast<const void*>(static_cast<const int64_t*>(routing.ids) + at)
                    : static_cast<const int32_t*>(routing.ids) + at;
  routing.num_tokens = count;
  return routing;
}

void gate_up_together(const GateUpArgs& args) {
  const Grouping grouping = group_pairs(args.routing, args.w.num_experts, true);
  if (grouping.experts.empty()) return;
  const int32_t columns = args.w.n / 2;
  const int32_t wide = widest_part(grouping);
  const int64_t half = int64_t{grouping.max_count} * wide;
  const Call call(args.dtype, args.a, args.a_stride_m, args.w, grouping, args.row_invariant,
                  2 * half);
  for_each_part(grouping, columns, wide, [&](const Part& part, const Part& next, int64_t thread) {
    float* gate = call.floats(thread);
    float* up = gate + half;
    const Part up_part{part.expert, columns + part.first, part.columns};
    call.multiply(part, up_part, gate, wide, thread);
    call.multiply(up_part, next, up, wide, thread);
    for (int32_t r = 0; r < part.expert->count; ++r) {
      const int32_t row = grouping.outputs[part.expert->begin + r];
      call.epilogue().activate(args, gate + r * wide, up + r * wide, part.columns,
                               row_of(args.c, args.c_stride_m, row) + part.first);
    }
  });
}

void gate_up(const GateUpArgs& args) {
  const int32_t tokens = args.routing.num_tokens, top_k = args.routing.top_k;
  const int32_t step = tokens_together(args.w, top_k);
  for (int32_t begin = 0; begin < tokens; begin += step) {
    GateUpArgs some = args;
    some.a = row_of(args.a, args.a_stride_m, begin);
    some.c = row_of(args.c, args.c_stride_m, int64_t{begin} * top_k);
    some.routing = slice(args.routing, begin, std::min(step, tokens - begin));
    gate_up_together(some);
  }
  shared_gate_up(args);
}

// A thread computes some columns for all tokens at a time. It adds the experts in ascending order.
void down_together(const DownArgs& args) {
  const int32_t tokens = args.routing.num_tokens, top_k = args.routing.top_k, n = args.w.n;
  const Grouping grouping = group_pairs(args.routing, args.w.num_experts, false);
  // Columns per step. Their sums (128 KiB for 64 tokens, 256 KiB for 512) stay in the L2 cache.
  const int32_t turn_columns = tokens <= 64 ? 512 : 128;
  const int32_t wide = std::min(widest_part(grouping), turn_columns);
  const int64_t sums = int64_t{tokens} * turn_columns;
  const Call call(args.dtype, args.a, args.a_stride_m, args.w, grouping, args.row_invariant,
                  sums + int64_t{grouping.max_count} * wide);
  const auto weight_of = [&](int32_t pair) {
    return args.topk_weights == nullptr
               ? 1.0f
               : args.topk_weights[pair / top_k * args.tw_stride_m + pair % top_k];
  };
  // Adds columns [first, past) of an expert to total[token][column - first].
  const auto add_expert = [&](const Grouping::Expert* expert, const Grouping::Expert* next_expert,
                              int32_t first, int32_t past, float* total, int64_t thread) {
    float* y = total + sums;
    const auto part = [&](const Grouping::Expert* of, int32_t column) {
      return Part{of, column, std::min(wide, past - column)};
    };
    for (int32_t column = first; column < past; column += wide) {
      const Part at = part(expert, column);
      const Part next =
          column + wide < past ? part(expert, column + wide) : part(next_expert, first);
      call.multiply(at, next, y, wide, thread);
      for (int32_t r = 0; r < expert->count; ++r) {
        const int32_t pair = grouping.outputs[expert->begin + r];
        const float weight = weight_of(pair);
        float* to = total + pair / top_k * turn_columns + column - first;
        for (int32_t j = 0; j < at.columns; ++j) to[j] += weight * y[r * wide + j];
      }
    }
  };
  const auto turn = [&](int64_t turn_begin, int64_t turn_end, int64_t thread) {
    float* total = call.floats(thread);
    const int32_t turn_past = std::min(static_cast<int32_t>(turn_end) * kUnitColumns, n);
    for (int32_t first = static_cast<int32_t>(turn_begin) * kUnitColumns; first < turn_past;
         first += turn_columns) {
      const int32_t past = std::min(first + turn_columns, turn_past);
      for (int32_t m = 0; m < tokens; ++m)
        std::fill_n(total + m * turn_columns, past - first, 0.0f);
      for (size_t e = 0; e < grouping.experts.size(); ++e) {
        const size_t next = std::min(e + 1, grouping.experts.size() - 1);
        add_expert(&grouping.experts[e], &grouping.experts[next], first, past, total, thread);
      }
      for (int32_t m = 0; m < tokens; ++m) {
        call.epilogue().store(args.dtype, total + m * turn_columns, past - first,
                              row_of(args.c, args.c_stride_m, m) + first);
      }
    }
  };
  for_each_thread(units_of(n), turn_columns / kUnitColumns, turn);
}

void down(const DownArgs& args) {
  const int32_t tokens = args.routing.num_tokens, top_k = args.routing.top_k;
  const int32_t step = tokens_together(args.w, top_k);
  for (int32_t begin = 0; begin < tokens; begin += step) {
    DownArgs some = args;
    some.a = row_of(args.a, args.a_stride_m, int64_t{begin} * top_k);
    some.c = row_of(args.c, args.c_stride_m, begin);
    if (args.topk_weights != nullptr) some.topk_weights += begin * args.tw_stride_m;
    some.routing = slice(args.routing, begin, std::min(step, tokens - begin));
    down_together(some);
  }
  shared_down(args);
}

void gemm_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& expert_ids, int64_t block_size_m, int64_t cu_count, int64_t group_size,
             const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& sorted_token_ids, int64_t top_k) {
  gemm(check_gemm(DeviceType::CPU, a, w, scales, c, expert_ids, block_size_m, cu_count, group_size,
                  zero_points, sorted_token_ids, top_k));
}

// fork: begin lm_head
void dense_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
              int64_t cu_count, int64_t group_size, int64_t bits,
              const std::optional<Tensor>& zero_points) {
  const DenseArgs dense =
      check_dense(DeviceType::CPU, a, w, scales, c, cu_count, group_size, bits, zero_points);
  const int32_t expert_id = 0, step = tokens_together(dense.w, 1);
  for (int32_t begin = 0; begin < dense.m; begin += step) {
    GemmArgs args{};
    args.dtype = dense.dtype;
    args.a = row_of(dense.a, dense.a_stride_m, begin);
    args.a_stride_m = dense.a_stride_m;
    args.w = dense.w;
    args.c = row_of(dense.c, dense.c_stride_m, begin);
    args.c_stride_m = dense.c_stride_m;
    args.expert_ids = &expert_id;
    args.num_blocks = args.top_k = 1;
    args.num_rows = args.block_size_m = std::min(step, dense.m - begin);
    args.row_invariant = dense.row_invariant;
    gemm(args);
  }
}

// fork: end
void gate_up_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
                const Tensor& topk_ids, std::string activation, int64_t cu_count,
                int64_t group_size, const std::optional<Tensor>& zero_points,
                const std::optional<Tensor>& expert_map, double alpha, double beta,
                std::optional<double> limit, const std::optional<std::vector<int64_t>>& plan,
                const std::optional<Tensor>& shared_w, const std::optional<Tensor>& shared_gate,
                const std::optional<Tensor>& shared_c, const std::optional<Tensor>& shared_factors,
                const std::optional<Tensor>& shared_scales,
                const std::optional<Tensor>& shared_zero_points) {
  gate_up(check_gate_up(DeviceType::CPU, a, w, scales, c, topk_ids, activation, cu_count,
                        group_size, zero_points, expert_map, alpha, beta, limit, plan, shared_w,
                        shared_gate, shared_c, shared_factors, shared_scales, shared_zero_points));
}

void down_op(const Tensor& a, const Tensor& w, const Tensor& scales, const Tensor& c,
             const Tensor& topk_ids, const std::optional<Tensor>& topk_weights, int64_t cu_count,
             int64_t group_size, const std::optional<Tensor>& zero_points,
             const std::optional<Tensor>& expert_map,
             const std::optional<std::vector<int64_t>>& plan, const std::optional<Tensor>& shared_a,
             const std::optional<Tensor>& shared_w, const std::optional<Tensor>& shared_factors,
             const std::optional<Tensor>& shared_c, const std::optional<Tensor>& shared_scales,
             const std::optional<Tensor>& shared_zero_points) {
  down(check_down(DeviceType::CPU, a, w, scales, c, topk_ids, topk_weights, cu_count, group_size,
                  zero_points, expert_map, plan, shared_a, shared_w, shared_factors, shared_c,
                  shared_scales, shared_zero_points));
}

}  // namespace
}  // namespace moe_int4::cpu

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CPU, m) {
  m.impl("fused_moe_wvSplitK_int4_gemm", TORCH_BOX(&moe_int4::cpu::gemm_op));
  m.impl("fused_moe_wvSplitK_int4_gate_up", TORCH_BOX(&moe_int4::cpu::gate_up_op));
  m.impl("fused_moe_wvSplitK_int4_down", TORCH_BOX(&moe_int4::cpu::down_op));
  // fork: begin lm_head
  m.impl("wvSplitK_int_g", TORCH_BOX(&moe_int4::cpu::dense_op));
  // fork: end
}
