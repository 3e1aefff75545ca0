# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Memory bandwidth of the machine: the ceilings for comparison with the results.

Each ceiling is the best of several methods, each the best of several passes over
buffers far larger than any cache. The result names the method.
"""

import mmap
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_bench.timing import time_on_gpu

PASSES = 10
CPU_BYTES = 1 << 30
GPU_BYTES = 4 << 30


def measure_ceilings(
    device: torch.device, threads: int, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read and copy ceilings in GB/s (10**9 bytes), with all methods tried.

    ``copy_gbps`` counts the bytes read plus the bytes written. On a GPU ``launch_us``
    is the time of one near-empty kernel in a graph, in microseconds. Given the result
    of an ``earlier`` measurement, the better of the two counts for each method.
    """
    if device.type == "cpu":
        methods = {"read": _cpu_reads(threads), "copy": _cpu_copies()}
    else:
        methods = {"read": _gpu_reads(), "copy": _gpu_copies()}
    result: dict[str, Any] = {}
    for kind, tried in methods.items():
        if earlier is not None:
            for method, gbps in earlier["methods"][kind].items():
                tried[method] = max(gbps, tried[method])
        best = max(tried, key=lambda method: tried[method])  # noqa: B023
        result[f"{kind}_gbps"] = tried[best]
        result[f"{kind}_method"] = best
    if device.type != "cpu":
        result["launch_us"] = _launch_us()
    return result | {"methods": methods}


def _best_gbps(run: Callable[[], object], num_bytes: int) -> float:
    run()
    best = float("inf")
    for _ in range(PASSES):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best / 1e9


def _cpu_reads(threads: int) -> dict[str, float]:
    return {
        method: _best_gbps(run, CPU_BYTES)
        for method, run in _cpu_read_methods(threads).items()
    }


class ReadNow:
    """The CPU's current read bandwidth. A shared machine may read twice as much in one
    second as in the next, so a result needs a ceiling measured at the same time.

    Keeps the buffers of all methods; ``gbps`` has one entry per ``measure()``.
    """

    def __init__(self, threads: int) -> None:
        self._methods = _cpu_read_methods(threads)
        self.gbps: list[float] = []

    def measure(self) -> None:
        """One pass of each method; the best one counts."""
        best = float("inf")
        for run in self._methods.values():
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        self.gbps.append(CPU_BYTES / best / 1e9)


def _cpu_read_methods(threads: int) -> dict[str, Callable[[], object]]:
    normal = torch.ones(CPU_BYTES // 8, dtype=torch.int64)
    methods: dict[str, Callable[[], object]] = {"torch.sum, int64": normal.sum}
    try:
        from moe_bench.cpu_read import read_sum
    except ImportError:
        return methods
    for pages, data in (("normal", normal.numpy()), ("huge", _ones_on_huge_pages())):
        for streams in (1, 4):
            method = f"numba, {streams} stream(s) a thread, {pages} pages"
            if read_sum(data, streams, threads) != data.size:
                raise RuntimeError(f"read ceiling, {method}: the sum is wrong")
            methods[method] = partial(read_sum, data, streams, threads)
    return methods


def _ones_on_huge_pages() -> npt.NDArray[np.int64]:
    pages = mmap.mmap(-1, CPU_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(pages, dtype=np.int64)
    data[:] = 1
    return data


def _cpu_copies() -> dict[str, float]:
    source = torch.ones(CPU_BYTES // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    return {
        "torch copy_": _best_gbps(lambda: target.copy_(source), 2 * CPU_BYTES),
    }


def _best_gpu_gbps(run: Callable[[], object], num_bytes: int) -> float:
    run()
    times = []
    for _ in range(PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return num_bytes / min(times) / 1e9


def _gpu_reads() -> dict[str, float]:
    data = torch.ones(GPU_BYTES // 4, dtype=torch.int32, device="cuda")
    results = {"torch.sum, int32": _best_gpu_gbps(data.sum, GPU_BYTES)}
    try:
        from moe_bench.triton_read import read_sum
    except ImportError:
        return results
    # from a few programs per multiprocessor that persist to many short ones
    for programs in (512, 1024, 4096, 32768):
        for words in (2048, 4096, 8192):
            method = f"Triton, {programs} programs, {4 * words >> 10} KiB blocks"
            if int(read_sum(data, programs, words)) != data.numel():
                raise RuntimeError(f"read ceiling, {method}: the sum is wrong")
            results[method] = _best_gpu_gbps(
                lambda: read_sum(data, programs, words),  # noqa: B023
                GPU_BYTES,
            )
    return results


def _gpu_copies() -> dict[str, float]:
    source = torch.ones(GPU_BYTES // 4, dtype=torch.int32, device="cuda")
    target = torch.zeros_like(source)
    return {
        "torch copy_": _best_gpu_gbps(lambda: target.copy_(source), 2 * GPU_BYTES),
    }


def _launch_us() -> float:
    """A chain of dependent kernels over 256 numbers."""
    numbers = torch.zeros(256, device="cuda")
    samples = time_on_gpu({"launch": lambda i: numbers.add_(1)}, PASSES)
    return statistics.median(samples["launch"])
