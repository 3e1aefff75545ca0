# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A Triton kernel that reads a buffer once, for the GPU's read ceiling."""

import torch
import triton
import triton.language as tl


@triton.jit
def _read_sum(data, sums, steps, WORDS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, WORDS)
    total = tl.zeros((WORDS,), tl.int32)
    for step in range(steps):
        # programs that run at the same time read neighbouring blocks
        block = step * tl.num_programs(0) + program
        total += tl.load(data + block * WORDS + lanes)
    tl.store(sums + program, tl.sum(total, 0))


def read_sum(data: torch.Tensor, programs: int, words: int) -> torch.Tensor:
    """Sum of 1-D int32 ``data``, all of it read once, as an int64 scalar tensor.

    ``programs`` programs alternate over blocks of ``words`` words (a power of two).
    programs * words must divide the size of ``data``. The sum of one program must fit
    in 32 bits.
    """
    sums = torch.empty(programs, dtype=torch.int32, device=data.device)
    steps = data.numel() // (programs * words)
    _read_sum[(programs,)](data, sums, steps, WORDS=words, num_warps=8)
    return sums.sum()
