// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The host branch of gpu_compat.cuh, which documents these primitives: it runs them over the lanes
// of scheduler.h. Misaligned 16-byte accesses and divergent collectives are errors.
#pragma once

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "scheduler.h"

#ifndef GPU_HOST_MMA
#error "define GPU_HOST_MMA as 0 or 1: whether kernels use matrix instructions in this build"
#endif

#define GPU_HAS_MMA GPU_HOST_MMA
#define GPU_DEVICE inline
// A separate section, so that tests can find all kernels of a program.
#define GPU_KERNEL(max_threads) __attribute__((section("gpu_kernels")))

namespace gpu {

constexpr bool kHasMma = GPU_HOST_MMA;
constexpr bool kHasAsyncCopy = GPU_HOST_MMA;

using Stream = void*;

inline int lane() { return gpu_host::thread_index() % kWaveSize; }
inline int wave() { return gpu_host::thread_index() / kWaveSize; }
inline int block_x() { return gpu_host::block_index().x; }
inline int block_y() { return gpu_host::block_index().y; }
inline int block_z() { return gpu_host::block_index().z; }
inline char* dynamic_lds() { return gpu_host::dynamic_lds(); }
inline int uniform(int v) { return v; }

inline int load_uniform(const int* p) { return *p; }
inline U32x4 load_16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) gpu_host::fail("misaligned 16-byte load");
  return *static_cast<const U32x4*>(p);
}
inline bool takes_load_16(const void* p, int64_t bytes) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) & 15) == 0;
}
inline U32x4 load_16_any(const uint16_t* p) {
  U32x4 r;
  for (int i = 0; i < 4; ++i) r.v[i] = p[2 * i] | static_cast<uint32_t>(p[2 * i + 1]) << 16;
  return r;
}
inline U32x4 load_weights(const void* p) { return load_16(p); }

// A copy poisons its destination when it starts, and arrives when the lane waits for it.
using LdsAddress = char*;
inline LdsAddress lds_address(void* p) { return static_cast<char*>(p); }
inline U32x4 lds_load_16(LdsAddress p) { return load_16(p); }
inline uint32_t lds_load_4(LdsAddress p) {
  if (reinterpret_cast<uintptr_t>(p) % 4 != 0) gpu_host::fail("misaligned 4-byte load");
  return *reinterpret_cast<const uint32_t*>(p);
}
inline void copy_16_async(LdsAddress lds, const void* p, bool real) {
  if (reinterpret_cast<uintptr_t>(lds) % 16 != 0) gpu_host::fail("misaligned 16-byte copy");
  const U32x4 value = real ? load_16(p) : U32x4{{0, 0, 0, 0}};
  *reinterpret_cast<U32x4*>(lds) = {{~0u, ~0u, ~0u, ~0u}};
  gpu_host::copies().started.push_back(
      {lds, {value.v[0], value.v[1], value.v[2], value.v[3]}, gpu_host::copies().groups});
}
inline void copy_weights_async(LdsAddress lds, const void* p, bool real) {
  copy_16_async(lds, p, real);
}
inline void commit_copies() { ++gpu_host::copies().groups; }
inline void finish_copies(int groups) {
  auto& started = gpu_host::copies().started;
  size_t done = 0;
  for (; done < started.size() && started[done].group < groups; ++done) {
    const gpu_host::Copy& copy = started[done];
    *reinterpret_cast<U32x4*>(copy.to) = {{copy.v[0], copy.v[1], copy.v[2], copy.v[3]}};
  }
  started.erase(started.begin(), started.begin() + done);
}
template <int N>
void wait_copies() {
  finish_copies(gpu_host::copies().groups - N);
}
inline void wait_all_copies() { finish_copies(gpu_host::copies().groups + 1); }

template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float rcp_fast(float x) { return 1.0f / x; }
inline float sqrt_of(float x) { return std::sqrt(x); }
inline float exp_of(float x) { return std::exp(x); }
inline float exp_fast(float x) { return std::exp(x); }

