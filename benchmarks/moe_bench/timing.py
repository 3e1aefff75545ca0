# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times calls: one by one on the CPU, inside captured graphs on a GPU.

Backends alternate in rounds, so if the machine slows down for a while (another process,
a lower clock), all of them slow down.
"""

import itertools
import time
from collections.abc import Callable

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_graph_timing import (
    capture,
    replay,
)

# ``step(i)`` runs call ``i``, which determines its layer copy and its batch.
Step = Callable[[int], object]

ROUNDS = 4
# A backend gets at most this long per round, but at least MIN_SAMPLES samples.
ROUND_SECONDS = 0.5
MIN_SAMPLES = 2
# On the CPU, a backend runs this long before the first round.
WARM_UP_SECONDS = 0.5
# Calls per graph: enough that the launch of the graph itself does not matter. From
# LONG_CALL_TOKENS on a call is long itself: fewer do, in proportion, down to the least.
GRAPH_CALLS = 64
LEAST_GRAPH_CALLS = 8
LONG_CALL_TOKENS = 512


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
    """Make at least one call; freshly written memory is slow at first."""
    start = time.perf_counter()
    for index in itertools.count():
        step(index)
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break


def graph_calls(tokens: int) -> int:
    """Calls per graph of a layer with this many tokens."""
    calls = GRAPH_CALLS * LONG_CALL_TOKENS // max(tokens, LONG_CALL_TOKENS)
    return max(LEAST_GRAPH_CALLS, calls)


def time_on_gpu(
    steps: dict[str, Step], repeats: int, calls: int = GRAPH_CALLS
) -> dict[str, list[float]]:
    """Microseconds per call from replays of a graph of ``calls`` calls.

    Times each replay with device events; about ``repeats`` replays per backend.
    """
    graphs = {name: capture(step, calls) for name, step in steps.items()}
    counts = {}
    for name, graph in graphs.items():
        seconds = max(replay(graph, MIN_SAMPLES, calls)) * calls / 1e6
        in_time = max(MIN_SAMPLES, int(ROUND_SECONDS / seconds))
        counts[name] = min(in_time, samples_per_round(repeats))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name] += replay(graph, counts[name], calls)
    return samples


def samples_per_round(repeats: int) -> int:
    """Samples per round if time allows."""
    return max(MIN_SAMPLES, -(-repeats // ROUNDS))


def _time_round(step: Step, taken: list[float], wanted: int) -> None:
    round_start = time.perf_counter()
    for count in range(wanted):
        if count >= MIN_SAMPLES and time.perf_counter() - round_start > ROUND_SECONDS:
            break
        start = time.perf_counter_ns()
        step(len(taken))
        taken.append((time.perf_counter_ns() - start) / 1e3)
