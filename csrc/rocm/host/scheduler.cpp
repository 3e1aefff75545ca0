// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Implements scheduler.h. Everything runs in one thread: the scheduler switches into a lane's
// fiber, and the lane switches back when it must meet other lanes or ends. This file is compiled
// without sanitizers, because it often reads LDS that it hides from lanes.
#include "scheduler.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <random>

#if !defined(__x86_64__)
#error "the fiber switch below is written for x86-64"
#endif

// void gpu_host_switch(void** save_sp, void* load_sp): saves the callee-saved registers of the
// System V ABI on this stack and restores them from the other one. It replaces ucontext, whose
// swapcontext makes AddressSanitizer clear the shadow of the whole target stack, including the red
// zones of live frames.
extern "C" void gpu_host_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.globl gpu_host_switch
.type gpu_host_switch,@function
gpu_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gpu_host_switch,.-gpu_host_switch
)");

namespace gpu_host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // instrumented frames are large; pages are lazy
constexpr size_t kGuardBytes = 4096;
constexpr int kFailExit = 70;  // EX_SOFTWARE; AddressSanitizer and UBSan exit with 1

enum class State { kReady, kAtExchange, kAtWaveBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // lowest usable byte
  void* fake_stack = nullptr;
  State state = State::kDone;
  const char* what = "";
  int parity = 0;
  Copies copies;
};

struct Wave {
  Registers values[2][kWaveSize];  // two, because a lane may be one collective ahead of another
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Wave> waves;
  std::vector<std::string> launched;
  Order order;
  std::mt19937_64 rng;
  std::string kernel;  // empty: none is running
  const std::function<void()>* lane = nullptr;
  Dim3 block;
  int num_threads = 0;
  int current = -1;  // running lane, -1: the scheduler
  char* lds = nullptr;
  size_t lds_bytes = 0;
  void* scheduler_sp = nullptr;
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};

Machine& machine() {
  static Machine& m = *new Machine;  // never destroyed: fail() may run at any time
  return m;
}

std::string where() {
  const Machine& m = machine();
  if (m.kernel.empty()) return "outside a kernel";
  std::string text = "kernel " + m.kernel + ", block (" + std::to_string(m.block.x) + ", " +
                     std::to_string(m.block.y) + ", " + std::to_string(m.block.z) + ")";
  if (m.current >= 0) {
    text += ", wave " + std::to_string(m.current / kWaveSize) + ", lane " +
            std::to_string(m.current % kWaveSize);
  }
  return text;
}

void fiber_main() {
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
  Fiber& self = m.fibers[m.current];
  (*m.lane)();
  if (!self.copies.started.empty()) fail("the lane ends before its copies to LDS have arrived");
  self.state = State::kDone;
  self.what = "";
  __sanitizer_start_switch_fiber(nullptr, m.scheduler_bottom, m.scheduler_size);
  gpu_host_switch(&self.sp, m.scheduler_sp);
  std::abort();  // a finished fiber is never resumed
}

void reset_fiber(Fiber& f) {
  if (f.stack == nullptr) {
    void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) fail("no memory for a stack");
    f.stack = static_cast<char*>(p) + kGuardBytes;
  }
  // A lane that ended took its frames' red zones with it, so the shadow is clean.
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes);
  *--top = nullptr;  // aligns the stack as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
  f.state = State::kReady;
  f.parity = 0;
  f.copies = {};
}

void resume(int index) {
  Machine& m = machine();
  Fiber& f = m.fibers[index];
  m.current = index;
  __sanitizer_start_switch_fiber(&m.scheduler_fake, f.stack, kStackBytes);
  gpu_host_switch(&m.scheduler_sp, f.sp);
  __sanitizer_finish_switch_fiber(m.scheduler_fake, nullptr, nullptr);
  m.current = -1;
}

void wait(State state, const char* what) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  f.state = state;
  f.what = what;
  __sanitizer_start_switch_fiber(&f.fake_stack, m.scheduler_bottom, m.scheduler_size);
  gpu_host_switch(&f.sp, m.scheduler_sp);
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
}

