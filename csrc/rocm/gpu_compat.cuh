// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// What kernels see of a GPU: one-dimensional blocks of 32-lane waves, and the
// primitives of namespace gpu. Kernels include no vendor header.
// fork: begin overlay
// The only file that distinguishes HIP, CUDA and host builds: every platform
// provides these with the same meaning (the host branch implements exactly this
// list).
// fork: end
//
//  GPU_DEVICE               attribute of a function that kernels call (inline)
//  GPU_KERNEL(max_threads)  attribute of an entry point:
//                           `extern "C" GPU_KERNEL(256) void name(...)`
//  GPU_DECLARE(max_threads, name, args...)
//                           declares such an entry point, for launch(name, ...)
//  GPU_8_WAVES_PER_SIMD     attribute of an entry point: limits registers on
//                           AMD so that 8 waves fit a SIMD; registers beyond
//                           that spill
// fork: begin overlay
//  kHasMma                  constexpr bool: mma_16x8x16 is the fast way to
//                           multiply. On the host the macro GPU_HOST_MMA (0 or
//                           1) sets it, so that tests run both paths
//  GPU_HAS_MMA              kHasMma for the preprocessor: 0 or 1
//  kHasAsyncCopy            constexpr bool, equal to kHasMma: copies to LDS run
//                           in the background
// CUDA has neither with HYBRID_W4A16_AMD_PATH: a test build that runs AMD's
// code path.
// fork: end
//
//  per lane, no cooperation:
//  int lane()               0..31
//  int wave()               wave of the block, 0..; wave-uniform
//  int block_x/_y/_z()      index of the block in the grid
//  char* dynamic_lds()      the block's LDS, LaunchShape::lds_bytes long,
//                           16-byte aligned, uninitialised
//  int uniform(int v)       v, which must be equal in all lanes; may move it to
//                           a scalar register
//  void settle(T*& p)       hint: compute p here rather than where it is used
//  void keep_arguments(args...)
//                           hint: read all of the kernel's arguments here, at
//                           once, and keep them, rather than reading each where
//                           it is used
//  void order_requests()    hint: request loads written before it before those
//                           written after it
//  void arrived(T& v)       hint: do not use v, which was loaded, before this
//  int load_uniform(p)      the int at p in global memory; p is equal in all
//                           lanes, and nothing in the grid writes *p
//  U32x4 load_weights(p)    16 bytes from global memory, 16-byte aligned, read
//                           once (non-temporal)
//  U32x4 load_16(p)         16 bytes from global memory or LDS, 16-byte
//                           aligned, cached
//  U32x4 load_16_any(p)     the same, 2-byte aligned
//  bool takes_load_16(p, bytes)
//                           whether load_16 is the faster of the two and
//                           reads rows from p on, bytes apart
//  float half_to_float(uint16_t), uint16_t float_to_half(float)
//                           fp16 bits, round to nearest even
//  float exp2_fast(float), rcp_fast(float), sqrt_of(float)
//                           2^x, 1/x and the square root, error below 2^-20
// fork: begin token
//  float exp_of(float), exp_fast(float)
//                           e^x, to about one rounding and with the hardware's
//                           2^x. On CUDA expf and __expf
// fork: end
//  float dot2(Half, uint32_t a, uint32_t b, float c)
//                           c + a.lo*b.lo + a.hi*b.hi, fp32 sum
//  float dot2(BFloat16, uint32_t a, uint32_t b, float c)
//                           the same for bf16 pairs
//  uint32_t and_or(x, mask, bits)
//                           (x & mask) | bits
//  uint32_t pick_bytes<B0, B1, B2, B3>(low, high)
//                           four of eight bytes; low has 0..3
//  int first_bit(uint32_t)  index of the lowest set bit; the argument is not 0
// fork: begin overlay
//  int count_bits(uint32_t) number of set bits. Only where kHasMma.
//  uint32_t add2(DT, uint32_t a, uint32_t b)
//                           a.lo+b.lo, a.hi+b.hi, round to nearest. Only where
//                           kHasMma.
//  void prefetch_l2(p)      hint: the 128 bytes around global address p will be
//                           read. No effect on results; p must be readable
// fork: end
//  void allow_next_grid()   lets the next grid of the stream start
//  void wait_previous_grid()
//                           returns when everything that the previous grid
//                           wrote is visible
//  AMD has no such overlap of grids: these two do nothing there.
// fork: begin token
//  int fetch_add(int* p, int v)
//                           adds v to *p in global memory, atomically; returns
//                           the value before
//  void release_writes()    what the lane wrote to global memory is visible to
//                           blocks that see its later fetch_add, or that of a
//                           lane behind a barrier, and call acquire_writes
//  void acquire_writes()    see release_writes
// fork: end
// fork: begin overlay
//  On CUDA they work for launches with LaunchShape::overlap.
//
//  per lane, from memory to LDS:
//  LdsAddress lds_address(p)
//                           the address of p, in LDS, for the loads below
//  U32x4 lds_load_16(LdsAddress)
//                           16 bytes, 16-byte aligned
//  uint32_t lds_load_4(LdsAddress)
//                           4 bytes, 4-byte aligned. Only where kHasMma.
//  void copy_weights_async(LdsAddress, p, bool real)
//  void copy_16_async(LdsAddress, p, bool real)
//                           starts copying 16 bytes from global memory to LDS,
//                           both 16-byte aligned. If !real they store zeros and
//                           do not read p. The first is for data that is read
//                           once.
//  void commit_copies()     makes a group of the copies that the lane started
//                           since the previous call
//  void wait_copies<N>()    waits for all but the lane's last N groups; other
//                           lanes see the data after a barrier
//  void wait_all_copies()   waits for all copies, whether in a group or not
// fork: end
//
//  wave-collective (all 32 lanes of the wave must call it; none has left the
//  kernel):
//  uint32_t wave_ballot(bool)
//                           bit i: lane i's argument
// fork: begin token
//  uint32_t wave_max(uint32_t)
//                           the largest argument of all lanes
// fork: end
//  T shuffle_xor<Mask>(T v) value of lane() ^ Mask, Mask 1, 2, 4, 8, 16; T int
//                           or float
//  T shuffle(T v, int from) value of lane `from`
//  T from_lane(T v, int from)
//                           the same for a `from` that is equal in all lanes;
//                           the result may be in a scalar register
//  T shuffle_in_quad(T v, int from)
//                           value of lane lane() / 4 * 4 + from % 4
//  void wave_barrier()      LDS writes of the wave's lanes before it are
//                           visible to all of them after it; reads before it
//                           complete first
// fork: begin overlay
//  uint32_t lanes_equal(int v)
//                           mask of the lanes with the caller's v. Only where
//                           kHasMma.
//  void mma_16x8x16(DT, float (&d)[4], const uint32_t (&a)[4],
//                   const uint32_t (&b)[2])
//      d += A B for A [16, 16], B [16, 8] in DT, d in fp32. With g = lane / 4,
//      t = lane % 4, the low half first:
//      a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]
//      a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
//      b[0] = B[2t, 2t+1][g]      b[1] = B[2t+8, 2t+9][g]
//      d[0], d[1] = D[g][2t, 2t+1]    d[2], d[3] = D[g+8][2t, 2t+1]
//      Only where kHasMma.
// fork: end
//
//  block-collective (all lanes of the block must call it; none has left the
//  kernel):
//  void block_barrier()     wave_barrier for the whole block
//
//  code that starts kernels (plain C++, not device code):
//  Stream                   opaque stream handle
//  void launch(kernel, const LaunchShape&, Stream, args...)
//                           runs kernel(args...) on the stream. Throws
//                           std::runtime_error with the vendor's message
//  int current_device()     index of the current device
//  int max_lds_bytes()      most LDS per block on the current device
// fork: begin overlay
//  std::string current_arch()
//                           the current device, such as "sm_90" or "host" (not
//                           on HIP)
//  On the host launch() returns when the kernel has ended, and LDS is poisoned.
//
//  for the test runner in host/:
//  void prepare_device(int, arch)
//                           loads kernels on a device and makes it current;
//                           `arch` is its architecture, or empty if the kernels
//                           are loaded already
//  void* allocate(size_t), void release(void*)
//                           memory for kernels, of exactly that size
//  void copy_in(void* to, const void* from, size_t), copy_out(...)
//                           copy into and out of it; they wait for launched
//                           kernels
//  kOrders, void set_order(int)
//                           number of orders in which lanes can run; selects
//                           one
//  std::string take_launched()
//                           names of the kernels launched since the last call,
//                           one per line, where known
// fork: end
#pragma once

