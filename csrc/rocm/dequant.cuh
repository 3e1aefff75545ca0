// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Converts packed int4 to pairs of fp16 or bf16 without a conversion instruction. A nibble v is put
// into the mantissa of a power of two, at the bit that is worth 1, which gives exactly that power
// plus v. The offset and the zero point are subtracted once per group through the sum of the
// activations. bf16 puts the nibble at the bottom of its 7 mantissa bits: offset 128, three shifts
// per word of eight. There fp16 would have offset 1024 and lose six more bits to cancellation, so
// it puts the nibble at the top of its 10 bits: offset 16, four shifts.
#pragma once

#include "gpu_compat.cuh"

namespace moe_int4 {

constexpr int kSymmetricZeroPoint = 8;

template <bool Value>
struct Flag {
  static constexpr bool kValue = Value;
};

// Calls use(flag): whether load_activations<flag> reads rows of 16 bits from p on, `stride` apart,
// without a branch per load.
template <typename Use>
GPU_DEVICE void with_alignment(const void* p, int64_t stride, const Use& use) {
  if (gpu::takes_load_16(p, 2 * stride)) return use(Flag<true>{});
  use(Flag<false>{});
}

template <bool Aligned>
GPU_DEVICE gpu::U32x4 load_activations(const uint16_t* p) {
  if constexpr (Aligned) {
    return gpu::load_16(p);
  } else {
    return gpu::load_16_any(p);
  }
}

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

// Eight weights of 4, 8 or 16 bits as pairs in order of k. 4 bits: plus Format::kOffset, as above.
// 8 bits: minus the zero point of 128, exact in both formats. 16 bits: DT already.
template <typename DT, int Bits>
struct Unpacked {
  static constexpr float kOffset = Bits == 4 ? Format<DT>::kOffset : 0.0f;
  static constexpr int kSymmetricZero = Bits == 4 ? kSymmetricZeroPoint : 0;

  uint32_t pair[4];

  // Unit q (eight weights) of the 16 bytes that a lane loaded.
  GPU_DEVICE Unpacked(const gpu::U32x4& loaded, int q) {
    if constexpr (Bits == 4) {
      const uint32_t word = loaded.v[q];
      pair[0] = unpack_pair<DT, 0>(word);
      pair[1] = unpack_pair<DT, 1>(word);
      pair[2] = unpack_pair<DT, 2>(word);
      pair[3] = unpack_pair<DT, 3>(word);
    } else if constexpr (Bits == 8) {
      set_bytes<0>(loaded.v[2 * q]);
      set_bytes<2>(loaded.v[2 * q + 1]);
    } else {
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) pair[i] = loaded.v[i];
    }
  }

 private:
  // Pairs I and I + 1 of four bytes.
  template <int I>
  GPU_DEVICE void set_bytes(uint32_t word) {
    pair[I] = rounded(value<0>(word), value<1>(word));
    pair[I + 1] = rounded(value<2>(word), value<3>(word));
  }

  // A byte in the mantissa of 2^23 gives 2^23 plus the byte.
  template <int B>
  static GPU_DEVICE float value(uint32_t word) {
    const uint32_t bits = gpu::pick_bytes<B, 4, 4, 7>(word, 0x4b000000u);
    return __builtin_bit_cast(float, bits) - (8388608.0f + 128.0f);
  }

  static GPU_DEVICE uint32_t rounded(float low, float high) {
    if constexpr (Format<DT>::kNibbleShift == 0) {  // bf16: the low halves of the floats are zero
      return gpu::pick_bytes<2, 3, 6, 7>(__builtin_bit_cast(uint32_t, low),
                                         __builtin_bit_cast(uint32_t, high));
    } else {
      return Format<DT>::from_float(low) | static_cast<uint32_t>(Format<DT>::from_float(high))
                                               << 16;
    }
  }
};

}  // namespace moe_int4
