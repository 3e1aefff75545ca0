// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// wvSplitK_int_g_rescore on the CPU. First each part of the vocabulary finds its largest product
// and its largest lower bound. Then each part recomputes its products that may be the largest of
// all, or that are within the window below it. The result depends neither on the number of threads
// nor on which thread handled a part.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "tuning.h"
#include "wvSplitK_int_g_checks.h"

namespace moe_int4::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

class Rescoring {
 public:
  explicit Rescoring(const RescoreArgs& args)
      : args_(args),
        kernels_(*instruction_set().epilogue),
        stride_((args.k + kDotBlock - 1) / kDotBlock * kDotBlock),
        a_(static_cast<size_t>(args.m * stride_)),
        norms_(args.m),
        largest_(args.m, kLowest),
        reached_(args.m, kLowest) {
    for (int32_t m = 0; m < args.m; ++m) {
      float* row = a_.data() + m * stride_;
      kernels_.load(args.dtype, static_cast<const uint16_t*>(args.a) + m * args.a_stride_m, args.k,
                    row);
      double squares = 0;
      for (int32_t k = 0; k < args.k; ++k) squares += double{row[k]} * row[k];
      norms_[m] = args.bound * static_cast<float>(std::sqrt(squares));
    }
  }

  void run() {
    for_each_part([&](int32_t part) { find_largest(part); });
    for (int32_t m = 0; m < args_.m; ++m) {
      const float* partials = args_.partials + m * args_.p_stride_m;
      for (int32_t part = 0; part < kRescoreParts; ++part) {
        largest_[m] = std::max(largest_[m], partials[2 * part]);
        reached_[m] = std::max(reached_[m], partials[2 * part + 1]);
      }
    }
    for_each_part([&](int32_t part) { rescore(part); });
  }

 private:
  template <typename Work>
  static void for_each_part(const Work& work) {
    std::atomic<int32_t> next{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                                [&](int64_t first, int64_t last) {
                                  for (int64_t thread = first; thread < last; ++thread) {
                                    for (int32_t part = next++; part < kRescoreParts; part = next++)
                                      work(part);
                                  }
                                });
  }

  int32_t begin_of(int32_t part) const {
    return static_cast<int32_t>(int64_t{args_.n} * part / kRescoreParts);
  }

  uint16_t* products(int32_t m, int32_t n) const {
    return static_cast<uint16_t*>(args_.c) + m * args_.c_stride_m + n;
  }

  // Runs visit(products, i) over blocks of a part's columns; i is a block's place in the part.
  template <typename Visit>
  void for_each_block(int32_t part, int32_t m, const Visit& visit) const {
    const int32_t begin = begin_of(part), end = begin_of(part + 1);
    for (int32_t n = begin; n < end; n += kDotBlock) {
      const int32_t count = std::min(kDotBlock, end - n);
      float values[kDotBlock] = {}, errors[kDotBlock];
      kernels_.load(args_.dtype, products(m, n), count, values);
      std::copy_n(args_.errors + n, count, errors);
      std::fill(errors + count, errors + kDotBlock, -1.0f);
      visit(Products{values, errors, norms_[m]}, n - begin);
    }
  }

  void find_largest(int32_t part) const {
    for (int32_t m = 0; m < args_.m; ++m) {
      float* partials = args_.partials + m * args_.p_stride_m + 2 * part;
      partials[0] = partials[1] = kLowest;
      for_each_block(part, m, [&](const Products& block, int32_t) {
        kernels_.raise_bounds(block, partials, partials + 1);
      });
    }
  }

  void rescore(int32_t part) const {
    const int32_t begin = begin_of(part), count = begin_of(part + 1) - begin;
    std::vector<uint32_t> asked(count + kDotBlock, 0);  // one bit per activation row
    for (int32_t m = 0; m < args_.m; ++m) {
      for_each_block(part, m, [&](const Products& block, int32_t at) {
        kernels_.ask(block, largest_[m] - args_.window, reached_[m], 1u << m, asked.data() + at);
      });
    }
    for (int32_t i = 0; i < count; ++i) {
      if (asked[i] == 0) continue;
      const float* rows[kDenseRows];
      int32_t of_row[kDenseRows], together = 0;
      for (int32_t m = 0; m < args_.m; ++m) {
        if ((asked[i] >> m & 1) == 0) continue;
        rows[together] = a_.data() + m * stride_;
        of_row[together++] = m;
      }
      float exact[kDenseRows];
      kernels_.dot(args_.dtype,
                   static_cast<const uint16_t*>(args_.w) + (begin + i) * args_.w_stride_n, rows,
                   together, args_.k, exact);
      for (int32_t j = 0; j < together; ++j) {
        kernels_.store(args_.dtype, exact + j, 1, products(of_row[j], begin + i));
      }
    }
  }

  const RescoreArgs& args_;
  const Epilogue& kernels_;
  const int64_t stride_;
  std::vector<float> a_;
  std::vector<float> norms_;              // of each activation row, times the bound
  std::vector<float> largest_, reached_;  // largest product and largest lower bound of each row
};

void rescore_op(const Tensor& a, const Tensor& w, const Tensor& errors, const Tensor& c,
                const Tensor& partials, double window, double bound) {
  const RescoreArgs args = check_rescore(DeviceType::CPU, a, w, errors, c, partials, window, bound);
  if (args.m > 0) Rescoring(args).run();
}

}  // namespace
}  // namespace moe_int4::cpu

STABLE_TORCH_LIBRARY_IMPL(_rocm_C, CPU, m) {
  m.impl("wvSplitK_int_g_rescore", TORCH_BOX(&moe_int4::cpu::rescore_op));
}
