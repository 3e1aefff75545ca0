// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#include "hip_runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "device_code.h"
#include "inflate.h"

namespace gpu {
namespace {

Entry* first_entry = nullptr;

std::runtime_error error(const std::string& message) { return std::runtime_error(message); }

// The functions of HIP that are used here; hipError_t is an int, handles are pointers.
struct Runtime {
  int (*get_device)(int*);
  int (*set_device)(int);
  int (*load_module)(void** module, const void* code_object);
  int (*unload_module)(void* module);
  int (*get_function)(void** function, void* module, const char* name);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned lds_bytes, void* stream, void** args,
                void** extra);
  int (*is_capturing)(void* stream, int* status);  // status 0: not capturing
  int (*last_error)();
  const char* (*error_name)(int);
  const char* (*error_string)(int);
};

std::string library_of(const void* symbol) {
  Dl_info info{};
  return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "?";
}

Runtime find_runtime() {
  Runtime found{};
  const void* anchor = find_symbol("hipGetDevice");
  if (anchor == nullptr) {
    throw error("no HIP runtime is loaded in this process: torch is not a ROCm build");
  }
  const auto find = [&](auto& function, const char* name) {
    void* const symbol = find_symbol(name);
    if (symbol == nullptr) {
      throw error("the HIP runtime of this process, " + library_of(anchor) + ", has no " + name +
                  ": it is too old");
    }
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
  };
  find(found.get_device, "hipGetDevice");
  find(found.set_device, "hipSetDevice");
  find(found.load_module, "hipModuleLoadData");
  find(found.unload_module, "hipModuleUnload");
  find(found.get_function, "hipModuleGetFunction");
  find(found.launch, "hipModuleLaunchKernel");
  find(found.is_capturing, "hipStreamIsCapturing");
  find(found.last_error, "hipGetLastError");
  find(found.error_name, "hipGetErrorName");
  find(found.error_string, "hipGetErrorString");
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

void check(int status, const std::string& what) {
  if (status == 0) return;
  runtime().last_error();  // clears it: torch would report it after a kernel of its own
  throw error(what + ": " + runtime().error_name(status) + " (" + runtime().error_string(status) +
              ")");
}

// Makes a device current for the lifetime of the object.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(current_device()) { set_device(device); }
  ~OnDevice() { runtime().set_device(before_); }

 private:
  int before_;
};

std::string device_name(int device) { return "device " + std::to_string(device); }

bool holds(const CodeObject& code, std::string_view kernel) {
  for (std::string_view lines = code.kernels; !lines.empty();) {
    const size_t end = lines.find('\n');
    if (lines.substr(0, end) == kernel) return true;
    lines.remove_prefix(end + 1);
  }
  return false;
}

// The runtime reads a code object in place for as long as it is loaded.
struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Image = std::unique_ptr<uint8_t, Free>;

Image decompress(const CodeObject& code) {
  constexpr size_t kPage = 4096;
  Image image(static_cast<uint8_t*>(std::aligned_alloc(kPage, (code.size / kPage + 1) * kPage)));
  if (image == nullptr) throw std::bad_alloc();
  inflate(code.data, code.compressed_size, image.get(), code.size);
  return image;
}

// Modules of one device, unloaded by the destructor unless keep() was called.
class Modules {
 public:
  void* load(const CodeObject& code, int device) {
    images_.push_back(decompress(code));
    void* module = nullptr;
    check(runtime().load_module(&module, images_.back().get()),
          "loading the " + std::string(code.arch) + " kernels on " + device_name(device));
    modules_.push_back(module);
    return module;
  }
  void keep() {
    static auto& kept = *new std::vector<Image>;  // never freed, not even at exit
    std::move(images_.begin(), images_.end(), std::back_inserter(kept));
    images_.clear();
    modules_.clear();
  }
  ~Modules() {
    for (void* module : modules_) runtime().unload_module(module);
  }

 private:
  std::vector<Image> images_;
  std::vector<void*> modules_;
};

}  // namespace

Entry::Entry(const char* entry_name) : name(entry_name), next(std::exchange(first_entry, this)) {}

void* find_symbol(const char* name) {
  if (void* const found = dlsym(RTLD_DEFAULT, name)) return found;
  // The library may have been loaded with RTLD_LOCAL, by none of those that depend on it. Collect
  // names first: dl_iterate_phdr holds a lock that dlopen takes too.
  std::vector<std::string> loaded;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* names) {
        static_cast<std::vector<std::string>*>(names)->push_back(info->dlpi_name);
        return 0;
      },
      &loaded);
  for (const std::string& library : loaded) {
    void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    void* const found = dlsym(handle, name);
    dlclose(handle);  // this reference alone; the library stays loaded
    if (found != nullptr) return found;
  }
  return nullptr;
}

