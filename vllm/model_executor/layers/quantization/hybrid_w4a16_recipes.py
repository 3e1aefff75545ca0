# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What a quantization config says about each expert of a layer."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

Recipe = TypeVar("Recipe")


class RecipeConflict(ValueError):
    """The config quantizes experts of one layer differently; the message names two."""


def expert_linears(layer: "RoutedExperts", prefix: str) -> Iterator[str]:
    """Names of the linears of all experts, as in checkpoints and their configs.

    ``prefix``: the layer's name.
    """
    for expert in range(layer.moe_config.num_logical_experts):
        for projection in (
            layer.ckpt_gate_proj_name,
            layer.ckpt_up_proj_name,
            layer.ckpt_down_proj_name,
        ):
            if projection is not None:
                yield f"{prefix}.{expert}.{projection}"


def uniform_recipe(
    layer: "RoutedExperts", prefix: str, recipe_of: Callable[[str], Recipe]
) -> Recipe:
    """The recipe that ``recipe_of`` returns for every linear of the layer's experts.

    vLLM looks a layer up in the quantization config by the layer's name alone. This
    also sees entries for single experts and patterns that match only an expert's name.

    Raises ``RecipeConflict`` naming two linears with different recipes: vLLM keeps the
    experts of a layer in one tensor.
    """
    names = expert_linears(layer, prefix)
    first = next(names)
    recipe = recipe_of(first)
    for name in names:
        other = recipe_of(name)
        if other != recipe:
            raise RecipeConflict(
                "the experts of a layer have to be quantized alike, but "
                f"{first} is {recipe} and {name} is {other}"
            )
    return recipe
