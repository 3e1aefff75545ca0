# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Converts the weights of a loaded int4 MoE layer and makes its hybrid kernel.

Only ``setup_hybrid_w4a16_moe`` converts expert weights and makes the kernel. A method
class describes how its checkpoint stores tensors (``CheckpointPacking``);
``hybrid_w4a16_packing`` defines the target layout.

Weights are repacked expert by expert in the storage that they were loaded into.
Afterwards the layer holds the checkpoint's int4 words and scales and nothing more,
except for row padding if the tuning table asks for it. Repacking needs memory for one
additional expert.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    CheckpointPacking,
    Int4MoEMethod,
    transposed_copy,
)
from vllm.model_executor.utils import replace_parameter

# fork: begin overlay
from . import hybrid_w4a16_guard

# fork: end

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

_PACKED = "hybrid_w4a16_packed"


def setup_hybrid_w4a16_moe(
    method: Int4MoEMethod, layer: "RoutedExperts"
) -> mk.FusedMoEKernel:
    """Convert a loaded layer's weights and return the kernel that runs on them.

    Afterwards, for E local experts and w = w13 (N = 2*I, K = H) or w2 (N = H, K = I):
    ``<w>_<qweight>`` is int32 [E, N, K//8] and ``<w>_<scales>`` is [E, N, K//G] in the
    activation dtype, both in the storage that they were loaded into. ``<w>_<zeros>`` is
    int32 [E, N//8, K//G], or ``None`` for a symmetric checkpoint. Weight rows are
    padded if the parameter was created with room for it (``empty_experts``). Weights
    that are already converted are left alone, so a second call changes nothing.

    Raises ``ValueError`` with the checkpoint's tensor and the bad value if a checkpoint
    that is declared symmetric stores a zero point other than 8, if a scale is not
    finite in the activation dtype, or if all scales of a projection are zero. The layer
    is then unchanged.
    """
    packing = method.packing
    names = ("w13", "w2")
    # fork: begin overlay
    kept = None
    # fork: end
    if not is_packed(getattr(layer, f"w13_{packing.qweight}")):
        for name in names:
            _verify_scales(layer, f"{name}_{packing.scales}", packing)
            if method.symmetric and packing.symmetric_zeros:
                _verify_symmetric(layer, f"{name}_{packing.zeros}", packing)
        # fork: begin overlay
        kept = hybrid_w4a16_guard.keep(method, layer)
        # fork: end
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
    kernel = make_kernel(method, layer)
    # fork: begin overlay
    # RuntimeError where what was converted or the kernels compute something else
    hybrid_w4a16_guard.check(method, layer, kernel, kept)
    # fork: end
    return kernel


def is_packed(weight: torch.Tensor) -> bool:
    """Return whether ``weight`` is already in the packed layout of the ops."""
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
    """[E, rows, columns] over the storage of ``stored``. The row stride is as large as
    the storage allows.
    """
    slot = stored.stride(0)
    shape, stride = (len(stored), rows, columns), (slot, slot // rows, 1)
    room = stored.untyped_storage().nbytes() // stored.itemsize
    if room - stored.storage_offset() < len(stored) * slot:
        # vLLM's weight reload makes tensors without room for padding
        return stored.new_empty(len(stored) * slot).as_strided(shape, stride)
    return stored.as_strided(shape, stride)


def _verify_scales(
    layer: "RoutedExperts", name: str, packing: CheckpointPacking
) -> None:
    """Check that the activation dtype can hold every scale of parameter ``name``, and
    that no projection of an expert has only zeros."""
    for expert, scales in enumerate(getattr(layer, name).data):
        by_row = scales.t() if packing.k_first else scales
        bad = (~by_row.isfinite()).nonzero()
        if len(bad):
            row, group = bad[0].tolist()
            raise ValueError(
                f"{_tensor_at(layer, name, packing, expert, row)} holds "
                f"{by_row[row, group].item()} in {scales.dtype}, expected finite scales"
            )
        rows = len(by_row) // len(layer_projections(layer, name))
        for first, part in enumerate(by_row.split(rows)):
            if not bool(part.any()):
                tensor = _tensor_at(layer, name, packing, expert, first * rows)
                raise ValueError(
                    f"{tensor} holds nothing but zeros, expected scales: is the file "
                    "complete?"
                )


def _verify_symmetric(
    layer: "RoutedExperts", name: str, packing: CheckpointPacking
) -> None:
    """Check that every nibble of zero point parameter ``name`` encodes 8."""
    stored = getattr(layer, name).data
    sentinel = packing.symmetric_word
    if bool((stored == sentinel).all()):
        return
    expert, *where = (stored != sentinel).nonzero()[0].tolist()
    word = stored[expert, where[0], where[1]].item() & 0xFFFFFFFF
    row = 8 * where[1 if packing.k_first else 0]
    raise ValueError(
        f"{_tensor_at(layer, name, packing, expert, row)} holds 0x{word:08x}, expected "
        f"0x{sentinel & 0xFFFFFFFF:08x} (zero point 8 everywhere in {packing.name}): "
        f"the checkpoint's config says symmetric, but it is not"
    )


def layer_projections(layer: "RoutedExperts", parameter: str) -> list[str]:
    """Return the checkpoint's names of the projections in a w13 or w2 parameter."""
    if parameter.startswith("w2"):
        return [layer.ckpt_down_proj_name]
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name]
    return [name for name in names if name]


def tensor_name(
    layer: "RoutedExperts", expert: int, projection: str, suffix: str
) -> str:
    """Return a tensor's name in the checkpoint, as vLLM knows it, for error messages.

    ``expert`` is its number in the checkpoint.
    """
    return f"{layer.layer_name}.{expert}.{projection}.{suffix}"


def _tensor_at(
    layer: "RoutedExperts",
    parameter: str,
    packing: CheckpointPacking,
    local_expert: int,
    row: int,
) -> str:
    """Return the name of the checkpoint tensor that has row ``row`` of a parameter."""
    projections = layer_projections(layer, parameter)
    suffix = parameter.partition("_")[2]
    rows = getattr(layer, f"{parameter.partition('_')[0]}_{packing.scales}").shape
    part = row * len(projections) // rows[2 if packing.k_first else 1]
    expert = global_expert(layer, local_expert)
    return tensor_name(layer, expert, projections[part], suffix)


def global_expert(layer: "RoutedExperts", local_expert: int) -> int:
    """Return a local expert's number in the checkpoint."""
    expert_map = layer.expert_map
    if expert_map is None:
        return local_expert
    return int((expert_map == local_expert).nonzero()[0].item())


def make_kernel(method: Int4MoEMethod, layer: "RoutedExperts") -> mk.FusedMoEKernel:
    """Make a kernel over the converted tensors of the layer."""
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
