// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// How gate_up and down are launched: as a value, from a rule or from the caller. Results do not
// depend on it except for the order of fp32 sums.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "geometry.h"
#include "moe_int4_args.h"

namespace moe_int4 {

enum class Family { kCuda, kRdna, kHost };

enum class Kernel {
  kPairs = 0,    // _t1: every pair (token, expert) reads the expert's weights
  kEights = 1,   // _t8: eight tokens share them
  kGrouped = 2,  // grouped: kGroupTokens tokens share them; where there are matrix instructions
  kWide = 3,     // the same with twice the rows per wave; down only
};

struct GateUpPlan {
  Kernel kernel;
  int waves;      // of a block: kPairs and kEights share k, kGrouped has row tiles of their own
  int slots;      // kGrouped: pairs of an expert per pass over its weights
  int row_tiles;  // kGrouped: row tiles one after the other in each wave
};
struct DownPlan {
  Kernel kernel;
  int waves;     // of a block
  int k_slices;  // of them share k, a power of two that divides waves
  int slots;     // kGrouped, kWide: as in GateUpPlan
  int rows() const { return kernel == Kernel::kWide ? 2 * kRowsPerWave : kRowsPerWave; }
  bool grouped() const { return kernel == Kernel::kGrouped || kernel == Kernel::kWide; }
};

// What a rule looks at.
struct Problem {
  int tokens, top_k, experts;
  int rows;       // weight rows that a block divides: half of gate_up's, all of down's
  int blocks;     // of kBlockK along k
  bool aligned;   // activation rows are 16-byte aligned
  int cu_count;
  int max_lds;    // bytes that a block may have

