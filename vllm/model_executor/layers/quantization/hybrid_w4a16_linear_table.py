# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What was measured of dense int4 linears, by ``vllm-hybrid-w4a16 tune`` for example.

``linears`` in a table (``hybrid_w4a16_tuning``) is a list of entries, one for each
linear and device. The owner's precede shipped ones::

    outputs, inputs, group_size, zero_points, dtype   the linear on one rank
    compute_units, kernel_version, source
    peer    name of the kernel that vLLM would choose instead, or null
    rows    [{"rows", "way", "us", "peer_us"}, ...] by number of activation rows; way:
            "skinny", "tiles" or "dequantized", the fastest of ours, or null if its
            result was wrong; peer_us is null if there is no peer for these rows
"""

import bisect
import functools
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning

logger = init_logger(__name__)

SKINNY, TILES, DEQUANTIZED = "skinny", "tiles", "dequantized"
FEW = 8
"""Rows of a decode step, for which our kernel has to be the faster one."""
MOST = 1.1
"""Times the peer's time that our kernel may take for any other number of rows."""
ALIKE = 1.1
"""Ratio of outputs up to which linears are alike: a pair of linears in one launch has
some more outputs than the larger one."""


@dataclass(frozen=True)
class LinearShape:
    """A dense int4 linear on one rank; dtype: of the activations, bf16 or fp16."""

    outputs: int
    inputs: int
    group_size: int
    zero_points: bool
    dtype: str

    def __str__(self) -> str:
        kind = "asym" if self.zero_points else "sym"
        return (
            f"linear {self.outputs} x {self.inputs}, g{self.group_size}, {self.dtype}, "
            f"{kind}"
        )


def entry_shape(entry: dict[str, Any]) -> LinearShape:
    """The linear of an entry."""
    return LinearShape(*(entry[name] for name in LinearShape.__dataclass_fields__))


def shape_fields(shape: LinearShape) -> dict[str, Any]:
    """A linear as the fields of an entry."""
    return asdict(shape)


def entries(arch: str) -> list[dict[str, Any]]:
    """``linears`` of the owner's table; if they are broken, none and a warning."""
    path = tuning.owner_table(arch)
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text()).get("linears", [])
        for entry in found:
            entry_shape(entry), entry["compute_units"], entry["kernel_version"]
            why_not(entry)
            _bounds(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "HybridW4A16 MoE: linears in %s are not used (%s: %s); "
            "`vllm-hybrid-w4a16 tune` measures them",
            path,
            type(error).__name__,
            error,
        )
        return []
    return found


def write(arch: str, entry: dict[str, Any]) -> Path:
    """Add an entry to the owner's table; it replaces one of the same linear and device.

    Returns the table's path.
    """
    forget()
    return tuning.write_to_list(arch, "linears", entries(arch), entry, entry_shape)


def usable_entries(arch: str, compute_units: int) -> list[dict[str, Any]]:
    """The entries of this device and of these kernels: the owner's, then shipped."""
    shipped = tuning.table(tuning.table_name(arch)).get("linears", [])
    return [
        entry
        for entry in [*entries(arch), *shipped]
        if tuning.is_usable(entry, compute_units)
    ]


@functools.lru_cache(maxsize=1024)
def find(arch: str, compute_units: int, shape: LinearShape) -> dict[str, Any] | None:
    """The entry of a linear on a device, if there is one."""
    for entry in usable_entries(arch, compute_units):
        if entry_shape(entry) == shape:
            return entry
    return None


def way(
    arch: str, compute_units: int, outputs: int, inputs: int, rows: int
) -> str | None:
    """Our fastest way for the nearest measured number of rows, on a logarithmic scale.

    That of the linear with as many inputs and the nearest number of outputs; ``None``
    if no number was within ``ALIKE``, or for fewer rows than were measured. ``SKINNY``
    may be the answer for more rows than it takes.
    """
    bounds, ways = _ways(arch, compute_units, outputs, inputs)
    return ways[bisect.bisect(bounds, rows)]


@functools.lru_cache(maxsize=1024)
def _ways(
    arch: str, compute_units: int, outputs: int, inputs: int
) -> tuple[list[float], list[str | None]]:
    """Bounds between numbers of rows, and the ways between the bounds."""

    def distance(entry: dict[str, Any]) -> float:
        return abs(math.log(entry["outputs"] / outputs))

    alike = [
        entry
        for entry in usable_entries(arch, compute_units)
        if entry["inputs"] == inputs and distance(entry) <= math.log(ALIKE)
    ]
    return _bounds(min(alike, key=distance)) if alike else ([], [None])


def _bounds(entry: dict[str, Any]) -> tuple[list[float], list[str | None]]:
    """``None`` is the way of fewer rows than were measured."""
    rows = sorted(entry["rows"], key=lambda row: row["rows"])
    numbers = [row["rows"] for row in rows]
    bounds = [math.sqrt(fewer * more) for fewer, more in itertools.pairwise(numbers)]
    return [*numbers[:1], *bounds], [None, *(row["way"] for row in rows)]


def forget() -> None:
    """Read the owner's table again at the next question."""
    find.cache_clear()
    _ways.cache_clear()


def why_not(entry: dict[str, Any]) -> str | None:
    """Why vLLM's own kernel is the better choice, or ``None``.

    Ours has to be right, faster for up to ``FEW`` rows together, and must not take more
    than ``MOST`` times as long for any number of rows.
    """
    wrong = [row["rows"] for row in entry["rows"] if row["way"] is None]
    if wrong:
        return (
            f"its results were wrong in `tune` for {wrong[0]} rows, "
            "`vllm-hybrid-w4a16 selftest` says more"
        )
    measured = [row["rows"] for row in entry["rows"]]
    if min(measured, default=FEW + 1) > FEW or max(measured, default=0) <= FEW:
        return "`tune` did not compare all numbers of rows, it was interrupted"
    both = [row for row in entry["rows"] if row["peer_us"] is not None]
    few = [row for row in both if row["rows"] <= FEW]
    ours, peers = (sum(row[key] for row in few) for key in ("us", "peer_us"))
    if few and ours >= peers:
        return (
            f"{entry['peer']} was faster in `tune`: {peers:.0f} against {ours:.0f} us "
            f"for {', '.join(str(row['rows']) for row in few)} rows together"
        )
    for row in both:
        if row["us"] > MOST * row["peer_us"]:
            return (
                f"{entry['peer']} was faster in `tune` for {row['rows']} rows: "
                f"{row['peer_us']:.0f} against {row['us']:.0f} us"
            )
    return None


def reason(arch: str, compute_units: int, shape: LinearShape) -> str | None:
    """Why our kernel is not used by default on an AMD GPU, or ``None``."""
    entry = find(arch, compute_units, shape)
    if entry is None:
        return (
            "not compared with vLLM's RDNA kernel yet "
            "(`vllm-hybrid-w4a16 tune CHECKPOINT` does)"
        )
    return why_not(entry)
