// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace moe_int4::cpu {
namespace {

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kPortable};

const Kernels* best() {
  for (const Kernels* candidate : kAll) {
    if (candidate->available()) return candidate;
  }
  return &kPortable;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

std::string available_isas() {
  std::string names;
  for (const Kernels* candidate : kAll) {
    if (!candidate->available()) continue;
    if (!names.empty()) names += ' ';
    names += candidate->name;
  }
  return names;
}

std::string select_isa(const std::string& name) {
  if (name.empty()) {
    selected() = best();
    return kernels().name;
  }
  for (const Kernels* candidate : kAll) {
    if (name == candidate->name && candidate->available()) {
      selected() = candidate;
      return name;
    }
  }
  throw std::runtime_error("hybrid_w4a16_cpu_isa: isa: expected one of " + available_isas() +
                           " or an empty string, got '" + name + "'");
}

}  // namespace moe_int4::cpu
