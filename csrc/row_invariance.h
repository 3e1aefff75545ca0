// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Row invariance: a row of a call gets the same bits whatever other rows the call has. The op
// hybrid_w4a16_row_invariance sets it for the process, as vLLM's batch-invariant mode is set for
// the process. The argument checks copy it into each call's arguments; tuning.h (CPU), plan.h and
// the launchers (GPU) then choose kernels and launches that do not depend on the number of rows.
#pragma once

#include <atomic>

namespace moe_int4 {

inline std::atomic<bool>& row_invariance() {
  static std::atomic<bool> on{false};
  return on;
}

}  // namespace moe_int4
