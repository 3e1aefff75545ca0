# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The candidate launch plans and tiles, and the search for the fastest.

The launch plans of decode form one grid per kernel. ``search`` descends on the grids
from several starts, and looks farther from its result. ``sweep`` measures every plan.
``finals`` decides between the best few and the current choice.
"""

import itertools
import operator
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import TILED, Plan, Tile

SIFT_REPLAYS, FINAL_REPLAYS = 3, 12
FINALISTS = 3
# Smallest gain that counts, as a share; more is needed if the gains spread more.
LEAST_GAIN = 0.01
# The search does not go on from places that are slower than the best by this factor.
# Around its result it measures the plans up to this many steps away on two axes. With
# these values it finds the fastest plan of each of 42 full sweeps on an H200; with 1
# step it misses one. On 20 of them it takes 35% of the measurements.
HOPELESS, BOX = 1.25, 2

Sampler = Callable[[Any, int], list[float]]
"""``sample(candidate, count)``: microseconds per call, ``count`` samples."""
Measure = Callable[[Any], float | None]
"""Microseconds of a candidate; ``None``: not for this shape or device, or wrong."""


# ---------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class Family:
    """The launch plans of one kernel: each point of the grid of ``axes`` is a plan.

    ``make(*values)`` returns ``None`` for a combination that is not a plan.
    """

    axes: tuple[tuple[int, ...], ...]
    make: Callable[..., Plan | None]

    def plan(self, point: tuple[int, ...]) -> Plan | None:
        """The plan at a point, an index along each axis; ``None`` outside the grid."""
        if any(
            not 0 <= place < len(axis)
            for place, axis in zip(point, self.axes, strict=True)
        ):
            return None
        values = (axis[place] for place, axis in zip(point, self.axes, strict=True))
        return self.make(*values)

    def points(self) -> Iterator[tuple[int, ...]]:
        """All points of the grid, including those without a plan."""
        return itertools.product(*(range(len(axis)) for axis in self.axes))

    def plans(self) -> Iterator[Plan]:
        """All plans of the grid."""
        for point in self.points():
            plan = self.plan(point)
            if plan is not None:
                yield plan

    def starts(self) -> Iterator[tuple[int, ...]]:
        """The points at the start, one third and two thirds of each axis."""
        yield from itertools.product(
            *(
                sorted({0, (len(axis) - 1) // 3, 2 * (len(axis) - 1) // 3})
                for axis in self.axes
            )
        )

    def lines(self, point: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The points that differ from ``point`` along one axis, at any distance."""
        for i, axis in enumerate(self.axes):
            for place in range(len(axis)):
                if place != point[i]:
                    yield (*point[:i], place, *point[i + 1 :])

    def box(self, point: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The points up to ``BOX`` steps from ``point`` along two axes at most."""
        for steps in itertools.product(range(-BOX, BOX + 1), repeat=len(point)):
            if sum(map(bool, steps)) <= 2:
                yield tuple(map(operator.add, point, steps))

    def neighbours(self, point: tuple[int, ...]) -> tuple[list, list]:
        """The points one move away along one axis, and those along several axes.

        A move along one axis is a step, or doubles or halves the value. A move along
        several axes makes the same kind of move on all of them.
        """
        found: dict[tuple[int, ...], int] = {}
        for step in itertools.product((-1, 0, 1), repeat=len(point)):
            for move in (_step, _scale):
                moved = tuple(map(move, self.axes, point, step))
                if moved != point and self.plan(moved) is not None:
                    found[moved] = sum(map(abs, step))
        along = [near for near, axes in found.items() if axes == 1]
        return along, [near for near, axes in found.items() if axes > 1]


def _step(axis: tuple[int, ...], place: int, step: int) -> int:
    return place + step


def _scale(axis: tuple[int, ...], place: int, step: int) -> int:
    """The index of twice the value (``step`` 1) or half of it (-1)."""
    wanted = axis[place] * 2.0**step
    beyond = [i for i, value in enumerate(axis) if (value - wanted) * step >= 0]
    if step == 0:
        return place
    if not beyond:
        return -1  # outside the grid
    return beyond[0] if step > 0 else beyond[-1]


_SHARES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_SLOTS = (1, 2, 3, 4, 8, 16)


def plan_families(op: str, matrix_units: bool) -> list[Family]:
    """All plans of ``op`` ("gate_up" or "down") that ``csrc/rocm/plan.h`` defines.

    gate_up: kernel, waves, slots, row_tiles; down: kernel, waves, k_slices, slots.
    """
    if op == "gate_up":
        families = [
            Family((tuple(range(1, 9)),), lambda waves, k=kernel: (k, waves, 0, 0))
            for kernel in (0, 1)
        ]
        if matrix_units:
            axes = ((1, 2, 3, 4, 6, 8, 12, 16), _SLOTS, (1, 2, 3, 4, 6, 8, 12, 16, 24))
            families.append(Family(axes, lambda *values: (2, *values)))
            tiles = (tuple(range(1, 9)), (2, 3, 4, 6, 8, 12, 16))
            families.append(Family(tiles, lambda waves, rows: (3, waves, 0, rows)))
        return families

    def down(kernel: int, shares: int, k_slices: int, slots: int = 0) -> Plan | None:
        waves = shares * k_slices
        return (kernel, waves, k_slices, slots) if waves <= 16 else None

    slices = (1, 2, 4, 8)
    families = [
        Family((_SHARES, slices), lambda *values, k=kernel: down(k, *values))
        for kernel in (0, 1)
    ]
    if matrix_units:
        grid = (_SHARES, slices, _SLOTS[:-1])
        families += [
            Family(grid, lambda *values, k=kernel: down(k, *values))
            for kernel in (2, 3)
        ]
    return families


def tile_sizes(block_m: int) -> Iterator[Tile]:
    """Tiles worth trying; a thread holds at most 64 sums of one projection."""
    for order, block_n, warps, stages in itertools.product(
        orders_here(block_m), (32, 64, 128, 256), (2, 4, 8), stages_here()
    ):
        wide = block_n == 256 and order == "planes"
        if not wide and 8 <= block_m * block_n // (32 * warps) <= 64:
            yield Tile(block_m, block_n, warps, stages, order)

    if block_m <= 64 and ops.has_tiled():
        for row_tiles, warps in itertools.product((0.5, 1, 2, 4), (2, 4, 8)):
            yield Tile(block_m, int(32 * warps * row_tiles), warps, 2, TILED)


def orders_here(block_m: int) -> tuple[str, ...]:
    """Triton's orders of k to try. NVIDIA's wide matrix instruction, which has at least
    64 rows, takes the natural one from shared memory.
    """
    if block_m < 16:
        return ()
    if torch.version.hip or block_m >= 64:
        return ("natural", "planes")
    return ("planes",)


def stages_here() -> tuple[int, ...]:
    """Numbers of pipeline stages to try. On AMD, more than one crashes Triton and gains
    nothing.
    """
    return (1,) if torch.version.hip else (2, 3, 4)


# -------------------------------------------------------------------------- search
class Measured:
    """Remembers the result of ``measure`` for each candidate."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.times: dict[Any, float | None] = {}

    def __call__(self, candidate: Any) -> float | None:
        if candidate not in self.times:
            self.times[candidate] = self._measure(candidate)
        return self.times[candidate]

    def ranked(self) -> list[Any]:
        """The candidates that have a time, fastest first."""
        known = {plan: us for plan, us in self.times.items() if us is not None}
        return sorted(known, key=known.__getitem__)


def search(families: Sequence[Family], measure: Measured) -> list[Plan]:
    """Search for the fastest plan; returns the measured plans, fastest first.

    Most of the grid is left out. Of the starts (see ``Family.starts``) with the same
    kernel and the same value on the first axis, the search takes the fastest and goes
    to the fastest neighbour, first along one axis and then along several, until no
    neighbour is faster. From there it looks along each axis to its end, and goes on
    once from a faster plan. From the best of all it looks farther: along each axis,
    around it, and at the same point of kernels with the same axes. While one of these
    is faster, it goes on from there.
    """
    begins: dict[tuple[int, int], Place] = {}
    for number, family in enumerate(families):
        for point in family.starts():
            us = _time(family, point, measure)
            group = number, point[0]
            if us is not None and (group not in begins or us < begins[group][0]):
                begins[group] = us, family, point
    reached = [_descend(begin, measure) for begin in _promising(begins.values())]
    for place in _promising(reached):
        _, family, point = place
        along = [(family, other) for other in family.lines(point)]
        reached += _beyond(place, along, measure)
    while reached:
        place = min(reached, key=lambda place: place[0])
        _, family, point = place
        far = [(family, other) for other in family.lines(point)]
        far += [(other, point) for other in families if other.axes == family.axes]
        around = [(family, other) for other in family.box(point)]
        reached = _beyond(place, far, measure) or _beyond(place, around, measure)
    return measure.ranked()


Place = tuple[float, Family, tuple[int, ...]]
"""The microseconds of a plan, and where it is."""


def _promising(places: Collection[Place]) -> list[Place]:
    """Those that are not slower than the fastest by ``HOPELESS``."""
    limit = HOPELESS * min((us for us, _, _ in places), default=0.0)
    return [place for place in places if place[0] <= limit]


def _beyond(
    place: Place, far: list[tuple[Family, tuple[int, ...]]], measure: Measured
) -> list[Place]:
    """Descend from the fastest of ``far``; empty if none is faster than ``place``."""
    faster = [
        (us, family, point)
        for family, point in far
        if (us := _time(family, point, measure)) is not None and us < place[0]
    ]
    if not faster:
        return []
    return [_descend(min(faster, key=lambda place: place[0]), measure)]


def _descend(begin: Place, measure: Measured) -> Place:
    """Go to faster neighbours until there is none."""
    us, family, point = begin
    moved = True
    while moved:
        moved = False
        for points in family.neighbours(point):
            times = ((_time(family, near, measure), near) for near in points)
            known = [(time, near) for time, near in times if time is not None]
            fastest = min(known, default=None)
            if fastest is not None and fastest[0] < us:
                us, point = fastest
                moved = True
                break
    return us, family, point


def _time(family: Family, point: tuple[int, ...], measure: Measured) -> float | None:
    plan = family.plan(point)
    return None if plan is None else measure(plan)


def sweep(families: Sequence[Family], measure: Measured) -> list[Plan]:
    """Measure every plan of the grids; returns them, fastest first."""
    for family in families:
        for plan in family.plans():
            measure(plan)
    return measure.ranked()


# -------------------------------------------------------------------------- choice
class Choice(NamedTuple):
    """The result of ``finals``; times in microseconds."""

    winner: Any
    us: float
    current_us: float
    fastest_us: float
    """The lowest time of all candidates, even if the gain is within the noise."""


def alternate(
    entrants: Sequence[Any],
    sample: Sampler,
    step: Callable[[str], None] = lambda name: None,
) -> list[dict[int, list[float]]]:
    """Samples in microseconds of each entrant, by its index, in each of two passes.

    The entrants alternate, in the second pass in the opposite order.
    """
    samples: list[dict[int, list[float]]] = []
    for order in (range(len(entrants)), range(len(entrants) - 1, -1, -1)):
        step("finals")
        taken: dict[int, list[float]] = {index: [] for index in order}
        for _ in range(FINAL_REPLAYS // 3):
            for index in order:
                taken[index] += sample(entrants[index], 3)
        samples.append(taken)
    return samples


def finals(
    current: Any,
    finalists: Sequence[Any],
    sample: Sampler,
    step: Callable[[str], None] = lambda name: None,
) -> Choice:
    """Decide whether one of ``finalists`` replaces ``current``.

    All candidates ``alternate``. A finalist wins if in each pass it is faster by more
    than ``LEAST_GAIN`` and more than the noise. Both come from pairs of samples of the
    same round, because a GPU's clock can fall by several percent within a pass.
    """
    entrants = [current, *(f for f in finalists if f != current)]
    samples = alternate(entrants, sample, step)
    medians = [
        statistics.median(samples[0][index] + samples[1][index])
        for index in range(len(entrants))
    ]
    best = 0
    for index in range(1, len(entrants)):
        wins = all(_is_faster(taken[0], taken[index]) for taken in samples)
        if wins and medians[index] < medians[best]:
            best = index
    return Choice(entrants[best], medians[best], medians[0], min(medians))


def choose(
    current: Any,
    candidates: Sequence[Any],
    sample: Sampler,
    step: Callable[[str], None] = lambda name: None,
) -> Choice:
    """Measure all candidates, then hold ``finals`` among the best few."""
    measure = Measured(sifting(sample, step))
    for candidate in candidates:
        measure(candidate)
    return finals(current, measure.ranked()[:FINALISTS], sample, step)


def sifting(sample: Sampler, step: Callable[[str], None]) -> Measure:
    """A quick measurement: the lowest of a few samples."""

    def measure(candidate: Any) -> float:
        step("sifting")
        return min(sample(candidate, SIFT_REPLAYS))

    return measure


def _is_faster(old: list[float], new: list[float]) -> bool:
    """Whether ``new`` takes less time than ``old`` beyond the noise.

    The noise is half the interquartile range of the gains.
    """
    gains = [1 - after / before for before, after in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(gains, n=4)
    return middle > max(LEAST_GAIN, (high - low) / 2)