// Finds LDS accesses of different lanes that no barrier orders. Changed bytes show what a lane
// wrote. Until the barrier these bytes are poisoned while other lanes run, so that AddressSanitizer
// reports the access itself. The forward and backward orders together put each of two conflicting
// accesses first once; in the other orders the detector is off. It works in units of 2 bytes.
// AddressSanitizer can hide the end of an aligned 8-byte granule, but not the beginning alone.
// There only a second write is detected; reads show up in the results.
class RaceDetector {
 public:
  RaceDetector(const char* lds, size_t bytes, int threads)
      : lds_(reinterpret_cast<const uint16_t*>(lds)),
        units_(bytes / 2),
        before_(units_, 0xffff),
        owner_(units_, kNobody),
        written_(threads) {}
  ~RaceDetector() { block_barrier(); }

  // Hides from `thread` what it must not touch, given what was hidden from the previous lane.
  void before_lane(int thread) {
    if (last_ < 0 || last_ / kWaveSize != thread / kWaveSize) {
      for (const auto& granules : written_) hide(granules, thread);
      hide(shared_, thread);
    } else {
      hide(written_[last_], thread);
      hide(written_[thread], thread);
    }
    last_ = thread;
  }

  void after_lane(int thread) {
    constexpr size_t kChunk = 256;
    for (size_t at = 0; at < units_; at += kChunk) {
      const size_t end = std::min(at + kChunk, units_);
      uint16_t differ = 0;
      for (size_t i = at; i < end; ++i) differ |= lds_[i] ^ before_[i];
      if (differ == 0) continue;
      for (size_t i = at; i < end; ++i) {
        if (lds_[i] != before_[i]) changed(i, thread);
      }
    }
  }

  // What the wave's lanes have written so far now belongs to the whole wave.
  void wave_barrier(int wave) {
    const int first = wave * kWaveSize, end = first + kWaveSize;
    for (int thread = first; thread < end; ++thread) {
      for (size_t granule : written_[thread]) {
        for (size_t i = 4 * granule; i < std::min(4 * granule + 4, units_); ++i) {
          if (owner_[i] == thread) owner_[i] = shared_by(wave);
        }
      }
    }
    for (int thread = first; thread < end; ++thread) {
      std::vector<size_t>& granules = written_[thread];
      hide(granules, first);
      shared_.insert(shared_.end(), granules.begin(), granules.end());
      granules.clear();
    }
  }

  void block_barrier() {
    __asan_unpoison_memory_region(lds_, 2 * units_);
    std::fill(owner_.begin(), owner_.end(), kNobody);
    for (auto& granules : written_) granules.clear();
    shared_.clear();
    last_ = -1;
  }

 private:
  static constexpr int kNobody = -1;  // otherwise a thread, or shared_by(wave)
  static int shared_by(int wave) { return -2 - wave; }
  static bool foreign(int owner, int thread) {
    return owner != kNobody && owner != thread && owner != shared_by(thread / kWaveSize);
  }

  void hide(const std::vector<size_t>& granules, int thread) {
    for (size_t granule : granules) {
      const size_t first = 4 * granule, end = std::min(first + 4, units_);
      size_t hidden = end;
      while (hidden > first && foreign(owner_[hidden - 1], thread)) --hidden;
      __asan_unpoison_memory_region(lds_ + first, 2 * (end - first));
      if (hidden < end) __asan_poison_memory_region(lds_ + hidden, 2 * (end - hidden));
    }
  }

  void changed(size_t unit, int thread) {
    if (foreign(owner_[unit], thread)) {
      fail("LDS race: thread " + std::to_string(thread) + " wrote byte " +
           std::to_string(2 * unit) + ", another lane did, with no barrier between");
    }
    before_[unit] = lds_[unit];
    owner_[unit] = thread;
    std::vector<size_t>& mine = written_[thread];
    if (mine.empty() || mine.back() != unit / 4) mine.push_back(unit / 4);
  }

