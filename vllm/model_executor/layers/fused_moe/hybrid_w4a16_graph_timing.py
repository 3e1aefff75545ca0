# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times GPU calls inside captured graphs, for ``tune`` and for the benchmarks.

A graph holds several calls, so that neither the host nor the launch of the graph shows.
"""

import itertools
from collections.abc import Callable

import torch


def capture(step: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of ``step(0)`` to ``step(calls - 1)``, after one call outside of it."""
    # what a first call does (compilation, workspaces) must not end up in the graph
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            step(index)
    return graph


def replay(graph: torch.cuda.CUDAGraph, count: int, calls: int) -> list[float]:
    """Microseconds per call of ``count`` replays of such a graph, one after another.

    They are queued at once behind an untimed one, so that the host's work of launching
    a graph is hidden behind the replay before it.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [
        start.elapsed_time(end) * 1e3 / calls
        for start, end in itertools.pairwise(events)
    ]
