// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Starts the GPU kernels. Nothing here waits for the device, allocates, or depends on values in
// device memory, so every call can be captured in a graph. Throws std::runtime_error.
#pragma once

#include "moe_int4_args.h"

namespace moe_int4 {

void launch_gemm(const GemmArgs& args, void* stream);
void launch_gate_up(const GateUpArgs& args, void* queue);
// May read router ids, expert map and weights before the previous grid of the stream has ended, if
// that grid lets the next one start early, as gate_up does: they are not its output.
void launch_down(const DownArgs& args, void* queue);

// fork: begin lm_head
void launch_dense(const DenseArgs& args, void* stream);
// Reads c, which the grid before may still write, in its first grid and writes it in its second.
void launch_rescore(const RescoreArgs& args, void* stream);

// fork: end
}  // namespace moe_int4
