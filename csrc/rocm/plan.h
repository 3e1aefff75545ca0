// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// How gate_up and down are launched, as a value that comes from a rule or from the caller. Results
// depend on it only in the order of fp32 sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "geometry.h"
#include "moe_int4_args.h"

namespace moe_int4 {

enum class Kernel {
  kPairs = 0,   // _t1: every pair (token, expert) reads the expert's weights
  kEights = 1,  // _t8: eight tokens share them
  // fork: begin overlay
  kGrouped = 2,  // grouped: kGroupTokens tokens share them; needs matrix instructions
  // down: as kGrouped with twice the rows per wave; gate_up: as kPairs, with several row tiles per
  // block
  kWide = 3,
  // fork: end
};
#if GPU_HAS_MMA
constexpr Kernel kLastGateUp = Kernel::kWide, kLastDown = Kernel::kWide;
#else
constexpr Kernel kLastGateUp = Kernel::kEights, kLastDown = Kernel::kEights;
#endif

struct GateUpPlan {
  Kernel kernel;
  int waves;      // per block; they share k
  int slots;      // 0
  int row_tiles;  // 0
  // fork: begin overlay
  // kGrouped: waves have row tiles of their own, `row_tiles` one after another; `slots` pairs of an
  // expert share a pass over its weights. kWide: `row_tiles` of a block.
  int stream_tiles() const { return kernel == Kernel::kWide ? row_tiles : 1; }
  // fork: end
};
struct DownPlan {
  Kernel kernel;
  int waves;     // per block
  int k_slices;  // waves that share k, a power of two that divides waves
  int slots;     // 0
  // fork: begin overlay
  // kGrouped, kWide: `slots` as in GateUpPlan.
  bool grouped() const { return kernel == Kernel::kGrouped || kernel == Kernel::kWide; }
  // fork: end
  int rows() const {
#if GPU_HAS_MMA
    if (kernel == Kernel::kWide) return 2 * kRowsPerWave;
#endif
    return kRowsPerWave;
  }
};

// The input of a rule.
struct Problem {
  int tokens, top_k, experts;
  int rows;      // weight rows to divide among blocks: half of gate_up's, all of down's
  int blocks;    // of kBlockK along k
  bool aligned;  // activation rows are 16-byte aligned
  int cu_count;
  int max_lds;          // bytes per block
  double expert_bytes;  // of one expert's int4 weights in this op
  bool row_invariant;   // see row_invariance.h
  // fork: begin overlay
  bool shared = false;  // down: the grid has blocks of a shared expert, as many as others
  // fork: end

