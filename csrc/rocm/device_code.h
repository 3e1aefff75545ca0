// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The AMD code objects that are embedded in this library. embed_device_code.py writes the
// definition; amd_device_code.cmake runs it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpu {

struct CodeObject {
  const char* arch;     // "gfx1151"
  const char* kernels;  // names, one per line
  const uint8_t* data;  // a zlib stream
  size_t compressed_size, size;
};

extern const CodeObject kCodeObjects[];
extern const size_t kNumCodeObjects;

}  // namespace gpu
