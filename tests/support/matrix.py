# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The support matrix: runs and judges cells, and writes the table of docs/support.md.

    python -m tests.support.matrix            # cells missing in tests/e2e/matrix.json
    python -m tests.support.matrix --again    # all cells
    python -m tests.support.matrix --gpu      # on GPUs, tests/e2e/matrix-gpu.json
    python -m tests.support.matrix --table    # only the tables, from the files

A cell runs a tiny random checkpoint with ``LLM(...)`` under
``VLLM_HYBRID_W4A16_MOE=require`` and compares it with transformers, which runs the
dequantized weights in float32 on the CPU.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .matrix_cells import DEPLOYMENTS, SHARDINGS, Cell, full, on_gpus
from .tiny_models import DenseReference

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "tests/e2e/matrix.json"
GPU_RESULTS = CHECKOUT / "tests/e2e/matrix-gpu.json"
DOCUMENT = CHECKOUT / "docs/support.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"
GPU_BEGIN, GPU_END = "<!-- gpu matrix: begin -->\n", "<!-- gpu matrix: end -->\n"
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
# Where it is exceeded, a cell stands still: graphs of a tiny model take 20 to 40 s.
GPU_CELL_TIMEOUT_S = 150.0


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive TCP ports that are free now.

    They lie below the range from which Linux serves programs that ask for any port.
    """
    while True:
        first = random.randrange(20000, 32000 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def batches(cells: Sequence[Cell], lanes: int = 1) -> list[list[Cell]]:
    """Group cells by number of ranks: the same processes run all cells of a group.

    lanes: how many groups run at a time; with more than one, groups are smaller.
    """
    awake = [cell for cell in cells if not sleeps(cell)]
    found = []
    for ranks in sorted({cell.ranks for cell in awake}):
        same = [cell for cell in awake if cell.ranks == ranks]
        same.sort(key=lambda cell: DEPLOYMENTS[cell.deployment].eager)
        count = min(len(same), max(1, round(lanes * len(same) / len(awake))))
        found += [same[i::count] for i in range(count)]
    return found + [[cell] for cell in cells if sleeps(cell)]


def sleeps(cell: Cell) -> bool:
    """Whether the cell measures the GPU's free memory, so nothing may run beside it."""
    return DEPLOYMENTS[cell.deployment].sleep


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    timeout_s: float = 3600.0,
    lanes: int = 1,
    cell_timeout_s: float = 600.0,
) -> dict[Cell, dict[str, Any]]:
    """Run the cells and return each cell's output, or its error.

    folder: for checkpoints, logs and outputs. timeout_s: for all cells together.
    lanes: groups of cells that run at a time. cell_timeout_s: for one cell, twice that
    for a group's first; the group goes on with the next one in new processes.
    """
    deadline = time.monotonic() + timeout_s
    stop = threading.Event()
    groups = batches(cells, lanes)
    beside = [group for group in groups if not sleeps(group[0])]
    found: dict[Cell, dict[str, Any]] = {}

    def run(number: int) -> dict[Cell, dict[str, Any]]:
        return _run_group(
            groups[number], folder, f"{number}", deadline, cell_timeout_s, stop
        )

    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        try:
            for answers in pool.map(run, range(len(beside))):
                found.update(answers)
            for number in range(len(beside), len(groups)):
                found.update(run(number))
        finally:
            stop.set()
    return found


def _run_group(
    group: list[Cell],
    folder: Path,
    name: str,
    deadline: float,
    cell_timeout_s: float,
    stop: threading.Event,
) -> dict[Cell, dict[str, Any]]:
    """Run the cells of a group one after another.

    Processes that die or stand still are replaced.
    """
    found: dict[Cell, dict[str, Any]] = {}
    for attempt in range(len(group)):
        todo = [cell for cell in group if cell not in found]
        if not todo:
            break
        end = f"{name}-{attempt}"
        with _ranks(todo, folder, end) as processes:
            answers = [folder / f"answers-{end}-{rank}.jsonl" for rank in processes]
            size, since = 0, time.monotonic()
            while any(process.poll() is None for process in processes.values()):
                time.sleep(0.1)
                now = time.monotonic()
                new_size = sum(a.stat().st_size for a in answers if a.exists())
                if new_size != size:
                    size, since = new_size, now
                # the first cell's time includes the start of the processes
                allowed = cell_timeout_s if size else 2 * cell_timeout_s
                if stop.is_set() or now > min(deadline, since + allowed):
                    break
        of_ranks = [_read(path) for path in answers]
        found.update(_merge(todo, of_ranks))
        if stop.is_set() or time.monotonic() > deadline:
            break
        broken = next((c for c in todo if any(c not in a for a in of_ranks)), None)
        if broken is not None and broken not in found:
            log = (folder / f"log-{end}-0.txt").read_text(errors="replace")
            found[broken] = {"error": f"no output:\n{log[-2000:]}"}
    for cell in group:
        found.setdefault(cell, {"error": "not run: no time was left"})
    return found


