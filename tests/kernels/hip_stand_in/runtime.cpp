// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// A stand-in for libamdhip64 with the functions that csrc/rocm/hip_runtime.cpp uses. Modules are
// real AMDGPU code objects. A launch is checked against their metadata and then runs the kernel of
// the same name in the host build. Device memory is host memory. Errors that HIP reports are error
// codes here too; errors that HIP would not notice end the process with a message. Environment:
//   HIP_STAND_IN_DEVICES    architectures of the devices, default "gfx1151"
//   HIP_STAND_IN_FAIL_LOAD  number of module loads that succeed; the next one is out of memory
//   HIP_STAND_IN_LOG        file to which the names of launched kernels are appended
//   HIP_STAND_IN_CAPTURING  set: every stream is being captured into a graph
// If built with STAND_IN_OLD it has no hipStreamIsCapturing.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "code_object.h"
#include "host_kernels.h"

#define HIP_API extern "C" __attribute__((visibility("default")))

namespace {

using stand_in::Argument;

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
};

constexpr size_t kLdsBytes = 64 * 1024;

struct Module {
  int device;
  stand_in::CodeObject code;
};

struct Function {
  const Module* module;
  const stand_in::Kernel* kernel;
};

struct Machine {
  std::vector<std::string> archs;
  int device = 0, last_error = kSuccess, loads = 0, fail_load = -1;
  std::map<void*, std::unique_ptr<Module>> modules;
  std::vector<std::unique_ptr<Function>> functions;
  std::map<const char*, size_t> allocations;

  Machine() {
    const char* const devices = std::getenv("HIP_STAND_IN_DEVICES");
    std::istringstream words(devices != nullptr ? devices : "gfx1151");
    for (std::string arch; words >> arch;) archs.push_back(arch);
    if (const char* const count = std::getenv("HIP_STAND_IN_FAIL_LOAD")) {
      fail_load = std::atoi(count);
    }
  }
};

Machine& machine() {
  static Machine all;
  return all;
}

int result(int error) {
  if (error != kSuccess) machine().last_error = error;
  return error;
}

[[noreturn]] void fault(const std::string& message) {
  std::fprintf(stderr, "HIP stand-in: %s\n", message.c_str());
  std::exit(70);
}

std::string text(size_t value) { return std::to_string(value); }

bool is_hidden(const Argument& argument) { return argument.kind.rfind("hidden", 0) == 0; }

bool is_device_memory(const void* p) {
  const auto after = machine().allocations.upper_bound(static_cast<const char*>(p));
  if (after == machine().allocations.begin()) return false;
  const auto& [start, size] = *std::prev(after);
  return static_cast<const char*>(p) <= start + size;
}

// The segment from which a kernel reads its arguments, filled according to the metadata.
std::vector<char> argument_segment(const stand_in::Kernel& kernel, void** args) {
  std::vector<char> segment(kernel.kernarg_bytes, '\xff');
  size_t i = 0;
  for (const Argument& argument : kernel.arguments) {
    if (is_hidden(argument)) continue;
    char* const to = segment.data() + argument.offset;
    std::memcpy(to, args[i], argument.size);
    if (argument.kind == "global_buffer") {
      void* pointer;
      std::memcpy(&pointer, to, sizeof(pointer));
      if (pointer != nullptr && !is_device_memory(pointer)) {
        fault(kernel.name + ": argument " + text(i) + " is not device memory");
      }
    }
    ++i;
  }
  return segment;
}

void check_layout(const stand_in::Kernel& kernel, const stand_in::HostKernel& host) {
  std::vector<Argument> visible;
  for (const Argument& argument : kernel.arguments) {
    if (!is_hidden(argument)) visible.push_back(argument);
  }
  if (visible.size() != host.arguments.size()) {
    fault(kernel.name + ": the code object takes " + text(visible.size()) +
          " arguments, the source " + text(host.arguments.size()));
  }
  for (size_t i = 0; i < visible.size(); ++i) {
    const Argument& got = visible[i];
    const stand_in::HostArgument& expected = host.arguments[i];
    if (got.offset != expected.offset || got.size != expected.size ||
        (got.kind == "global_buffer") != expected.is_pointer) {
      fault(kernel.name + ": argument " + text(i) + " of the code object is a " + got.kind +
            " of " + text(got.size) + " bytes at " + text(got.offset) + ", of the source a " +
            (expected.is_pointer ? "global_buffer" : "by_value") + " of " + text(expected.size) +
            " bytes at " + text(expected.offset));
    }
  }
}

}  // namespace

HIP_API int hipGetDevice(int* device) {
  *device = machine().device;
  return kSuccess;
}

HIP_API int hipSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(machine().archs.size())) {
    return result(kInvalidDevice);
  }
  machine().device = device;
  return kSuccess;
}

HIP_API int hipModuleLoadData(void** module, const void* image) {
  Machine& all = machine();
  if (all.loads++ == all.fail_load) return result(kOutOfMemory);
  auto loaded = std::make_unique<Module>();
  loaded->device = all.device;
  try {
    loaded->code = stand_in::read_code_object(image);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "HIP stand-in: %s\n", error.what());
    return result(kInvalidImage);
  }
  if (loaded->code.arch != all.archs[all.device]) return result(kNoBinaryForGpu);
  *module = loaded.get();
  all.modules[*module] = std::move(loaded);
  return kSuccess;
}