  const uint16_t* lds_;
  size_t units_;
  std::vector<uint16_t> before_;
  std::vector<int> owner_;                    // per unit
  std::vector<std::vector<size_t>> written_;  // per thread: granules with units owned by the thread
  std::vector<size_t> shared_;                // granules with units owned by waves
  int last_ = -1;                             // the thread that hide() served last
};

// Runs the lanes of `wave` until each is waiting or done; returns what they wait for.
State run_wave(int wave, RaceDetector* races) {
  Machine& m = machine();
  int lanes[kWaveSize];
  std::iota(lanes, lanes + kWaveSize, wave * kWaveSize);
  if (m.order.schedule == Schedule::kBackward) std::reverse(lanes, lanes + kWaveSize);
  if (m.order.schedule == Schedule::kRandom) std::shuffle(lanes, lanes + kWaveSize, m.rng);
  for (int lane : lanes) {
    if (races != nullptr) races->before_lane(lane);
    resume(lane);
    if (races != nullptr) races->after_lane(lane);
  }

  const Fiber& first = m.fibers[lanes[0]];
  for (int lane : lanes) {
    const Fiber& f = m.fibers[lane];
    if (f.state == first.state && std::strcmp(f.what, first.what) == 0) continue;
    const auto describe = [](const Fiber& x) {
      return x.state == State::kDone ? std::string("has ended") : "is at " + std::string(x.what);
    };
    m.current = lane;
    const bool exchange = f.state == State::kAtExchange || first.state == State::kAtExchange;
    fail(
        (exchange ? "cross-lane operation with lanes missing: lane " : "divergent barrier: lane ") +
        std::to_string(lanes[0] % kWaveSize) + " " + describe(first) + ", lane " +
        std::to_string(lane % kWaveSize) + " " + describe(f));
  }
  if (first.state == State::kAtWaveBarrier && races != nullptr) races->wave_barrier(wave);
  return first.state;
}

void run_block(size_t lds_bytes) {
  Machine& m = machine();
  const int num_waves = m.num_threads / kWaveSize;
  // Allocated with the exact size: AddressSanitizer's red zone starts at the first byte past the
  // end.
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  const std::unique_ptr<char, Free> lds(lds_bytes ? static_cast<char*>(std::malloc(lds_bytes))
                                                  : nullptr);
  if (lds_bytes != 0) std::memset(lds.get(), 0xff, lds_bytes);
  m.lds = lds.get();
  m.lds_bytes = lds_bytes;
  for (int i = 0; i < m.num_threads; ++i) reset_fiber(m.fibers[i]);

  const bool whole_turns =
      m.order.schedule == Schedule::kForward || m.order.schedule == Schedule::kBackward;
  std::optional<RaceDetector> detector;
  if (whole_turns && lds_bytes != 0) detector.emplace(m.lds, lds_bytes, m.num_threads);
  RaceDetector* const races = detector ? &*detector : nullptr;
  std::vector<int> ready(num_waves);
  std::iota(ready.begin(), ready.end(), 0);
  if (m.order.schedule == Schedule::kBackward) std::reverse(ready.begin(), ready.end());
  std::vector<int> waiting, ended;
  while (!ready.empty()) {
    const size_t turn = m.order.schedule == Schedule::kRandom ? m.rng() % ready.size() : 0;
    const int wave = ready[turn];
    ready.erase(ready.begin() + turn);
    State state;
    do {
      state = run_wave(wave, races);
    } while (whole_turns && state != State::kAtBlockBarrier && state != State::kDone);
    if (state == State::kDone) {
      ended.push_back(wave);
    } else {
      (state == State::kAtBlockBarrier ? waiting : ready).push_back(wave);
    }
    if (!ready.empty() || waiting.empty()) continue;
    if (!ended.empty()) {
      fail("divergent barrier: wave " + std::to_string(waiting[0]) + " waits, wave " +
           std::to_string(ended[0]) + " has ended");
    }
    std::sort(waiting.begin(), waiting.end());
    if (m.order.schedule == Schedule::kBackward) std::reverse(waiting.begin(), waiting.end());
    ready.swap(waiting);
    if (races != nullptr) races->block_barrier();
  }
  m.lds = nullptr;
}

}  // namespace

