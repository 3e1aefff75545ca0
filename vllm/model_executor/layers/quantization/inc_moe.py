# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""AutoRound (INC) int4 MoE checkpoints on the hybrid path."""

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import AWQ, GPTQ_V1
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16 as oracle,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_recipes import (
    RecipeConflict,
    uniform_recipe,
)
from vllm.model_executor.layers.quantization.inc.config_parser import INCConfigParser

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.inc.config_parser import (
        INCLayerConfig,
    )
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig
    from vllm.model_executor.layers.quantization.inc.schemes.inc_scheme import (
        INCScheme,
    )

PACKINGS = {"auto_round:auto_gptq": GPTQ_V1, "auto_round:auto_awq": AWQ}


class INCHybridW4A16MoEMethod(HybridW4A16MoEMethod):
    """AutoRound, with tensor names and packing of GPTQ v1 or AWQ."""


def inc_moe_method(
    scheme: "INCScheme",
    config: "INCConfig",
    layer: "RoutedExperts",
    prefix: str,
    layer_config: "INCLayerConfig",
) -> FusedMoEMethodBase | None:
    """The method of a MoE layer; the arguments of ``INCWna16Scheme.get_moe_method``.

    Returns the hybrid method, or ``None`` for that function to choose one itself. For
    entries of ``extra_config`` that name the layer's experts, which it ignores, returns
    the method for the settings that they give. Raises ``ValueError`` under
    the conditions of ``oracle.decline``, also if the entries give the layer's experts
    different settings.
    """
    if not oracle.consider(layer, prefix):
        return None
    if config.extra_config:
        try:
            recipe = _expert_recipe(config, layer, prefix, layer_config)
        except RecipeConflict as conflict:
            oracle.decline(prefix, oracle.Misfit(conflict))
            return None
        if not recipe.quantized:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if recipe != layer_config:
            return scheme.get_moe_method(config, layer, prefix, recipe)
    packing = PACKINGS.get(layer_config.packing_format)
    unsupported = None
    if packing is None:
        unsupported = (
            f"packing_format is {layer_config.packing_format!r}, "
            f"supported: {', '.join(map(repr, PACKINGS))}"
        )
    if not oracle.accept(
        layer, prefix, layer_config.bits, layer_config.group_size, unsupported
    ):
        return None
    assert packing is not None and isinstance(layer_config.group_size, int)
    return INCHybridW4A16MoEMethod(
        layer.moe_config, layer_config.group_size, layer_config.sym, packing
    )


def _expert_recipe(
    config: "INCConfig",
    layer: "RoutedExperts",
    prefix: str,
    layer_config: "INCLayerConfig",
) -> "INCLayerConfig":
    """``layer_config`` with what ``extra_config`` says of the experts by name."""
    assert config.extra_config is not None
    relevant = {
        key: recipe
        for key, recipe in config.extra_config.items()
        if _may_name_experts(key, prefix)
    }
    if not relevant:
        return layer_config
    # of thousands of entries vLLM's parser would try each on each of hundreds of names
    config = copy.copy(config)
    config.extra_config = relevant
    parser = INCConfigParser(config)
    default = (config.weight_bits, config.group_size, config.sym)
    own = (layer_config.bits, layer_config.group_size, layer_config.sym)

    def recipe_of(name: str) -> tuple:
        recipe = parser.get_layer_config(layer, name)
        return own if recipe == default else recipe

    bits, group_size, sym = uniform_recipe(layer, prefix, recipe_of)
    return replace(
        layer_config, bits=bits, group_size=group_size, sym=sym, quantized=bits < 16
    )


def _may_name_experts(key: str, prefix: str) -> bool:
    """Whether vLLM's parser could match an ``extra_config`` key, a pattern, a name or
    the end of one, with a linear of layer ``prefix``'s experts.
    """
    if not re.fullmatch(r"[\w.-]*", key):
        return True
    layer, *linear = key.rsplit(".", 2)
    return len(linear) < 2 or f".{prefix}".endswith(f".{layer}")
