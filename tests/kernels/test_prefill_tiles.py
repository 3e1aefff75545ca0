# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The tuning tables: their entries, the choice of tiles, and compiled kernels."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    PrefillTiles,
    Tile,
    prefill_from,
    prefill_tiles,
    row_padding,
    table_name,
)

CHECKOUT = Path(__file__).resolve().parents[2]
TABLES = {
    file.stem: json.loads(file.read_text())
    for file in hybrid_w4a16_tuning.TABLES.glob("*.json")
}
AMD_ARCHS = json.loads((CHECKOUT / "csrc/rocm/amd_archs.json").read_text())
ARCHS = [*AMD_ARCHS, "sm_80", "sm_90"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_that_is_built_for_has_an_entry(arch):
    entry = TABLES[table_name(arch)]
    assert entry["source"]
    pairs = entry.get("prefill_pairs", math.inf)
    begins = min(entry["prefill_from"], pairs / 8)
    assert prefill_from(table_name(arch), 128, 8) == begins > 8
    for row in entry["rows"]:
        for block_n, warps, stages, *order in (row["gate_up"], row["down"]):
            least = 8 if order == ["tiled"] else 16
            for size in (row["block_m"], block_n):
                assert size >= least and size & (size - 1) == 0
            assert warps in (2, 4, 8) and 1 <= stages <= 4


def test_architectures_without_a_table_of_their_own():
    archs = ("gfx1151", "gfx1150", "gfx1201", "sm_90", "gfx942")
    names = ["rdna", "rdna", "rdna4", "sm_90", "gfx942"]
    assert [table_name(arch) for arch in archs] == names


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_not_padded_where_nobody_measured_it(name):
    assert row_padding(name, 2048) == 0


@pytest.mark.parametrize(("k", "words"), [(2048, 32), (4096, 32), (1024, 0), (2880, 0)])
def test_a_table_can_pad_rows_of_a_multiple_of_1024_bytes(k, words, other_tables):
    other_tables("x", {"row_padding": 128})
    assert row_padding("x", k) == words


@pytest.fixture
def other_tables(monkeypatch, tmp_path):
    """Use tables that a test writes instead of the shipped ones."""
    monkeypatch.setattr(hybrid_w4a16_tuning, "TABLES", tmp_path)

    def forget():
        hybrid_w4a16_tuning.table.cache_clear()
        prefill_tiles.cache_clear()

    def write(name, table):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
        forget()

    yield write
    forget()


@pytest.mark.parametrize("family", TABLES)
def test_a_measured_case_gets_its_own_tiles(family):
    for row in TABLES[family]["rows"]:
        pairs = math.ceil(row["rows_per_expert"] * 128)
        found = prefill_tiles(family, pairs, 128, row["hidden"], row["intermediate"])
        block_m = row["block_m"]
        assert found == PrefillTiles(
            Tile(block_m, *row["gate_up"]), Tile(block_m, *row["down"])
        )


def test_the_nearest_case_is_taken(other_tables):
    def row(rows_per_expert, hidden, block_m):
        return {
            "hidden": hidden,
            "intermediate": 512,
            "rows_per_expert": rows_per_expert,
            "block_m": block_m,
            "gate_up": [32, 4, 2],
            "down": [64, 8, 3],
        }

    rows = [row(1, 1024, 16), row(64, 1024, 32), row(1, 8192, 64), row(64, 8192, 128)]
    other_tables("x", {"prefill_from": 9, "rows": rows})

    def chosen(pairs, hidden):
        return prefill_tiles("x", pairs, 100, hidden, 512).down.block_m

    assert [chosen(p, 2048) for p in (0, 500, 1000, 10**6)] == [16, 16, 32, 32]
    assert [chosen(p, 4096) for p in (0, 500, 1000, 10**6)] == [64, 64, 128, 128]


def test_prefill_begins_at_a_number_of_tokens_or_of_rows_per_expert(other_tables):
    other_tables("x", {"prefill_from": 65, "prefill_rows_per_expert": 16, "rows": []})
    assert prefill_from("x", 128, 8) == 65
    assert prefill_from("x", 8, 2) == 65
    assert prefill_from("x", 9, 4) == 37


def test_an_unknown_family_gets_small_tiles_and_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hybrid_w4a16_tuning.table.cache_clear()
    for pairs in (16, 4096):
        tiles = prefill_tiles("sm_999", pairs, 8, 1024, 1024)
        assert tiles.gate_up.block_m * tiles.gate_up.block_n <= 1024
    assert prefill_from("sm_999", 8, 2) == 32
    warnings = [r.getMessage() for r in caplog.records if "sm_999" in r.getMessage()]
    assert len(warnings) == 1 and "vllm-hybrid-w4a16 tune" in warnings[0]


def report(archs: str, environment: dict[str, str] | None = None) -> str:
    """Run prefill_report.py, which exits with 1 if a tile is over its limits."""
    command = [sys.executable, str(CHECKOUT / "benchmarks/prefill_report.py")]
    run = subprocess.run(
        [*command, "--arch", archs],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, **(environment or {})},
    )
    print(run.stdout, run.stderr[-3000:])
    assert run.returncode == 0
    return run.stdout


@pytest.mark.slow
def test_default_tiles_compile_within_the_limits():
    kernels = re.findall(r"^(gfx\d+) +(\w+)", report("gfx1151,gfx1201"), re.M)
    for arch in ("gfx1151", "gfx1201"):
        for kernel in ("gate_up", "down"):
            assert kernels.count((arch, kernel)) >= 8
        assert kernels.count((arch, "dequantize")) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("release", ["3.6.0", "3.7.1", "3.8.0", "installed"])
def test_triton_releases_in_the_field_compile_the_tiles(release, tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    if release != "installed":
        target = tmp_path / "triton"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run(
            [*install, "--target", str(target), f"triton=={release}"],
            check=True,
            timeout=900,
        )
        environment["PYTHONPATH"] = str(target)
    printed = report("gfx1151,gfx1100,gfx1201", environment)
    expected = r"\d+\.\d+\.\d+" if release == "installed" else re.escape(release)
    assert re.search(rf"^Triton {expected}", printed, re.M)


@pytest.mark.parametrize(
    ("tile", "gate_up", "down"),
    [
        # block_n, the columns of a block, is waves * tiles of 16 or 32 columns each
        (Tile(64, 64, 4, 2, "tiled"), (64, 4, 1), (64, 4, 1)),
        (Tile(8, 512, 4, 2, "tiled"), (8, 4, 8), (8, 4, 4)),
        (Tile(16, 128, 8, 2, "tiled"), (16, 8, 1), (16, 8, 1)),
    ],
    ids=str,
)
def test_launches_of_the_tiled_kernels(tile, gate_up, down):
    assert tile.tiled and tile.natural
    assert (tile.launch(columns=16), tile.launch(columns=32)) == (gate_up, down)


def test_the_output_of_a_tiled_gate_up_is_not_in_plane_order():
    tiled, natural = Tile(16, 64, 4, 2, "tiled"), Tile(16, 64, 4, 3, "natural")
    PrefillTiles(tiled, natural)
    PrefillTiles(natural, tiled)
    with pytest.raises(ValueError, match='the output of a "tiled" gate_up is in natur'):
        PrefillTiles(tiled, Tile(16, 64, 4, 3))