int thread_index() { return machine().current; }
int max_lds_bytes() {
  static const char* const given = std::getenv("GPU_HOST_LDS_BYTES");
  return given != nullptr ? std::atoi(given) : (GPU_HOST_MMA ? 227 : 64) * 1024;
}

Copies& copies() { return machine().fibers[machine().current].copies; }
Dim3 block_index() { return machine().block; }
char* dynamic_lds() { return machine().lds; }

void block_barrier() { wait(State::kAtBlockBarrier, "block_barrier"); }
void wave_barrier() { wait(State::kAtWaveBarrier, "wave_barrier"); }

const Registers* wave_gather(const Registers& values, const char* what) {
  Machine& m = machine();
  const int self = m.current;
  Wave& wave = m.waves[self / kWaveSize];
  const int parity = m.fibers[self].parity ^= 1;
  wave.values[parity][self % kWaveSize] = values;
  wait(State::kAtExchange, what);
  return wave.values[parity];
}

void fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "gpu_host: %s: %s\n", where().c_str(), message.c_str());
  _exit(kFailExit);
}

void launch(const std::string& kernel, Dim3 grid, int threads, size_t lds_bytes,
            const std::function<void()>& lane) {
  Machine& m = machine();
  m.kernel = kernel;
  m.lane = &lane;
  m.num_threads = threads;
  if (threads <= 0 || threads % kWaveSize != 0 || threads > 1024) {
    fail("block of " + std::to_string(threads) + " lanes; need a multiple of 32 up to 1024");
  }
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) fail("empty grid");
  if (lds_bytes > static_cast<size_t>(max_lds_bytes())) {
    fail(std::to_string(lds_bytes) + " bytes of LDS; " + std::to_string(max_lds_bytes()) +
         " are the most");
  }
  m.fibers.resize(std::max<size_t>(m.fibers.size(), threads));
  m.waves.resize(threads / kWaveSize);
  m.rng.seed(m.order.seed);

  std::vector<int64_t> blocks(int64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  if (m.order.schedule == Schedule::kBackward) std::reverse(blocks.begin(), blocks.end());
  if (m.order.schedule == Schedule::kRandom) std::shuffle(blocks.begin(), blocks.end(), m.rng);
  for (int64_t b : blocks) {
    m.block = {static_cast<int>(b % grid.x), static_cast<int>(b / grid.x % grid.y),
               static_cast<int>(b / grid.x / grid.y)};
    run_block(lds_bytes);
  }
  m.launched.push_back(kernel);
  m.kernel.clear();
}

void set_order(Order order) { machine().order = order; }
const std::vector<std::string>& launched_kernels() { return machine().launched; }

}  // namespace gpu_host

// Sanitizer hooks. Fake stacks would double the cost of a switch and find nothing more.
extern "C" const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:detect_leaks=0:redzone=2048:quarantine_size_mb=16";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" void __ubsan_on_report() {
  std::fprintf(stderr, "gpu_host: %s: UBSan found this:\n", gpu_host::where().c_str());
}
extern "C" void __asan_on_error() {
  // The only LDS bytes that are poisoned are those that the race detector hides.
  const auto& m = gpu_host::machine();
  const char* first = static_cast<const char*>(__asan_get_report_address());
  const bool race = m.lds != nullptr && first >= m.lds &&
                    first + __asan_get_report_access_size() <= m.lds + m.lds_bytes;
  std::fprintf(stderr, "gpu_host: %s: %s\n", gpu_host::where().c_str(),
               race ? "LDS race: another lane wrote these bytes with no barrier between:"
                    : "AddressSanitizer found this:");
}
