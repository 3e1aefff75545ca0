// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "row_invariance.h"
#include "tuning.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moe_int4::cpu {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// True if the processor has AMX tiles with bf16 and int8, the operating system saves them, and
// Linux lets this process use them (Intel SDM volume 1, chapter 18; Linux
// Documentation/arch/x86/xstate.rst).
bool has_amx() {
#if defined(__linux__)
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr uint32_t kTileInt8Bf16 = 1u << 24 | 1u << 25 | 1u << 22;  // leaf 7, edx
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 ||
      (edx & kTileInt8Bf16) != kTileInt8Bf16) {
    return false;
  }
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return (eax & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif  // x86-64

namespace {

const std::vector<const InstructionSet*>& available() {
  static const std::vector<const InstructionSet*> found = [] {
    std::vector<const InstructionSet*> sets;
    for (const InstructionSet& set : kInstructionSets) {
      if (set.available()) sets.push_back(&set);
    }
    return sets;
  }();
  return found;
}

std::atomic<const InstructionSet*>& selected() {
  static std::atomic<const InstructionSet*> set{available().front()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *selected().load(std::memory_order_relaxed); }

std::string available_isas() {
  std::string names;
  for (const InstructionSet* set : available()) {
    if (!names.empty()) names += ' ';
    names += set->name;
  }
  return names;
}

std::string select_isa(const std::string& name) {
  for (const InstructionSet* set : available()) {
    if (name.empty() || name == set->name) {
      selected() = set;
      return set->name;
    }
  }
  throw std::runtime_error("hybrid_w4a16_cpu_isa: isa: expected one of " + available_isas() +
                           " or an empty string, got '" + name + "'");
}

std::string kernels_by_rows(int32_t group_size, DType dtype) {
  const InstructionSet& set = instruction_set();
  if (row_invariance()) return std::string(set.row_invariant->name) + " 1";
  std::string lines;
  const Kernel* previous = nullptr;
  int64_t rows = 1;
  for (const Rule& rule : set.rules) {  // the kernel can only change after a rule's last row
    if (!fits(rule, group_size, dtype) || rows > kAllRows) continue;
    const Kernel& kernel = kernel_for(set, static_cast<int32_t>(rows), group_size, dtype);
    if (&kernel != previous) {
      if (previous != nullptr) lines += '\n';
      lines += std::string(kernel.name) + ' ' + std::to_string(rows);
    }
    previous = &kernel;
    rows = std::max(rows, int64_t{rule.max_rows} + 1);
  }
  return lines;
}

}  // namespace moe_int4::cpu
