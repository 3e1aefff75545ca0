// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "host_kernels.h"

#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "entry_points.h"

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

template <typename... P>
HostKernel describe(void (*kernel)(P...)) {
  return describe(kernel, std::index_sequence_for<P...>{});
}

#define STAND_IN_ROW(OP, NAME, DT, G, ZNAME, ZP, T) \
  STAND_IN_PAIR(MOE_INT4_NAME(OP, NAME, G, ZNAME, T))
#define STAND_IN_PAIR(name) STAND_IN_PAIR_OF(name)
#define STAND_IN_PAIR_OF(name) {#name, describe(name)},

const std::map<std::string, HostKernel>& table() {
  static const std::map<std::string, HostKernel> kernels = {
      MOE_INT4_FOR_ALL(STAND_IN_ROW, gate_up)  //
      MOE_INT4_FOR_ALL(STAND_IN_ROW, down)     //
      MOE_INT4_FOR_ALL(STAND_IN_ROW, gemm)};
  return kernels;
}

}  // namespace

const HostKernel* find_host_kernel(const std::string& name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : &found->second;
}

void run_host_kernel(const std::string& name, const HostKernel& kernel, const unsigned (&grid)[3],
                     unsigned threads, size_t lds_bytes, const char* segment) {
  static int launches = 0;
  gpu::set_order(launches++ % gpu::kOrders);
  gpu_host::launch(
      name, {static_cast<int>(grid[0]), static_cast<int>(grid[1]), static_cast<int>(grid[2])},
      static_cast<int>(threads), lds_bytes, [&] { kernel.lane(segment); });
}

}  // namespace stand_in
