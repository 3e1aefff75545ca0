# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The tuning tables: where prefill begins and how its GEMMs are cut up.

One file per device in ``configs/hybrid_w4a16``::

    source        what the numbers were measured on
    prefill_from  least number of tokens that prefill takes
    row_padding   bytes added to packed weight rows of a multiple of 1024 bytes
    rows          prefill tiles by shape: hidden, intermediate, rows_per_expert;
                  block_m, and [block_n, num_warps, num_stages] of gate_up and down

``benchmarks/tune_prefill.py`` measures a table on the machine at hand.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger(__name__)

TABLES = Path(__file__).parent / "configs/hybrid_w4a16"


def table_name(arch: str) -> str:
    """Name of the table for an architecture such as "gfx1151" or "sm_90".

    RDNA architectures without a table of their own share ``rdna``.
    """
    if not (TABLES / f"{arch}.json").is_file() and arch.startswith(("gfx11", "gfx12")):
        return "rdna"
    return arch


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


# For a device that nobody has measured: small enough for every device's registers and
# shared memory.
_DEFAULT: dict[str, Any] = {
    "prefill_from": 32,
    "row_padding": 0,
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
def table(name: str) -> dict[str, Any]:
    """The table ``name``; one warning and small tiles where there is none."""
    path = TABLES / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    logger.warning(
        "HybridW4A16 MoE: no prefill tiles were measured for %s; using small ones. "
        "benchmarks/tune_prefill.py measures them.",
        name,
    )
    return _DEFAULT


def prefill_from(name: str) -> int:
    """Least number of tokens that prefill takes; fewer go to decode."""
    return table(name)["prefill_from"]


def row_padding(name: str, k: int) -> int:
    """int32 words to pad a packed row of ``k`` int4 weights with.

    Caches of RDNA may alias rows whose stride is a multiple of 1024 bytes. Upstream,
    128 bytes more took 13 to 23 % off the time to first token of dense int4 kernels on
    gfx1151. It was not measured on these kernels, so no shipped table pads.
    """
    return table(name)["row_padding"] // 4 if k % 2048 == 0 else 0


@functools.lru_cache(maxsize=1024)
def prefill_tiles(
    name: str, pairs: int, num_experts: int, hidden: int, intermediate: int
) -> PrefillTiles:
    """Tiles of the measured case that is nearest, on a logarithmic scale.

    Args:
        name: of the table, see ``table_name``.
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

    row = min(table(name)["rows"], key=distance)
    block_m = row["block_m"]
    return PrefillTiles(Tile(block_m, *row["gate_up"]), Tile(block_m, *row["down"]))