#include <cstdint>

namespace gpu {

constexpr int kWaveSize = 32;

// fork: begin overlay
#if defined(HYBRID_W4A16_AMD_PATH)
constexpr bool kAmdPath = true;
#define GPU_CUDA_HAS_MMA 0
#else
constexpr bool kAmdPath = false;
#define GPU_CUDA_HAS_MMA 1
#endif

// fork: end
struct Half {};  // tags: values are plain bits, in uint16_t or (pairs) uint32_t
struct BFloat16 {};

struct alignas(16) U32x4 {
  uint32_t v[4];
};

struct LaunchShape {
  int grid_x, grid_y, grid_z;
  int threads;    // a multiple of kWaveSize
  int lds_bytes;  // dynamic LDS per block
  bool overlap;   // may start before the previous grid ends: the kernel calls wait_previous_grid
};

}  // namespace gpu

// GPU_UNROLL: before a loop that indexes registers. GPU_ROLLED: before a loop whose code must stay
// short. GPU_ANYWHERE: attribute of constexpr functions that kernels and host code share.
#if defined(__CUDACC__) || defined(__HIP__)
#define GPU_UNROLL _Pragma("unroll")
#define GPU_ROLLED _Pragma("unroll 1")
#else
#define GPU_UNROLL
#define GPU_ROLLED
#endif
#if defined(__CUDACC__)
#define GPU_ANYWHERE __host__ __device__
#else
#define GPU_ANYWHERE
#endif
#if !defined(__HIP__)
#define GPU_8_WAVES_PER_SIMD
#endif

