# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Loads int4 experts and checks every tensor.

vLLM's own expert loader copies a tensor that is too small into part of the parameter,
converts any dtype, and does not notice a missing tensor.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_moe_helper import (
    global_expert,
    is_packed,
    tensor_name,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    CheckpointPacking,
    shard_group_size,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

# Attribute of a parameter: "w13" or "w2", and the suffix of its name.
PART = "hybrid_w4a16_part"
# Suffix of parameters without elements, which vLLM asks for before it drops a bias.
BIAS = "bias"
# vLLM's names of the projections of an expert: gate, up and down.
_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class ExpertTensorLoader:
    """The weight loader of one layer's parameters.

    Args:
        layer: sizes and names are taken from it and its ``moe_config``.
        packing: the checkpoint's format.
        group_size: weights along K per scale.
        with_zeros: whether the checkpoint stores zero points.
        load: the layer's own loader, which cuts tensor-parallel shards.
    """

    def __init__(
        self,
        layer: "RoutedExperts",
        packing: CheckpointPacking,
        group_size: int,
        with_zeros: bool,
        load: Callable[..., bool | None],
    ) -> None:
        # Weak: vLLM keeps the parameters' attributes for reloading, as long as the
        # layer lives, in a dictionary with weak keys.
        self._load = weakref.WeakMethod(load)
        self._layer = weakref.ref(layer)
        self._weight_shape = packing.weight_shape
        self._by_group = {packing.scales, packing.zeros}
        self._group_dim = 0 if packing.k_first else 1
        inter = layer.moe_config.intermediate_size_per_partition
        self._parts_of_a_group = group_size // shard_group_size(group_size, inter)
        self._integer = {packing.qweight, packing.zeros, packing.weight_shape}
        hidden = layer.moe_config.hidden_dim
        intermediate = layer.moe_config.intermediate_size
        self._sizes = {
            "w1": (intermediate, hidden),
            "w3": (intermediate, hidden),
            "w2": (hidden, intermediate),
        }
        self._projections = {
            "w1": layer.ckpt_gate_proj_name,
            "w3": layer.ckpt_up_proj_name,
            "w2": layer.ckpt_down_proj_name,
        }
        self._shapes = {}
        for shard, (n, k) in self._sizes.items():
            shapes = packing.shapes(n, k, group_size)
            if not with_zeros:
                del shapes[packing.zeros]
            self._shapes[shard] = shapes
        self._num_fused_shared_experts = (
            layer.expert_map_manager.num_fused_shared_experts
        )
        self._loaded: set[tuple[str, str, int]] = set()

    def load(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """``RoutedExperts.weight_loader`` with the tensor checked first.

        Raises ``ValueError`` naming the tensor when its shape or dtype does not match
        the format and the model's config, when it was loaded before, and when the layer
        has already been converted.
        """
        if is_packed(param):
            raise ValueError(
                f"{weight_name}: shard {shard_id} of expert {expert_id} comes after "
                f"the layer was converted for the kernels; use vLLM's reload_weights"
            )
        part: tuple[str, str] = getattr(param, PART)
        weight, suffix = part
        tensor = self._describe(shard_id, suffix, expert_id)
        if shard_id not in _SHARDS[weight]:
            raise ValueError(f"{tensor} does not belong into {weight}_{suffix}")
        if suffix == BIAS:
            # some GPTQ tools write zeros for models that know of no bias
            if bool(loaded_weight.any()):
                raise ValueError(f"{tensor} is not zero; experts have no bias here")
            success = True
        elif suffix == self._weight_shape:
            success = self._load_weight_shape(param, loaded_weight, shard_id, expert_id)
        else:
            self._check(tensor, loaded_weight, suffix, self._shapes[shard_id][suffix])
            key = (suffix, shard_id, expert_id)
            if key in self._loaded:
                raise ValueError(f"{tensor} is in the checkpoint more than once")
            if shard_id == "w2" and suffix in self._by_group:
                # vLLM cuts groups along K evenly over the ranks: give it groups that
                # no rank shares with another
                loaded_weight = loaded_weight.repeat_interleave(
                    self._parts_of_a_group, dim=self._group_dim
                )
            load = self._load()
            assert load is not None
            success = bool(
                load(param, loaded_weight, weight_name, shard_id, expert_id, True)
            )
            # on the meta device vLLM only counts what a reload will bring
            if success and not param.is_meta:
                self._loaded.add(key)
        return success if return_success else None

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[str]:
        """``RoutedExperts.load_weights``, which silently skips unknown experts.

        Raises ``ValueError`` naming the tensor if the config has no such expert.
        """
        layer = self._layer()
        assert layer is not None
        return type(layer).load_weights(layer, self._of_known_experts(layer, weights))

    def _of_known_experts(
        self, layer: "RoutedExperts", weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        known = layer.moe_config.num_logical_experts + self._num_fused_shared_experts
        for name, tensor in weights:
            expert = name.partition(".")[0]
            if expert.isdigit() and int(expert) >= known:
                raise ValueError(
                    f"{layer.layer_name}.{name} is in the checkpoint, but the config "
                    f"has {known} experts"
                )
            yield name, tensor

    def check_complete(self, layer: "RoutedExperts") -> None:
        """Raise ``ValueError`` unless every tensor of the layer's experts was loaded.

        Afterwards the loader accepts the tensors again, for a reload.
        """
        missing = [
            self._describe(shard, suffix, expert)
            for expert in (
                global_expert(layer, e) for e in range(layer.local_num_experts)
            )
            for shard, shapes in self._shapes.items()
            for suffix in shapes
            if (suffix, shard, expert) not in self._loaded
        ]
        self._loaded.clear()
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0]}{more} is not in the checkpoint")

    def _describe(self, shard_id: str, suffix: str, expert_id: int) -> str:
        layer = self._layer()
        assert layer is not None
        projection = self._projections.get(shard_id, shard_id)
        return tensor_name(layer, expert_id, projection, suffix)

    def _check(
        self, tensor: str, loaded: torch.Tensor, suffix: str, shape: tuple[int, ...]
    ) -> None:
        if tuple(loaded.shape) != shape:
            raise ValueError(
                f"{tensor} has shape {tuple(loaded.shape)}, expected {shape}"
            )
        if suffix in self._integer:
            if loaded.dtype != torch.int32:
                raise ValueError(f"{tensor} is {loaded.dtype}, expected torch.int32")
        elif loaded.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"{tensor} is {loaded.dtype}, expected float16, bfloat16 or float32"
            )

    def _load_weight_shape(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        shard_id: str,
        expert_id: int,
    ) -> bool:
        """Check the record of [N, K]; the copy is for vLLM, which counts elements."""
        assert self._weight_shape is not None
        expected = list(self._sizes[shard_id])
        if loaded_weight.tolist() != expected:
            tensor = self._describe(shard_id, self._weight_shape, expert_id)
            raise ValueError(
                f"{tensor} is {loaded_weight.tolist()}, expected {expected}"
            )
        layer = self._layer()
        assert layer is not None
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False
        param.data[local, int(shard_id == "w3")].copy_(loaded_weight)
        return True
