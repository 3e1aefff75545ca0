# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Pairs of token and expert that a wave serves together (csrc/rocm/slots.cuh).

The test compares the lists themselves: a list that leaves a pair to another wave gives
the same result, but reads an expert's weights once more. It runs on the host, like the
kernels in test_moe_int4_on_host.py.
"""

import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "csrc" / "rocm" / "host" / "build.py"

# Arguments: tokens, top_k, then the ids of every token. It prints a line per pair and
# order of lanes: the pairs that it serves, as token * top_k + t, in the order of their
# slots; -2 if one came with another pair's router weight.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "slots.cuh"

using namespace moe_int4;

extern "C" GPU_KERNEL(32) void list_all(
    const int32_t* ids, const float* weights, int tokens, int top_k, int* lists,
    int* counts) {
  const Router router{ids, false, top_k, nullptr, 0, 1 << 30, top_k};
  const int token = gpu::block_x() / top_k, t = gpu::block_x() % top_k;
  auto* const kept = reinterpret_cast<float*>(gpu::dynamic_lds());
  const Picked picked(router, weights, top_k, kept, 0, tokens,
                      t / Picked::kPlaces * Picked::kPlaces);
  const int count = list_slots(picked, token, t, picked.expert(token, t),
                               [&](int slot, int of_token, int of_t, float weight) {
    const int pair = of_token * top_k + of_t;
    lists[gpu::block_x() * kMaxSlots + slot] = weight == pair ? pair : -2;
  });
  if (gpu::lane() == 0) counts[gpu::block_x()] = count;
}

int main(int argc, char** argv) {
  const int tokens = std::atoi(argv[1]), top_k = std::atoi(argv[2]);
  const int pairs = tokens * top_k;
  std::vector<int32_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
  std::vector<float> weights(pairs);  // the weight of a pair is its number
  for (int pair = 0; pair < pairs; ++pair) weights[pair] = pair;
  for (int order = 0; order < gpu::kOrders; ++order) {
    gpu::set_order(order);
    std::vector<int> lists(pairs * kMaxSlots, -1), counts(pairs, -1);
    gpu::launch(list_all, {pairs, 1, 1, 32, kKeptBytes, false}, nullptr, ids.data(),
                weights.data(), tokens, top_k, lists.data(), counts.data());
    for (int pair = 0; pair < pairs; ++pair) {
      for (int i = 0; i < counts[pair]; ++i) {
        std::printf("%d ", lists[pair * kMaxSlots + i]);
      }
      std::printf("\n");
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("the host run switches fibers in x86-64 assembler")
    folder = tmp_path_factory.mktemp("slots")
    source = folder / "slots.cpp"
    source.write_text(PROGRAM)
    command = [sys.executable, BUILD, "--cache", folder, source]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    return build.stdout.strip()


def expected_lists(ids: list[list[int]]) -> list[list[int]]:
    """The first token that picked an expert serves it for all tokens.

    A second pair with the same token and expert is served separately.
    """
    top_k, lists = len(ids[0]), []
    for token, picked in enumerate(ids):
        for t, expert in enumerate(picked):
            if picked.index(expert) != t:
                lists.append([token * top_k + t])
            elif any(expert in earlier for earlier in ids[:token]):
                lists.append([])
            else:
                lists.append(
                    [
                        other * top_k + theirs.index(expert)
                        for other, theirs in enumerate(ids)
                        if expert in theirs
                    ]
                )
    return lists


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (1, 1, 1),
        (2, 8, 12),
        (8, 10, 30),
        (5, 16, 24),
        # A lane keeps four ids of its token, so four lanes hold the first 16.
        (2, 17, 24),
        (8, 24, 40),
        (7, 40, 64),
    ],
)
def test_pairs_that_share_an_expert_are_served_together(
    program, tokens, top_k, experts
):
    rng = random.Random(f"{tokens} {top_k}")
    ids = [rng.sample(range(experts), top_k) for _ in range(tokens)]
    if top_k > 1:  # a router may pick an expert twice
        ids[-1][-1] = ids[-1][0]
    words = [tokens, top_k, *(expert for picked in ids for expert in picked)]
    run = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lists = [[int(pair) for pair in line.split()] for line in run.stdout.splitlines()]
    assert lists == expected_lists(ids) * 5