// The second macro expands a name that is itself a macro.
#define GPU_DECLARE(max_threads, name, ...) GPU_DECLARE_ENTRY(max_threads, name, __VA_ARGS__)
#define GPU_DECLARE_ENTRY(max_threads, name, ...) \
  extern "C" GPU_KERNEL(max_threads) void name(__VA_ARGS__);

#if defined(__CUDACC__)
// ---------------------------------------------------------------------------------------- CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GPU_DEVICE __device__ __forceinline__
#define GPU_KERNEL(max_threads) __global__ __launch_bounds__(max_threads)
#define GPU_HAS_MMA GPU_CUDA_HAS_MMA

namespace gpu {

constexpr bool kHasMma = !kAmdPath;
constexpr bool kHasAsyncCopy = !kAmdPath;

GPU_DEVICE int lane() { return threadIdx.x & (kWaveSize - 1); }
GPU_DEVICE int wave() { return threadIdx.x / kWaveSize; }
GPU_DEVICE int block_x() { return blockIdx.x; }
GPU_DEVICE int block_y() { return blockIdx.y; }
GPU_DEVICE int block_z() { return blockIdx.z; }
GPU_DEVICE char* dynamic_lds() {
  extern __shared__ __align__(16) char lds[];
  return lds;
}
GPU_DEVICE int uniform(int v) { return v; }
template <typename T>
GPU_DEVICE void settle(T*& p) {
  asm volatile("" : "+l"(p));
}
template <typename... Args>
GPU_DEVICE void keep_arguments(const Args&...) {}  // arguments are in cached constant memory
GPU_DEVICE void order_requests() {}                // waits are per register here
template <typename T>
GPU_DEVICE void arrived(T&) {}

GPU_DEVICE int load_uniform(const int* p) { return *p; }
GPU_DEVICE U32x4 load_weights(const void* p) {
  U32x4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "l"(p));
  return r;
}
GPU_DEVICE U32x4 load_16(const void* p) {
  const uint4 r = *static_cast<const uint4*>(p);
  return {{r.x, r.y, r.z, r.w}};
}

