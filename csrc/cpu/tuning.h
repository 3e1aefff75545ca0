// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Selects the kernel that multiplies an expert's rows on the CPU; no other file decides this. The
// driver looks a kernel up for each expert of a call. Instruction sets are listed best first. One
// is available if the processor has it and the compiler could build all its kernels (CMakeLists.txt
// defines HYBRID_W4A16_CPU_<KERNEL> for each that it could).
#pragma once

#include <cstdint>
#include <limits>

#include "isa.h"
#include "kernels.h"

namespace moe_int4::cpu {

constexpr int32_t kAllRows = std::numeric_limits<int32_t>::max();
constexpr int32_t kAny = -1;

// The first rule that matches is used.
struct Rule {
  int32_t max_rows;    // of the expert
  int32_t group_size;  // kAny: all
  int32_t dtype;       // a DType, kAny: all
  const Kernel* kernel;
};

struct InstructionSet {
  static constexpr int32_t kMaxRules = 4;
  const char* name;
  bool (*available)();  // on this processor, under this operating system
  const Epilogue* epilogue;
  Rule rules[kMaxRules];  // the last rule is {kAllRows, kAny, kAny, ...}
  Rule bytes[2];          // the rules for 8-bit weights
  // Computes every row on its own, whatever their number; for row-invariant calls.
  const Kernel* row_invariant;
};

constexpr InstructionSet kInstructionSets[] = {
#if defined(HYBRID_W4A16_CPU_AMX_BF16) && defined(HYBRID_W4A16_CPU_AMX_INT8) && \
    defined(HYBRID_W4A16_CPU_AVX512_VNNI)
    // Sapphire Rapids, 2 threads, k = 2048, group size 128: GB/s of cold weights by rows:
    //   rows           1    2    3    8   16   24   32
    //   avx512_vnni   41   29   21
    //   amx_int8      32   31   30   26   16   10
    //   amx_bf16                16   16   14   10   10
    // Smaller groups give amx_int8 more results to scale, so amx_bf16 takes over earlier.
    {"amx_bf16",
     has_amx,
     &kAvx512Epilogue,
     {{1, kAny, kAny, &kAvx512Vnni},
      {16, 128, kAny, &kAmxInt8},
      {8, kAny, kAny, &kAmxInt8},
      {kAllRows, kAny, kAny, &kAmxBf16}},
     {{7, kAny, kAny, &kAvx512Vnni}, {kAllRows, kAny, kAny, &kAvx512}},
     &kAvx512Vnni},
#endif
#if defined(HYBRID_W4A16_CPU_AVX512_BF16) && defined(HYBRID_W4A16_CPU_AVX512_VNNI)
    // Zen 4, one thread: CPU time in ms for two experts of 2816 x 4096 (gate_up), by rows:
    //   rows                  8     9    12    16    24
    //   avx512_vnni         2.7   3.0   4.0   5.2   7.8
    //   avx512_bf16, bf16   3.2   3.4   4.1   5.2   7.0
    //   avx512_bf16, fp16   4.8   5.3   6.6   8.3  12.1
    {"avx512_bf16",
     has_avx512_bf16,
     &kAvx512Epilogue,
     {{12, kAny, kAny, &kAvx512Vnni},
      {64, kAny, static_cast<int32_t>(DType::kHalf), &kAvx512Vnni},
      {kAllRows, kAny, kAny, &kAvx512Bf16}},
     {{7, kAny, kAny, &kAvx512Vnni}, {kAllRows, kAny, kAny, &kAvx512}},
     &kAvx512Vnni},
#endif
#if defined(HYBRID_W4A16_CPU_AVX512_VNNI)
    {"avx512_vnni",
     has_avx512_vnni,
     &kAvx512Epilogue,
     {{7, kAny, kAny, &kAvx512Vnni}, {kAllRows, kAny, kAny, &kAvx512}},
     {{7, kAny, kAny, &kAvx512Vnni}, {kAllRows, kAny, kAny, &kAvx512}},
     &kAvx512Vnni},
#endif
#if defined(HYBRID_W4A16_CPU_AVX512)
    {"avx512",
     has_avx512,
     &kAvx512Epilogue,
     {{kAllRows, kAny, kAny, &kAvx512}},
     {{kAllRows, kAny, kAny, &kAvx512}},
     &kAvx512Few},
#endif
#if defined(HYBRID_W4A16_CPU_AVX2)
    {"avx2",
     has_avx2,
     &kAvx2Epilogue,
     {{kAllRows, kAny, kAny, &kAvx2}},
     {{kAllRows, kAny, kAny, &kAvx2}},
     &kAvx2Few},
#endif
    {"portable",
     always,
     &kPortableEpilogue,
     {{kAllRows, kAny, kAny, &kPortable}},
     {{kAllRows, kAny, kAny, &kPortable}},
     &kPortableFew},
};

inline bool fits(const Rule& rule, int32_t group_size, DType dtype) {
  return rule.kernel != nullptr && (rule.group_size == kAny || rule.group_size == group_size) &&
         (rule.dtype == kAny || rule.dtype == static_cast<int32_t>(dtype));
}

// The kernel for an expert that has `rows` rows.
inline const Kernel& kernel_for(const InstructionSet& set, int32_t rows, int32_t group_size,
                                DType dtype, int32_t bits = 4) {
  const Rule* rule = bits == 8 ? set.bytes : set.rules;
  while (rows > rule->max_rows || !fits(*rule, group_size, dtype)) ++rule;
  return *rule->kernel;
}

}  // namespace moe_int4::cpu