std::string held_archs() {
  std::vector<std::string> archs;
  for (size_t i = 0; i < kNumCodeObjects; ++i) {
    const std::string arch = kCodeObjects[i].arch;
    if (std::find(archs.begin(), archs.end(), arch) == archs.end()) archs.push_back(arch);
  }
  std::string text;
  for (const std::string& arch : archs) text += (text.empty() ? "" : " ") + arch;
  return text;
}

void load_kernels(int device, const std::string& arch, void* stream) {
  static std::mutex mutex;
  static std::string loaded[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) {
    throw error(device_name(device) + ": expected 0.." + std::to_string(kMaxDevices - 1));
  }
  const std::lock_guard lock(mutex);
  if (loaded[device] == arch) return;
  if (!loaded[device].empty()) {
    throw error(device_name(device) + " is a " + loaded[device] + " by an earlier call, now a " +
                arch);
  }
  std::vector<const CodeObject*> codes;
  for (size_t i = 0; i < kNumCodeObjects; ++i) {
    if (kCodeObjects[i].arch == arch) codes.push_back(&kCodeObjects[i]);
  }
  if (codes.empty()) {
    throw error("hybrid_w4a16 has no kernels for " + device_name(device) + ", a " + arch +
                "; it was built for " + held_archs());
  }
  // Look everything up before anything is loaded: a failing call would leave an error in HIP.
  std::vector<std::pair<Entry*, size_t>> entries;
  for (Entry* entry = first_entry; entry != nullptr; entry = entry->next) {
    const auto code = std::find_if(codes.begin(), codes.end(),
                                   [&](const CodeObject* c) { return holds(*c, entry->name); });
    if (code == codes.end()) {
      throw error("the code for " + arch + " in hybrid_w4a16 lacks the kernel " + entry->name);
    }
    entries.emplace_back(entry, code - codes.begin());
  }
  const OnDevice on_device(device);
  int capturing = 0;
  check(runtime().is_capturing(stream, &capturing), "hipStreamIsCapturing");
  if (capturing != 0) {
    throw error("kernels cannot be loaded while a graph is captured: load them on " +
                device_name(device) + " before");
  }
  Modules modules;
  std::vector<void*> handles;
  for (const CodeObject* code : codes) handles.push_back(modules.load(*code, device));
  std::vector<void*> functions;
  for (const auto& [entry, code] : entries) {
    void* function = nullptr;
    check(runtime().get_function(&function, handles[code], entry->name),
          "looking up " + std::string(entry->name) + " on " + device_name(device));
    functions.push_back(function);
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i].first->function[device].store(functions[i], std::memory_order_release);
  }
  modules.keep();
  loaded[device] = arch;
}

void start_kernel(const Entry& kernel, const int (&grid)[3], int threads, int lds_bytes,
                  void* stream, void** args) {
  const int device = current_device();
  // Each device has its own functions, from the code for its architecture.
  void* const function = device >= 0 && device < kMaxDevices
                             ? kernel.function[device].load(std::memory_order_acquire)
                             : nullptr;
  if (function == nullptr) {
    throw error(std::string(kernel.name) + ": no kernels were loaded on " + device_name(device) +
                " (hybrid_w4a16_load_device does that); there is code for " + held_archs());
  }
  const int status = runtime().launch(function, grid[0], grid[1], grid[2], threads, 1, 1, lds_bytes,
                                      stream, args, nullptr);
  if (status != 0) check(status, "launch of " + std::string(kernel.name));
}

int current_device() {
  int device = 0;
  const int status = runtime().get_device(&device);
  if (status != 0) check(status, "hipGetDevice");
  return device;
}

void set_device(int device) { check(runtime().set_device(device), "hipSetDevice"); }
// fork: begin overlay

namespace {

template <typename... P>
void call(const char* name, P... args) {
  void* const symbol = find_symbol(name);
  if (symbol == nullptr) throw error(std::string("there is no ") + name + " in this process");
  check(reinterpret_cast<int (*)(P...)>(symbol)(args...), name);
}

// hipMemcpyKind
constexpr int kHostToDevice = 1, kDeviceToHost = 2;

}  // namespace

void* allocate(size_t size) {
  void* p = nullptr;
  call("hipMalloc", &p, size);
  return p;
}
void release(void* p) { call("hipFree", p); }
void copy_in(void* to, const void* from, size_t size) {
  call("hipMemcpy", to, from, size, kHostToDevice);
}
void copy_out(void* to, const void* from, size_t size) {
  call("hipMemcpy", to, from, size, kDeviceToHost);
}
// fork: end

}  // namespace gpu
