// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Few rows with AVX512_VNNI: 16-bit integer dot products (vpdpwssd). Activations become integers of
// 16 bits, per group in steps of max|a| / 32767, so that the error of a group is below 1e-4 of its
// norm: a twentieth of bf16's own rounding. Sums within a group are exact. Activations below 1e-33
// count as zero. Many rows are left to the fp32 kernels.
#include "few_rows_avx512.h"

namespace moe_int4::cpu {
namespace {

constexpr int32_t kManyRows = 8;  // from here on the fp32 kernels are faster

int64_t row_bytes(DType dtype, int32_t k) {
  const int64_t integers = round_up<int64_t>(k, kChunk) / kChunk * kPlaneBytes;
  const int64_t few = integers + 4 * padded_groups(k, 32);  // steps: as many as groups of 32 need
  const int64_t many = kAvx512.row_bytes(dtype, k);
  return many > few ? many : few;
}

int64_t scratch_bytes(int32_t k, int32_t group_size, int32_t m) {
  const int64_t few = few_scratch_bytes(k, group_size);
  const int64_t many = kAvx512.scratch_bytes(k, group_size, m);
  return many > few ? many : few;
}

// Integers of a group and their sum; returns the step.
float quantize(const float* values, int32_t count, int16_t* to, int32_t* sum) {
  int32_t bits = 0;  // of the largest magnitude; those of a NaN are larger still
  for (int32_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits_as<int32_t>(values[i]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = bits_as<float>(bits);
  const float inverse = largest > 1e-33f ? 32767.0f / largest : 0.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  int32_t total = 0;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t value = bits_as<int32_t>(values[i] * inverse + kRound) - bits_as<int32_t>(kRound);
    to[i] = static_cast<int16_t>(value);
    total += to[i];
  }
  *sum = total;
  return largest / 32767.0f;
}

void prepare_row(const Source& source, const uint16_t* a, char* row, float* sums) {
  const int32_t k = source.k;
  auto* steps = reinterpret_cast<float*>(row + round_up<int64_t>(k, kChunk) / kChunk * kPlaneBytes);
  for (int64_t g = 0; g < padded_groups(k, source.group_size); ++g) steps[g] = 0;
  for (int32_t g = 0; g < round_up(k / source.group_size, kSumsPadding); ++g) sums[g] = 0;
  for (int32_t begin = 0; begin < k; begin += kChunk, row += kPlaneBytes) {
    const int32_t count = k - begin < kChunk ? k - begin : kChunk;
    float values[kChunk];
    int16_t integers[kChunk] = {};
    to_float(source.dtype, a + begin, count, values);
    for (int32_t i = 0; i < count; i += source.group_size) {
      const int32_t group = (begin + i) / source.group_size;
      int32_t sum;
      steps[group] = quantize(values + i, source.group_size, integers + i, &sum);
      sums[group] = steps[group] * static_cast<float>(sum);
    }
    store_plane(reinterpret_cast<const uint16_t*>(integers), row);
  }
}

void prepare(const Source& source, const PreparedRows& rows) {
  if (source.m >= kManyRows) return kAvx512.prepare(source, rows);
  for (int32_t i = 0; i < source.count; ++i) {
    prepare_row(source, source.a[i], rows.data + (source.begin + i) * rows.stride,
                rows.sums + (source.begin + i) * rows.sums_stride);
  }
}

struct Int16Dot {
  using Sum = __m512i;
  static constexpr int32_t kPlanes = 1;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kSteps = true;
  template <int32_t I>
  static __m512i weights(__m512i words) {
    const __m512i shifted = I == 0 ? words : _mm512_srli_epi32(words, 4 * I);
    return _mm512_and_si512(shifted, _mm512_set1_epi32(0x000f000f));
  }
  static Sum add(Sum sum, __m512i a, __m512i w) { return _mm512_dpwssd_epi32(sum, a, w); }
  static __m512 scaled(Sum sum, __m512 scale, __m512 step, __m512 total) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, step), total);
  }
};

void multiply(const Tile& t) { t.m < kManyRows ? multiply_few<Int16Dot>(t) : kAvx512.multiply(t); }

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", row_bytes, as_many_rows, scratch_bytes,
                             prepare,       multiply,  activate,     store};

}  // namespace moe_int4::cpu