// load_16_any branches on the address.
GPU_DEVICE bool takes_load_16(const void* p, int64_t bytes) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) & 15) == 0;
}
GPU_DEVICE U32x4 load_16_any(const uint16_t* p) {
  if ((reinterpret_cast<uintptr_t>(p) & 15) == 0) return load_16(p);
  U32x4 r;
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) r.v[i] = p[2 * i] | static_cast<uint32_t>(p[2 * i + 1]) << 16;
  return r;
}

using LdsAddress = uint32_t;
GPU_DEVICE LdsAddress lds_address(void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
GPU_DEVICE U32x4 lds_load_16(LdsAddress p) {
  U32x4 r;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "r"(p)
               : "memory");
  return r;
}
GPU_DEVICE uint32_t lds_load_4(LdsAddress p) {
  uint32_t r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(p) : "memory");
  return r;
}
GPU_DEVICE void copy_weights_async(LdsAddress lds, const void* p, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(lds), "l"(p),
               "r"(real ? 16 : 0)
               : "memory");
}
GPU_DEVICE void copy_16_async(LdsAddress lds, const void* p, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(lds), "l"(p),
               "r"(real ? 16 : 0)
               : "memory");
}
GPU_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
GPU_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
GPU_DEVICE void wait_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

GPU_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
GPU_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
GPU_DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
GPU_DEVICE float sqrt_of(float x) { return __fsqrt_rn(x); }
// fork: begin token
GPU_DEVICE float exp_of(float x) { return expf(x); }
GPU_DEVICE float exp_fast(float x) { return __expf(x); }
// fork: end
GPU_DEVICE float rcp_fast(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
GPU_DEVICE float dot2(Half, uint32_t a, uint32_t b, float c) {
  const float2 x = __half22float2(reinterpret_cast<const __half2&>(a));
  const float2 y = __half22float2(reinterpret_cast<const __half2&>(b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, c));
}
GPU_DEVICE float dot2(BFloat16, uint32_t a, uint32_t b, float c) {
  const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), c + low);
}
GPU_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t r;  // asm: with constants the compiler would emit two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
  return r;
}
GPU_DEVICE uint32_t add2(Half, uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
GPU_DEVICE uint32_t add2(BFloat16, uint32_t a, uint32_t b) {
  uint32_t r;  // sm_80 has no addition of bf16 pairs
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return r;
}
template <int B0, int B1, int B2, int B3>
GPU_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, B0 | B1 << 4 | B2 << 8 | B3 << 12);
}
GPU_DEVICE int first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
GPU_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

GPU_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
GPU_DEVICE void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
GPU_DEVICE void wait_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// fork: begin token
GPU_DEVICE int fetch_add(int* p, int v) { return atomicAdd(p, v); }
GPU_DEVICE void release_writes() { __threadfence(); }
GPU_DEVICE void acquire_writes() { __threadfence(); }

GPU_DEVICE uint32_t wave_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }
// fork: end
GPU_DEVICE uint32_t wave_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
GPU_DEVICE uint32_t lanes_equal(int v) { return __match_any_sync(0xffffffffu, v); }
template <int Mask, typename T>
GPU_DEVICE T shuffle_xor(T v) {
  return __shfl_xor_sync(0xffffffffu, v, Mask);
}
template <typename T>
GPU_DEVICE T shuffle(T v, int from) {
  return __shfl_sync(0xffffffffu, v, from);
}
template <typename T>
GPU_DEVICE T from_lane(T v, int from) {
  return shuffle(v, from);
}
template <typename T>
GPU_DEVICE T shuffle_in_quad(T v, int from) {
  return __shfl_sync(0xffffffffu, v, from, 4);
}
GPU_DEVICE void wave_barrier() { __syncwarp(); }
GPU_DEVICE void block_barrier() { __syncthreads(); }

GPU_DEVICE void mma_16x8x16(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GPU_DEVICE void mma_16x8x16(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace gpu

#elif defined(__HIP__)
// fork: begin overlay
#define GPU_HAS_MMA 0
// fork: end

// No HIP header: plain clang compiles kernels with -nogpuinc -nogpulib --offload-device-only.
#define GPU_DEVICE __attribute__((device)) inline __attribute__((always_inline))
#define GPU_KERNEL(max_threads) \
  __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(32, max_threads)))
