# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Routed-experts layers as vLLM builds them, and checkpoints for them."""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# fork: begin overlay
from unittest import mock

# fork: end
import numpy as np
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle

# fork: begin overlay
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)

# fork: end
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.workspace import (
    init_workspace_manager,
    is_workspace_manager_initialized,
)

from .int4_formats import FORMATS

LAYER_NAME = "model.layers.3.mlp.experts"
# Layers are on vLLM's device. Inputs and expected results are on the CPU, and
# ``run_layer`` returns the output there.
DEVICE = current_platform.device_type


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a whole MoE layer, before any sharding."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 256
    intermediate: int = 128
    group_size: int = 64


CONFIG_CLASSES: dict[str, type[QuantizationConfig]] = {
    "auto-round": INCConfig,
    "gptq": AutoGPTQConfig,
    "awq": AutoAWQConfig,
    "compressed-tensors": CompressedTensorsConfig,
}


def quant_config(
    format: str, group_size: int = 64, symmetric: bool = True, /, **overrides: Any
) -> QuantizationConfig:
    """Return vLLM's config object for a ``quantization_config`` of ``int4_formats``."""
    config = FORMATS[format].config(group_size, symmetric, [], **overrides)
    return CONFIG_CLASSES[config["quant_method"]].from_config(config)


def inc_config(group_size: int = 64, **overrides: Any) -> INCConfig:
    """Return the config of an AutoRound ``quantization_config`` as in a config.json."""
    config = quant_config("auto_round:auto_gptq", group_size, **overrides)
    assert isinstance(config, INCConfig)
    return config


def ready_workspace() -> None:
    """Set up the workspace of MoE layers on a GPU, as vLLM's worker does."""
    if DEVICE != "cpu" and not is_workspace_manager_initialized():
        init_workspace_manager(torch.device(DEVICE))


def make_layer(
    shape: Shape,
    quant_config: QuantizationConfig,
    dtype: torch.dtype = torch.bfloat16,
    ep: tuple[int, int] = (1, 0),
    name: str = LAYER_NAME,
    tp: tuple[int, int] = (1, 0),
    **moe_overrides,
) -> RoutedExperts:
    """Make a ``RoutedExperts`` layer with the method that vLLM's factories return.

    ep, tp: expert-parallel and tensor-parallel size and rank. moe_overrides: fields of
    ``FusedMoEConfig``.
    """
    ready_workspace()
    ep_size, ep_rank = ep
    parallel = dataclasses.replace(
        FusedMoEParallelConfig.make_no_parallel(),
        ep_size=ep_size,
        ep_rank=ep_rank,
        use_ep=ep_size > 1,
        tp_size=tp[0],
        tp_rank=tp[1],
    )
    with torch.device(DEVICE):
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
            "device": DEVICE,
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": parallel,
            "in_dtype": dtype,
            **moe_overrides,
        }
    )
    with set_current_vllm_config(VllmConfig()), torch.device(DEVICE):
        return RoutedExperts(
            name, dtype, moe_config, quant_config, expert_map_manager=experts
        )


def become_the_only_rank(folder: Path) -> None:
    """Set up vLLM's process groups for one rank, unless they exist.

    ``folder`` gets the file through which the ranks of a group meet.
    """
    if model_parallel_is_initialized():
        return
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


class Checkpoint:
    """Random experts of one layer in one of ``int4_formats``' formats."""

    def __init__(
        self,
        shape: Shape,
        symmetric: bool = True,
        seed: int = 0,
        format: str = "auto_round:auto_gptq",
    ) -> None:
        rng = np.random.default_rng(seed)
        sizes = {
            "gate_proj": (shape.intermediate, shape.hidden),
            "up_proj": (shape.intermediate, shape.hidden),
            "down_proj": (shape.hidden, shape.intermediate),
        }
        self.shape = shape
        self.format = FORMATS[format]
        self.experts = [
            {
                name: self.format.random_linear(rng, n, k, shape.group_size, symmetric)
                for name, (n, k) in sizes.items()
            }
            for _ in range(shape.experts)
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the checkpoint's tensors by their names within the layer."""
        for e, expert in enumerate(self.experts):
            for name, linear in expert.items():
                for suffix, array in linear.items():
                    yield f"{e}.{name}.{suffix}", torch.from_numpy(array)

    def load_into(self, layer: RoutedExperts) -> None:
        """Load through the layer's own weight loaders, then post-process.

        The model's dtype is torch's default dtype, as when vLLM loads a model.
        """
        with set_default_torch_dtype(layer.moe_config.in_dtype):
            list(layer.load_weights(self.tensors()))
            layer.quant_method.process_weights_after_loading(layer)

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = silu_and_mul,
    ) -> torch.Tensor:
        """Return float64 [M, H]: the MoE layer with dequantized weights."""
        result = torch.zeros(x.shape, dtype=torch.float64)
        for e in topk_ids.unique().tolist():
            w = {
                name: torch.from_numpy(self.format.dequantize(linear))
                for name, linear in self.experts[e].items()
            }
            for m, k in (topk_ids == e).nonzero().tolist():
                row = x[m].double()
                hidden = activation(w["gate_proj"] @ row, w["up_proj"] @ row)
                result[m] += topk_weights[m, k].double() * (w["down_proj"] @ hidden)
        return result


def random_routing(
    tokens: int, shape: Shape, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [M, top_k] weights that sum to 1, and int32 [M, top_k] distinct experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, shape.experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(shape.top_k)
    return weights / weights.sum(-1, keepdim=True), ids.int()


# fork: begin overlay
def is_opt_in() -> bool:
    """Whether the device is used on request only."""
    family = device_family()
    return isinstance(family, DeviceFamily) and family.opt_in


# fork: end
def peak_of_processing(layer: RoutedExperts) -> int:
    """Return the peak memory of converting a loaded layer, in bytes above the start.

    The allocator records it; on a GPU it rounds each tensor up to 512 bytes.
    """
    if DEVICE != "cpu":
        gc.collect()  # earlier layers would otherwise be freed in between
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        unguarded: Any = contextlib.nullcontext()
        # fork: begin overlay
        # of a layer this small the check of the kernels needs more
        unguarded = mock.patch(
            "vllm.model_executor.layers.fused_moe.hybrid_w4a16_guard.check"
        )
        # fork: end
        with unguarded:
            layer.quant_method.process_weights_after_loading(layer)
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        layer.quant_method.process_weights_after_loading(layer)
    live = peak = moves = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
            moves += 1
    assert moves > 2 * layer.local_num_experts, "no allocations were recorded"
    return peak


def fresh_gate_records(monkeypatch) -> None:
    """For one test: empty records of the decision, the default switch, and log lines
    that caplog captures."""
    monkeypatch.setattr(oracle, "_model", oracle._Model())
    monkeypatch.setattr(oracle, "_reasons_logged", set())
    # fork: begin overlay
    monkeypatch.delenv(switch.NAME, raising=False)
    if is_opt_in():
        monkeypatch.setenv(switch.NAME, "1")
    # fork: end
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)


def run_layer(
    layer: RoutedExperts,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """One forward pass of the routed experts."""
    inputs = (tensor.to(DEVICE) for tensor in (x, topk_weights, topk_ids))
    with set_forward_context(None, VllmConfig()):
        return layer.forward_modular(*inputs).cpu()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference divided by the norm of ``expected``."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
