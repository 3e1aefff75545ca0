# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The tuning tables: launch plans for decode, the start of prefill, tiles for prefill.

There is one file per device in ``configs/hybrid_w4a16``. The owner's tables have the
same form, are in ``VLLM_CONFIG_ROOT/hybrid_w4a16`` and take precedence::

    source        what the numbers were measured on
    prefill_from  lowest number of tokens that prefill handles
    prefill_rows_per_expert  ... or fewer, if experts get more rows each; optional
    row_padding   bytes added to packed weight rows of a multiple of 1024 bytes
    rows          prefill tiles by shape: hidden, intermediate, rows_per_expert;
                  block_m, and [block_n, num_warps, num_stages, order] of gate_up and
                  down; see ``Tile``
    shapes        measurements for one shape, see ``MoEShape``: compute_units and
                  kernel_version, prefill_from, rows as above, and decode: by tokens
                  the plans of gate_up and down, as the ops take them, or null
    linears       dense int4 linears, see ``hybrid_w4a16_linear_table``; optional

A lookup uses the nearest shape. If none is near, the rule in the op library plans
decode, and prefill begins at the device's ``prefill_from``.
"""

# fork: begin overlay
import contextlib

# fork: end
import functools
import json
import math

# fork: begin overlay
from collections.abc import Callable

# fork: end
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.logger import init_logger

logger = init_logger(__name__)

TABLES = Path(__file__).parent / "configs/hybrid_w4a16"

# What the log adds where a measured table would help.
_MEASURE = _MEASURE_NEW = _MEASURE_RULE = ""
# fork: begin overlay
_MEASURE = "; `vllm-hybrid-w4a16 tune` measures them"
_MEASURE_RULE = ", `vllm-hybrid-w4a16 tune` measures"
_MEASURE_NEW = "; `vllm-hybrid-w4a16 tune` writes a new one"
# fork: end


def table_name(arch: str) -> str:
    """Name of the table for an architecture such as "gfx1151" or "sm_90".

    Without a table of their own RDNA 3 architectures share ``rdna``, and RDNA 4
    ``rdna4``, whose kernels need more registers.
    """
    if (TABLES / f"{arch}.json").is_file():
        return arch
    return {"gfx11": "rdna", "gfx12": "rdna4"}.get(arch[:5], arch)


# fork: begin overlay
TILED = "tiled"
# fork: end
ORDERS = (
    "planes",
    "natural",
    # fork: begin overlay
    TILED,
    # fork: end
)


@dataclass(frozen=True)
class Tile:
    """How a GEMM is divided into blocks.

    A block is ``block_m`` rows of activations (a power of two, at least 16) times
    ``block_n`` weight rows (of gate and of up each). ``num_warps`` warps compute it,
    and loads run ``num_stages`` steps ahead. ``order`` is "planes" or "natural", see
    ``hybrid_w4a16_triton``. Raises ``ValueError`` for another order.
    """

    # fork: begin overlay
    # With "tiled" the CUDA ops of that name run instead of Triton: natural order,
    # block_m 8, 16, 32 or 64, up to 8 warps, and always 2 stages.
    # fork: end

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    order: str = "planes"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(
                f"prefill tile: expected an order of {', '.join(ORDERS)}, "
                f"got {self.order!r}"
            )

    @functools.cached_property
    def natural(self) -> bool:
        """Whether the activations are in their natural order."""
        return self.order != "planes"

    # fork: begin overlay
    @property
    def tiled(self) -> bool:
        """Whether the tiled CUDA ops run."""
        return self.order == TILED

    def launch(self, columns: int) -> tuple[int, int, int]:
        """The ops' tile, for a kernel whose waves multiply ``columns`` at a time."""
        row_tiles = max(1, self.block_n // (columns * self.num_warps))
        return self.block_m, self.num_warps, row_tiles

    # fork: end


@dataclass(frozen=True)
class PrefillTiles:
    """Tiles of the two GEMMs; they share the sorted pairs and thus ``block_m``."""

    gate_up: Tile
    down: Tile
    # fork: begin overlay

    def __post_init__(self) -> None:
        if self.gate_up.tiled and not self.down.natural:
            raise ValueError(
                'prefill tiles: the output of a "tiled" gate_up is in natural order, '
                f"down's tile is {self.down}"
            )

    # fork: end


# For a device without measurements: small enough for the registers and shared memory of
# every device.
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
    """The table ``name``; if there is none, small tiles and one warning."""
    path = TABLES / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    logger.warning(
        "HybridW4A16 MoE: no prefill tiles were measured for %s, using small ones%s",
        name,
        _MEASURE,
    )
    return _DEFAULT


def prefill_from(name: str, num_experts: int, top_k: int) -> int:
    """Lowest number of tokens that prefill handles; decode handles fewer.

    Args:
        name: of the table, see ``table_name``.
        num_experts: experts on all ranks, over which the tokens spread.
        top_k: experts per token.
    """
    entry = table(name)
    tokens = entry["prefill_from"]
    rows = entry.get("prefill_rows_per_expert")
    if rows is not None:
        tokens = min(tokens, rows * num_experts // top_k + 1)
    # fork: begin overlay
    # decode sorts a block's pairs (token, expert) in every block
    pairs = entry.get("prefill_pairs")
    if pairs is not None:
        tokens = min(tokens, -(-pairs // top_k))
    # fork: end
    return tokens


def row_padding(name: str, k: int) -> int:
    """Number of int32 words to add to a packed row of ``k`` int4 weights.

    RDNA caches may alias rows whose stride is a multiple of 1024 bytes. Upstream, 128
    more bytes reduced the time to first token of dense int4 kernels on gfx1151 by 13 to
    23 %. It was not measured on these kernels, so no shipped table pads.
    """
    return table(name)["row_padding"] // 4 if k % 2048 == 0 else 0


@functools.lru_cache(maxsize=1024)
def prefill_tiles(
    name: str, pairs: int, num_experts: int, hidden: int, intermediate: int
) -> PrefillTiles:
    """Tiles of the nearest measured case, on a logarithmic scale.

    Args:
        name: of the table, see ``table_name``.
        pairs: M * top_k.
        num_experts: experts on all ranks, over which the pairs spread.
        hidden, intermediate: sizes on this rank.
    """
    rows = table(name)["rows"]
    return nearest_tiles(rows, pairs, num_experts, hidden, intermediate)


# fork: begin lm_head
@functools.lru_cache(maxsize=4096)
def dense_tile(arch: str, rows: int, outputs: int, inputs: int) -> Tile:
    """The tile of a dense linear ``outputs x inputs`` for ``rows`` rows.

    From the table's ``dense_rows``, which have the form of ``rows``, if it has any.
    arch: such as "gfx1151".
    """
    entry = table(table_name(arch))
    cases = entry.get("dense_rows", entry["rows"])
    return nearest_tiles(cases, rows, 1, outputs, inputs).down


@functools.cache
def dequantize_from(arch: str) -> float:
    """Lowest number of rows for which a dense linear's weights are dequantized first.

    Infinite where it was not measured. arch: such as "gfx1151".
    """
    return table(table_name(arch)).get("dequantize_from", float("inf"))


# fork: end
def nearest_tiles(
    rows: list[dict[str, Any]],
    pairs: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
) -> PrefillTiles:
    """As ``prefill_tiles``, from the ``rows`` of a table or of an entry."""

    def distance(row: dict[str, Any]) -> float:
        return (
            abs(math.log(row["rows_per_expert"] * num_experts / max(pairs, 1)))
            + abs(math.log(row["hidden"] / hidden))
            + abs(math.log(row["intermediate"] / intermediate))
        )

    row = min(rows, key=distance)
    block_m = row["block_m"]
    return PrefillTiles(Tile(block_m, *row["gate_up"]), Tile(block_m, *row["down"]))


# Increase this when a kernel changes the meaning of a plan or which plan is fastest:
# entries with another version are not used.
KERNEL_VERSION = 2
# Entries further than this from a shape are not used for it. A factor of 1.5 in one
# size is 0.4.
_NEAR = 0.45

Plan = tuple[int, ...]


@dataclass(frozen=True)
class MoEShape:
    """The key of a table lookup: sizes of one rank's layer."""

    experts: int
    """Experts on all ranks, over which the pairs of a batch spread."""
    top_k: int
    hidden: int
    intermediate: int
    """On this rank."""
    group_size: int
    dtype: str
    """bf16 or fp16."""
    # fork: begin token
    shared: int = 0
    """On this rank, intermediate size of the shared expert in the launches; 0: none."""
    # fork: end

    def __str__(self) -> str:
        text = (
            f"{self.experts} experts, top-{self.top_k}, {self.hidden} x "
            f"{self.intermediate}, g{self.group_size}, {self.dtype}"
        )
        # fork: begin token
        if self.shared:
            text += f", shared expert {self.shared}"
        # fork: end
        return text


@dataclass(frozen=True)
class Tuned:
    """The choice for one shape."""

    arch: str
    shape: MoEShape
    prefill_from: int
    """Lowest number of tokens that prefill handles."""
    origin: str
    """Its source: "owner", "shipped", or "rule" (with the device's tiles)."""
    entry: dict[str, Any] | None = None
    """The table entry, if one is near."""
    exact: bool = False
    decode: dict[int, tuple[Plan | None, Plan | None]] = field(default_factory=dict)
    """Plans of gate_up and down by number of tokens."""
    _tiles: dict[int, PrefillTiles] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def decode_plans(self, tokens: int) -> tuple[Plan | None, Plan | None]:
        """The plans for the smallest measured number of tokens >= ``tokens``."""
        for measured, plans in self.decode.items():
            if measured >= tokens:
                return plans
        return None, None

    def prefill_tiles(self, pairs: int) -> PrefillTiles:
        """As the module's ``prefill_tiles``; computed once for each ``pairs``."""
        tiles = self._tiles.get(pairs)
        if tiles is None:
            shape = self.shape
            sizes = (pairs, shape.experts, shape.hidden, shape.intermediate)
            if self.entry is not None and self.entry.get("rows"):
                tiles = nearest_tiles(self.entry["rows"], *sizes)
            else:
                tiles = prefill_tiles(table_name(self.arch), *sizes)
            self._tiles[pairs] = tiles
        return tiles


def _is(tuned: Tuned, arch: str, shape: MoEShape) -> bool:
    return (tuned.arch, tuned.shape) == (arch, shape)


# All lookups in this process, in order.
_used: list[Tuned] = []


def lookup(arch: str, compute_units: int, shape: MoEShape) -> Tuned:
    """Look up a shape on a device, first in the owner's table.

    Args:
        arch: such as "gfx1151" or "sm_90".
        compute_units: of the device; entries for another number are not used.
    """
    known = next((tuned for tuned in _used if _is(tuned, arch, shape)), None)
    if known is None:
        known = _lookup(arch, compute_units, shape)
        _used.append(known)
    return known


# fork: begin overlay
def forget() -> None:
    """Forget all lookups, so that the tables are read again."""
    _used.clear()
    table.cache_clear()
    prefill_tiles.cache_clear()
    dense_tile.cache_clear()
    dequantize_from.cache_clear()


# fork: end
def _lookup(arch: str, compute_units: int, shape: MoEShape) -> Tuned:
    shipped = table(table_name(arch)).get("shapes", [])
    for origin, entries in (("owner", owner_entries(arch)), ("shipped", shipped)):
        usable = [
            entry
            for entry in entries
            if entry["compute_units"] == compute_units
            and entry["kernel_version"] == KERNEL_VERSION
        ]
        nearest = min(usable, key=lambda e: distance(e, shape), default=None)
        if nearest is not None and distance(nearest, shape) <= _NEAR:
            decode = {
                row["tokens"]: (as_plan(row["gate_up"]), as_plan(row["down"]))
                for row in sorted(nearest["decode"], key=lambda row: row["tokens"])
            }
            exact = distance(nearest, shape) == 0
            begin = nearest.get("prefill_from") or _rule(arch, shape)
            return Tuned(arch, shape, begin, origin, nearest, exact, decode)
    return Tuned(arch, shape, _rule(arch, shape), "rule")


def as_plan(values: list[int] | None) -> Plan | None:
    """The plan of an entry in the form that the ops take."""
    return None if values is None else tuple(values)


def _rule(arch: str, shape: MoEShape) -> int:
    return prefill_from(table_name(arch), shape.experts, shape.top_k)


def distance(entry: dict[str, Any], shape: MoEShape) -> float:
    """Distance between an entry and a shape; 0 if the shapes are equal."""
    spread = entry["top_k"] * shape.experts / (entry["experts"] * shape.top_k)
    sizes = (
        spread,
        entry["experts"] / shape.experts,
        entry["hidden"] / shape.hidden,
        entry["intermediate"] / shape.intermediate,
        # a quarter as many groups is only a little less work
        (entry["group_size"] / shape.group_size) ** 0.25,
    )
    far = sum(abs(math.log(ratio)) for ratio in sizes)
    # fork: begin token
    shared = entry.get("shared", 0)
    if (shared > 0) != (shape.shared > 0):
        return math.inf  # a shared expert takes part of the device
    if shared:
        far += abs(math.log(shared / shape.shared))
    # fork: end
    return far + 0.05 * (entry["dtype"] != shape.dtype)


def owner_table(arch: str) -> Path:
    """Path of the owner's table for an architecture, whether or not it exists."""
    return Path(envs.VLLM_CONFIG_ROOT) / "hybrid_w4a16" / f"{arch}.json"


def owner_entries(arch: str) -> list[dict[str, Any]]:
    """``shapes`` of the owner's table; if it is broken, none and a warning."""
    path = owner_table(arch)
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text())["shapes"]
        for entry in entries:
            distance(entry, entry_shape(entry))
            entry["compute_units"], entry["kernel_version"]
            for row in entry["decode"]:
                row["tokens"], row["gate_up"], row["down"]
            if entry.get("rows"):
                nearest_tiles(entry["rows"], 1, 1, 1, 1)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        logger.warning(
            "HybridW4A16 MoE: %s is not a tuning table (%s: %s) and is not used%s",
            path,
            type(error).__name__,
            error,
            _MEASURE_NEW,
        )
        return []
    return entries


_FIELDS = ("experts", "top_k", "hidden", "intermediate", "group_size", "dtype")


# fork: begin overlay
def is_usable(entry: dict[str, Any], compute_units: int) -> bool:
    """Whether an entry is of this device and of these kernels."""
    return (
        entry["compute_units"] == compute_units
        and entry["kernel_version"] == KERNEL_VERSION
    )


def write_owner_entry(arch: str, entry: dict[str, Any]) -> Path:
    """Add an entry of an MoE shape to the owner's table, see ``write_to_list``."""
    return write_to_list(arch, "shapes", owner_entries(arch), entry, entry_shape)


def write_to_list(
    arch: str,
    name: str,
    entries: list[dict[str, Any]],
    entry: dict[str, Any],
    shape_of: Callable[[dict[str, Any]], Any],
) -> Path:
    """Add an entry to ``entries``, the list ``name`` of the owner's table.

    It replaces one of the same shape and compute units. The table's other list of
    "shapes" and "linears" is kept, and the file is replaced as a whole. Returns its
    path.
    """
    key = entry["compute_units"], shape_of(entry)
    kept = [e for e in entries if (e["compute_units"], shape_of(e)) != key]
    path = owner_table(arch)
    lists: dict[str, list[dict[str, Any]]] = {"shapes": [], "linears": []}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        other = "linears" if name == "shapes" else "shapes"
        members = json.loads(path.read_text())[other]
        lists[other] = [entry for entry in members if isinstance(entry, dict)]
    lists[name] = [*kept, entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [f'{{\n "arch": {json.dumps(arch)}']
    for title, listed in lists.items():
        entries_text = ",\n".join(map(_entry_text, listed))
        text.append(f' "{title}": [\n{entries_text}\n ]')
    new = path.with_suffix(".new")
    new.write_text(",\n".join(text) + "\n}\n")
    new.replace(path)
    return path


def _entry_text(entry: dict[str, Any]) -> str:
    """The entry as JSON with one line per measured case."""
    lines = []
    for name, value in entry.items():
        if name in ("decode", "rows"):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f'   "{name}": [\n{rows}\n   ]')
        else:
            lines.append(f"   {json.dumps(name)}: {json.dumps(value)}")
    return "  {\n" + ",\n".join(lines) + "\n  }"


def shape_fields(shape: MoEShape) -> dict[str, Any]:
    """A shape as the fields of an entry."""
    return asdict(shape)


# fork: end
def entry_shape(entry: dict[str, Any]) -> MoEShape:
    """The shape of an entry."""
    shape = MoEShape(**{name: entry[name] for name in _FIELDS})
    # fork: begin token
    shape = MoEShape(**{**vars(shape), "shared": entry.get("shared", 0)})
    # fork: end
    return shape


def used_text() -> str | None:
    """One line about the lookups in this process; ``None`` if there were none."""
    if not _used:
        return None
    files = []
    for origin in ("owner", "shipped"):
        hits = sum(tuned.origin == origin for tuned in _used)
        if hits:
            arch = _used[0].arch
            path = owner_table(arch)
            if origin == "shipped":
                path = TABLES / f"{table_name(arch)}.json"
            files.append(f"{hits} from {path}")
    ruled = sum(tuned.origin == "rule" for tuned in _used)
    if ruled:
        files.append(f"{ruled} by rule{_MEASURE_RULE}")
    return f"tuning of {len(_used)} shapes: {'; '.join(files)}"
