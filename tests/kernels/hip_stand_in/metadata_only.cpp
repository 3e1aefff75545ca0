// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Replaces host_kernels.cpp: a stand-in that loads code objects but runs none.
#include "host_kernels.h"

namespace stand_in {

const HostKernel* find_host_kernel(const std::string&) { return nullptr; }

void run_host_kernel(const std::string&, const HostKernel&, const unsigned (&)[3], unsigned, size_t,
                     const char*) {}

}  // namespace stand_in