#define GPU_8_WAVES_PER_SIMD __attribute__((amdgpu_num_vgpr(128)))

namespace gpu {

// fork: begin overlay
constexpr bool kHasMma = false;
constexpr bool kHasAsyncCopy = false;

// fork: end
GPU_DEVICE int lane() { return __builtin_amdgcn_workitem_id_x() & (kWaveSize - 1); }
GPU_DEVICE int uniform(int v) { return __builtin_amdgcn_readfirstlane(v); }
GPU_DEVICE int wave() { return uniform(__builtin_amdgcn_workitem_id_x() / kWaveSize); }
GPU_DEVICE int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
GPU_DEVICE int block_y() { return __builtin_amdgcn_workgroup_id_y(); }
GPU_DEVICE int block_z() { return __builtin_amdgcn_workgroup_id_z(); }
extern __attribute__((shared)) __attribute__((aligned(16))) char lds[];
GPU_DEVICE char* dynamic_lds() { return lds; }

template <typename T>
GPU_DEVICE void settle(T*&) {}
template <typename T>
GPU_DEVICE void keep_argument(T v) {
  asm volatile("" ::"s"(v));
}
template <typename... Args>
GPU_DEVICE void keep_arguments(Args... args) {
  __builtin_amdgcn_sched_barrier(0);  // request all loads before waiting for the first
  (..., keep_argument(args));
}
GPU_DEVICE void order_requests() { __builtin_amdgcn_sched_barrier(0); }
template <typename T>
GPU_DEVICE void arrived(T& v) {
  asm volatile("" : "+v"(v));
}

using Vec4 = uint32_t __attribute__((ext_vector_type(4)));
using Half2 = _Float16 __attribute__((ext_vector_type(2)));
using BFloat2 = __bf16 __attribute__((ext_vector_type(2)));

GPU_DEVICE int load_uniform(const int* p) {  // the constant address space has scalar loads
  return *(const __attribute__((address_space(4))) int*)p;
}
GPU_DEVICE U32x4 load_weights(const void* p) {
  return __builtin_bit_cast(U32x4, __builtin_nontemporal_load(static_cast<const Vec4*>(p)));
}
GPU_DEVICE U32x4 load_16(const void* p) {
  return __builtin_bit_cast(U32x4, *static_cast<const Vec4*>(p));
}
GPU_DEVICE constexpr bool takes_load_16(const void*, int64_t) { return false; }
GPU_DEVICE U32x4 load_16_any(const uint16_t* p) {  // one instruction: unaligned access is enabled
  using Unaligned = Vec4 __attribute__((aligned(2)));
  return __builtin_bit_cast(U32x4, *reinterpret_cast<const Unaligned*>(p));
}

using LdsAddress = char*;
GPU_DEVICE LdsAddress lds_address(void* p) { return static_cast<char*>(p); }
GPU_DEVICE U32x4 lds_load_16(LdsAddress p) { return *reinterpret_cast<const U32x4*>(p); }
GPU_DEVICE void copy_weights_async(LdsAddress lds, const void* p, bool real) {
  *reinterpret_cast<U32x4*>(lds) = real ? load_weights(p) : U32x4{{0, 0, 0, 0}};
}
GPU_DEVICE void copy_16_async(LdsAddress lds, const void* p, bool real) {
  *reinterpret_cast<U32x4*>(lds) = real ? load_16(p) : U32x4{{0, 0, 0, 0}};
}
GPU_DEVICE void commit_copies() {}
template <int N>
GPU_DEVICE void wait_copies() {}
GPU_DEVICE void wait_all_copies() {}

GPU_DEVICE float half_to_float(uint16_t bits) {
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}
GPU_DEVICE uint16_t float_to_half(float x) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}
GPU_DEVICE float exp2_fast(float x) { return __builtin_amdgcn_exp2f(x); }
GPU_DEVICE float rcp_fast(float x) { return __builtin_amdgcn_rcpf(x); }
GPU_DEVICE float sqrt_of(float x) { return __builtin_amdgcn_sqrtf(x); }
// fork: begin token
GPU_DEVICE float exp_of(float x) { return __builtin_elementwise_exp(x); }
GPU_DEVICE float exp_fast(float x) { return exp2_fast(1.44269504f * x); }
// fork: end
GPU_DEVICE float dot2(Half, uint32_t a, uint32_t b, float c) {
  return __builtin_amdgcn_fdot2(__builtin_bit_cast(Half2, a), __builtin_bit_cast(Half2, b), c,
                                false);
}
GPU_DEVICE float dot2(BFloat16, uint32_t a, uint32_t b, float c) {
  return __builtin_amdgcn_fdot2_f32_bf16(__builtin_bit_cast(BFloat2, a),
                                         __builtin_bit_cast(BFloat2, b), c, false);
}
GPU_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
template <int B0, int B1, int B2, int B3>
GPU_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high) {
  return __builtin_amdgcn_perm(high, low, B0 | B1 << 8 | B2 << 16 | B3 << 24);
}
GPU_DEVICE int first_bit(uint32_t bits) { return __builtin_ctz(bits); }

