// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// Starts AMD kernels through the HIP runtime that torch has loaded into this process, without a HIP
// header or import library. The functions are found by their symbols, and only those whose
// arguments are plain integers and pointers are used: they are the same in ROCm 6, 7 and 10.
// Everything here throws std::runtime_error with HIP's own message.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>

namespace gpu {

constexpr int kMaxDevices = 64;
// What every gfx11 and gfx12 device gives a block; more than 48 KiB needs no asking on AMD.
constexpr int kLdsBytesPerBlock = 64 * 1024;

// A kernel as the code that starts it sees it. Objects have static storage duration: they stay on
// a list, through which load_kernels() finds them.
class Entry {
 public:
  explicit Entry(const char* name);
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

  const char* const name;
  Entry* const next;
  std::atomic<void*> function[kMaxDevices] = {};  // hipFunction_t by device; null: not loaded
};

// Address of `name` in this process, null where no loaded library defines it. What this library's
// own dependencies define comes first: torch's libraries and the HIP runtime below them.
void* find_symbol(const char* name);

// The architectures that this library holds code for, in order, separated by spaces.
std::string held_archs();

// Loads the code for `arch`, the architecture of `device`, and looks up every kernel there. Once
// per device: a second call does nothing. `stream` is one of the device's; the call fails while it
// is being captured into a graph. Where it fails nothing is loaded, and it can be tried again.
void load_kernels(int device, const std::string& arch, void* stream);

// Starts a kernel on the current device, for which load_kernels() has been called. `args` point to
// the arguments.
void start_kernel(const Entry& kernel, const int (&grid)[3], int threads, int lds_bytes,
                  void* stream, void** args);

int current_device();
void set_device(int device);
// fork: begin overlay

// For the runner of host/: device memory, and copies that wait for what was started.
void* allocate(size_t size);
void release(void* p);
void copy_in(void* to, const void* from, size_t size);
void copy_out(void* to, const void* from, size_t size);
// fork: end

}  // namespace gpu
