// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Decompression of zlib streams (RFC 1950, RFC 1951), so that embedded code objects need no library
// at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpu {

// Writes the `out_size` bytes that `size` bytes at `data` decompress to. Throws std::runtime_error
// where the stream is damaged, is of another size, or its checksum differs.
void inflate(const uint8_t* data, size_t size, uint8_t* out, size_t out_size);

}  // namespace gpu
