// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// A GPU block on the host: one fiber per lane, waves of 32 lanes that meet at cross-lane
// operations, real block barriers, LDS as a heap block of exactly the size that the launch asked
// for. Every misuse that hardware would
// answer with garbage or a hang is an error here, which names the kernel, the block and the lane:
//   - a cross-lane operation that not all 32 lanes of the wave reach,
//   - a barrier that not all lanes of the block reach,
//   - LDS bytes that one lane writes and another touches with no barrier between,
//   - a lane that ends while copies to LDS that it started are on their way,
//   - a block that is no whole number of waves, or wants more LDS than there is.
// LDS starts as 0xff bytes (NaN in fp16, bf16 and fp32), so reads of unwritten LDS spoil the
// result. Out-of-bounds accesses are AddressSanitizer's to find: build with
// -fsanitize=address,undefined.
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
  uint32_t v[6];  // as many as the widest cross-lane operation takes
};

// The order in which the lanes of a launch run between two points where they must meet.
enum class Schedule {
  kForward,     // each wave as far as it can go, first wave, first lane and first block first
  kBackward,    // the same from the last wave, lane and block
  kRoundRobin,  // waves change at every cross-lane operation
  kRandom       // a seeded draw of the next wave, lane order and block
};

struct Order {
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 0;
};

// A copy of 16 bytes to LDS that has not arrived.
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

// Most LDS that a block may have: 64 KiB, or 227 KiB in a build with matrix instructions, as on
// sm_90, or what the environment variable GPU_HOST_LDS_BYTES says.
int max_lds_bytes();

// Where the running lane is. Valid inside a kernel only.
int thread_index();
Dim3 block_index();
char* dynamic_lds();  // null where the launch asked for none

// Meets all lanes of the block, or of the wave, and orders their LDS accesses.
void block_barrier();
void wave_barrier();

// Meets the 32 lanes of the wave, but orders no memory; returns what they brought, by lane.
// The array holds until the lane's next meeting but one. `what` names the operation and must
// agree between lanes.
const Registers* wave_gather(const Registers& values, const char* what);

// Reports `message` with the kernel, block and lane that run now, and ends the process.
[[noreturn]] void fail(const std::string& message);

// Runs `lane` once per thread of every block, in the order that set_order() chose last.
// `threads` must be a multiple of 32. Appends `kernel` to launched_kernels().
void launch(const std::string& kernel, Dim3 grid, int threads, size_t lds_bytes,
            const std::function<void()>& lane);

void set_order(Order order);
const std::vector<std::string>& launched_kernels();

}  // namespace gpu_host
