// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Launches the GPU kernels. The functions do not wait for the device, allocate, or depend on values
// in device memory, so every call can be captured in a graph. They throw std::runtime_error.
#pragma once

#include "moe_int4_args.h"
// fork: begin token
#include "moe_router_args.h"
// fork: end

namespace moe_int4 {

void launch_gemm(const GemmArgs& args, void* stream);
void launch_gate_up(const GateUpArgs& args, void* queue);
// If the previous grid of the stream lets the next one start early (gate_up does), the kernel may
// read router ids, expert map and weights before that grid ends. They are not its output.
void launch_down(const DownArgs& args, void* queue);

// fork: begin lm_head
void launch_dense(const DenseArgs& args, void* stream);
// Two grids: the first reads c, which the previous grid may still be writing; the second writes it.
void launch_rescore(const RescoreArgs& args, void* stream);

// fork: end
// fork: begin token
void launch_router(const RouterArgs& args, void* stream);

// fork: end
}  // namespace moe_int4