@contextlib.contextmanager
def _ranks(
    cells: list[Cell], folder: Path, end: str
) -> Iterator[dict[int, subprocess.Popen]]:
    """The processes that run the cells, by rank. They are killed at the end."""
    ranks = cells[0].ranks
    todo = folder / f"cells-{end}.json"
    todo.write_text(json.dumps([cell.to_json() for cell in cells]))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(len(cells))),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    if importlib.util.find_spec("torchvision") is None:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH")])
        )
    if torch.cuda.is_available():  # groups run side by side, each compiles for itself
        environment["VLLM_CACHE_ROOT"] = str(folder / f"cache-{end}")
    if ranks > 1:
        cores = os.cpu_count() or 1
        bind = "|".join(str(rank % cores) for rank in range(ranks))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bind
    processes: dict[int, subprocess.Popen] = {}
    try:
        for rank in range(ranks):
            with (folder / f"log-{end}-{rank}.txt").open("w") as log:
                answers = folder / f"answers-{end}-{rank}.jsonl"
                answers.unlink(missing_ok=True)  # of an earlier run in this folder
                processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", WORKER, todo, folder, answers],
                    cwd=CHECKOUT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        yield processes
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.wait()


def _read(path: Path) -> dict[Cell, dict[str, Any]]:
    """What one rank has written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {Cell.from_json(a["cell"]): a for a in map(json.loads, lines)}


def _merge(
    cells: list[Cell], of_ranks: list[dict[Cell, dict[str, Any]]]
) -> dict[Cell, dict[str, Any]]:
    """One output per cell that failed on any rank or ended on all of them."""
    found: dict[Cell, dict[str, Any]] = {}
    for cell in cells:
        answers = [rank[cell] for rank in of_ranks if cell in rank]
        failed = [answer for answer in answers if "error" in answer]
        if failed:
            found[cell] = failed[0]
        elif len(answers) == len(of_ranks):
            found[cell] = dict(answers[0])
            if cell.data_parallel:
                found[cell]["answers"] = [one for a in answers for one in a["answers"]]
    return found


def judge(
    cells: dict[Cell, dict[str, Any]], folder: Path
) -> dict[Cell, dict[str, Any]]:
    """``{"ok", "difference", "worst_tie", "same_tokens", "problem"}`` of each cell, and
    ``parting`` where its tokens are not those of one rank.
    """
    references: dict[Path, DenseReference] = {}
    verdicts: dict[Cell, dict[str, Any]] = {}
    one_rank = {
        (cell.recipe, cell.dtype): answer
        for cell, answer in cells.items()
        if cell.deployment == "1 rank" and "answers" in answer
    }
    for cell in sorted(cells, key=lambda cell: cell.recipe.folder_name):
        answer = cells[cell]
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
            pairs = list(zip(same["answers"], answer["answers"], strict=False))
            different = [
                pair for pair in pairs if pair[0]["tokens"] != pair[1]["tokens"]
            ]
            verdict["same_tokens"] = not different
            if different:
                gaps = [_parting(references[path], *pair) for pair in different]
                verdict["parting"] = round(max(gaps), 4)
        verdict["ok"] = is_good(cell, verdict)
        verdicts[cell] = verdict
    return verdicts


def is_good(cell: Cell, verdict: dict[str, Any]) -> bool:
    """Whether a cell is close to the reference and, in fp16, has one rank's tokens.

    Tokens may part where the reference's two log-probabilities tie. Data parallelism
    pads batches, which changes the order of sums, and so which of two equals wins.
    """
    return (
        verdict["difference"] < MAX_DIFFERENCE[cell.dtype]
        and verdict["worst_tie"] < MAX_TIE[cell.dtype]
        and (
            cell.dtype == "bfloat16"
            or verdict.get("parting", 0.0) < MAX_TIE[cell.dtype]
        )
    )


def _parting(
    reference: DenseReference, one: dict[str, Any], other: dict[str, Any]
) -> float:
    """How far apart the reference sees the first two tokens that differ, in nats."""
    pairs = zip(one["tokens"], other["tokens"], strict=True)
    at = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
    logprobs = reference.logprobs(one["prompt"] + one["tokens"][: at + 1])[-2]
    gap = logprobs[one["tokens"][at]] - logprobs[other["tokens"][at]]
    return gap.abs().item()


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


def gpu_table(results: list[dict[str, Any]]) -> str:
    """Return the GPUs' table: a row per deployment, two columns per model."""
    if not results:
        return "Not run yet.\n"
    columns: dict[str, dict[str, list[bool]]] = {}
    rows: dict[str, None] = {}
    for result in results:
        cell = Cell.from_json(result["cell"])
        deployment = DEPLOYMENTS[cell.deployment]
        words = cell.deployment.split(", ")
        row = ", ".join(w for w in words if w not in ("compiled", "eager"))
        row = row or "1 rank"
        rows[row] = None
        mode = "eager" if deployment.eager else "compiled"
        column = columns.setdefault(f"{cell.recipe.model}, {mode}", {})
        column.setdefault(row, []).append(result["ok"])
    lines = [f"| deployment | {' | '.join(columns)} |", "| --- " * (len(columns) + 1)]
    lines[-1] += "|"
    for row in rows:
        counts = [column.get(row, []) for column in columns.values()]
        entries = [f"{sum(c)} of {len(c)}" if c else "" for c in counts]
        lines.append(f"| {row} | {' | '.join(entries)} |".replace("  ", " "))
    devices = " and ".join(dict.fromkeys(result["device"] for result in results))
    count = f"{len(results)} of {len(on_gpus())}"
    lines += ["", f"{count} cells have been run, on {devices}."]
    return "\n".join(lines) + "\n"


