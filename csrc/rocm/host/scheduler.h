// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// A GPU block on the host: one fiber per lane, waves of 32 lanes that meet at cross-lane
// operations, real block barriers, and LDS as a heap block of exactly the size that the launch
// requested. Misuse that on hardware gives garbage or a hang is an error that names the kernel, the
// block and the lane:
//   - a cross-lane operation that not all 32 lanes of the wave reach,
//   - a barrier that not all lanes of the block reach,
//   - LDS bytes that one lane writes and another touches with no barrier between,
//   - a lane that ends before the copies to LDS that it started have arrived,
//   - a block that is not a whole number of waves, or requests more LDS than there is.
// LDS starts as 0xff bytes (NaN in fp16, bf16 and fp32), so that reads of unwritten LDS spoil the
// result. AddressSanitizer finds out-of-bounds accesses: build with -fsanitize=address,undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace gpu_host {

constexpr int kWaveSize = 32;

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

struct Registers {
  uint32_t v[6];  // as many as the widest cross-lane operation needs
};

// The order in which the lanes of a launch run between two points at which they must meet.
enum class Schedule {
  kForward,     // each wave as far as possible; first wave, lane and block first
  kBackward,    // the same from the last wave, lane and block
  kRoundRobin,  // switches waves at every cross-lane operation
  kRandom       // seeded random choice of the next wave, lane order and block
};

struct Order {
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 0;
};

// A 16-byte copy to LDS that has not arrived yet.
struct Copy {
  char* to;
  uint32_t v[4];
  int group;
};
struct Copies {
  std::vector<Copy> started;
  int groups = 0;  // committed
};

// The running lane's copies.
Copies& copies();

// Most LDS per block: 64 KiB, or 227 KiB in a build with matrix instructions (as on sm_90). The
// environment variable GPU_HOST_LDS_BYTES overrides it.
int max_lds_bytes();

// The running lane's position. Valid only inside a kernel.
int thread_index();
Dim3 block_index();
char* dynamic_lds();  // null if the launch requested none

// Waits for all lanes of the block, or of the wave, and orders their LDS accesses.
void block_barrier();
void wave_barrier();

// Waits for the 32 lanes of the wave without ordering memory; returns their values by lane. The
// array is valid until the lane's second next collective. `what` names the operation and must agree
// between lanes.
const Registers* wave_gather(const Registers& values, const char* what);

// Reports `message` with the current kernel, block and lane, and ends the process.
[[noreturn]] void fail(const std::string& message);

// Runs `lane` once per thread of every block, in the order set by set_order(). `threads` must be a
// multiple of 32. Appends `kernel` to launched_kernels().
void launch(const std::string& kernel, Dim3 grid, int threads, size_t lds_bytes,
            const std::function<void()>& lane);

void set_order(Order order);
const std::vector<std::string>& launched_kernels();

}  // namespace gpu_host
