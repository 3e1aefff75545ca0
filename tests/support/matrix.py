# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The support matrix: runs and judges cells, and writes the table of docs/support.md.

    python -m tests.support.matrix            # cells missing in tests/e2e/matrix.json
    python -m tests.support.matrix --again    # all cells
    python -m tests.support.matrix --table    # only the table, from the file

A cell runs a tiny random checkpoint with ``LLM(...)`` on the CPU under
``VLLM_HYBRID_W4A16_MOE=require`` and compares it with transformers, which runs the
dequantized weights in float32.
"""

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .matrix_cells import DEPLOYMENTS, SHARDINGS, Cell, full
from .tiny_models import DenseReference

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "tests/e2e/matrix.json"
DOCUMENT = CHECKOUT / "docs/support.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
WORKER = "tests.support.matrix_worker"
STAND_INS = Path(__file__).with_name("stand_ins")

# Mean difference of log-probabilities from the reference, in nats. Measured when this
# was written: at most 0.0282 in bf16 (Qwen3.5, for which transformers' own bf16 has
# 0.023 to 0.026) and 0.0031 in fp16. If gate and up of one expert are swapped, the
# difference exceeds 0.09 (test_matrix).
MAX_DIFFERENCE = {"bfloat16": 0.035, "float16": 0.006}
# How far a greedy token may lie below the reference's first choice, in nats. Measured:
# at most 0.001 in fp16; 0.49 in bf16, where router ties send a token to other experts.
MAX_TIE = {"bfloat16": 0.6, "float16": 0.01}


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports; only the first is known free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port if port + count < 65536 else port - count


def batches(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group cells by number of ranks: the same processes run all cells of a group."""
    sleeping = [cell for cell in cells if DEPLOYMENTS[cell.deployment].sleep]
    awake = [cell for cell in cells if cell not in sleeping]
    found = [
        [cell for cell in awake if cell.ranks == ranks]
        for ranks in sorted({cell.ranks for cell in awake})
    ]
    return found + [[cell] for cell in sleeping]


def run_cells(
    cells: Sequence[Cell], folder: Path, timeout_s: float = 3600.0
) -> dict[Cell, dict[str, Any]]:
    """Run the cells and return each cell's output."""
    found: dict[Cell, dict[str, Any]] = {}
    for number, batch in enumerate(batches(cells)):
        ranks = batch[0].ranks
        todo = folder / f"cells-{number}.json"
        todo.write_text(json.dumps([cell.to_json() for cell in batch]))
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(len(batch))),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        if importlib.util.find_spec("torchvision") is None:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH")])
            )
        if ranks > 1:
            cores = os.cpu_count() or 1
            bind = "|".join(str(rank % cores) for rank in range(ranks))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = bind
        processes = []
        for rank in range(ranks):
            log = (folder / f"log-{number}-{rank}.txt").open("w")
            answers = folder / f"answers-{number}-{rank}.jsonl"
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", WORKER, todo, folder, answers],
                    cwd=CHECKOUT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        try:
            for process in processes:
                process.wait(timeout_s)
        finally:
            for process in processes:
                process.kill()
        for rank in range(ranks):
            answers = folder / f"answers-{number}-{rank}.jsonl"
            lines = answers.read_text().splitlines() if answers.exists() else []
            for answer in map(json.loads, lines):
                cell = Cell.from_json(answer["cell"])
                if rank == 0 or "error" in answer:
                    found[cell] = answer
                elif cell.data_parallel and "answers" in found.get(cell, {}):
                    found[cell]["answers"] += answer["answers"]
        log_text = (folder / f"log-{number}-0.txt").read_text()
        for cell in batch:
            found.setdefault(cell, {"error": f"no output:\n{log_text[-2000:]}"})
    return found


def judge(
    cells: dict[Cell, dict[str, Any]], folder: Path
) -> dict[Cell, dict[str, Any]]:
    """``{"ok", "difference", "worst_tie", "same_tokens", "problem"}`` of each cell."""
    references: dict[Path, DenseReference] = {}
    verdicts: dict[Cell, dict[str, Any]] = {}
    one_rank = {
        (cell.recipe, cell.dtype): answer
        for cell, answer in cells.items()
        if cell.deployment == "1 rank" and "answers" in answer
    }
    for cell, answer in cells.items():
        if "answers" not in answer:
            verdicts[cell] = {"ok": False, "problem": answer["error"][-2000:]}
            continue
        path = folder / cell.recipe.folder_name
        if path not in references:
            references = {path: DenseReference(path)}
        difference, worst_tie = _distance(references[path], answer["answers"])
        verdict: dict[str, Any] = {
            "ok": True,
            "difference": round(difference, 4),
            "worst_tie": round(worst_tie, 3),
        }
        same = one_rank.get((cell.recipe, cell.dtype))
        if same is not None and same is not answer:
            # with data parallelism only the first rank runs these prompts
            verdict["same_tokens"] = all(
                one["tokens"] == other["tokens"]
                for one, other in zip(same["answers"], answer["answers"], strict=False)
            )
        verdict["ok"] = is_good(cell, verdict)
        verdicts[cell] = verdict
    return verdicts