GPU_DEVICE void prefetch_l2(const void*) {}
GPU_DEVICE void allow_next_grid() {}
GPU_DEVICE void wait_previous_grid() {}

GPU_DEVICE uint32_t wave_ballot(bool p) { return __builtin_amdgcn_ballot_w32(p); }
template <typename T>
GPU_DEVICE T shuffle(T v, int from) {
  return __builtin_bit_cast(T, __builtin_amdgcn_ds_bpermute(4 * from, __builtin_bit_cast(int, v)));
}
template <typename T>
GPU_DEVICE T from_lane(T v, int from) {
  return __builtin_bit_cast(T, __builtin_amdgcn_readlane(__builtin_bit_cast(int, v), from));
}
template <typename T>
GPU_DEVICE T shuffle_in_quad(T v, int from) {
  return shuffle(v, lane() / 4 * 4 + from % 4);
}
template <int Mask, typename T>
GPU_DEVICE T shuffle_xor(T v) {
  const int bits = __builtin_bit_cast(int, v);
  if constexpr (Mask < 16) {  // row_xmask: a VALU operand modifier, no LDS traffic
    return __builtin_bit_cast(T,
                              __builtin_amdgcn_update_dpp(0, bits, 0x160 + Mask, 0xf, 0xf, true));
  } else {  // swizzle, bit-mask mode: xor in bits 10..14, and-mask in bits 0..4
    return __builtin_bit_cast(T, __builtin_amdgcn_ds_swizzle(bits, (Mask << 10) | 0x1f));
  }
}
// fork: begin token
GPU_DEVICE int fetch_add(int* p, int v) {
  return __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
GPU_DEVICE void release_writes() { __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent"); }
GPU_DEVICE void acquire_writes() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent"); }
template <int Mask>
GPU_DEVICE uint32_t larger_of_lanes(uint32_t v) {
  const uint32_t other = static_cast<uint32_t>(shuffle_xor<Mask>(static_cast<int>(v)));
  return v > other ? v : other;
}
GPU_DEVICE uint32_t wave_max(uint32_t v) {
  v = larger_of_lanes<1>(v);
  v = larger_of_lanes<2>(v);
  v = larger_of_lanes<4>(v);
  v = larger_of_lanes<8>(v);
  return uniform(static_cast<int>(larger_of_lanes<16>(v)));
}
// fork: end
GPU_DEVICE void wave_barrier() {  // LDS is in order within a wave; this stops only the compiler
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront", "local");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront", "local");
}
GPU_DEVICE void block_barrier() {  // LDS only: a full fence would invalidate the vector cache
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
}

}  // namespace gpu

// fork: begin ops
#elif defined(HYBRID_W4A16_CUDA) || defined(HYBRID_W4A16_HIP)
// ------------------------------------------------------------- plain C++ that starts kernels
// fork: end
// fork: begin overlay
// CUDA declares an entry point as an ordinary function, whose address is the vendor's handle.
// fork: end
// fork: begin ops
#include <stdexcept>
#include <string>

