// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// From packed int4 to pairs of fp16 or bf16 without a conversion instruction. With exponent 2^4 a
// 16-bit float is 16 + v when the nibble v sits in the topmost mantissa bits; that is exact, and
// the offset 16 + zero point is taken out once per group through the sum of the activations. (A
// larger offset, 1024 with the nibble at the bottom of an fp16, saves one shift per word but loses
// six bits to cancellation.)
#pragma once

#include "gpu_compat.cuh"

namespace moe_int4 {

constexpr float kNibbleOffset = 16.0f;
constexpr int kSymmetricZeroPoint = 8;

template <typename DT>
struct Format;

template <>
struct Format<gpu::Half> {
  static constexpr uint32_t kSixteen = 0x4c004c00u;  // the pair (16, 16)
  static constexpr uint32_t kOnes = 0x3c003c00u;     // the pair (1, 1)
  static constexpr int kNibbleShift = 6;             // of 10 mantissa bits
  static GPU_DEVICE float to_float(uint16_t bits) { return gpu::half_to_float(bits); }
  static GPU_DEVICE uint16_t from_float(float x) { return gpu::float_to_half(x); }
};

template <>
struct Format<gpu::BFloat16> {
  static constexpr uint32_t kSixteen = 0x41804180u;
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr int kNibbleShift = 3;  // of 7 mantissa bits
  static GPU_DEVICE float to_float(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  static GPU_DEVICE uint16_t from_float(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    return static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
  }
};

// The pair (16 + v[2i], 16 + v[2i+1]) of an ExLlama-shuffled word.
template <typename DT, int I>
GPU_DEVICE uint32_t unpack_pair(uint32_t word) {
  constexpr int kShift = Format<DT>::kNibbleShift - 4 * I;
  constexpr uint32_t kMask = 0x000f000fu << Format<DT>::kNibbleShift;
  const uint32_t moved = kShift >= 0 ? word << (kShift & 31) : word >> (-kShift & 31);
  return (moved & kMask) | Format<DT>::kSixteen;
}

}  // namespace moe_int4
