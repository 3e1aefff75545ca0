// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The kernels of the host build (csrc/rocm/host) by name.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace stand_in {

struct HostArgument {
  size_t offset, size;  // in a kernel argument segment
  bool is_pointer;
};

struct HostKernel {
  std::vector<HostArgument> arguments;
  // Runs one lane with the arguments in a segment.
  std::function<void(const char* segment)> lane;
};

// Null if there is no kernel with that name.
const HostKernel* find_host_kernel(const std::string& name);

// Runs the kernel over the grid, each time with another order of lanes.
void run_host_kernel(const std::string& name, const HostKernel& kernel, const unsigned (&grid)[3],
                     unsigned threads, size_t lds_bytes, const char* segment);

}  // namespace stand_in
