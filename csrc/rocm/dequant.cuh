// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// From packed int4 to pairs of fp16 or bf16 without a conversion instruction: a nibble v put into
// the mantissa of a power of two, where its last place is worth 1, gives that power plus v,
// exactly. The offset and the zero point are taken out once per group through the sum of the
// activations. bf16 takes the nibble at the bottom of its 7 mantissa bits: offset 128, three shifts
// per word of eight. fp16 would have offset 1024 there and lose six more bits to cancellation: it
// takes it at the top of its 10 bits, offset 16, four shifts.
#pragma once

#include "gpu_compat.cuh"

namespace moe_int4 {

constexpr int kSymmetricZeroPoint = 8;

template <typename DT>
struct Format;

template <>
struct Format<gpu::Half> {
  static constexpr float kOffset = 16.0f;
  static constexpr uint32_t kOffsetPair = 0x4c004c00u;
  static constexpr uint32_t kOnes = 0x3c003c00u;  // the pair (1, 1)
  static constexpr int kNibbleShift = 6;
  static GPU_DEVICE float to_float(uint16_t bits) { return gpu::half_to_float(bits); }
  static GPU_DEVICE uint16_t from_float(float x) { return gpu::float_to_half(x); }
};

template <>
struct Format<gpu::BFloat16> {
  static constexpr float kOffset = 128.0f;
  static constexpr uint32_t kOffsetPair = 0x43004300u;
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr int kNibbleShift = 0;
  static GPU_DEVICE float to_float(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  static GPU_DEVICE uint16_t from_float(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    return static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
  }
};

// The pair (offset + v[2i], offset + v[2i+1]) of an ExLlama-shuffled word.
template <typename DT, int I>
GPU_DEVICE uint32_t unpack_pair(uint32_t word) {
  constexpr int kShift = Format<DT>::kNibbleShift - 4 * I;
  constexpr uint32_t kMask = 0x000f000fu << Format<DT>::kNibbleShift;
  const uint32_t moved = kShift >= 0 ? word << (kShift & 31) : word >> (-kShift & 31);
  return gpu::and_or(moved, kMask, Format<DT>::kOffsetPair);
}

}  // namespace moe_int4