#if defined(HYBRID_W4A16_CUDA)
#define GPU_KERNEL(max_threads)
#include <cuda_runtime_api.h>
#define GPU_HAS_MMA GPU_CUDA_HAS_MMA
#else
// fork: end
// fork: begin overlay
#define GPU_HAS_MMA 0
// fork: end
// fork: begin ops
// An entry point is an object that holds its name and, per device, the runtime's handle.
#undef GPU_DECLARE_ENTRY
#define GPU_DECLARE_ENTRY(max_threads, name, ...) inline gpu::Kernel<void(__VA_ARGS__)> name{#name};
#include "hip_runtime.h"
#endif

namespace gpu {

using Stream = void*;

#if defined(HYBRID_W4A16_CUDA)
constexpr bool kHasMma = !kAmdPath;
constexpr bool kHasAsyncCopy = !kAmdPath;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

template <typename... P>
void start_kernel(void (*entry)(P...), const LaunchShape& shape, Stream stream, void** args) {
  const auto kernel = reinterpret_cast<const void*>(entry);
  constexpr int kAlwaysAllowed = 48 * 1024;  // more must be requested for each kernel
  if (shape.lds_bytes > kAlwaysAllowed) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.lds_bytes),
        "shared memory of a kernel");
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.lds_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = shape.overlap ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, args), "kernel launch");
}

inline void prepare_device(int device, const std::string&) {
  check(cudaSetDevice(device), "cudaSetDevice");
}
inline void* allocate(size_t size) {
  void* p = nullptr;
  check(cudaMalloc(&p, size), "cudaMalloc");
  return p;
}
inline void release(void* p) { check(cudaFree(p), "cudaFree"); }
inline void copy_in(void* to, const void* from, size_t size) {
  check(cudaMemcpy(to, from, size, cudaMemcpyHostToDevice), "cudaMemcpy");
}
inline void copy_out(void* to, const void* from, size_t size) {
  check(cudaMemcpy(to, from, size, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int max_lds_bytes() {
  thread_local int asked = -1, bytes = 0;
  const int device = current_device();
  if (device != asked) {
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    asked = device;
  }
  return bytes;
}

inline std::string current_arch() {
  const int device = current_device();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  return "sm_" + std::to_string(major * 10 + minor);
}
#else
// fork: end
// fork: begin overlay
constexpr bool kHasMma = false;
constexpr bool kHasAsyncCopy = false;

// fork: end
// fork: begin ops
// One object per entry point; its type holds the signature.
template <typename Signature>
struct Kernel : Entry {
  using Entry::Entry;
};

inline int max_lds_bytes() { return kLdsBytesPerBlock; }
// fork: end
// fork: begin overlay

inline void prepare_device(int device, const std::string& arch) {
  if (!arch.empty()) load_kernels(device, arch, nullptr);
  set_device(device);
}
// fork: end
// fork: begin ops
#endif

// fork: end
// fork: begin overlay
constexpr int kOrders = 2;  // repeats the hardware's own order, which may vary
inline void set_order(int) {}
inline std::string take_launched() { return {}; }

// fork: end
// fork: begin ops
#if defined(HYBRID_W4A16_CUDA)
template <typename... P>
using KernelRef = void (*)(P...);
#else
template <typename... P>
using KernelRef = const Kernel<void(P...)>&;

inline void start_kernel(const Entry& kernel, const LaunchShape& shape, Stream stream,
                         void** args) {
  start_kernel(kernel, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, shape.lds_bytes,
               stream, args);
}
#endif

template <typename... P, typename... A>
void launch(KernelRef<P...> kernel, const LaunchShape& shape, Stream stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument per parameter of the kernel");
  const auto start = [&](P... values) {
    void* pointers[] = {&values...};
    start_kernel(kernel, shape, stream, pointers);
  };
  start(static_cast<P>(args)...);
}

}  // namespace gpu

// fork: end
// fork: begin overlay
#else
// ---------------------------------------------------------------------------------------- host
#include "host/gpu_host.h"

namespace gpu {
template <typename T>
inline void settle(T*&) {}
template <typename... Args>
inline void keep_arguments(const Args&...) {}
inline void order_requests() {}
template <typename T>
inline void arrived(T&) {}
}  // namespace gpu
// fork: end
#endif
