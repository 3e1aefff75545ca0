# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The cells of the support matrix: checkpoints, and ways to deploy them."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from .int4_formats import FORMATS
from .tiny_models import MODELS, Recipe

GROUP_SIZES = (128, 32, 64)
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Arguments of ``LLM``, and what happens before it generates."""

    ranks: int = 1
    """Number of ``matrix_worker`` processes."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    seen: bool = True
    """Whether the prompt's log-probabilities are requested. They turn prefix caching
    off, and fail in the first of two pipeline stages."""
    reload: bool = False
    """Whether wrong weights are loaded first, then the checkpoint's again."""
    sleep: bool = False
    """Whether the engine first sleeps and wakes, at level 1 (weights in host memory)
    and level 2 (weights reloaded). GPUs only: vLLM has no sleep mode on the CPU. Such a
    cell runs in its own process, since vLLM's memory pool serves one engine."""

    @property
    def data_parallel(self) -> bool:
        """Whether each rank runs its own prompts."""
        return "data_parallel_size" in self.arguments

    @property
    def eager(self) -> bool:
        """Whether vLLM neither compiles the model nor captures graphs."""
        return self.arguments.get("enforce_eager", True)


_COMPILED = {"enforce_eager": False}
_SHARED_INT8 = {"quantization_config": {"targets": {"*shared_expert*": "int8_g32"}}}
DEPLOYMENTS = {
    "1 rank": Deployment(),
    "TP 2": Deployment(2, {"tensor_parallel_size": 2}),
    "TP 4": Deployment(4, {"tensor_parallel_size": 4}),
    "TP 2, EP 2": Deployment(
        2, {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    ),
    "DP 2": Deployment(2, {"data_parallel_size": 2}),
    "DP 2, EP 2": Deployment(
        2, {"data_parallel_size": 2, "enable_expert_parallel": True}
    ),
    # In eager mode vLLM 0.32's CPU model runner lacks the second stage's input buffer.
    "PP 2": Deployment(2, {"pipeline_parallel_size": 2, **_COMPILED}, seen=False),
    "PP 2, eager": Deployment(2, {"pipeline_parallel_size": 2}, seen=False),
    "chunked prefill": Deployment(1, {"max_num_batched_tokens": 16}),
    "prefix caching": Deployment(1, {"enable_prefix_caching": True}, seen=False),
    "weights reloaded": Deployment(1, reload=True),
    "compiled": Deployment(1, _COMPILED),
    "shared expert int8": Deployment(1, _SHARED_INT8),
    "shared expert int8, TP 2": Deployment(
        2, {"tensor_parallel_size": 2, **_SHARED_INT8}
    ),
    "sleep mode": Deployment(1, {"enable_sleep_mode": True}, sleep=True),
}
for _name in ("TP 2", "TP 2, EP 2", "DP 2", "DP 2, EP 2", "sleep mode"):
    DEPLOYMENTS[f"{_name}, compiled"] = dataclasses.replace(
        DEPLOYMENTS[_name], arguments=DEPLOYMENTS[_name].arguments | _COMPILED
    )
for _name in ("sleep mode", "sleep mode, compiled"):
    DEPLOYMENTS[f"{_name}, TP 2"] = dataclasses.replace(
        DEPLOYMENTS[_name],
        ranks=2,
        arguments=DEPLOYMENTS[_name].arguments | {"tensor_parallel_size": 2},
    )
# The checkpoint that runs under every deployment.
DEPLOYED = Recipe(format="compressed-tensors", symmetric=False, group_size=64)
# The project's first target, as published except for its size.
QWEN35 = Recipe("qwen3_5_moe", "auto_round:auto_gptq", True, 128)
# Its attention is int4 too.
QWEN35_ATTENTION = dataclasses.replace(QWEN35, int4_attention=True)
SHARDINGS = ("1 rank", "TP 2", "TP 2, EP 2")
OTHER_DEPLOYMENTS = (
    "DP 2",
    "DP 2, EP 2",
    "PP 2",
    "chunked prefill",
    "prefix caching",
    "weights reloaded",
    "compiled",
)
TWO_RANKS = (
    "TP 2",
    "TP 2, EP 2",
    "DP 2",
    "DP 2, EP 2",
    "PP 2, eager",
    "TP 2, compiled",
    "TP 2, EP 2, compiled",
    "DP 2, compiled",
    "DP 2, EP 2, compiled",
    "PP 2",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A checkpoint under one deployment."""

    recipe: Recipe = Recipe()
    dtype: str = "bfloat16"
    deployment: str = "1 rank"

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return DEPLOYMENTS[self.deployment].ranks

    @property
    def data_parallel(self) -> bool:
        return DEPLOYMENTS[self.deployment].data_parallel

    @property
    def name(self) -> str:
        """Unique name, used in reports and test ids."""
        return f"{self.recipe.folder_name} {self.dtype} {self.deployment}"

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for ``from_json``, without defaults of the recipe."""
        usual = dataclasses.asdict(Recipe())
        recipe = dataclasses.asdict(self.recipe)
        own = {key: value for key, value in recipe.items() if value != usual[key]}
        return {**dataclasses.asdict(self), "recipe": own}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Cell":
        """Return the cell that ``to_json`` described."""
        return Cell(**{**values, "recipe": Recipe(**values["recipe"])})


def exists(format: str, symmetric: bool) -> bool:
    """Whether vLLM accepts such a checkpoint: its GPTQ config rejects sym = false."""
    return symmetric or not format.startswith("gptq")


def grid() -> list[Cell]:
    """Format x symmetric x group size x dtype x sharding, for one model."""
    return [
        Cell(Recipe("qwen3_moe", format, symmetric, group_size), dtype, sharding)
        for group_size, format, symmetric, dtype, sharding in itertools.product(
            GROUP_SIZES, FORMATS, (True, False), DTYPES, SHARDINGS
        )
        if exists(format, symmetric)
    ]


def other_models() -> list[Cell]:
    """The other models in every format, in float16, because their routers tie in bf16.

    Qwen3.5 runs in bf16, the only dtype of vLLM's linear attention on the CPU.
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
    """Data-parallel cells in float16, where tokens must equal those of one rank."""
    return [
        Cell(
            DEPLOYED,
            "float16" if DEPLOYMENTS[name].data_parallel else "bfloat16",
            name,
        )
        for name in OTHER_DEPLOYMENTS
    ]


def shared_experts() -> list[Cell]:
    """Quantized at load; the first cell is in test_matrix's short run."""
    return [
        Cell(QWEN35, "bfloat16", "shared expert int8"),
        Cell(QWEN35, "bfloat16", "shared expert int8, TP 2"),
        Cell(Recipe("glm4_moe", "compressed-tensors"), "float16", "shared expert int8"),
    ]


def cut_groups() -> list[Cell]:
    """Tensor parallel shards that cut groups of 128: 192 or 96 of 384 columns a rank.

    All formats in float16, where tokens must equal those of one rank. The first two
    cells are in test_matrix's short run.
    """
    cases = [("compressed-tensors", False)]
    cases += [c for c in itertools.product(FORMATS, (True, False)) if c != cases[0]]
    return [
        Cell(Recipe("qwen3_moe", format, symmetric, 128, 384), dtype, deployment)
        for format, symmetric in cases
        if exists(format, symmetric)
        for dtype in DTYPES[::-1]
        if dtype == "float16" or format == "auto_round:auto_gptq"
        for deployment in ("1 rank", "TP 2", "TP 4")
    ]


def on_a_gpu() -> list[Cell]:
    """Additional cells that test_matrix runs on a GPU."""
    return [
        Cell(DEPLOYED, "float16", "compiled"),
        Cell(QWEN35, "float16"),
        Cell(QWEN35, "bfloat16", "compiled"),
        Cell(DEPLOYED, "float16", "sleep mode"),
        Cell(DEPLOYED, "float16", "sleep mode, compiled"),
        Cell(QWEN35, "float16", "sleep mode"),
    ]


def two_ranks() -> list[Cell]:
    """Additional cells that test_matrix runs on two GPUs.

    Each model's cells with one rank are there for comparison.
    """
    many_experts = Recipe(moe_intermediate_size=128, experts=512)
    return [
        *(
            Cell(recipe, dtype, deployment)
            for recipe, dtype, deployment in itertools.product(
                (DEPLOYED, QWEN35), DTYPES, ("1 rank", *TWO_RANKS)
            )
        ),
        *(
            Cell(many_experts, "float16", deployment)
            for deployment in ("1 rank", "TP 2, EP 2", "TP 2, EP 2, compiled")
        ),
        Cell(DEPLOYED, "float16", "sleep mode, TP 2"),
        Cell(QWEN35, "bfloat16", "sleep mode, compiled, TP 2"),
    ]


def on_gpus() -> list[Cell]:
    """The support matrix on two GPUs."""
    cut = [cell for cell in cut_groups()[:8] if cell.ranks <= 2]
    cells = [*subset(), *on_a_gpu(), *cut, *shared_experts(), *two_ranks()]
    return list(dict.fromkeys(cells))


def full() -> list[Cell]:
    """The whole support matrix on the CPU."""
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
    """Return a small subset of ``cells`` that contains every pair of values.

    Greedy: picks the cell with the most uncovered pairs, fewest ranks first.
    """
    missing = set().union(*map(_pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: (len(_pairs(cell) & missing), -cell.ranks))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def int4_attention() -> list[Cell]:
    """Cells whose attention is int4 too, beside that of Qwen3.5 in ``subset``."""
    asymmetric = functools.partial(Recipe, "qwen3_moe", symmetric=False)
    return [
        Cell(
            asymmetric(format="awq", group_size=64, int4_attention=True),
            "bfloat16",
            "compiled",
        ),
        Cell(
            asymmetric(format="compressed-tensors", group_size=32, int4_attention=True),
            "float16",
        ),
    ]


def subset() -> list[Cell]:
    """The cells that test_matrix runs; test_serving covers compiled mode."""
    models = [
        Cell(Recipe("mixtral", "awq", False, 128), "float16"),
        Cell(Recipe("glm4_moe", "compressed-tensors", True, 128), "float16"),
        Cell(QWEN35_ATTENTION, "bfloat16"),
    ]
    shards = [Cell(DEPLOYED, "float16", name) for name in SHARDINGS]
    others = [cell for cell in other_deployments() if cell.deployment != "compiled"]
    return list(
        dict.fromkeys(
            [
                *covering(grid()),
                *models,
                *int4_attention(),
                *shared_experts()[:1],
                *shards,
                *others,
            ]
        )
    )
