# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""AWQ int4 MoE checkpoints on the hybrid path."""

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
    uniform_recipe,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig


class AWQHybridW4A16MoEMethod(HybridW4A16MoEMethod):
    """AWQ in its ``gemm`` version, symmetric or with zero points."""


def awq_moe_method(
    config: "AutoAWQConfig", layer: torch.nn.Module, prefix: str
) -> FusedMoEMethodBase | None:
    """Hook of ``AutoAWQConfig.get_quant_method``, called with its arguments.

    Returns the hybrid method, or ``None`` to leave the layer to vLLM. vLLM ignores
    entries of ``modules_to_not_convert`` that name the layer's experts; for these the
    hook returns vLLM's method for 16-bit experts. Raises ``ValueError`` under the
    conditions of ``oracle.decline``, also if the entries name only some of the layer's
    experts.
    """
    if not isinstance(layer, RoutedExperts):
        return None
    if not oracle.consider(layer, prefix):
        return None

    def bits_of(name: str) -> int:
        skipped = is_layer_skipped(
            name, config.modules_to_not_convert, match_mode="substring"
        )
        return 16 if skipped else config.weight_bits

    try:
        bits = uniform_recipe(layer, prefix, bits_of)
    except RecipeConflict as conflict:
        oracle.decline(prefix, oracle.Misfit(conflict))
        return None
    if bits == 16:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    packing = formats.awq(config.full_config.get("version"))
    unsupported = packing if isinstance(packing, str) else None
    if not oracle.accept(layer, prefix, bits, config.group_size, unsupported):
        return None
    assert not isinstance(packing, str)
    return AWQHybridW4A16MoEMethod(
        layer.moe_config, config.group_size, not config.zero_point, packing
    )
