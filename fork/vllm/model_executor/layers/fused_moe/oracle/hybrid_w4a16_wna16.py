# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the WNA16 oracle (``int_wna16``) asks of the HYBRID_W4A16 backend.

Notation: E local experts, K the reduction size, N output rows, G the group size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs

from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    AWQ,
    CheckpointPacking,
    rows_to_exllama,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_formats as formats,
)


class _Layer(NamedTuple):
    """All that the decision reads of a layer."""

    moe_config: FusedMoEConfig


class _Recipe(NamedTuple):
    """What a quantization config says of a layer's experts."""

    packing: CheckpointPacking | str
    """Or the reason why the kernels cannot read it."""
    bits: int
    group_size: int | None
    has_zeros: bool
    in_bytes: bool
    """Tensors are those of ``MoeWNA16Method``, uint8."""


def _recipe(quant_config: Any) -> _Recipe:
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.moe_wna16 import MoeWNA16Config

    config = quant_config
    if isinstance(config, QuantizationArgs):
        return _Recipe(
            formats.compressed_tensors(config.strategy, config.actorder),
            config.num_bits,
            config.group_size,
            not config.symmetric,
            False,
        )
    if isinstance(config, AutoAWQConfig):
        packing = formats.awq(config.full_config.get("version"))
        zeros = config.zero_point
    elif isinstance(config, AutoGPTQConfig):
        checkpoint_format = config.full_config.get("checkpoint_format")
        packing = formats.gptq(checkpoint_format, config.desc_act)
        zeros = False  # AutoGPTQConfig refuses others
    elif isinstance(config, MoeWNA16Config):
        full, zeros = config.full_config, config.has_zp
        if config.linear_quant_method == "gptq":
            packing = formats.gptq(
                full.get("checkpoint_format"), full.get("desc_act", False)
            )
        else:
            packing = formats.awq(full.get("version"))
    else:
        packing, zeros = f"{type(config).__name__} is not supported", False
        return _Recipe(packing, 4, None, zeros, False)
    in_bytes = isinstance(config, MoeWNA16Config)
    return _Recipe(packing, config.weight_bits, config.group_size, zeros, in_bytes)


def incompatibility_reason(moe_config: FusedMoEConfig, quant_config: Any) -> str | None:
    """Why the HYBRID_W4A16 backend cannot take a layer, ``None`` if it can.

    ``quant_config``: what the oracle gets, ``QuantizationArgs`` or the config of GPTQ,
    AWQ or MoeWNA16.
    """
    layer = _Layer(moe_config)
    recipe = _recipe(quant_config)
    reason = oracle.incompatibility_reason(layer)
    if reason is not None:
        return reason
    if isinstance(recipe.packing, str):
        return recipe.packing
    reason = oracle.incompatibility_reason(layer, recipe.bits, recipe.group_size)
    if reason is not None or recipe.in_bytes:
        return reason
    shard = moe_config.intermediate_size_per_partition
    if recipe.group_size is not None and shard % recipe.group_size:
        return (
            f"intermediate size per partition {shard} is not a multiple of the group "
            f"size {recipe.group_size}"
        )
    return None


def takes(moe_config: FusedMoEConfig, quant_config: Any) -> bool:
    """Whether the oracle is going to pick HYBRID_W4A16, or to raise since it cannot."""
    if moe_config.moe_backend != "auto":
        return moe_config.moe_backend == oracle.BACKEND
    return incompatibility_reason(moe_config, quant_config) is None


def convert_weights(
    quant_config: Any,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_zeros: torch.Tensor | None,
    w2_zeros: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """A layer's tensors in the layout of ``hybrid_w4a16_packing``, as the ten that the
    oracle returns.

    Weights come as int32 [E, N, K//8], from AWQ as int32 [E, K, N//8], from MoeWNA16 as
    uint8 [E, N, K//2]; scales and zero points accordingly. Raises ``ValueError`` where
    a checkpoint has biases other than zero.
    """
    recipe = _recipe(quant_config)
    packing = recipe.packing
    assert isinstance(packing, CheckpointPacking), packing
    for name, bias in (("w13", w13_bias), ("w2", w2_bias)):
        if bias is not None and bool(bias.any()):
            raise ValueError(f"{name}_bias is not zero; HYBRID_W4A16 has no bias")
    if not recipe.has_zeros:
        w13_zeros = w2_zeros = None
    to_words: Callable[[torch.Tensor], torch.Tensor] = rows_to_exllama
    to_zeros: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    if recipe.in_bytes:
        w13, w2 = (w.contiguous().view(torch.int32) for w in (w13, w2))
        w13_zeros, w2_zeros = _zero_words(w13_zeros), _zero_words(w2_zeros)
    elif packing is AWQ:
        to_words, to_zeros = packing.to_exllama, packing.to_row_zeros
        w13_scale, w2_scale = (
            s.transpose(1, 2).contiguous() for s in (w13_scale, w2_scale)
        )
    return (
        _each(w13, to_words),
        _each(w2, to_words),
        w13_scale,
        w2_scale,
        None if w13_zeros is None else _each(w13_zeros, to_zeros),
        None if w2_zeros is None else _each(w2_zeros, to_zeros),
        None,
        None,
        None,
        None,
    )


def _each(
    stacked: torch.Tensor, convert: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Convert expert by expert: the temporaries of one are there at a time."""
    first = convert(stacked[0])
    result = first.new_empty(len(stacked), *first.shape)
    for expert, source in enumerate(stacked):
        result[expert] = first if expert == 0 else convert(source)
    return result


def _zero_words(zeros: torch.Tensor | None) -> torch.Tensor | None:
    """uint8 [E, N//2, K//G], two rows to a byte, as int32 [E, N//8, K//G]."""
    if zeros is None:
        return None
    words = zeros.unflatten(1, (-1, 4)).transpose(2, 3).contiguous()
    return words.view(torch.int32).squeeze(-1)
