// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Prints the launch plans that plan.h chooses. Each line on stdin is a problem: tokens, top_k,
// experts, hidden and intermediate size, compute units, bytes of LDS. Each line on stdout is its
// plan. For gate_up: kernel, waves per block, slots, row tiles, waves of the grid, bytes of LDS per
// block. For down: kernel, waves per block, k slices, slots, waves of the grid, bytes of LDS per
// block.
#include <cinttypes>
#include <cstdio>

#include "plan.h"

int main() {
  using namespace moe_int4;
  int tokens, top_k, experts, hidden, inter, cus, lds;
  while (std::scanf("%d %d %d %d %d %d %d", &tokens, &top_k, &experts, &hidden, &inter, &cus,
                    &lds) == 7) {
    const auto problem = [&](int rows, int k, double weights) {
      return Problem{tokens, top_k, experts, rows,          ceil_div(k, kBlockK),
                     true,   cus,   lds,     0.5 * weights, false};
    };
    const auto eights = [&](Kernel kernel) {
      return kernel == Kernel::kPairs ? tokens : ceil_div(tokens, kMaxSlots);
    };
    const int64_t blocks_of_tokens = ceil_div(tokens, kGroupTokens);

    const Problem g = problem(inter, hidden, 2.0 * inter * hidden);
    const GateUpPlan up = gate_up_plan(g);
    int64_t up_waves = int64_t{ceil_div(inter, kRowGroups)} * g.pairs() * up.waves;
    if (up.kernel == Kernel::kGrouped) {
      up_waves = int64_t{ceil_div(inter, kGateUpRows * kRowGroups * up.waves * up.row_tiles)} *
                 most_lists(g.block_pairs(), experts, up.slots) * blocks_of_tokens * up.waves;
    }
    const Problem d = problem(hidden, inter, 1.0 * inter * hidden);
    const DownPlan down = down_plan(d);
    const int64_t down_waves = int64_t{ceil_div(hidden, down.rows())} * down.waves *
                               (down.grouped() ? blocks_of_tokens : eights(down.kernel));
    std::printf("%d %d %d %d %" PRId64 " %d  %d %d %d %d %" PRId64 " %d\n",
                static_cast<int>(up.kernel), up.waves, up.slots, up.row_tiles, up_waves,
                gate_up_lds(g, up), static_cast<int>(down.kernel), down.waves, down.k_slices,
                down.slots, down_waves, down_lds(d, down));
  }
  return 0;
}
