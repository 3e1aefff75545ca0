# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The host run of GPU kernels detects the faults that it is made for.

The toy kernel is a block sum. Each wave sums its lanes with shuffles and stores the sum
in LDS; after a barrier all lanes add up the waves. The program's argument breaks it.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "csrc" / "rocm" / "host" / "build.py"

TOY = r"""
#include <cstdio>
#include <cstring>
#include <vector>
#include "gpu_compat.cuh"

extern "C" GPU_KERNEL(128) void block_sum(const char* fault, const float* in,
                                          float* out) {
  const auto broken = [&](const char* x) { return std::strcmp(fault, x) == 0; };
  const int lane = gpu::lane(), wave = gpu::wave(), thread = 32 * wave + lane;
  const float* row = in + gpu::block_x() * 128;
  float* lds = reinterpret_cast<float*>(gpu::dynamic_lds());
  float sum = row[thread];
  if (broken("global read past the end")) sum += in[512 + thread];
  if (broken("global read before the start")) sum += in[thread - 128];
  if (broken("prefetch past the end")) gpu::prefetch_l2(in + 512);
  if (broken("misaligned load")) sum += gpu::load_weights(row + 1).v[0];
  const auto* quads = reinterpret_cast<const gpu::U32x4*>(row + 1);
  if (broken("misaligned pointer")) sum += quads->v[0];
  if (broken("shift")) sum += static_cast<float>(1 << (32 + lane));
  if (broken("shuffle without upper lanes") && lane < 16) {
    sum = gpu::shuffle_xor<8>(sum);
  }
  if (broken("ballot beside shuffle") && lane < 16) gpu::wave_ballot(true);
  sum += gpu::shuffle_xor<16>(sum);
  sum += gpu::shuffle_xor<8>(sum);
  sum += gpu::shuffle_xor<4>(sum);
  sum += gpu::shuffle_xor<2>(sum);
  sum += gpu::shuffle_xor<1>(sum);
  const bool written = !broken("uninitialised LDS") || wave != 2;
  if (lane == 0 && written) lds[broken("LDS overrun") ? wave + 641 : wave] = sum;
  if (broken("barrier in one wave")) {
    if (wave != 1) return;
    gpu::block_barrier();
  } else if (broken("barrier in half a wave")) {
    if (lane < 16) gpu::block_barrier();
  } else if (!broken("missing barrier")) {
    gpu::block_barrier();
  }
  float total = 0;
  for (int i = 0; i < 4; ++i) total += lds[i];
  if (broken("LDS reuse without barrier") && lane == 0) lds[3 - wave] = 0;
  if (broken("same word from all waves") && lane == 1) lds[0] = total;
  // Waves exchange values through LDS of their own: 128 words from word 4 on.
  float* own = lds + 4 + thread;
  *own = total;
  if (broken("shuffle for a barrier")) gpu::shuffle_xor<1>(total);
  if (!broken("missing wave barrier") && !broken("shuffle for a barrier")) {
    gpu::wave_barrier();
  }
  total = lds[4 + (thread ^ 7)];
  // A copy in the background: the row's first four values to the lane's own LDS.
  const auto to = gpu::lds_address(lds + 132 + 4 * thread);
  gpu::copy_16_async(to + (broken("copy past the end") ? 2048 : 0), row, true);
  if (!broken("copy in no group")) gpu::commit_copies();
  if (!broken("copy nobody waits for")) gpu::wait_copies<0>();
  const gpu::U32x4 first = gpu::lds_load_16(to);
  if (broken("copy in no group")) gpu::wait_all_copies();
  total += gpu::bit_cast<float>(first.v[1]) - row[1];
  if (thread == 0) out[gpu::block_x()] = total;
}

int main(int, char** argv) {
  const gpu_host::Order orders[] = {{gpu_host::Schedule::kForward, 0},
                                    {gpu_host::Schedule::kBackward, 0},
                                    {gpu_host::Schedule::kRoundRobin, 0},
                                    {gpu_host::Schedule::kRandom, 1},
                                    {gpu_host::Schedule::kRandom, 2}};
  for (const gpu_host::Order& order : orders) {
    std::vector<float> in(512), out(4, -1.0f);
    for (int i = 0; i < 512; ++i) in[i] = static_cast<float>(i % 128 + i / 128);
    gpu_host::set_order(order);
    const bool odd = std::strcmp(argv[1], "odd block") == 0;
    const gpu::LaunchShape shape{4, 1, 1, odd ? 100 : 128, (132 + 512) * sizeof(float),
                                 false};
    gpu::launch(block_sum, shape, nullptr, argv[1], in.data(), out.data());
    for (float value : out) std::printf("%g ", value);
    std::printf("\n");
  }
}
"""

FAULTS = {
    "global read past the end": "heap-buffer-overflow",
    "global read before the start": "heap-buffer-overflow",
    "prefetch past the end": "heap-buffer-overflow",
    "misaligned load": "misaligned 16-byte load",
    "misaligned pointer": "requires 16 byte alignment",
    "shift": "shift exponent 32 is too large",
    "shuffle without upper lanes": "cross-lane operation with lanes missing",
    "ballot beside shuffle": "cross-lane operation with lanes missing",
    "LDS overrun": "heap-buffer-overflow",
    "barrier in one wave": "divergent barrier: wave 1 waits, wave 0 has ended",
    "barrier in half a wave": "divergent barrier: lane 0 is at block_barrier",
    "missing barrier": "LDS race",
    "LDS reuse without barrier": "LDS race",
    "same word from all waves": "LDS race",
    "missing wave barrier": "LDS race",
    "shuffle for a barrier": "LDS race",
    "copy past the end": "heap-buffer-overflow",
    "copy nobody waits for": "ends before its copies to LDS have arrived",
    "odd block": "block of 100 lanes",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("the host run switches fibers in x86-64 assembler")
    folder = tmp_path_factory.mktemp("toy")
    source = folder / "toy.cpp"
    source.write_text(TOY)
    command = [sys.executable, BUILD, "--cache", folder, source]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    program = build.stdout.strip()
    return lambda fault: subprocess.run(
        [program, fault], capture_output=True, text=True, check=False
    )


def test_sound_kernel_gives_the_same_right_result_in_every_order(toy):
    run = toy("none")
    assert run.returncode == 0, run.stderr
    sums = [128 * 127 / 2 + 128 * block for block in range(4)]
    expected = " ".join(f"{value:g}" for value in sums)
    assert [line.strip() for line in run.stdout.splitlines()] == [expected] * 5


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported_with_the_kernel(toy, fault):
    run = toy(fault)
    assert run.returncode != 0
    assert FAULTS[fault] in run.stderr
    assert "kernel block_sum" in run.stderr


@pytest.mark.parametrize("fault", ["uninitialised LDS", "copy in no group"])
def test_unwritten_lds_spoils_the_result(toy, fault):
    run = toy(fault)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) <= {"nan", "-nan"}
