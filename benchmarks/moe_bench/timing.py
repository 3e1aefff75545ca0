# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times calls: one by one on the CPU, inside captured graphs on a GPU.

Backends take turns in rounds, so that a machine that slows down for a while (another
process, a lower clock) slows all of them.
"""

import itertools
import time
from collections.abc import Callable

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_graph_timing import (
    capture,
    replay,
)

# ``step(i)`` runs call ``i``: its layer copy and its batch follow from ``i``.
Step = Callable[[int], object]

ROUNDS = 4
# A backend gets at most this long per round, but always MIN_SAMPLES samples.
ROUND_SECONDS = 0.5
MIN_SAMPLES = 2
# Before the first round a backend on the CPU runs this long.
WARM_UP_SECONDS = 0.5
# Calls per graph: long enough that the launch of the graph itself does not show.
GRAPH_CALLS = 64


def time_on_cpu(
    steps: dict[str, Step], repeats: int, before_round: Callable[[], None]
) -> dict[str, list[float]]:
    """Microseconds of single calls, about ``repeats`` per backend."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        _warm_up(step)
    for _ in range(ROUNDS):
        before_round()
        for name, step in steps.items():
            _time_round(step, samples[name], samples_per_round(repeats))
    return samples


def _warm_up(step: Step) -> None:
    """At least one call; memory that was written a moment ago is slow at first."""
    start = time.perf_counter()
    for index in itertools.count():
        step(index)
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break


def time_on_gpu(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Microseconds per call from replays of a graph of ``GRAPH_CALLS`` calls.

    Device events around each replay; about ``repeats`` replays per backend.
    """
    graphs = {name: capture(step, GRAPH_CALLS) for name, step in steps.items()}
    counts = {}
    for name, graph in graphs.items():
        seconds = max(replay(graph, MIN_SAMPLES, GRAPH_CALLS)) * GRAPH_CALLS / 1e6
        in_time = max(MIN_SAMPLES, int(ROUND_SECONDS / seconds))
        counts[name] = min(in_time, samples_per_round(repeats))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name] += replay(graph, counts[name], GRAPH_CALLS)
    return samples


def samples_per_round(repeats: int) -> int:
    """Samples of one round when time allows."""
    return max(MIN_SAMPLES, -(-repeats // ROUNDS))


def _time_round(step: Step, taken: list[float], wanted: int) -> None:
    round_start = time.perf_counter()
    for count in range(wanted):
        if count >= MIN_SAMPLES and time.perf_counter() - round_start > ROUND_SECONDS:
            break
        start = time.perf_counter_ns()
        step(len(taken))
        taken.append((time.perf_counter_ns() - start) / 1e3)
