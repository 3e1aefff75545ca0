# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Where prefill begins and how its GEMMs are cut up, per family of devices.

The numbers are in ``configs/hybrid_w4a16_tiles.json``, one entry per family with the
source of its numbers; ``benchmarks/tune_prefill.py`` measures an entry on the machine
at hand.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger(__name__)

# among vLLM's own tables: what it packs into its wheel
TABLE = Path(__file__).parents[1] / "configs/hybrid_w4a16_tiles.json"


@dataclass(frozen=True)
class Tile:
    """How a GEMM is cut up.

    ``block_m`` rows of activations (a power of two, 16 or more) times ``block_n``
    weight rows (of gate and of up each), by ``num_warps`` warps, loads running
    ``num_stages`` steps ahead.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """Tiles of the two GEMMs; they share the sorted pairs, hence ``block_m``."""

    gate_up: Tile
    down: Tile


# For a family that nobody has measured: small enough for every device's registers and
# shared memory.
_DEFAULT_FAMILY: dict[str, Any] = {
    "prefill_from": 32,
    "rows": [
        {
            "hidden": 2048,
            "intermediate": 768,
            "rows_per_expert": 1.0,
            "block_m": 16,
            "gate_up": [32, 4, 2],
            "down": [64, 4, 2],
        }
    ],
}


@functools.cache
def _family(name: str) -> dict[str, Any]:
    table = json.loads(TABLE.read_text())
    if name in table:
        return table[name]
    logger.warning(
        "HybridW4A16 MoE: no prefill tiles were measured for %s; using small ones. "
        "benchmarks/tune_prefill.py measures them.",
        name,
    )
    return _DEFAULT_FAMILY


def prefill_from(family: str) -> int:
    """Least number of tokens that prefill takes; fewer go to decode."""
    return _family(family)["prefill_from"]


@functools.lru_cache(maxsize=1024)
def prefill_tiles(
    family: str, pairs: int, num_experts: int, hidden: int, intermediate: int
) -> PrefillTiles:
    """Tiles of the measured case that is nearest, on a logarithmic scale.

    Args:
        family: a key of the table, such as ``"gfx1151"``.
        pairs: M * top_k.
        num_experts: experts that the pairs spread over, on all ranks.
        hidden, intermediate: sizes on this rank.
    """

    def distance(row: dict[str, Any]) -> float:
        return (
            abs(math.log(row["rows_per_expert"] * num_experts / max(pairs, 1)))
            + abs(math.log(row["hidden"] / hidden))
            + abs(math.log(row["intermediate"] / intermediate))
        )

    row = min(_family(family)["rows"], key=distance)
    block_m = row["block_m"]
    return PrefillTiles(Tile(block_m, *row["gate_up"]), Tile(block_m, *row["down"]))
