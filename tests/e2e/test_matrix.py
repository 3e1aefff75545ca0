# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Tiny checkpoints in every format through ``LLM(...)``, deployed in several ways.

The cells here cover every pair of format, symmetry, group size, dtype and sharding.
``make matrix`` runs the whole matrix; ``matrix.json`` has its results, from which the
table in docs/support.md is made. On a GPU machine the same cells run on the GPU, and
additional ones: those that the CPU does not support (sleep mode, Qwen3.5 in fp16), and,
with two GPUs, every way to deploy two models on them. ``matrix.py --gpu`` runs these
many at a time and writes their table.
"""

import itertools

import pytest
import torch

from ..support import matrix
from ..support.matrix_cells import (
    DEPLOYED,
    SHARDINGS,
    Cell,
    cut_groups,
    full,
    grid,
    on_gpus,
    shared_experts,
    subset,
)
from ..support.tiny_models import DenseReference, Recipe, make_checkpoint, prompts

GPUS = torch.cuda.device_count()
SHORT_RUN = [*subset(), *cut_groups()[:2]]
LONG_RUN = cut_groups()[2:] + shared_experts()[1:]
CELLS = list(dict.fromkeys([*SHORT_RUN, *on_gpus(), *LONG_RUN]))
ON_CPU = [*SHORT_RUN, *LONG_RUN]
RUN = [cell for cell in CELLS if (cell.ranks <= GPUS if GPUS else cell in ON_CPU)]
SHARDED = [Cell(DEPLOYED, "float16", name) for name in SHARDINGS]
TIMEOUT_S = 1100.0  # pytest-timeout's is 1200


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="session")
def answers(request, folder):
    """Run the cells of the selected tests (pytest's -k)."""
    asked = set()
    for item in request.session.items:
        if item.originalname == test_cell.__name__:
            asked.add(item.callspec.params["cell"])
        elif item.originalname == test_shards_give_the_tokens_of_one_rank.__name__:
            asked.update(SHARDED)
    return matrix.run_cells([c for c in RUN if c in asked], folder, TIMEOUT_S)


@pytest.fixture(scope="session")
def verdicts(answers, folder):
    return matrix.judge(answers, folder)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=pytest.mark.nightly if cell in LONG_RUN else ())
        for cell in CELLS
    ],
    ids=[cell.name for cell in CELLS],
)
def test_cell(cell, verdicts):
    if cell not in RUN:
        pytest.skip(f"needs {cell.ranks} GPU(s), found {GPUS}")
    verdict = verdicts[cell]
    print(verdict)
    assert verdict["ok"], verdict.get("problem", verdict)


@pytest.mark.e2e
def test_shards_give_the_tokens_of_one_rank(answers):
    if GPUS == 1:
        pytest.skip("needs 2 GPUs, found 1")
    tokens = [[a["tokens"] for a in answers[cell]["answers"]] for cell in SHARDED]
    assert tokens[0] == tokens[1] == tokens[2]


def test_subset_has_every_pair():
    def pairs(cells):
        values = [
            (
                c.recipe.format,
                c.recipe.symmetric,
                c.recipe.group_size,
                c.dtype,
                c.deployment,
            )
            for c in cells
        ]
        return {
            pair
            for each in values
            for pair in itertools.combinations(enumerate(each), 2)
        }

    assert pairs(grid()) <= pairs(subset())


