# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the support matrix consists of: checkpoints, and ways to deploy them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from .int4_formats import FORMATS
from .tiny_models import MODELS, Recipe

GROUP_SIZES = (128, 32, 64)
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Arguments of ``LLM`` and what is done before it answers."""

    ranks: int = 1
    """Processes of ``matrix_worker``."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    seen: bool = True
    """Whether the prompt's log-probabilities are requested. That turns prefix caching
    off, and fails in the first of two pipeline stages."""
    reload: bool = False
    """Wrong weights are loaded over the right ones first, then the checkpoint again."""
    sleep: bool = False
    """Sleeps and wakes first, at level 1 (weights in host memory) and level 2 (weights
    reloaded). GPUs only: vLLM has no sleep mode on the CPU. Such a cell runs in a
    process of its own, since vLLM's memory pool serves one engine."""

    @property
    def data_parallel(self) -> bool:
        """Each rank answers prompts of its own."""
        return "data_parallel_size" in self.arguments


DEPLOYMENTS = {
    "1 rank": Deployment(),
    "TP 2": Deployment(2, {"tensor_parallel_size": 2}),
    "TP 2, EP 2": Deployment(
        2, {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    ),
    "DP 2": Deployment(2, {"data_parallel_size": 2}),
    "DP 2, EP 2": Deployment(
        2, {"data_parallel_size": 2, "enable_expert_parallel": True}
    ),
    # In eager mode vLLM 0.32's CPU model runner lacks the second stage's input buffer.
    "PP 2": Deployment(
        2, {"pipeline_parallel_size": 2, "enforce_eager": False}, seen=False
    ),
    "chunked prefill": Deployment(1, {"max_num_batched_tokens": 16}),
    "prefix caching": Deployment(1, {"enable_prefix_caching": True}, seen=False),
    "weights reloaded": Deployment(1, reload=True),
    "compiled": Deployment(1, {"enforce_eager": False}),
    "sleep mode": Deployment(1, {"enable_sleep_mode": True}, sleep=True),
    "sleep mode, compiled": Deployment(
        1, {"enable_sleep_mode": True, "enforce_eager": False}, sleep=True
    ),
}
# The checkpoint that is deployed in every way.
DEPLOYED = Recipe(format="compressed-tensors", symmetric=False, group_size=64)
# The project's first target, as published but for its size.
QWEN35 = Recipe("qwen3_5_moe", "auto_round:auto_gptq", True, 128)
# Its attention is int4 too.
QWEN35_ATTENTION = dataclasses.replace(QWEN35, int4_attention=True)
SHARDINGS = ("1 rank", "TP 2", "TP 2, EP 2")
OTHER_DEPLOYMENTS = tuple(
    name
    for name, deployment in DEPLOYMENTS.items()
    if name not in SHARDINGS and not deployment.sleep
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One checkpoint, deployed one way."""

    recipe: Recipe = Recipe()
    dtype: str = "bfloat16"
    deployment: str = "1 rank"

    @property
    def ranks(self) -> int:
        return DEPLOYMENTS[self.deployment].ranks

    @property
    def data_parallel(self) -> bool:
        return DEPLOYMENTS[self.deployment].data_parallel

    @property
    def name(self) -> str:
        return f"{self.recipe.folder_name} {self.dtype} {self.deployment}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Cell":
        return Cell(**{**values, "recipe": Recipe(**values["recipe"])})


def exists(format: str, symmetric: bool) -> bool:
    """Whether vLLM lets such a checkpoint in: its GPTQ config refuses sym = false."""
    return symmetric or not format.startswith("gptq")


def grid() -> list[Cell]:
    """Format x symmetric x group size x dtype x sharding, on one model."""
    return [
        Cell(Recipe("qwen3_moe", format, symmetric, group_size), dtype, sharding)
        for group_size, format, symmetric, dtype, sharding in itertools.product(
            GROUP_SIZES, FORMATS, (True, False), DTYPES, SHARDINGS
        )
        if exists(format, symmetric)
    ]


def other_models() -> list[Cell]:
    """The other models in every format, in float16: their routers tie in bf16.

    Qwen3.5 in bf16: vLLM's linear attention on the CPU has nothing else.
    """
    return [
        Cell(
            Recipe(model, format, symmetric, 128),
            "bfloat16" if model == "qwen3_5_moe" else "float16",
        )
        for model, format, symmetric in itertools.product(
            MODELS, FORMATS, (True, False)
        )
        if model != "qwen3_moe" and exists(format, symmetric)
    ] + [
        Cell(QWEN35, "bfloat16", sharding)
        for sharding in SHARDINGS
        if sharding != "1 rank"
    ]


def other_deployments() -> list[Cell]:
    """Data parallel cells in float16, where tokens must equal those of one rank."""
    return [
        Cell(
            DEPLOYED,
            "float16" if DEPLOYMENTS[name].data_parallel else "bfloat16",
            name,
        )
        for name in OTHER_DEPLOYMENTS
    ]


def on_a_gpu() -> list[Cell]:
    """What test_matrix runs beyond its subset where there is a GPU."""
    return [
        Cell(DEPLOYED, "float16", "compiled"),
        Cell(QWEN35, "float16"),
        Cell(QWEN35, "bfloat16", "compiled"),
        Cell(DEPLOYED, "float16", "sleep mode"),
        Cell(DEPLOYED, "float16", "sleep mode, compiled"),
        Cell(QWEN35, "float16", "sleep mode"),
    ]


def full() -> list[Cell]:
    """The support matrix, as far as the CPU goes."""
    return other_deployments() + other_models() + grid()


def _pairs(cell: Cell) -> set[tuple[Any, ...]]:
    recipe = cell.recipe
    values = (
        recipe.format,
        recipe.symmetric,
        recipe.group_size,
        cell.dtype,
        cell.deployment,
    )
    return set(itertools.combinations(enumerate(values), 2))


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """A small subset of ``cells`` in which every pair of values still occurs.

    Greedy: takes the cell with the most uncovered pairs, fewest ranks first.
    """
    missing = set().union(*map(_pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: (len(_pairs(cell) & missing), -cell.ranks))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def subset() -> list[Cell]:
    """The part of ``full`` that test_matrix runs; test_serving covers compiled mode."""
    models = [
        Cell(Recipe("mixtral", "awq", False, 128), "float16"),
        Cell(Recipe("glm4_moe", "compressed-tensors", True, 128), "float16"),
        Cell(QWEN35_ATTENTION, "bfloat16"),
    ]
    attention = [
        Cell(Recipe("qwen3_moe", "awq", False, 64, True), "bfloat16", "compiled"),
        Cell(Recipe("qwen3_moe", "compressed-tensors", False, 32, True), "float16"),
    ]
    shards = [Cell(DEPLOYED, "float16", name) for name in SHARDINGS]
    others = [cell for cell in other_deployments() if cell.deployment != "compiled"]
    return list(
        dict.fromkeys([*covering(grid()), *models, *attention, *shards, *others])
    )