  int pairs() const { return tokens * top_k; }
  // fork: begin overlay
  bool can_group() const {
    return kStreams && aligned && top_k <= kMaxGroupTopK && experts < (1 << 16) - 1;
  }
  double pairs_per_expert() const { return pairs() / distinct(); }
  int block_pairs() const { return (tokens < kGroupTokens ? tokens : kGroupTokens) * top_k; }
  // fork: end
  // Expected number of distinct experts under uniform routing; no token picks one twice.
  double distinct() const {
    const double picked = top_k < experts ? static_cast<double>(top_k) / experts : 1.0;
    return experts * (1 - std::pow(1 - picked, static_cast<double>(tokens)));
  }
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// fork: begin overlay
// Bytes of LDS of a wave of a stream, without the results of several tiles.
inline int gate_up_stream_lds(const Problem& p, const GateUpPlan& plan) {
  return stream_lds_bytes_per_wave(ceil_div(p.blocks, plan.waves), plan.stream_tiles());
}
// fork: end
// Bytes of LDS per block.
inline int gate_up_lds(const Problem& p, const GateUpPlan& plan) {
#if GPU_HAS_MMA
  if (plan.kernel == Kernel::kGrouped) {
    return plan.waves * kGroupWeightBytes + group_row_ring_bytes(kGateUpRows, plan.slots) +
           group_list_bytes(p.block_pairs(), p.experts, plan.slots);
  }
  if (plan.kernel != Kernel::kEights) {
    const int results = plan.kernel == Kernel::kWide ? plan.row_tiles * result_bytes(1) : 0;
    return plan.waves * (gate_up_stream_lds(p, plan) + results) + kStreamZeroBytes;
  }
#endif
  return plan.waves * lds_bytes_per_wave(plan.kernel == Kernel::kPairs ? 1 : kMaxSlots, p.tokens);
}
inline int down_wave_lds(const Problem& p, const DownPlan& plan) {
#if GPU_HAS_MMA
  if (plan.grouped()) {
    const int tokens = p.tokens < kGroupTokens ? p.tokens : kGroupTokens;
    const int r = plan.rows() / kRowsPerWave;
    return kGroupWeightBytes + group_row_ring_bytes(r, plan.slots) + group_result_bytes(r, tokens);
  }
  if (plan.kernel == Kernel::kPairs) {
    return stream_lds_bytes_per_wave(ceil_div(p.blocks, plan.k_slices),
                                     ceil_div(p.top_k, plan.waves / plan.k_slices));
  }
#endif
  return lds_bytes_per_wave(plan.kernel == Kernel::kPairs ? 1 : kMaxSlots, p.tokens);
}
inline int down_lds(const Problem& p, const DownPlan& plan) {
  int bytes = plan.waves * down_wave_lds(p, plan);
#if GPU_HAS_MMA
  if (plan.grouped()) bytes += group_list_bytes(p.block_pairs(), p.experts, plan.slots);
  if (plan.kernel == Kernel::kPairs) bytes += kStreamZeroBytes;
#endif
  return bytes;
}

namespace plan_detail {

[[noreturn]] inline void fail(const char* op, const std::string& what, const std::string& expected,
                              int64_t got) {
  throw std::runtime_error(std::string("fused_moe_wvSplitK_int4_") + op + ": plan: " + what +
                           ": expected " + expected + ", got " + std::to_string(got));
}

// Value i of the plan, checked to be between least and most.
inline int value(const char* op, const Plan& plan, int i, const char* name, int least, int most) {
  const int64_t got = plan.values[i];
  if (got < least || got > most) {
    fail(op, std::string(name) + " (value " + std::to_string(i) + ")",
         std::to_string(least) + " to " + std::to_string(most), got);
  }
  return static_cast<int>(got);
}

inline Kernel kernel(const char* op, const Plan& plan, [[maybe_unused]] const Problem& p,
                     Kernel last) {
  constexpr int kSize = 4;
  if (plan.size != kSize) fail(op, "length", std::to_string(kSize) + " integers", plan.size);
  const auto kernel = static_cast<Kernel>(value(op, plan, 0, "kernel", 0, static_cast<int>(last)));
#if GPU_HAS_MMA
  const bool grouped = kernel != Kernel::kPairs && kernel != Kernel::kEights;
  if (kernel != Kernel::kEights && !p.aligned) {
    fail(op, "kernel (value 0)", "1 where activation rows are not 16-byte aligned", plan.values[0]);
  }
  if (grouped && !p.can_group()) {
    fail(op, "kernel (value 0)",
         "0 or 1 for more than " + std::to_string(kMaxGroupTopK) + " experts per token or more " +
             "than 65535 experts",
         plan.values[0]);
  }
#endif
  return kernel;
}

inline void check_lds(const char* op, int lds, const Problem& p) {
  if (lds > p.max_lds) {
    fail(op, "bytes of shared memory that it takes", "at most " + std::to_string(p.max_lds), lds);
  }
}

}  // namespace plan_detail

// Parses the caller's plan of four integers: kernel, waves, slots, row_tiles; see GateUpPlan.
// Throws std::runtime_error naming the value that is not valid.
inline GateUpPlan parse_gate_up_plan(const Plan& plan, const Problem& p) {
  using namespace plan_detail;
  constexpr const char* kOp = "gate_up";
  GateUpPlan out{};
  out.kernel = kernel(kOp, plan, p, kLastGateUp);
#if GPU_HAS_MMA
  const bool grouped = out.kernel == Kernel::kGrouped, wide = out.kernel == Kernel::kWide;
  out.waves = value(kOp, plan, 1, "waves", 1, grouped ? kMaxGroupWaves : kMaxWavesSharingK);
  out.slots = value(kOp, plan, 2, "slots", grouped ? 1 : 0, grouped ? kGateUpSlots : 0);
  out.row_tiles = value(kOp, plan, 3, "row_tiles", grouped || wide ? 1 : 0,
                        grouped ? 1024
                        : wide  ? kMaxStreamTiles
                                : 0);
#else
  out.waves = value(kOp, plan, 1, "waves", 1, kMaxWavesSharingK);
  out.slots = value(kOp, plan, 2, "slots", 0, 0);
  out.row_tiles = value(kOp, plan, 3, "row_tiles", 0, 0);
#endif
  check_lds(kOp, gate_up_lds(p, out), p);
  return out;
}

// The same for kernel, waves, k_slices, slots; see DownPlan.
inline DownPlan parse_down_plan(const Plan& plan, const Problem& p) {
  using namespace plan_detail;
  constexpr const char* kOp = "down";
  DownPlan out{};
  out.kernel = kernel(kOp, plan, p, kLastDown);
  out.waves = value(kOp, plan, 1, "waves", 1, kMaxWaves);
  out.k_slices = value(kOp, plan, 2, "k_slices", 1, out.waves);
  if ((out.k_slices & (out.k_slices - 1)) != 0 || out.waves % out.k_slices != 0) {
    fail(kOp, "k_slices (value 2)",
         "a power of two that divides waves " + std::to_string(out.waves), out.k_slices);
  }
#if GPU_HAS_MMA
  const bool grouped = out.grouped();
  out.slots = value(kOp, plan, 3, "slots", grouped ? 1 : 0, grouped ? kDownSlots : 0);
#else
  out.slots = value(kOp, plan, 3, "slots", 0, 0);
#endif
  check_lds(kOp, down_lds(p, out), p);
  return out;
}

// ---------------------------------------------------------------------------------------- the rule
// The constants for RDNA were not measured: they come from the registers, loads and instructions
// that the compiled code has.
// fork: begin overlay
// Those for streams and matrix instructions were measured on an H100 (six model shapes, 1 to 64
// tokens, 2026-11; README.md). The host uses those of the code that it runs.
// fork: end

// The fewest parts of `total` whose largest is no larger than with `parts` equal parts.
constexpr int even_parts(int total, int parts) {
  return ceil_div(total, ceil_div(total, parts < total ? parts : total));
}
constexpr int clamp(double x, int least, int most) {
  return x < least ? least : x > most ? most : static_cast<int>(x);
}

// Number of waves that share k of a tile if `tiles` tiles are to occupy the device.
inline int waves_sharing_k(int blocks, int64_t tiles, int cu_count) {
#if GPU_HAS_MMA
  constexpr int kWavesPerCu = 16;
#else
  constexpr int kWavesPerCu = 24;
#endif
  const double wanted = std::ceil(static_cast<double>(kWavesPerCu) * cu_count / tiles);
  return even_parts(blocks, clamp(wanted, 1, kMaxWavesSharingK));
}
inline int gemm_waves(int blocks, int64_t tiles, int cu_count) {
  return waves_sharing_k(blocks, tiles, cu_count);
}

// Distinct experts per pair from which pairs on their own are faster than pairs that share: where
// reading the shared experts again costs less than finding the pairs that share. On RDNA that is 5%
// of the bytes, since its weight loads leave nothing in the last-level cache.
// fork: begin overlay
// With matrix instructions it is up to 23% of a small expert, mostly from the cache, and 4% of a
// large one (H200, half of the routings skewed: README.md).
// fork: end
inline double few_share_limit([[maybe_unused]] const Problem& p) {
#if GPU_HAS_MMA
  const double limit = 0.82 + 0.065 * std::log2(p.expert_bytes / 1e6);
  return limit < 0.77 ? 0.77 : limit > 0.96 ? 0.96 : limit;
#else
  return 0.95;
#endif
}
inline bool few_share(const Problem& p) { return p.distinct() > few_share_limit(p) * p.pairs(); }

// The problem that decides the plan. Row invariant: that of one token, whose pairs are on their own
// (kPairs). A block then computes one token (down) or one pair (gate_up), and the waves that share
// its k do not depend on the other tokens.
inline Problem deciding(Problem p) {
  if (!p.row_invariant) return p;
#if GPU_HAS_MMA
  if (!p.aligned) {
    throw std::runtime_error(
        "a: expected rows aligned to 16 bytes in a row-invariant call, got other ones");
  }
#endif
  p.tokens = 1;
  return p;
}

// Whether each pair reads its expert's weights.
inline bool pairs_alone(const Problem& p) {
#if GPU_HAS_MMA
  if (!p.aligned) return false;
#endif
  return p.tokens == 1 || few_share(p);
}

#if GPU_HAS_MMA
inline GateUpPlan grouped_gate_up_plan(const Problem& p) {
  const int tiles = ceil_div(p.rows, kRowGroups);
  if (pairs_alone(p)) {
    // One window per wave, all of it requested at once, as long as the waves are few rounds.
    const int waves = ceil_div(p.blocks, kWindowBlocks);
    const double most = 96.0 * p.cu_count / (static_cast<double>(tiles) * p.pairs());
    return {Kernel::kPairs, even_parts(p.blocks, clamp(waves < most ? waves : most, 1, 8)), 0, 0};
  }
  GateUpPlan out{Kernel::kGrouped, 1, 0, 1};
  out.slots = p.tokens <= 4 ? p.tokens : p.pairs_per_expert() < 6 ? 8 : kGateUpSlots;
  out.waves = out.slots == kGateUpSlots || p.blocks <= 16 ? 4 : 2;
  if (out.slots <= 8) {  // up to 24 windows per wave, as long as all waves that fit have work
    const int windows = ceil_div(p.blocks, group_window_blocks(kGateUpRows));
    const double rounds =
        ceil_div(tiles, kGateUpRows) * p.distinct() / (8.0 * out.waves * p.cu_count);
    const int most = clamp(24 / windows, 1, 24);
    out.row_tiles = clamp(std::round(rounds), 1, most);
  }
  return out;
}
#endif

inline GateUpPlan gate_up_plan(const Problem& call) {
  const Problem p = deciding(call);
#if GPU_HAS_MMA
  if (p.can_group()) return grouped_gate_up_plan(p);
#endif
  const int tiles = ceil_div(p.rows, kRowGroups);
  const int waves = waves_sharing_k(p.blocks, int64_t{tiles} * p.pairs(), p.cu_count);
  return {pairs_alone(p) ? Kernel::kPairs : Kernel::kEights, waves, 0, 0};
}

// Reduces the waves until the block fits the device's LDS.
inline DownPlan fitted(const Problem& p, DownPlan plan) {
  int shares = plan.waves / plan.k_slices;
  while (down_lds(p, plan) > p.max_lds && plan.waves > 1) {
    if (shares > 1) {
      --shares;
    } else {
      plan.k_slices /= 2;
    }
    plan.waves = shares * plan.k_slices;
  }
  return plan;
}

#if GPU_HAS_MMA
inline DownPlan grouped_down_plan(const Problem& p) {
  const bool wide = p.tokens > 2 && ceil_div(p.rows, 2 * kRowsPerWave) >= 0.7 * p.cu_count;
  DownPlan out{wide ? Kernel::kWide : Kernel::kGrouped, 1, 1, 0};
  out.slots = p.tokens <= 4 ? p.tokens : p.pairs_per_expert() < (wide ? 2.2 : 3) ? 4 : kDownSlots;
  const int least = 2 * group_window_blocks(wide ? 2 : 1);  // blocks per slice: two windows
  while (out.k_slices < 4 && p.blocks / (2 * out.k_slices) >= least) out.k_slices *= 2;
  const int most = p.pairs() < p.experts ? p.pairs() : p.experts;
  int waves = p.tokens <= 2 ? 8 : 12;
  // So that a block of the shared expert fits beside each block: 16 waves take all registers.
  if (p.shared && ceil_div(p.rows, out.rows()) <= p.cu_count) waves = 8;
  const int shares = waves / out.k_slices;
  out.waves = (shares < most ? shares : most) * out.k_slices;
  return fitted(p, out);
}
#endif

inline DownPlan down_plan(const Problem& call) {
  const Problem p = deciding(call);
  const int tiles = ceil_div(p.rows, kRowsPerWave);
#if GPU_HAS_MMA
  // With at least one tile per compute unit, the grouped blocks are one round for any tokens.
  if (p.can_group() && !p.row_invariant &&
      (tiles >= p.cu_count || !(p.tokens == 1 || few_share(p)))) {
    return grouped_down_plan(p);
  }
  const int waves_per_cu = p.shared ? 8 : 16;  // one round of blocks
#else
  constexpr int waves_per_cu = 32;  // one round of blocks
#endif
  const bool alone = pairs_alone(p);
  const int block_tokens = alone ? 1 : p.tokens < kMaxSlots ? p.tokens : kMaxSlots;
  const double wanted = static_cast<double>(waves_per_cu) * p.cu_count /
                        (static_cast<double>(tiles) * ceil_div(p.tokens, block_tokens));
  const int most = clamp(wanted, 1, kMaxWaves), pairs = block_tokens * p.top_k;
  DownPlan out{alone ? Kernel::kPairs : Kernel::kEights, 1, 1, 0};
  int least = INT32_MAX;  // blocks of the busiest wave
  for (int slices = 1; slices <= 4 && slices <= most; slices *= 2) {
    const int blocks = ceil_div(p.blocks, slices);
    if (slices > 1 && blocks < slices) break;
    const int shares = even_parts(pairs, most / slices), chain = ceil_div(pairs, shares) * blocks;
    if (chain < least) {
      least = chain;
      out.waves = shares * slices;
      out.k_slices = slices;
    }
  }
  return fitted(p, out);
}

}  // namespace moe_int4
