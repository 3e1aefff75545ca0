# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""MoE runners as vLLM builds them, with a gate or a shared expert of their own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import set_default_torch_dtype

from .moe_layers import DEVICE, Shape, quant_config, ready_workspace, relative_error

SHAPE = Shape(8, 2, 256, 128, 64)
FORMAT = "auto_round:auto_gptq"
NAME = "model.layers.3.mlp"


class Calls:
    """Counts the forward passes of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_: Any) -> None:
        """Count one."""
        self.count += 1


@contextlib.contextmanager
def building(config: VllmConfig) -> Iterator[None]:
    """The context in which vLLM builds and loads a model in bf16."""
    with (
        set_current_vllm_config(config),
        torch.device(DEVICE),
        set_default_torch_dtype(torch.bfloat16),
    ):
        yield


def make_experts(**options: Any) -> MoERunner:
    """The runner of a layer of ``SHAPE``, not loaded; ``options``: the factory's."""
    ready_workspace()
    return FusedMoEFactory(
        num_experts=SHAPE.experts,
        top_k=SHAPE.top_k,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        params_dtype=torch.bfloat16,
        quant_config=quant_config(FORMAT, SHAPE.group_size),
        prefix=f"{NAME}.experts",
        **options,
    )


def check_one_graph(
    runner: MoERunner,
    forward: Callable[[int, Callable[..., Any] | None], torch.Tensor],
    calls: Calls,
    most: int,
) -> None:
    """One compiled graph serves any number of tokens.

    forward: called with a number of tokens and the compiled function, or ``None`` for
    the runner itself. calls: of vLLM's module, which runs with more than `most` tokens.
    """
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(runner.forward, backend=backend, dynamic=True)
    for tokens in (2, 3, most + 1, 40):
        before = calls.count
        got = forward(tokens, compiled)
        assert calls.count - before == (tokens > most)
        assert relative_error(got, forward(tokens, None)) < 6e-3
    assert len(graphs) == 1
