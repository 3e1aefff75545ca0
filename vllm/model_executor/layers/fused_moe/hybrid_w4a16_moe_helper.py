# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""From a loaded int4 MoE checkpoint to a layer that runs on the hybrid path.

``setup_hybrid_w4a16_moe`` is the only place where weights are converted and the
kernel is installed. A method class says how its checkpoint stores things (a
``CheckpointPacking``); the target layout is the one of ``hybrid_w4a16_ops``.

Repacking works expert by expert in the storage that was loaded: after it the layer
holds the checkpoint's int4 words and scales and nothing more, and on the way there it
never needs more than one expert's weights on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.utils import replace_parameter

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.hybrid_w4a16_moe import (
        HybridW4A16MoEMethod,
    )

# The bit shuffle works on chunks, so that its temporaries stay small beside an expert:
# at least this many, of at most about this many words.
_SHUFFLE_CHUNKS = 8
_SHUFFLE_CHUNK_WORDS = 1 << 16
_PACKED = "hybrid_w4a16_packed"


@dataclass(frozen=True)
class CheckpointPacking:
    """How a checkpoint format stores one expert's [N, K] linear."""

    qweight: str
    """Suffix of the weight parameters: ``w13_<qweight>``, ``w2_<qweight>``."""
    scales: str
    """Suffix of the scale parameters, [K//G, N] per expert."""
    zeros: str
    """Suffix of the zero point parameters."""
    zero_offset: int
    """Zero point minus the stored nibble: 1 in the GPTQ v1 convention, else 0."""
    to_exllama: Callable[[torch.Tensor], torch.Tensor]
    """One expert's stored weights to contiguous int32 [N, K//8], ExLlama order."""
    to_row_zeros: Callable[[torch.Tensor], torch.Tensor]
    """One expert's stored zero points to contiguous int32 [N//8, K//G]."""


def shuffle_exllama_(words: torch.Tensor) -> torch.Tensor:
    """Reorder the nibbles of contiguous int32 words in place.

    From v0..v7 at bits 0, 4, .., 28 to the ExLlama order of ``hybrid_w4a16_ops``:
    even nibbles in the low half of the word, odd ones in the high half.
    """
    flat = words.view(-1)
    for chunk in flat.chunk(max(_SHUFFLE_CHUNKS, flat.numel() // _SHUFFLE_CHUNK_WORDS)):
        for shift, mask in ((4, 0x00F000F0), (8, 0x0000FF00)):
            # swaps the bits under mask with those that lie shift higher
            swap = (chunk >> shift).bitwise_xor_(chunk).bitwise_and_(mask)
            chunk ^= swap
            chunk ^= swap.bitwise_left_shift_(shift)
    return words


def _transposed_copy(matrix: torch.Tensor) -> torch.Tensor:
    # a copy also where the transpose of a single row or column would be a mere view
    return matrix.t().clone(memory_format=torch.contiguous_format)


def gptq_to_exllama(qweight: torch.Tensor) -> torch.Tensor:
    """GPTQ words int32 [K//8, N], nibble i is k = 8*k8+i, to ExLlama [N, K//8]."""
    return shuffle_exllama_(_transposed_copy(qweight))


def gptq_to_row_zeros(qzeros: torch.Tensor) -> torch.Tensor:
    """GPTQ v1 zero points int32 [K//G, N//8], stored minus one, to [N//8, K//G]."""
    # adds 1 to every nibble, modulo 16, without carries between nibbles
    plus_one = ((qzeros & 0x77777777) + 0x11111111) ^ (qzeros & ~0x77777777)
    return _transposed_copy(plus_one)


GPTQ_V1 = CheckpointPacking(
    "qweight", "scales", "qzeros", 1, gptq_to_exllama, gptq_to_row_zeros
)


def setup_hybrid_w4a16_moe(
    method: "HybridW4A16MoEMethod", layer: "RoutedExperts"
) -> None:
    """Convert a loaded layer's weights and install its kernel.

    Afterwards, with E local experts, w = w13 (N = 2*I, K = H) and w2 (N = H, K = I):
    ``<w>_<qweight>`` is int32 [E, N, K//8], ``<w>_<scales>`` [E, N, K//G] in the
    activation dtype, both in the storage that was loaded; ``<w>_<zeros>`` is int32
    [E, N//8, K//G] or, for a symmetric checkpoint, ``None``. Weights that are in that
    form already are left alone, so that a second call changes nothing.

    Raises ``ValueError`` when a checkpoint that calls itself symmetric stores a zero
    point other than 8, naming layer, expert and value; the layer is then unchanged.
    """
    packing = method.packing
    if not getattr(getattr(layer, f"w13_{packing.qweight}"), _PACKED, False):
        zeros = [f"{name}_{packing.zeros}" for name in ("w13", "w2")]
        if method.symmetric:
            for name in zeros:
                _verify_symmetric(layer, name, packing.zero_offset)
            for name in zeros:
                replace_parameter(layer, name, None)
        else:
            for name in zeros:
                _convert(layer, name, packing.to_row_zeros)
        for name in ("w13", "w2"):
            _convert(layer, f"{name}_{packing.scales}", _transposed_copy)
            _convert(layer, f"{name}_{packing.qweight}", packing.to_exllama)
    _install_kernel(method, layer)


def _convert(
    layer: "RoutedExperts",
    name: str,
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Convert parameter ``name`` expert by expert, in its own storage."""
    stored = getattr(layer, name).data
    packed = stored
    for expert, source in enumerate(stored):
        converted = convert(source)
        packed = stored.view(-1, *converted.shape)
        packed[expert] = converted
        del converted  # before the next expert's
    setattr(packed, _PACKED, True)
    replace_parameter(layer, name, packed)


def _verify_symmetric(layer: "RoutedExperts", name: str, zero_offset: int) -> None:
    """Check that every nibble of zero point parameter ``name`` stands for 8."""
    stored = getattr(layer, name).data
    nibble = 8 - zero_offset
    sentinel = int.from_bytes(bytes([nibble * 0x11] * 4), "little", signed=True)
    if bool((stored == sentinel).all()):
        return
    expert, *where = (stored != sentinel).nonzero()[0].tolist()
    word = stored[expert, where[0], where[1]].item() & 0xFFFFFFFF
    raise ValueError(
        f"layer {layer.layer_name}: {name} of expert {_global_expert(layer, expert)} "
        f"holds 0x{word:08x} at {where}, expected 0x{sentinel & 0xFFFFFFFF:08x} (zero "
        f"point 8 everywhere): the checkpoint calls itself symmetric but is not"
    )


def _global_expert(layer: "RoutedExperts", local_expert: int) -> int:
    expert_map = layer.expert_map
    if expert_map is None:
        return local_expert
    return int((expert_map == local_expert).nonzero()[0].item())


def _install_kernel(method: "HybridW4A16MoEMethod", layer: "RoutedExperts") -> None:
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    prepare_finalize = maybe_make_prepare_finalize(
        moe=method.moe,
        quant_config=method.moe_quant_config,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
        use_monolithic=False,
    )
    assert prepare_finalize is not None
    experts = HybridW4A16MoEExperts(method.moe, method.moe_quant_config)
    method.moe_kernel = mk.FusedMoEKernel(prepare_finalize, experts)
