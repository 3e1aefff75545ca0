// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// What a runtime reads from an AMDGPU code object: the metadata note (LLVM's AMDGPU usage guide,
// code object v3 and later), which is MessagePack in an ELF note.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace stand_in {

struct Argument {
  size_t offset, size;
  std::string kind;  // "by_value", "global_buffer", "hidden_..."
};

struct Kernel {
  std::string name;
  std::vector<Argument> arguments;
  size_t kernarg_bytes = 0, lds_bytes = 0, max_threads = 0, wave_size = 0;
};

struct CodeObject {
  std::string arch;
  std::vector<Kernel> kernels;
};

// The code object that starts at `image`. Throws std::runtime_error if there is none.
CodeObject read_code_object(const void* image);

}  // namespace stand_in
