// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moe_int4::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*available)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The processor has AMX tiles with bf16 and bytes, the operating system saves them, and Linux lets
// this process use them (Intel SDM volume 1, chapter 18; Linux Documentation/arch/x86/xstate.rst).
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
#endif

// Best first.
constexpr Candidate kAll[] = {
#if defined(__x86_64__)
    {&kAmxBf16, has_amx},
    {&kAvx512Bf16, has_avx512_bf16},
    {&kAvx512Vnni, has_avx512_vnni},
    {&kAvx512, has_avx512},
    {&kAvx2, has_avx2},
#endif
    {&kPortable, always}};

// The candidates that this processor offers.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels;
    for (const Candidate& candidate : kAll) {
      if (candidate.available()) kernels.push_back(candidate.kernels);
    }
    return kernels;
  }();
  return found;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{available().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels(int32_t bits) {
  const Kernels* found = selected().load(std::memory_order_relaxed);
#if defined(__x86_64__)
  // The kernels that multiply in bf16 and with AMX are for weights of 4 bits.
  if (bits == 8 && (found == &kAmxBf16 || found == &kAvx512Bf16)) found = &kAvx512Vnni;
#endif
  return *found;
}

const Kernels& fp32_kernels() {
  const Kernels* found = selected().load(std::memory_order_relaxed);
#if defined(__x86_64__)
  if (found->dot == nullptr) found = &kAvx512;
#endif
  return *found;
}

std::string available_isas() {
  std::string names;
  for (const Kernels* candidate : available()) {
    if (!names.empty()) names += ' ';
    names += candidate->name;
  }
  return names;
}

std::string select_isa(const std::string& name) {
  for (const Kernels* candidate : available()) {
    if (name.empty() || name == candidate->name) {
      selected() = candidate;
      return candidate->name;
    }
  }
  throw std::runtime_error("hybrid_w4a16_cpu_isa: isa: expected one of " + available_isas() +
                           " or an empty string, got '" + name + "'");
}

}  // namespace moe_int4::cpu
