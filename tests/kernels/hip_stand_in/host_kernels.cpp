// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "host_kernels.h"

#include <cstring>
#include <map>
#include <type_traits>
#include <utility>

#include "gpu_compat.cuh"

namespace stand_in {
namespace {

template <typename T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename... P, size_t... I>
HostKernel describe(void (*kernel)(P...), std::index_sequence<I...>) {
  HostKernel host;
  size_t end = 0;
  const auto place = [&](size_t size, size_t alignment, bool is_pointer) {
    const size_t offset = (end + alignment - 1) / alignment * alignment;
    end = offset + size;
    host.arguments.push_back({offset, size, is_pointer});
  };
  (place(sizeof(P), alignof(P), std::is_pointer_v<P>), ...);
  std::vector<size_t> offsets;
  for (const HostArgument& argument : host.arguments) offsets.push_back(argument.offset);
  host.lane = [kernel, offsets](const char* segment) { kernel(read<P>(segment + offsets[I])...); };
  return host;
}

std::map<std::string, HostKernel>& table() {
  static std::map<std::string, HostKernel> kernels;
  return kernels;
}

struct Row {
  template <typename... P>
  Row(const char* name, void (*kernel)(P...)) {
    table()[name] = describe(kernel, std::index_sequence_for<P...>{});
  }
};

}  // namespace

const HostKernel* find_host_kernel(const std::string& name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : &found->second;
}

void run_host_kernel(const std::string& name, const HostKernel& kernel, const unsigned (&grid)[3],
                     unsigned threads, size_t lds_bytes, const char* segment) {
  static int launches = 0;
  gpu::set_order(launches++ % gpu::kOrders);
  const gpu_host::Dim3 blocks{static_cast<int>(grid[0]), static_cast<int>(grid[1]),
                              static_cast<int>(grid[2])};
  gpu_host::launch(name, blocks, static_cast<int>(threads), lds_bytes,
                   [&] { kernel.lane(segment); });
}

}  // namespace stand_in

// The table has a row for every entry point that the launchers know.
#undef GPU_DECLARE_ENTRY
#define GPU_DECLARE_ENTRY(max_threads, name, ...) \
  extern "C" void name(__VA_ARGS__);              \
  static const stand_in::Row row_of_##name(#name, name);
#include "entry_points.h"
#if __has_include("entry_points_dense.h")
#include "entry_points_dense.h"
#endif
#if __has_include("entry_points_router.h")
#include "entry_points_router.h"
#endif