HIP_API int hipModuleUnload(void* module) {
  return result(machine().modules.erase(module) == 1 ? kSuccess : kInvalidHandle);
}

HIP_API int hipModuleGetFunction(void** function, void* handle, const char* name) {
  const auto module = machine().modules.find(handle);
  if (module == machine().modules.end()) return result(kInvalidHandle);
  for (const stand_in::Kernel& kernel : module->second->code.kernels) {
    if (kernel.name != name) continue;
    machine().functions.push_back(std::make_unique<Function>());
    *machine().functions.back() = {module->second.get(), &kernel};
    *function = machine().functions.back().get();
    return kSuccess;
  }
  return result(kNotFound);
}

HIP_API int hipModuleLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                  unsigned block_x, unsigned block_y, unsigned block_z,
                                  unsigned lds_bytes, void* stream, void** args, void** extra) {
  const Function& function = *static_cast<Function*>(handle);
  const stand_in::Kernel& kernel = *function.kernel;
  const std::string name = kernel.name;
  if (machine().last_error != kSuccess) {
    fault(name + ": an error was left behind, " + text(machine().last_error));
  }
  if (function.module->device != machine().device) {
    fault(name + ": code for " + function.module->code.arch + " on device " +
          text(function.module->device) + " was started on device " + text(machine().device) +
          ", a " + machine().archs[machine().device]);
  }
  if (stream != nullptr || extra != nullptr || args == nullptr) {
    fault(name + ": an unknown stream, or arguments in an unsupported form");
  }
  const unsigned grid[] = {grid_x, grid_y, grid_z};
  for (const unsigned size : grid) {
    if (size == 0) fault(name + ": an empty grid");
  }
  // HIP counts work items along x in 32 bits, and blocks along y and z in 16 bits.
  if (uint64_t{grid_x} * block_x > UINT32_MAX || grid_y > UINT16_MAX || grid_z > UINT16_MAX) {
    fault(name + ": a grid of " + text(grid_x) + " x " + text(grid_y) + " x " + text(grid_z));
  }
  const size_t threads = size_t{block_x} * block_y * block_z;
  if (threads == 0 || threads > kernel.max_threads || threads % kernel.wave_size != 0) {
    fault(name + ": a block of " + text(threads) + " threads, at most " + text(kernel.max_threads));
  }
  if (lds_bytes + kernel.lds_bytes > kLdsBytes) {
    fault(name + ": " + text(lds_bytes) + " bytes of LDS, and " + text(kernel.lds_bytes) +
          " that are fixed");
  }
  const stand_in::HostKernel* const host = stand_in::find_host_kernel(name);
  if (host == nullptr) fault(name + ": not in the host build");
  check_layout(kernel, *host);
  const std::vector<char> segment = argument_segment(kernel, args);
  if (const char* const log = std::getenv("HIP_STAND_IN_LOG")) {
    std::ofstream(log, std::ios::app) << name << "\n";
  }
  stand_in::run_host_kernel(name, *host, grid, static_cast<unsigned>(threads),
                            lds_bytes + kernel.lds_bytes, segment.data());
  return kSuccess;
}

#if !defined(STAND_IN_OLD)
HIP_API int hipStreamIsCapturing(void*, int* status) {
  *status = std::getenv("HIP_STAND_IN_CAPTURING") != nullptr;
  return kSuccess;
}
#endif

HIP_API int hipGetLastError() {
  const int error = machine().last_error;
  machine().last_error = kSuccess;
  return error;
}

HIP_API const char* hipGetErrorName(int error) {
  switch (error) {
    case kSuccess:
      return "hipSuccess";
    case kOutOfMemory:
      return "hipErrorOutOfMemory";
    case kInvalidDevice:
      return "hipErrorInvalidDevice";
    case kInvalidImage:
      return "hipErrorInvalidImage";
    case kNoBinaryForGpu:
      return "hipErrorNoBinaryForGpu";
    case kNotFound:
      return "hipErrorNotFound";
    default:
      return "hipErrorUnknown";
  }
}

HIP_API const char* hipGetErrorString(int error) {
  return error == kOutOfMemory ? "out of memory" : "error";
}

HIP_API int hipMalloc(void** p, size_t size) {
  *p = std::malloc(size);
  machine().allocations[static_cast<char*>(*p)] = size;
  return kSuccess;
}

HIP_API int hipFree(void* p) {
  if (machine().allocations.erase(static_cast<char*>(p)) != 1) return result(kInvalidValue);
  std::free(p);
  return kSuccess;
}

HIP_API int hipMemcpy(void* to, const void* from, size_t size, int) {
  std::memcpy(to, from, size);
  return kSuccess;
}

// For tests: the number of modules loaded on a device, and of kernels in them.
HIP_API int hipStandInModules(int device) {
  int count = 0;
  for (const auto& [handle, module] : machine().modules) count += module->device == device;
  return count;
}
HIP_API int hipStandInKernels(int device) {
  size_t count = 0;
  for (const auto& [handle, module] : machine().modules) {
    if (module->device == device) count += module->code.kernels.size();
  }
  return static_cast<int>(count);
}
