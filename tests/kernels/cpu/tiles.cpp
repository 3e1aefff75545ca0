// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// tiles KERNEL CASES SEED LIMIT: runs random tiles through a kernel and compares with float64.
//
// Prints the largest error. Exit status 1: a case failed, and is printed; 77: the processor lacks
// the kernel's instructions (amx_emulation.h emulates AMX). Each buffer ends where a kernel must
// not read or write further. Outputs of prepare() and multiply() are poisoned with NaNs beforehand,
// and so are the gaps between the outputs.
//
// Errors are relative to the norm that outputs have on average for independent rows and weights.
// The norm of the random outputs themselves may be close to zero.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "kernels_common.h"

// Aborts (the emulation's too) are reported like faults: with a stack and the case.
extern "C" const char* __asan_default_options() { return "handle_abort=1"; }

namespace {

using namespace moe_int4;
using namespace moe_int4::cpu;

constexpr int kFailed = 1, kSkipped = 77;
constexpr uint32_t kPoison = 0x7fabcdef;  // a NaN that no kernel makes

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Returns null if this processor cannot run the kernel.
const Kernel* find(const std::string& name) {
  for (const Kernel* kernel : {&kPortable, &kPortableFew}) {
    if (name == kernel->name) return kernel;
  }
#if defined(__x86_64__)
  for (const Kernel* kernel : {&kAvx2, &kAvx2Few}) {
    if (name == kernel->name && has_avx2()) return kernel;
  }
  if (!has_avx512()) return nullptr;
  for (const Kernel* kernel :
       {&kAvx512, &kAvx512Few, &kAvx512Vnni, &kAvx512Bf16, &kAmxInt8, &kAmxBf16}) {
    if (name == kernel->name) return kernel;
  }
#endif
  return nullptr;
}

// Poisoned memory that ends at an inaccessible page, because AddressSanitizer does not check masked
// vector intrinsics.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), pages_(round_up<int64_t>(bytes, kPage)) {
    void* start =
        mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED ||
        mprotect(static_cast<char*>(start) + pages_, kPage, PROT_NONE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    start_ = static_cast<char*>(start);
    std::memset(data(), 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(start_, pages_ - bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    ASAN_UNPOISON_MEMORY_REGION(start_, pages_);
    munmap(start_, pages_ + kPage);
  }
  char* data() const { return start_ + pages_ - bytes_; }

 private:
  static constexpr int64_t kPage = 65536;  // a multiple of every system's
  int64_t bytes_, pages_;
  char* start_;
};

// A copy that ends at the end of its memory.
template <typename T>
struct Copy {
  explicit Copy(const std::vector<T>& from) : memory(sizeof(T) * from.size()) {
    std::copy(from.begin(), from.end(), data());
  }
  T* data() const { return reinterpret_cast<T*>(memory.data()); }
  Memory memory;
};

// Aligned like the driver's buffers.
struct Aligned : Memory {
  explicit Aligned(int64_t bytes) : Memory(round_up<int64_t>(bytes, 64)) {}
};

class Case {
 public:
  Case(uint32_t seed, int32_t index) : seed_(seed), index_(index) {
    std::seed_seq sequence{seed, static_cast<uint32_t>(index)};
    random_.seed(sequence);
    dtype_ = pick(0, 1) ? DType::kHalf : DType::kBFloat16;
    group_size_ = 32 << pick(0, 2);
    groups_ = pick(1, pick(0, 3) ? 12 : 40);
    k_ = group_size_ * groups_;
    m_ = pick(1, pick(0, 1) ? 40 : 9);  // kernels differ most with few rows
    columns_ = pick(0, 1) ? 32 * pick(1, pick(0, 3) ? 4 : 16) : pick(1, 140);
    symmetric_ = pick(0, 1);
    first_ = pick(0, 3) ? 8 * pick(0, 3) : pick(0, 20);
    n_ = first_ + columns_ + pick(0, 9);
    q_stride_ = k_ / 8 + gap(20);
    s_stride_ = groups_ + gap(5);
    z_stride_ = groups_ + gap(5);
    out_stride_ = columns_ + gap(9);
    special_row_ = m_ > 1 && pick(0, 7) == 0 ? pick(0, m_ - 1) : -1;
    outliers_ = pick(0, 3) == 0;
    fill();
  }

  void print(FILE* to) const {
    std::fprintf(to,
                 "seed %u, case %d: %s, m %d, k %d, group_size %d, first %d, columns %d, n %d, %s, "
                 "q_stride %d, s_stride %d, z_stride %d, out_stride %d, row of a NaN or infinity "
                 "%d, outliers %d\n",
                 seed_, index_, dtype_ == DType::kHalf ? "fp16" : "bf16", m_, k_, group_size_,
                 first_, columns_, n_, symmetric_ ? "symmetric" : "zero points", q_stride_,
                 s_stride_, z_stride_, out_stride_, special_row_, outliers_);
  }

  // Returns the error, or infinity if an output is unwritten or not finite; prints which.
  double run(const Kernel& kernel) const {
    const std::vector<float> out = multiply(kernel);
    double error = 0, norm = 0, worst = -1;
    int32_t worst_row = 0, worst_column = 0;
    bool good = true;
    for (int32_t j = 0; j < columns_; ++j) {
      const std::vector<double> w = weights_of(first_ + j);
      for (int32_t r = 0; r < m_; ++r) {
        const float got = out[int64_t{r} * out_stride_ + j];
        if (bits_as<uint32_t>(got) == kPoison || std::isfinite(got) == (r == special_row_)) {
          if (good) std::printf("row %d, column %d is %g\n", r, j, got);
          good = false;
        }
        if (r == special_row_) continue;
        const double* a = values_.data() + int64_t{r} * k_;
        double expected = 0;
        for (int32_t g = 0; g < groups_; ++g) {
          double w_squares = 0, a_squares = 0;
          for (int32_t i = g * group_size_; i < (g + 1) * group_size_; ++i) {
            expected += w[i] * a[i];
            w_squares += w[i] * w[i];
            a_squares += a[i] * a[i];
          }
          norm += w_squares * a_squares / group_size_;
        }
        const double difference = std::fabs(got - expected);
        error += difference * difference;
        if (difference > worst) worst = difference, worst_row = r, worst_column = j;
      }
    }
    for (int32_t r = 0; r + 1 < m_; ++r) {
      for (int32_t j = columns_; j < out_stride_; ++j) {
        if (bits_as<uint32_t>(out[int64_t{r} * out_stride_ + j]) == kPoison) continue;
        if (good) std::printf("row %d was written past its end, at %d\n", r, j);
        good = false;
      }
    }
    if (!good) return std::numeric_limits<double>::infinity();
    worst_ = "largest in row " + std::to_string(worst_row) + ", column " +
             std::to_string(worst_column) + ": " + std::to_string(worst);
    // Products with zeros are exact.
    if (norm == 0) return error == 0 ? 0 : std::numeric_limits<double>::infinity();
    return std::sqrt(error / norm);
  }

  const std::string& worst() const { return worst_; }

 private:
  int32_t pick(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random_() % (high - low + 1));
  }

  int32_t gap(int32_t most) { return pick(0, 1) ? pick(1, most) : 0; }

  uint16_t round(float value) const {
    return dtype_ == DType::kHalf ? float_to_half(value) : float_to_bf16(value);
  }

  double value(uint16_t bits) const {
    return dtype_ == DType::kHalf ? half_to_float(bits) : bf16_to_float(bits);
  }

  void fill() {
    std::normal_distribution<float> normal;
    q_.resize(int64_t{n_ - 1} * q_stride_ + k_ / 8);
    for (uint32_t& word : q_) word = random_();
    scales_.resize(int64_t{n_ - 1} * s_stride_ + groups_);
    for (uint16_t& scale : scales_) {
      const float magnitude = 0.01f * (1 + std::fabs(normal(random_)));
      scale = round(pick(0, 9) ? magnitude : -magnitude);
    }
    if (!symmetric_) {
      zeros_.resize(int64_t{(n_ + 7) / 8 - 1} * z_stride_ + groups_);
      for (uint32_t& word : zeros_) word = random_();
    }
    a_.resize(int64_t{m_} * k_);
    for (uint16_t& a : a_) {
      const float size = outliers_ && pick(0, 30) == 0 ? 20 : 1;
      a = round(pick(0, 40) ? size * normal(random_) : 0.0f);
    }
    if (pick(0, 5) == 0) std::fill_n(a_.begin() + int64_t{pick(0, m_ - 1)} * k_, k_, uint16_t{0});
    if (special_row_ >= 0) {
      const float special = pick(0, 1) ? std::numeric_limits<float>::infinity() : NAN;
      a_[int64_t{special_row_} * k_ + pick(0, k_ - 1)] = round(special);
    }
    for (const uint16_t a : a_) values_.push_back(value(a));
  }

  std::vector<double> weights_of(int32_t row) const {
    constexpr int32_t kShifts[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // moe_int4_args.h
    std::vector<double> w(k_);
    for (int32_t i = 0; i < k_; ++i) {
      const int32_t g = i / group_size_;
      const uint32_t word = q_[int64_t{row} * q_stride_ + i / 8];
      const int32_t q = word >> kShifts[i % 8] & 15;
      const int32_t zero =
          symmetric_ ? 8 : zeros_[int64_t{row / 8} * z_stride_ + g] >> 4 * (row % 8) & 15;
      w[i] = (q - zero) * value(scales_[int64_t{row} * s_stride_ + g]);
    }
    return w;
  }

  // As the driver does (moe_int4_cpu.cpp).
  std::vector<float> multiply(const Kernel& kernel) const {
    const int64_t rows = kernel.rows_allocated(dtype_, m_);
    const int64_t stride = round_up<int64_t>(kernel.row_bytes(dtype_, k_), 64) + 64;
    const int64_t sums_stride = round_up(groups_, kSumsPadding);
    const Aligned data(rows * stride), sums(4 * rows * sums_stride);
    const PreparedRows prepared{data.data(), stride, reinterpret_cast<float*>(sums.data()),
                                sums_stride};
    const Copy a(a_), scales(scales_);
    const Copy q(q_), zeros(zeros_);
    for (int32_t begin = 0; begin < m_; begin += kPreparedTogether) {
      Source source{};
      source.dtype = dtype_;
      source.begin = begin;
      source.count = std::min(m_ - begin, kPreparedTogether);
      source.m = m_;
      source.k = k_;
      source.group_size = group_size_;
      for (int32_t r = 0; r < source.count; ++r) {
        source.a[r] = a.data() + int64_t{begin + r} * k_;
      }
      kernel.prepare(source, prepared);
    }

    const Aligned scratch(kernel.scratch_bytes(k_, group_size_, m_));
    const Copy out(
        std::vector<float>(int64_t{m_ - 1} * out_stride_ + columns_, bits_as<float>(kPoison)));
    Tile tile{};
    tile.dtype = dtype_;
    tile.q = tile.next = q.data();
    tile.q_stride = q_stride_;
    tile.scales = tile.next_scales = scales.data();
    tile.s_stride = s_stride_;
    tile.zeros = symmetric_ ? nullptr : zeros.data();
    tile.z_stride = z_stride_;
    tile.first = first_;
    tile.columns = columns_;
    tile.k = k_;
    tile.group_size = group_size_;
    tile.a = prepared;
    tile.m = m_;
    tile.out = out.data();
    tile.out_stride = out_stride_;
    tile.scratch = scratch.data();
    kernel.multiply(tile);
    return {out.data(), out.data() + int64_t{m_ - 1} * out_stride_ + columns_};
  }

  std::mt19937 random_;
  uint32_t seed_;
  int32_t index_;
  DType dtype_;
  int32_t m_, k_, group_size_, groups_, first_, columns_, n_;
  int32_t q_stride_, s_stride_, z_stride_, out_stride_;
  int32_t special_row_;
  bool symmetric_, outliers_;
  std::vector<uint32_t> q_, zeros_;
  std::vector<uint16_t> scales_, a_;
  std::vector<double> values_;  // of a_
  mutable std::string worst_;
};

const Case* running = nullptr;

void print_running() {
  if (running != nullptr) running->print(stderr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: tiles KERNEL CASES SEED LIMIT\n");
    return 2;
  }
  const Kernel* kernel = find(argv[1]);
  if (kernel == nullptr) return kSkipped;
  const int32_t cases = std::atoi(argv[2]);
  const auto seed = static_cast<uint32_t>(std::strtoul(argv[3], nullptr, 10));
  const double limit = std::atof(argv[4]);
  __sanitizer_set_death_callback(print_running);
  double largest = 0;
  for (int32_t i = 0; i < cases; ++i) {
    const Case one(seed, i);
    running = &one;
    const double error = one.run(*kernel);
    running = nullptr;
    if (!(error <= limit)) {
      one.print(stdout);
      std::printf("error %g, limit %g; %s\n", error, limit, one.worst().c_str());
      return kFailed;
    }
    largest = std::max(largest, error);
  }
  std::printf("%d cases, largest error %g\n", cases, largest);
}
