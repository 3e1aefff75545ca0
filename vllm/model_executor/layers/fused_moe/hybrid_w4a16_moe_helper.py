# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""From a loaded int4 MoE checkpoint to a layer that runs on the hybrid path.

``setup_hybrid_w4a16_moe`` is the only place where weights are converted and the kernel
is made. A method class says how its checkpoint stores things (a ``CheckpointPacking``);
the target layout is that of ``hybrid_w4a16_packing``.

Repacking works expert by expert in the storage that was loaded. Afterwards the layer
holds the checkpoint's int4 words and scales and nothing more (but for row padding,
where the tuning table asks for it). On the way it needs one expert's weights on top.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    CheckpointPacking,
    transposed_copy,
)
from vllm.model_executor.utils import replace_parameter

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

_PACKED = "hybrid_w4a16_packed"


class Int4MoEMethod(Protocol):
    """What the set-up needs to know of a layer's method."""

    packing: CheckpointPacking
    """How the checkpoint stores the experts."""
    symmetric: bool
    """Whether every zero point is 8."""
    moe: FusedMoEConfig

    def get_fused_moe_quant_config(
        self, layer: "RoutedExperts"
    ) -> FusedMoEQuantConfig | None: ...


def setup_hybrid_w4a16_moe(
    method: Int4MoEMethod, layer: "RoutedExperts"
) -> mk.FusedMoEKernel:
    """Convert a loaded layer's weights; returns the kernel that runs on them.

    Afterwards, with E local experts, w = w13 (N = 2*I, K = H) and w2 (N = H, K = I):
    ``<w>_<qweight>`` is int32 [E, N, K//8], ``<w>_<scales>`` [E, N, K//G] in the
    activation dtype, both in the storage that was loaded; ``<w>_<zeros>`` is int32
    [E, N//8, K//G] or, for a symmetric checkpoint, ``None``. Rows of weights are padded
    where the parameter was made with room for it (``empty_experts``). Weights that are
    in that form already are left alone, so that a second call changes nothing.

    Raises ``ValueError`` when a checkpoint that calls itself symmetric stores a zero
    point other than 8, or a scale is not finite in the activation dtype, naming layer,
    expert and value; the layer is then unchanged.
    """
    packing = method.packing
    names = ("w13", "w2")
    if not is_packed(getattr(layer, f"w13_{packing.qweight}")):
        for name in names:
            _verify_finite(layer, f"{name}_{packing.scales}")
            if method.symmetric and packing.symmetric_zeros:
                _verify_symmetric(layer, f"{name}_{packing.zeros}", packing)
        for name in names:
            zeros, shape = f"{name}_{packing.zeros}", f"{name}_{packing.weight_shape}"
            if packing.weight_shape is not None:
                replace_parameter(layer, shape, None)
            if not method.symmetric:
                _convert(layer, zeros, packing.to_row_zeros)
            elif packing.symmetric_zeros:
                replace_parameter(layer, zeros, None)
            if packing.k_first:
                _convert(layer, f"{name}_{packing.scales}", transposed_copy)
            _convert(layer, f"{name}_{packing.qweight}", packing.to_exllama)
    return make_kernel(method, layer)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether ``weight`` holds the packed layout, no longer the checkpoint's."""
    return getattr(weight, _PACKED, False)


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
        if expert == 0:
            packed = _padded_view(stored, *converted.shape)
        packed[expert] = converted
        del converted  # before the next expert's
    setattr(packed, _PACKED, True)
    replace_parameter(layer, name, packed)


def _padded_view(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[E, rows, columns] over the storage of ``stored``, rows as far apart as it has
    room for.
    """
    slot = stored.stride(0)
    shape, stride = (len(stored), rows, columns), (slot, slot // rows, 1)
    room = stored.untyped_storage().nbytes() // stored.itemsize
    if room - stored.storage_offset() < len(stored) * slot:
        # weights loaded anew: vLLM's reload makes tensors that end with their last word
        return stored.new_empty(len(stored) * slot).as_strided(shape, stride)
    return stored.as_strided(shape, stride)


def _verify_finite(layer: "RoutedExperts", name: str) -> None:
    """Check that every scale is a number that the activation dtype can hold."""
    for expert, scales in enumerate(getattr(layer, name).data):
        if not bool(scales.isfinite().all()):
            value = scales[~scales.isfinite()][0].item()
            raise ValueError(
                f"layer {layer.layer_name}: {name} of expert "
                f"{global_expert(layer, expert)} holds {value} in {scales.dtype}, "
                f"expected finite scales"
            )


def _verify_symmetric(
    layer: "RoutedExperts", name: str, packing: CheckpointPacking
) -> None:
    """Check that every nibble of zero point parameter ``name`` stands for 8."""
    stored = getattr(layer, name).data
    sentinel = packing.symmetric_word
    if bool((stored == sentinel).all()):
        return
    expert, *where = (stored != sentinel).nonzero()[0].tolist()
    word = stored[expert, where[0], where[1]].item() & 0xFFFFFFFF
    raise ValueError(
        f"layer {layer.layer_name}: {name} of expert {global_expert(layer, expert)} "
        f"holds 0x{word:08x} at {where}, expected 0x{sentinel & 0xFFFFFFFF:08x} (zero "
        f"point 8 everywhere in {packing.name}): the checkpoint calls itself symmetric "
        f"but is not"
    )


def global_expert(layer: "RoutedExperts", local_expert: int) -> int:
    """The expert's number in the checkpoint."""
    expert_map = layer.expert_map
    if expert_map is None:
        return local_expert
    return int((expert_map == local_expert).nonzero()[0].item())


def make_kernel(method: Int4MoEMethod, layer: "RoutedExperts") -> mk.FusedMoEKernel:
    """A kernel over the converted tensors that the layer holds now."""
    quant_config = method.get_fused_moe_quant_config(layer)
    assert quant_config is not None
    prepare_finalize = maybe_make_prepare_finalize(
        moe=method.moe,
        quant_config=quant_config,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
        use_monolithic=False,
    )
    assert prepare_finalize is not None
    experts = HybridW4A16MoEExperts(method.moe, quant_config)
    return mk.FusedMoEKernel(prepare_finalize, experts)
