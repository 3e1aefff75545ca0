# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compiled loops that read a buffer once, for the CPU's read ceiling. Needs numba."""

import numba
import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# Blocks per buffer: enough to spread evenly over threads, and large enough to stream.
BLOCKS = 1024


@numba.njit
def _sum_one_stream(block):
    total = 0
    for i in range(block.size):
        total += block[i]
    return total


@numba.njit
def _sum_four_streams(block):
    part = block.size // 4
    a, b = block[:part], block[part : 2 * part]
    c, d = block[2 * part : 3 * part], block[3 * part :]
    total = 0
    for i in range(part):
        total += a[i] + b[i] + c[i] + d[i]
    return total


@numba.njit(parallel=True)
def _read_one_stream(blocks, sums):
    for i in numba.prange(sums.size):
        sums[i] = _sum_one_stream(blocks[i])


@numba.njit(parallel=True)
def _read_four_streams(blocks, sums):
    for i in numba.prange(sums.size):
        sums[i] = _sum_four_streams(blocks[i])


def read_sum(data: Int64Array, streams: int, threads: int) -> int:
    """Sum of 1-D int64 ``data``, all of it read once by ``threads`` threads.

    ``streams``: 1, or 4 to read a block at four positions at once. The size of ``data``
    must be a multiple of 4096.
    """
    numba.set_num_threads(threads)
    sums = np.empty(BLOCKS, dtype=np.int64)
    read = _read_one_stream if streams == 1 else _read_four_streams
    read(data.reshape(BLOCKS, -1), sums)
    return int(sums.sum())
