# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A Triton kernel that reads a buffer once: the GPU's read ceiling."""

import torch
import triton
import triton.language as tl


@triton.jit
def _read_sum(data, sums, steps, WORDS: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, WORDS)
    total = tl.zeros((WORDS,), tl.int32)
    for step in range(steps):
        # neighbours in time read neighbouring memory
        block = step * tl.num_programs(0) + program
        total += tl.load(data + block.to(tl.int64) * WORDS + lanes)
    tl.store(sums + program, tl.sum(total, 0))


def read_sum(data: torch.Tensor, programs_per_unit: int, words: int) -> torch.Tensor:
    """Sum of int32 ``data``, all of it read once, as an int64 scalar tensor.

    ``programs_per_unit`` programs per multiprocessor, in all rounded down to a power of
    two so that blocks of ``words`` divide evenly among them; the size of ``data`` has
    to be a power of two.
    """
    units = torch.cuda.get_device_properties(data.device).multi_processor_count
    programs = 1 << (units * programs_per_unit).bit_length() - 1
    sums = torch.empty(programs, dtype=torch.int32, device=data.device)
    steps = data.numel() // (programs * words)
    _read_sum[(programs,)](data, sums, steps, WORDS=words, num_warps=8)
    return sums.sum()
