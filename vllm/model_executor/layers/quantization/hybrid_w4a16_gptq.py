# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""GPTQ int4 MoE checkpoints on the hybrid path."""

import copy
from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16 as oracle,
)
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_formats as formats,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_recipes import (
    RecipeConflict,
    expert_linears,
    uniform_recipe,
)
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    is_layer_gptq_quantized,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig


class GPTQHybridW4A16MoEMethod(HybridW4A16MoEMethod):
    """GPTQ without ``desc_act``, with zero points in the v1 or v2 convention."""


def gptq_moe_method(
    config: "AutoGPTQConfig", layer: torch.nn.Module, prefix: str
) -> FusedMoEMethodBase | None:
    """Hook of ``AutoGPTQConfig.get_quant_method``, called with its arguments.

    Returns the hybrid method, or ``None`` to leave the layer to vLLM. vLLM ignores
    entries of ``dynamic`` and ``modules_in_block_to_quantize`` that name the layer's
    experts; for these the hook returns vLLM's method for the settings that they give.
    Raises ``ValueError`` under the conditions of ``oracle.decline``, also if the
    entries give the layer's experts different settings.
    """
    if not isinstance(layer, RoutedExperts):
        return None
    if not oracle.consider(layer, prefix):
        return None

    def recipe_of(name: str) -> dict | None:
        override = get_dynamic_override(config, name)
        if override is False:
            return None
        keys = {
            "bits": config.weight_bits,
            "group_size": config.group_size,
            "sym": config.is_sym,
            "desc_act": config.desc_act,
        }
        return {**keys, **override} if isinstance(override, dict) else keys

    own = recipe_of(prefix)
    by_layer = get_dynamic_override(config, prefix) is not None
    try:
        recipe = own if by_layer else uniform_recipe(layer, prefix, recipe_of)
    except RecipeConflict as conflict:
        oracle.decline(prefix, oracle.Misfit(conflict))
        return None
    # empty: nothing is known; vLLM before 0.32 takes that for "none of the layers"
    modules = config.modules_in_block_to_quantize
    if recipe is None or (
        modules
        and not is_layer_gptq_quantized(next(expert_linears(layer, prefix)), modules)
    ):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if recipe != own:
        config = copy.copy(config)
        config.dynamic = {"+:.*": recipe}
        return config.get_quant_method(layer, prefix)
    packing = formats.gptq(
        config.full_config.get("checkpoint_format"), recipe["desc_act"]
    )
    unsupported = packing if isinstance(packing, str) else None
    if not oracle.accept(
        layer, prefix, recipe["bits"], recipe["group_size"], unsupported
    ):
        return None
    assert not isinstance(packing, str)
    return GPTQHybridW4A16MoEMethod(
        layer.moe_config, recipe["group_size"], recipe["sym"], packing
    )
