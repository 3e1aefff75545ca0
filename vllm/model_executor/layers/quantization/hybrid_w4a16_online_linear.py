# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""16-bit linears that are quantized to int8 or int4 when the model is loaded.

``--quantization-config '{"targets": {"*shared_expert*": "int8_g32"}}'`` selects them,
as for vLLM's own quantization at load. Most int4 checkpoints leave the shared expert in
16 bits. The 16-bit weights are freed.
"""

from typing import Any

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as moe_ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
    load_kernels,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops
from vllm.model_executor.layers.quantization.hybrid_w4a16_dense_linear import (
    multiply,
    register_gpu_op,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
    SCHEMES,
    linear_key,
)
from vllm.model_executor.layers.quantization.online.base import _ONLINE_LINEAR_METHODS
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.utils import replace_parameter


class HybridW4A16OnlineLinearMethod(OnlineLinearBase):
    """A linear in one of the schemes. After loading, an N x K layer has::

    weight         see ``hybrid_w4a16_dense_ops``
    weight_scale   activation dtype [N, K//G]
    """

    scheme_name: str
    activation_quant_key = None

    def __init__(self) -> None:
        super().__init__()
        self.scheme = SCHEMES[self.scheme_name]
        self._family = device_family()
        register_gpu_op()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the 16-bit weight, [N, K].

        Raises ``ValueError`` naming the layer if the scheme does not support it.
        """
        reason = self._family if isinstance(self._family, str) else ops.load_error()
        if params_dtype not in (torch.float16, torch.bfloat16):
            reason = f"weights in {params_dtype}, supported: fp16 and bf16"
        if input_size_per_partition % self.scheme.group_size:
            reason = (
                f"input size {input_size_per_partition} is not a multiple of the group "
                f"size {self.scheme.group_size}"
            )
        # an attribute since vLLM 0.32, where a target may name a quantized linear
        if getattr(self, "requantization_source", None) is not None:
            reason = "the checkpoint quantizes it already"
        if reason is not None:
            name = getattr(layer, "prefix", "a linear")
            raise ValueError(
                f"quantization_config.targets: {name}: {self.scheme_name}: {reason}"
            )
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the weight.

        Raises ``ValueError`` naming the layer if a weight is not finite.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        assert isinstance(self._family, DeviceFamily), self._family
        load_kernels(self._family)
        weight = layer.weight
        if not weight.isfinite().all():
            name = getattr(layer, "prefix", "a linear")
            raise ValueError(f"{name}.weight: expected finite values")
        packed, scales, _ = ops.quantize(
            weight.data, self.scheme.bits, self.scheme.group_size
        )
        replace_parameter(layer, "weight", packed)
        replace_parameter(layer, "weight_scale", scales)
        moe_ops.set_dense_parameters(layer, "weight", "weight_scale")
        layer._already_called_process_weights_after_loading = True

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x @ w^.T + bias`` in ``x``'s dtype, [..., N] for ``x`` [..., K]."""
        assert isinstance(self._family, DeviceFamily)
        out = multiply(
            x,
            layer.weight,
            layer.weight_scale,
            None,
            self.scheme.bits,
            self.scheme.group_size,
            self._family,
        )
        return out if bias is None else out.add_(bias)


class Int8G32OnlineLinearMethod(HybridW4A16OnlineLinearMethod):
    """Linears in int8 with groups of 32."""

    scheme_name = "int8_g32"


class Int4G32OnlineLinearMethod(HybridW4A16OnlineLinearMethod):
    """Linears in int4 with groups of 32."""

    scheme_name = "int4_g32"


class Int4G128OnlineLinearMethod(HybridW4A16OnlineLinearMethod):
    """Linears in int4 with groups of 128."""

    scheme_name = "int4_g128"


def register() -> None:
    """Register the methods with vLLM's quantization at load."""
    for method in (
        Int8G32OnlineLinearMethod,
        Int4G32OnlineLinearMethod,
        Int4G128OnlineLinearMethod,
    ):
        key = linear_key(SCHEMES[method.scheme_name])
        _ONLINE_LINEAR_METHODS.setdefault(key, method)