inline float to_float(Half, uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
inline float to_float(BFloat16, uint32_t bits) { return bit_cast<float>(bits << 16); }

template <typename DT>
float dot2(DT dtype, uint32_t a, uint32_t b, float c) {
  const float low = std::fma(to_float(dtype, a), to_float(dtype, b), c);
  return std::fma(to_float(dtype, a >> 16), to_float(dtype, b >> 16), low);
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
template <int B0, int B1, int B2, int B3>
uint32_t pick_bytes(uint32_t low, uint32_t high) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  constexpr int kBytes[] = {B0, B1, B2, B3};
  for (int i = 0; i < 4; ++i)
    picked |= static_cast<uint32_t>(all >> (8 * kBytes[i]) & 0xff) << (8 * i);
  return picked;
}
inline int first_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline uint16_t from_float(Half, float x) { return float_to_half(x); }
inline uint16_t from_float(BFloat16, float x) {  // to nearest, ties to even; callers pass no NaN
  const uint32_t bits = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
template <typename DT>
uint32_t add2(DT dtype, uint32_t a, uint32_t b) {
  const float low = to_float(dtype, a & 0xffff) + to_float(dtype, b & 0xffff);
  const float high = to_float(dtype, a >> 16) + to_float(dtype, b >> 16);
  return from_float(dtype, low) | static_cast<uint32_t>(from_float(dtype, high)) << 16;
}

// Reads the byte, so that AddressSanitizer reports a hint for an invalid address.
inline void prefetch_l2(const void* p) { (void)*static_cast<const volatile char*>(p); }
inline void allow_next_grid() {}
inline void wait_previous_grid() {}

// Blocks run one after the other.
inline int fetch_add(int* p, int v) {
  const int before = *p;
  *p += v;
  return before;
}
inline void release_writes() {}
inline void acquire_writes() {}

inline uint32_t wave_max(uint32_t v) {
  const gpu_host::Registers* all = gpu_host::wave_gather({{v}}, "wave_max");
  uint32_t largest = 0;
  for (int i = 0; i < kWaveSize; ++i) largest = all[i].v[0] > largest ? all[i].v[0] : largest;
  return largest;
}
inline uint32_t wave_ballot(bool p) {
  const gpu_host::Registers* all = gpu_host::wave_gather({{p}}, "wave_ballot");
  uint32_t bits = 0;
  for (int i = 0; i < kWaveSize; ++i) bits |= all[i].v[0] << i;
  return bits;
}
inline uint32_t lanes_equal(int v) {
  const auto* all = gpu_host::wave_gather({{bit_cast<uint32_t>(v)}}, "lanes_equal");
  uint32_t bits = 0;
  for (int i = 0; i < kWaveSize; ++i) bits |= uint32_t{all[i].v[0] == bit_cast<uint32_t>(v)} << i;
  return bits;
}
template <int Mask, typename T>
T shuffle_xor(T v) {
  static_assert(sizeof(T) == 4 && (Mask == 1 || Mask == 2 || Mask == 4 || Mask == 8 || Mask == 16));
  const auto* all = gpu_host::wave_gather({{bit_cast<uint32_t>(v)}}, "shuffle_xor");
  return bit_cast<T>(all[lane() ^ Mask].v[0]);
}
template <typename T>
T shuffle(T v, int from) {
  static_assert(sizeof(T) == 4);
  const auto* all = gpu_host::wave_gather({{bit_cast<uint32_t>(v)}}, "shuffle");
  if (from < 0 || from >= kWaveSize) gpu_host::fail("shuffle from no lane");
  return bit_cast<T>(all[from].v[0]);
}
template <typename T>
T from_lane(T v, int from) {
  const auto* all =
      gpu_host::wave_gather({{bit_cast<uint32_t>(v), static_cast<uint32_t>(from)}}, "from_lane");
  for (int i = 0; i < kWaveSize; ++i) {
    if (all[i].v[1] != static_cast<uint32_t>(from)) gpu_host::fail("from_lane: lanes disagree");
  }
  if (from < 0 || from >= kWaveSize) gpu_host::fail("from_lane: no such lane");
  return bit_cast<T>(all[from].v[0]);
}
template <typename T>
T shuffle_in_quad(T v, int from) {
  return shuffle(v, lane() / 4 * 4 + from % 4);
}
inline void wave_barrier() { gpu_host::wave_barrier(); }
inline void block_barrier() { gpu_host::block_barrier(); }

template <typename DT>
void mma_16x8x16(DT dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto* all = gpu_host::wave_gather({{a[0], a[1], a[2], a[3], b[0], b[1]}}, "mma_16x8x16");
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + (i / 2) * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k / 2 % 4, shift = k % 2 * 16;
      const uint32_t x = all[row % 8 * 4 + quad].v[row / 8 + k / 8 * 2] >> shift;
      const uint32_t y = all[column * 4 + quad].v[4 + k / 8] >> shift;
      d[i] = std::fma(to_float(dtype, x), to_float(dtype, y), d[i]);
    }
  }
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), const LaunchShape& shape, Stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument per parameter of the kernel");
  Dl_info info{};  // the program is linked with -rdynamic, so that kernels have names at run time
  const bool known = dladdr(reinterpret_cast<const void*>(kernel), &info) != 0;
  gpu_host::launch(known && info.dli_sname ? info.dli_sname : "(no symbol)",
                   {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, shape.lds_bytes,
                   [&] { kernel(static_cast<P>(args)...); });
}

inline std::string current_arch() { return "host"; }
inline int max_lds_bytes() { return gpu_host::max_lds_bytes(); }

inline void prepare_device(int, const std::string&) {}
inline void* allocate(size_t size) { return std::malloc(size); }
inline void release(void* p) { std::free(p); }
inline void copy_in(void* to, const void* from, size_t size) { std::memcpy(to, from, size); }
inline void copy_out(void* to, const void* from, size_t size) { std::memcpy(to, from, size); }

constexpr int kOrders = 5;
inline void set_order(int i) {
  constexpr gpu_host::Order orders[kOrders] = {{gpu_host::Schedule::kForward},
                                               {gpu_host::Schedule::kBackward},
                                               {gpu_host::Schedule::kRoundRobin},
                                               {gpu_host::Schedule::kRandom, 1},
                                               {gpu_host::Schedule::kRandom, 2}};
  gpu_host::set_order(orders[i]);
}
inline std::string take_launched() {
  static size_t taken = 0;
  std::string names;
  for (; taken < gpu_host::launched_kernels().size(); ++taken) {
    names += gpu_host::launched_kernels()[taken] + "\n";
  }
  return names;
}

}  // namespace gpu
