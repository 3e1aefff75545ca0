# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""compressed-tensors int4 MoE checkpoints on the hybrid path."""

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16 as oracle,
)
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_formats as formats,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_recipes import (
    RecipeConflict,
    expert_linears,
    uniform_recipe,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )


class CompressedTensorsHybridW4A16MoEMethod(HybridW4A16MoEMethod):
    """compressed-tensors ``pack-quantized``, symmetric or with zero points."""


def compressed_tensors_moe_method(
    quant_config: "compressed_tensors.CompressedTensorsConfig",
    layer: "RoutedExperts",
    layer_name: str,
) -> CompressedTensorsHybridW4A16MoEMethod | None:
    """Hook of ``CompressedTensorsMoEMethod.get_moe_method``, called with its arguments.

    Returns the hybrid method, or ``None`` to leave the layer to vLLM. Raises
    ``ValueError`` under the conditions of ``oracle.decline``, also if the layer's
    experts are quantized differently.
    """
    quant_config._add_fused_moe_to_target_scheme_map()
    first = next(expert_linears(layer, layer_name))
    if not _is_integer(quant_config.get_scheme_dict(layer, first)):
        return None  # 16 bits, or not an integer quantization
    if not oracle.consider(layer, layer_name):
        return None
    try:
        scheme = _expert_scheme(quant_config, layer, layer_name)
    except RecipeConflict as conflict:
        oracle.decline(layer_name, oracle.Misfit(conflict))
        return None
    assert scheme is not None
    weights = scheme["weights"]
    packing = formats.compressed_tensors(
        weights.strategy, weights.actorder, scheme.get("format")
    )
    unsupported = packing if isinstance(packing, str) else None
    if unsupported is None and quant_config.transform_config is not None:
        unsupported = "transform_config: activations have to be transformed"
    if not oracle.accept(
        layer, layer_name, weights.num_bits, weights.group_size, unsupported
    ):
        return None
    assert not isinstance(packing, str)
    return CompressedTensorsHybridW4A16MoEMethod(
        layer.moe_config, weights.group_size, weights.symmetric, packing
    )


def _is_integer(scheme: dict[str, Any] | None) -> bool:
    """Whether weights are integers and activations are not quantized."""
    weights = scheme.get("weights") if scheme else None
    if scheme is None or weights is None:
        return False
    return weights.type == "int" and scheme.get("input_activations") is None


def _expert_scheme(
    quant_config: "compressed_tensors.CompressedTensorsConfig",
    layer: "RoutedExperts",
    layer_name: str,
) -> dict[str, Any] | None:
    """The scheme that the layer's experts share; ``None``: they are not quantized."""

    def scheme_of(name: str) -> dict[str, Any] | None:
        return quant_config.get_scheme_dict(layer, name)

    # thousands of names against lists that can be as long: only where one of them
    # tells experts apart
    rules = [*quant_config.ignore, *quant_config.target_scheme_map]
    if any("experts" in rule for rule in rules):
        return uniform_recipe(layer, layer_name, scheme_of)
    return scheme_of(next(expert_linears(layer, layer_name)))