def is_good(cell: Cell, verdict: dict[str, Any]) -> bool:
    """Whether a cell is close to the reference and, in fp16, has one rank's tokens."""
    return (
        verdict["difference"] < MAX_DIFFERENCE[cell.dtype]
        and verdict["worst_tie"] < MAX_TIE[cell.dtype]
        and (cell.dtype == "bfloat16" or verdict.get("same_tokens", True))
    )


def _distance(
    reference: DenseReference, answers: list[dict[str, Any]]
) -> tuple[float, float]:
    """Mean difference of log-probabilities, and the lowest greedy token's distance."""
    differences, ties = [], []
    for answer in answers:
        prompt, tokens = answer["prompt"], answer["tokens"]
        logprobs = reference.logprobs(prompt + tokens)
        ids = torch.tensor((prompt + tokens)[1:])
        expected = logprobs[:-1].gather(1, ids[:, None])[:, 0]
        said = expected[len(prompt) - 1 :]
        best = logprobs[len(prompt) - 1 : -1].max(dim=1).values
        ties.append((best - said).max())
        differences.append(said - torch.tensor(answer["said"]))
        if answer["seen"] is not None:
            seen = expected[: len(prompt) - 1]
            differences.append(seen - torch.tensor(answer["seen"]))
    return torch.cat(differences).abs().mean().item(), torch.stack(ties).max().item()


def table(results: list[dict[str, Any]]) -> str:
    """Return the table: a row per format, a column per sharding."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    others = []
    for result in results:
        cell = Cell.from_json(result["cell"])
        if cell.recipe.model != "qwen3_moe" or cell.deployment not in SHARDINGS:
            others.append((cell, result["ok"]))
            continue
        sign = "symmetric" if cell.recipe.symmetric else "zero points"
        count = counts[f"`{cell.recipe.format}`, {sign}", cell.deployment]
        count[0] += result["ok"]
        count[1] += 1
    lines = [
        f"| checkpoint | {' | '.join(SHARDINGS)} |",
        "| --- |" + " --- |" * len(SHARDINGS),
    ]
    for row in dict.fromkeys(row for row, _ in counts):
        found = [counts.get((row, sharding), [0, 0]) for sharding in SHARDINGS]
        entries = [f"{good} of {all}" if all else "not run" for good, all in found]
        lines.append(f"| {row} | {' | '.join(entries)} |")
    for deployment in dict.fromkeys(c.deployment for c, _ in others):
        for model in dict.fromkeys(c.recipe.model for c, _ in others):
            of = [
                ok
                for c, ok in others
                if (c.deployment, c.recipe.model) == (deployment, model)
            ]
            if of:
                every = model != "qwen3_moe" and deployment == "1 rank"
                what = "in every format" if every else deployment
                lines.append(f"| {model}, {what} | {sum(of)} of {len(of)} | | |")
    lines += ["", f"{len(results)} of {len(full())} cells have been run."]
    return "\n".join(lines) + "\n"


def write_table(results: list[dict[str, Any]]) -> None:
    """Replace the table in docs/support.md."""
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])


def load_results() -> list[dict[str, Any]]:
    """Return the results in tests/e2e/matrix.json; none if there is no such file."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save_results(results: list[dict[str, Any]]) -> None:
    """Write tests/e2e/matrix.json, one result per line."""
    lines = ",\n".join(json.dumps(result) for result in results)
    RESULTS.write_text(f"[\n{lines}\n]\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--again", action="store_true", help="also run cells that have a result"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--batch", type=int, default=30, help="cells per saved batch")
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs, kept")
    options = parser.parse_args()
    known = {Cell.from_json(result["cell"]): result for result in load_results()}
    cells = full()
    todo = (
        [] if options.table else [c for c in cells if options.again or c not in known]
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        recipes = list(dict.fromkeys((cell.recipe, cell.dtype) for cell in todo))
        while recipes:
            batch: list[Cell] = []
            while recipes and len(batch) < options.batch:
                recipe = recipes.pop(0)
                batch += [c for c in todo if (c.recipe, c.dtype) == recipe]
            for old in folder.glob("answers-*"):
                old.unlink()
            answers = run_cells(batch, folder)
            for cell, verdict in judge(answers, folder).items():
                known[cell] = {"cell": cell.to_json(), **verdict}
                print(
                    "ok  " if verdict["ok"] else "FAIL", cell.name, verdict, flush=True
                )
            save_results([known[cell] for cell in cells if cell in known])
    results = [known[cell] for cell in cells if cell in known]
    write_table(results)
    return int(not all(result["ok"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