  int pairs() const { return tokens * top_k; }
  bool can_group() const {
    return kStreams && aligned && top_k <= kMaxGroupTopK && experts < (1 << 16) - 1;
  }
  // Different experts that uniform routing picks on average.
  double distinct() const {
    return experts * (1 - std::pow(1 - 1.0 / experts, static_cast<double>(pairs())));
  }
  int block_pairs() const { return (tokens < kGroupTokens ? tokens : kGroupTokens) * top_k; }
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Bytes of LDS of a block.
inline int gate_up_lds(const Problem& p, const GateUpPlan& plan) {
  if (plan.kernel == Kernel::kGrouped) {
    return plan.waves * kGroupWeightBytes + group_row_ring_bytes(kGateUpRows, plan.slots) +
           group_list_bytes(p.block_pairs(), p.experts);
  }
  if (plan.kernel == Kernel::kPairs && kStreams) {
    return plan.waves * stream_lds_bytes_per_wave(ceil_div(p.blocks, plan.waves), 1) +
           kStreamZeroBytes;
  }
  return plan.waves * lds_bytes_per_wave(plan.kernel == Kernel::kPairs ? 1 : kMaxSlots, p.tokens);
}
inline int down_wave_lds(const Problem& p, const DownPlan& plan) {
  if (plan.grouped()) {
    const int tokens = p.tokens < kGroupTokens ? p.tokens : kGroupTokens;
    const int r = plan.rows() / kRowsPerWave;
    return kGroupWeightBytes + group_row_ring_bytes(r, plan.slots) + group_result_bytes(r, tokens);
  }
  if (plan.kernel == Kernel::kPairs && kStreams) {
    return stream_lds_bytes_per_wave(ceil_div(p.blocks, plan.k_slices),
                                     ceil_div(p.top_k, plan.waves / plan.k_slices));
  }
  return lds_bytes_per_wave(plan.kernel == Kernel::kPairs ? 1 : kMaxSlots, p.tokens);
}
inline int down_lds(const Problem& p, const DownPlan& plan) {
  int bytes = plan.waves * down_wave_lds(p, plan);
  if (plan.grouped()) bytes += group_list_bytes(p.block_pairs(), p.experts);
  if (plan.kernel == Kernel::kPairs && kStreams) bytes += kStreamZeroBytes;
  return bytes;
}

namespace plan_detail {

[[noreturn]] inline void fail(const char* op, const std::string& what, const std::string& expected,
                              int64_t got) {
  throw std::runtime_error(std::string("fused_moe_wvSplitK_int4_") + op + ": plan: " + what +
                           ": expected " + expected + ", got " + std::to_string(got));
}

// Value i of the plan, checked to be from least to most.
inline int value(const char* op, const Plan& plan, int i, const char* name, int least, int most) {
  const int64_t got = plan.values[i];
  if (got < least || got > most) {
    fail(op, std::string(name) + " (value " + std::to_string(i) + ")",
         std::to_string(least) + " to " + std::to_string(most), got);
  }
  return static_cast<int>(got);
}

inline Kernel kernel(const char* op, const Plan& plan, const Problem& p, Kernel last) {
  constexpr int kSize = 4;
  if (plan.size != kSize) fail(op, "length", std::to_string(kSize) + " integers", plan.size);
  const auto kernel = static_cast<Kernel>(value(op, plan, 0, "kernel", 0, static_cast<int>(last)));
  const bool grouped = kernel != Kernel::kPairs && kernel != Kernel::kEights;
  const bool copies = kStreams && kernel != Kernel::kEights;
  if (grouped && !kStreams) {
    fail(op, "kernel (value 0)", "0 or 1 on a device without matrix instructions", plan.values[0]);
  }
  if (grouped && !p.can_group()) {
    fail(op, "kernel (value 0)",
         "0 or 1 for more than " + std::to_string(kMaxGroupTopK) + " experts per token or more " +
             "than 65535 experts",
         plan.values[0]);
  }
  if (copies && !p.aligned) {
    fail(op, "kernel (value 0)", "1 where activation rows are not 16-byte aligned",
         plan.values[0]);
  }
  return kernel;
}

inline void check_lds(const char* op, int lds, const Problem& p) {
  if (lds > p.max_lds) {
    fail(op, "bytes of shared memory that it takes", "at most " + std::to_string(p.max_lds), lds);
  }
}

}  // namespace plan_detail

// The caller's plan of four integers: kernel, waves, slots, row_tiles; see GateUpPlan. Throws
// std::runtime_error naming the value that does not fit.
inline GateUpPlan parse_gate_up_plan(const Plan& plan, const Problem& p) {
  using namespace plan_detail;
  constexpr const char* kOp = "gate_up";
  GateUpPlan out{};
  out.kernel = kernel(kOp, plan, p, Kernel::kGrouped);
  const bool grouped = out.kernel == Kernel::kGrouped;
  out.waves = value(kOp, plan, 1, "waves", 1, grouped ? kMaxGroupWaves : kMaxWavesSharingK);
  out.slots = value(kOp, plan, 2, "slots", grouped ? 1 : 0, grouped ? kGroupSlots : 0);
  out.row_tiles = value(kOp, plan, 3, "row_tiles", grouped ? 1 : 0, grouped ? 1024 : 0);
  check_lds(kOp, gate_up_lds(p, out), p);
  return out;
}

// Likewise: kernel, waves, k_slices, slots; see DownPlan.
inline DownPlan parse_down_plan(const Plan& plan, const Problem& p) {
  using namespace plan_detail;
  constexpr const char* kOp = "down";
  DownPlan out{};
  out.kernel = kernel(kOp, plan, p, Kernel::kWide);
  const bool grouped = out.grouped();
  out.waves = value(kOp, plan, 1, "waves", 1, kMaxWaves);
  out.k_slices = value(kOp, plan, 2, "k_slices", 1, out.waves);
  if ((out.k_slices & (out.k_slices - 1)) != 0 || out.waves % out.k_slices != 0) {
    fail(kOp, "k_slices (value 2)",
         "a power of two that divides waves " + std::to_string(out.waves), out.k_slices);
  }
  out.slots = value(kOp, plan, 3, "slots", grouped ? 1 : 0, grouped ? kGroupSlots : 0);
  check_lds(kOp, down_lds(p, out), p);
  return out;
}

// PLACEHOLDER RULE
struct Tuning {
  int max_blocks_k, waves_per_cu, down_waves, down_log2_k_slices, gate_up_single, down_single;
};
constexpr Tuning kCudaTuning[] = {{2, 16, 16, 0, 24, 24}, {1 << 30, 16, 16, 1, 24, 24}};
constexpr Tuning kRdnaTuning[] = {{2, 24, 8, 0, 1, 1}, {1 << 30, 24, 8, 1, 1, 1}};
constexpr Tuning kHostTuning[] = {{1, 1, 4, 0, 1, 3}, {1 << 30, 12, 4, 1, 2, 1}};
inline const Tuning& tuning(Family family, int blocks) {
  const Tuning* rows =
      family == Family::kCuda ? kCudaTuning : family == Family::kRdna ? kRdnaTuning : kHostTuning;
  return rows[blocks > rows[0].max_blocks_k];
}

inline int gemm_waves(Family family, int blocks, int64_t tiles, int cu_count) {
  int waves = 1;
  while (2 * waves <= kMaxWavesSharingK && 2 * waves <= blocks &&
         tiles * waves < static_cast<int64_t>(tuning(family, blocks).waves_per_cu) * cu_count) {
    waves *= 2;
  }
  return waves;
}

inline GateUpPlan gate_up_plan(Family family, const Problem& p) {
  const Tuning& tuned = tuning(family, p.blocks);
  const bool single = p.tokens <= tuned.gate_up_single && (p.aligned || !kStreams);
  GateUpPlan out{single ? Kernel::kPairs : Kernel::kEights, 1, 0, 0};
  const int min_blocks = single && kStreams ? kWindowBlocks : 1;
  const int64_t tiles = int64_t{ceil_div(p.rows, kRowGroups)} * p.pairs();
  while (2 * out.waves <= kMaxWavesSharingK && 2 * out.waves * min_blocks <= p.blocks &&
         tiles * out.waves < static_cast<int64_t>(tuned.waves_per_cu) * p.cu_count) {
    out.waves *= 2;
  }
  return out;
}
inline DownPlan down_plan(Family family, const Problem& p) {
  const Tuning& tuned = tuning(family, p.blocks);
  const bool single = p.tokens <= tuned.down_single && (p.aligned || !kStreams);
  DownPlan out{single ? Kernel::kPairs : Kernel::kEights, tuned.down_waves, 1, 0};
  if (single) {
    while (out.waves > 1 && out.waves * p.tokens > tuned.down_waves) out.waves /= 2;
  }
  const int block_tokens = p.tokens < kMaxSlots ? p.tokens : kMaxSlots;
  const int pairs = (single ? 1 : block_tokens) * p.top_k;
  for (;; out.waves /= 2) {  // until the device has the LDS
    out.k_slices = 1 << tuned.down_log2_k_slices;
    while (out.k_slices > out.waves) out.k_slices /= 2;
    while (pairs * out.k_slices < out.waves && 2 * out.k_slices <= p.blocks) out.k_slices *= 2;
    if (out.waves == 1 || down_lds(p, out) <= p.max_lds) return out;
  }
}

}  // namespace moe_int4
