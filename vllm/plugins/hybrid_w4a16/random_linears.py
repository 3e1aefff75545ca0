# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Random dense int4 linears, as layers of vLLM's kernels, for measurements."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vllm import distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types


class RandomLinear:
    """Random weights [N, K] in GPTQ's layout on the CPU, and layers made from them.

    n, k: outputs and inputs, k a multiple of group_size, n of 8. dtype: of activations
    and scales. Without zero_points every zero point is 8.
    """

    def __init__(
        self,
        n: int,
        k: int,
        group_size: int,
        dtype: torch.dtype,
        device: str,
        zero_points: bool = False,
    ) -> None:
        self.n, self.k, self.device, self.dtype = n, k, device, dtype
        self.words = _random_words(k // 8, n)
        scales = (0.5 + torch.rand(k // group_size, n)) / (5 * k**0.5)
        self.scales = scales.to(dtype)
        self.zeros = _random_words(k // group_size, n // 8) if zero_points else None
        self.nbytes = n * k // 2 + 2 * self.scales.numel()
        self.config = MPLinearLayerConfig(
            full_weight_shape=(k, n),
            partition_weight_shape=(k, n),
            weight_type=scalar_types.uint4 if zero_points else scalar_types.uint4b8,
            act_type=dtype,
            group_size=group_size,
            zero_points=zero_points,
        )

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        q = ((self.words[:, None] >> shifts[:, None]) & 15).reshape(self.k, self.n)
        zeros: Any = 8
        if self.zeros is not None:
            zeros = ((self.zeros[:, :, None] >> shifts) & 15).reshape(-1, self.n)
            zeros = zeros.repeat_interleave(self.config.group_size, 0)
        scales = self.scales.float().repeat_interleave(self.config.group_size, 0)
        return ((q - zeros) * scales).T

    def build(self, kernel_type: type) -> tuple[Callable[[Any], Any], torch.nn.Module]:
        """A new layer with a copy of the weights: a function of ``x``, and the module.

        Needs ``one_rank``.
        """
        common = {"weight_loader": lambda *_: None, "input_dim": 0, "output_dim": 1}
        packed = {"packed_dim": 0, "packed_factor": 8, **common}
        layer: Any = torch.nn.Module()
        layer.bias = None
        layer.qweight = parameter.PackedvLLMParameter(
            data=self.words.to(self.device, copy=True), **packed
        )
        layer.scales = parameter.GroupQuantScaleParameter(
            data=self.scales.to(self.device, copy=True), **common
        )
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full_like(self.scales[:, ::8], 0x77777777, dtype=torch.int32)
        layer.qzeros = parameter.PackedvLLMParameter(
            data=zeros.to(self.device, copy=True), **{**packed, "packed_dim": 1}
        )
        kernel = kernel_type(self.config, "qweight", "scales", "qzeros")
        kernel.process_weights_after_loading(layer)
        return partial(kernel.apply_weights, layer), layer


def _random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def kernels_for(config: MPLinearLayerConfig) -> list[type]:
    """The kernels in vLLM's list that support the layer here, in its order."""
    capability = current_platform.get_device_capability()
    number = -1 if capability is None else capability.to_int()
    return [
        kernel
        for kernel in _POSSIBLE_KERNELS[current_platform._enum]
        if (number < 0 or kernel.get_min_capability() <= number)
        and kernel.can_implement(config)[0]
    ]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """One rank and a config, which vLLM's parameters and kernels require.

    Ranks that the process has already are kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        if not distributed.model_parallel_is_initialized():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = f"file://{folder}/store"
            distributed.init_distributed_environment(1, 0, store, 0, "gloo")
            stack.callback(distributed.destroy_distributed_environment)
            distributed.initialize_model_parallel(1, 1)
            stack.callback(distributed.destroy_model_parallel)
        yield
