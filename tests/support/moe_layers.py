# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Routed-experts layers as vLLM builds them, and checkpoints to load into them."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.quantization.inc.inc import INCConfig

LAYER_NAME = "model.layers.3.mlp.experts"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an MoE layer (the whole layer, before any sharding)."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 256
    intermediate: int = 128
    group_size: int = 64


def inc_config(group_size: int = 64, **overrides) -> INCConfig:
    """An AutoRound ``quantization_config`` as it stands in a config.json."""
    return INCConfig.from_config(
        {
            "bits": 4,
            "data_type": "int",
            "group_size": group_size,
            "packing_format": "auto_round:auto_gptq",
            "quant_method": "auto-round",
            "sym": True,
            **overrides,
        }
    )


def make_layer(
    shape: Shape,
    quant_config: INCConfig,
    dtype: torch.dtype = torch.bfloat16,
    ep: tuple[int, int] = (1, 0),
    name: str = LAYER_NAME,
    **moe_overrides,
) -> RoutedExperts:
    """A ``RoutedExperts`` layer; its method is what vLLM's factories return.

    ep: expert-parallel size and rank. moe_overrides: fields of ``FusedMoEConfig``.
    """
    ep_size, ep_rank = ep
    parallel = dataclasses.replace(
        FusedMoEParallelConfig.make_no_parallel(),
        ep_size=ep_size,
        ep_rank=ep_rank,
        use_ep=ep_size > 1,
    )
    experts = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=shape.top_k,
        global_num_experts=shape.experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    moe_config = FusedMoEConfig(
        **{
            "num_experts": shape.experts,
            "experts_per_token": shape.top_k,
            "hidden_dim": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_local_experts": experts.local_num_experts,
            "num_logical_experts": shape.experts,
            "activation": MoEActivation.SILU,
            "device": "cpu",
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": parallel,
            "in_dtype": dtype,
            **moe_overrides,
        }
    )
    with set_current_vllm_config(VllmConfig()):
        return RoutedExperts(
            name, dtype, moe_config, quant_config, expert_map_manager=experts
        )


@dataclasses.dataclass
class GptqLinear:
    """One linear as ``auto_round:auto_gptq`` stores it, and what it stands for."""

    qweight: np.ndarray  # int32 [K//8, N], nibble i of a word is k = 8*k8 + i
    scales: np.ndarray  # fp16 [K//G, N]
    qzeros: np.ndarray  # int32 [K//G, N//8], nibble j is n = 8*n8 + j, minus one
    weight: np.ndarray  # float64 [N, K], dequantized


def pack_nibbles(values: np.ndarray, axis: int) -> np.ndarray:
    """Pack 0..15 along ``axis``, value i of a word at bits 4*i."""
    values = np.moveaxis(values.astype(np.uint32), axis, -1)
    values = values.reshape(*values.shape[:-1], -1, 8)
    words = (values << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def random_gptq_linear(
    rng: np.random.Generator, n: int, k: int, group_size: int, symmetric: bool
) -> GptqLinear:
    q = rng.integers(0, 16, (k, n))
    zero = rng.integers(0, 16, (k // group_size, n))
    if symmetric:
        zero[:] = 8
    scales = rng.uniform(0.5, 1.5, (k // group_size, n)).astype(np.float16)
    per_row = np.repeat(np.arange(k // group_size), group_size)
    weight = (q - zero[per_row]) * scales.astype(np.float64)[per_row]
    return GptqLinear(
        qweight=pack_nibbles(q, 0),
        scales=(scales / 64).astype(np.float16),
        qzeros=pack_nibbles((zero - 1) % 16, 1),
        weight=weight.T / 64,
    )


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


class Checkpoint:
    """Random experts of one layer, in the ``auto_round:auto_gptq`` format."""

    def __init__(self, shape: Shape, symmetric: bool = True, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sizes = {
            "gate_proj": (shape.intermediate, shape.hidden),
            "up_proj": (shape.intermediate, shape.hidden),
            "down_proj": (shape.hidden, shape.intermediate),
        }
        self.shape = shape
        self.experts = [
            {
                name: random_gptq_linear(rng, n, k, shape.group_size, symmetric)
                for name, (n, k) in sizes.items()
            }
            for _ in range(shape.experts)
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for e, expert in enumerate(self.experts):
            for name, linear in expert.items():
                for part in ("qweight", "scales", "qzeros"):
                    tensor = torch.from_numpy(getattr(linear, part))
                    yield f"{e}.{name}.{part}", tensor

    def load_into(self, layer: RoutedExperts) -> None:
        """Load through the layer's own weight loaders, then post-process."""
        list(layer.load_weights(self.tensors()))
        layer.quant_method.process_weights_after_loading(layer)

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = silu_and_mul,
    ) -> torch.Tensor:
        """float64 [M, H]: the MoE layer over the dequantized weights."""
        result = torch.zeros(x.shape, dtype=torch.float64)
        for m, row in enumerate(x.double()):
            for weight, e in zip(topk_weights[m], topk_ids[m], strict=True):
                w = {
                    name: torch.from_numpy(linear.weight)
                    for name, linear in self.experts[int(e)].items()
                }
                hidden = activation(w["gate_proj"] @ row, w["up_proj"] @ row)
                result[m] += weight.double() * (w["down_proj"] @ hidden)
        return result


def random_routing(
    tokens: int, shape: Shape, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [M, top_k] weights that sum to 1, int32 [M, top_k] distinct experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, shape.experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(shape.top_k)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def run_layer(
    layer: RoutedExperts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """One forward pass of the routed experts."""
    with set_forward_context(None, VllmConfig()):
        return layer.forward_modular(x, topk_weights, topk_ids)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
