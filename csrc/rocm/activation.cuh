// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
//
// The activations of moe_int4_args.h (formulas there), in fp32.
#pragma once

#include "gpu_compat.cuh"
#include "moe_int4_args.h"

namespace moe_int4 {

constexpr float kLog2e = 1.4426950408889634f;

GPU_DEVICE float sigmoid(float x) { return gpu::rcp_fast(1.0f + gpu::exp2_fast(-kLog2e * x)); }

// Phi(x) = erfc(-x / sqrt(2)) / 2 by formula 7.1.26 of Abramowitz and Stegun, Handbook of
// Mathematical Functions. This form is a product, not a difference from 1, so it stays accurate for
// negative x. Absolute error below 2e-7.
GPU_DEVICE float normal_cdf(float x) {
  const float z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const float t = gpu::rcp_fast(1.0f + 0.3275911f * z);
  const float poly =
      t * (0.254829592f +
           t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * poly * gpu::exp2_fast(-kLog2e * z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

// act(min(gate, limit)) * (clamp(up, -limit, limit) + beta); kind is moe_int4::Activation.
GPU_DEVICE float activate(int kind, float gate, float up, float alpha, float beta, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  const float x = gate;
  float weight = 0.0f;
  switch (static_cast<Activation>(kind)) {
#define MOE_INT4_CASE(KIND, WEIGHT) \
  case Activation::KIND:            \
    weight = WEIGHT;                \
    break;
    MOE_INT4_ACTIVATIONS(MOE_INT4_CASE)
#undef MOE_INT4_CASE
  }
  return x * weight * (up + beta);
}

}  // namespace moe_int4
