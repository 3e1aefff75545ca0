# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times calls: one by one on the CPU, inside captured graphs on a GPU.

Backends take turns in rounds, so that a machine that slows down for a while (another
process, a lower clock) slows all of them.
"""

import functools
import time
from collections.abc import Callable

import torch

# ``step(i)`` runs call ``i``: its layer copy and its batch follow from ``i``.
Step = Callable[[int], object]

ROUNDS = 4
# A backend gets at most this long per round, but always MIN_SAMPLES samples.
ROUND_SECONDS = 0.5
MIN_SAMPLES = 2
# Calls per graph: long enough that the launch of the graph itself does not show.
GRAPH_CALLS = 64


def time_on_cpu(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Microseconds of single calls, about ``repeats`` per backend."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(0)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            taken = samples[name]

            def sample(step: Step = step, taken: list[float] = taken) -> float:
                start = time.perf_counter_ns()
                step(len(taken))
                return (time.perf_counter_ns() - start) / 1e3

            _fill_round(taken, sample, repeats)
    return samples


def time_on_gpu(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Microseconds per call from replays of a graph of ``GRAPH_CALLS`` calls.

    Device events around each replay; about ``repeats`` replays per backend.
    """
    graphs = {name: _capture(step) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for graph in graphs.values():
        _replay_us(graph)
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            _fill_round(samples[name], functools.partial(_replay_us, graph), repeats)
    return samples


def _fill_round(taken: list[float], sample: Callable[[], float], repeats: int) -> None:
    start = time.perf_counter()
    wanted = max(MIN_SAMPLES, -(-repeats // ROUNDS))
    for count in range(wanted):
        if count >= MIN_SAMPLES and time.perf_counter() - start > ROUND_SECONDS:
            break
        taken.append(sample())


def _capture(step: Step) -> torch.cuda.CUDAGraph:
    # what a first call does (compilation, workspaces) must not end up in the graph
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(GRAPH_CALLS):
            step(index)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / GRAPH_CALLS