def write_tables() -> None:
    """Replace the tables in docs/support.md."""
    text = DOCUMENT.read_text()
    for begin, end, new in (
        (BEGIN, END, table(load_results())),
        (GPU_BEGIN, GPU_END, gpu_table(load_results(GPU_RESULTS))),
    ):
        before, rest = text.split(begin)
        text = before + begin + new + end + rest.split(end)[1]
    DOCUMENT.write_text(text)


def load_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the results in a file; none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def save_results(results: list[dict[str, Any]], path: Path = RESULTS) -> None:
    """Write a file of results, one result per line."""
    lines = ",\n".join(json.dumps(result) for result in results)
    path.write_text(f"[\n{lines}\n]\n")


def run_on_gpus(
    cells: Sequence[Cell], folder: Path, timeout_s: float, lanes: int
) -> list[dict[str, Any]]:
    """Run the cells on this machine's GPUs; returns their results.

    A result has the verdict, the device and the seconds that the cell took.
    """
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    answers = run_cells(cells, folder, timeout_s, lanes, GPU_CELL_TIMEOUT_S)
    (folder / "answers.json").write_text(
        json.dumps([{**a, "cell": cell.to_json()} for cell, a in answers.items()])
    )
    return [
        {
            "cell": cell.to_json(),
            **verdict,
            "device": device,
            "seconds": answers[cell].get("seconds"),
        }
        for cell, verdict in judge(answers, folder).items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--again", action="store_true", help="also run cells that have a result"
    )
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--batch", type=int, default=30, help="cells per saved batch")
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs, kept")
    parser.add_argument("--gpu", action="store_true", help="the cells for GPUs")
    parser.add_argument(
        "--lanes", type=int, default=4, help="with --gpu: groups of cells at a time"
    )
    parser.add_argument(
        "--limit", type=float, default=3600, help="with --gpu: seconds for all cells"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.table:
            (_gpu if options.gpu else _cpu)(options, folder)
    write_tables()
    path = GPU_RESULTS if options.gpu else RESULTS
    return int(not all(result["ok"] for result in load_results(path)))


def _todo(
    cells: list[Cell], known: dict[Cell, dict[str, Any]], again: bool
) -> list[Cell]:
    return [cell for cell in cells if again or cell not in known]


def _show(cell: Cell, verdict: dict[str, Any]) -> None:
    print("ok  " if verdict["ok"] else "FAIL", cell.name, verdict, flush=True)


def _gpu(options: argparse.Namespace, folder: Path) -> None:
    """Run the cells that this machine has the GPUs for."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        sys.exit("--gpu: this machine has no GPU that torch can use")
    known = {Cell.from_json(r["cell"]): r for r in load_results(GPU_RESULTS)}
    todo = _todo(on_gpus(), known, options.again)
    todo = [cell for cell in todo if cell.ranks <= gpus]
    for result in run_on_gpus(todo, folder, options.limit, options.lanes):
        cell = Cell.from_json(result["cell"])
        known[cell] = result
        _show(cell, result)
    save_results([known[c] for c in on_gpus() if c in known], GPU_RESULTS)


def _cpu(options: argparse.Namespace, folder: Path) -> None:
    """Run the cells in batches, each saved when it ends."""
    known = {Cell.from_json(result["cell"]): result for result in load_results()}
    cells = full()
    todo = _todo(cells, known, options.again)
    recipes = list(dict.fromkeys((cell.recipe, cell.dtype) for cell in todo))
    while recipes:
        batch: list[Cell] = []
        while recipes and len(batch) < options.batch:
            recipe = recipes.pop(0)
            batch += [c for c in todo if (c.recipe, c.dtype) == recipe]
        answers = run_cells(batch, folder)
        for cell, verdict in judge(answers, folder).items():
            known[cell] = {"cell": cell.to_json(), **verdict}
            _show(cell, verdict)
        save_results([known[cell] for cell in cells if cell in known])


if __name__ == "__main__":
    sys.exit(main())