def test_a_damaged_expert_would_show(tmp_path):
    """The tolerances detect one damaged expert: gate and up swapped in one of 8."""
    folder = make_checkpoint(Recipe(), tmp_path)
    intact, damaged = DenseReference(folder), DenseReference(folder)
    gate_up = damaged.model.model.layers[1].mlp.experts.gate_up_proj.data
    gate_up[2] = gate_up[2].roll(gate_up.shape[1] // 2, 0)
    differences = [
        (intact.logprobs(tokens) - damaged.logprobs(tokens)).abs().mean()
        for tokens in prompts(4, 24)
    ]
    print(f"{torch.stack(differences).mean():.3f} nats")
    assert torch.stack(differences).mean() > 2 * max(matrix.MAX_DIFFERENCE.values())


def test_fp16_tokens_may_part_at_a_tie_alone(tmp_path):
    """A stand-in for the reference sees tokens 1 and 2 tie, and 3 far below."""
    logprobs = torch.tensor([-0.7, -0.705, -5.0]).log_softmax(0)

    class Reference:
        def __init__(self, folder):
            pass

        def logprobs(self, tokens):
            row = torch.cat([torch.tensor([-20.0]), logprobs])
            return row.expand(len(tokens), 4)

    def answer(*tokens):
        said = [row.item() for row in logprobs[torch.tensor(tokens) - 1]]
        one = {"prompt": [3], "tokens": list(tokens), "said": said, "seen": None}
        return {"answers": [one]}

    def verdict(*tokens):
        alone, cell = (Cell(DEPLOYED, "float16", name) for name in SHARDINGS[:2])
        answers = {alone: answer(1, 1, 1), cell: answer(*tokens)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrix, "DenseReference", Reference)
            return matrix.judge(answers, tmp_path)[cell]

    same = verdict(1, 1, 1)
    assert same["ok"] and same["same_tokens"] and "parting" not in same
    tie = verdict(1, 2, 1)
    assert tie["ok"] and not tie["same_tokens"]
    assert tie["parting"] == pytest.approx(0.005, abs=1e-3)
    other = verdict(1, 3, 1)
    assert not other["ok"] and other["parting"] > 4


def test_the_table_is_that_of_the_results():
    results = matrix.load_results()
    cells = full()
    assert {Cell.from_json(result["cell"]) for result in results} <= set(cells)
    of_gpus = matrix.load_results(matrix.GPU_RESULTS)
    assert {Cell.from_json(result["cell"]) for result in of_gpus} <= set(on_gpus())
    text = matrix.DOCUMENT.read_text()
    between = text.split(matrix.BEGIN)[1].split(matrix.END)[0]
    assert between == matrix.table(results)
    between = text.split(matrix.GPU_BEGIN)[1].split(matrix.GPU_END)[0]
    assert between == matrix.gpu_table(of_gpus)


def test_the_table_of_gpus_has_a_row_for_each_deployment():
    cells = [
        Cell(DEPLOYED, "float16"),
        Cell(DEPLOYED, "float16", "compiled"),
        Cell(DEPLOYED, "float16", "PP 2, eager"),
        Cell(DEPLOYED, "bfloat16", "PP 2"),
        Cell(DEPLOYED, "float16", "PP 2"),
    ]
    results = [
        {"cell": cell.to_json(), "ok": number != 4, "device": "2 x GPU"}
        for number, cell in enumerate(cells)
    ]
    assert matrix.gpu_table(results).splitlines()[:4] == [
        "| deployment | qwen3_moe, eager | qwen3_moe, compiled |",
        "| --- | --- | --- |",
        "| 1 rank | 1 of 1 | 1 of 1 |",
        "| PP 2 | 1 of 1 | 1 of 2 |",
    ]


STAND_IN = """
import json, os, sys, time
cells, _, answers = sys.argv[1:]
for cell in json.load(open(cells)):
    if cell["deployment"] == "TP 2":
        time.sleep(60)
    if cell["deployment"] == "TP 2, EP 2" and os.environ["RANK"] == "1":
        sys.exit("out of memory")
    with open(answers, "a") as file:
        file.write(json.dumps({"cell": cell, "answers": [os.environ["RANK"]]}) + "\\n")
"""


def test_a_cell_that_stands_still_or_dies_does_not_stop_the_others(
    tmp_path, monkeypatch
):
    (tmp_path / "worker_in_a_test.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(matrix, "WORKER", "worker_in_a_test")
    names = ("TP 2", "TP 2, EP 2", "PP 2", "DP 2")
    cells = [Cell(DEPLOYED, "float16", name) for name in names]
    found = matrix.run_cells(cells, tmp_path, 60, lanes=2, cell_timeout_s=3)
    stalled, died, good, parallel = (found[cell] for cell in cells)
    assert "no output" in stalled["error"]
    assert "no output" in died["error"]
    assert good["answers"] == ["0"]
    assert parallel["answers"] == ["0", "1"]
