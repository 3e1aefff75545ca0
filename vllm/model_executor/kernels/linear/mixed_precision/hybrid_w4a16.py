# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Dense int4 (W4A16) linears.

The weights are stored once, ExLlama-shuffled (layout in ``hybrid_w4a16_dense_ops``).
``hybrid_w4a16_dense_linear`` chooses the kernel by the number of activation rows.
"""

from typing import TYPE_CHECKING, Any

import torch

from vllm import envs
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

# fork: begin pair
from .hybrid_w4a16_pair import pair_of, pair_up

# fork: end
from .MPLinearKernel import MPLinearKernel, MPLinearLayerConfig

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily

    # fork: begin overlay
    from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
        LinearShape,
    )
    # fork: end

_QUANT_TYPES = (scalar_types.uint4, scalar_types.uint4b8)
# The skinny GEMM keeps a row of activations in a block's shared memory. At this size it
# takes 39 KiB; every device has at least 48.
_MAX_GPU_INPUT_SIZE = 16384


class HybridW4A16LinearKernel(MPLinearKernel):
    """fp16/bf16 activations, int4 weights in groups, fp32 accumulation.

    After loading, with K inputs, N outputs and groups of G, the layer has::

        weights      int32 [N, K//8], ExLlama-shuffled
        scales       activation dtype [N, K//G]
        zero points  int32 [N//8, K//G], row n at word n//8, bits 4*(n%8);
                     ``None`` where every zero point is 8
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability: any, as ``can_implement`` decides."""
        return 0 if current_platform.is_cuda_alike() else -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether this device can run a layer, and if not, why.

        The summary of the model's MoE layers counts int4 layers that it cannot run.
        """
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            device_family,
        )
        from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
        from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops

        family = device_family()
        reason = (
            family
            if isinstance(family, str)
            else incompatibility_reason(c, family)
            or hybrid_w4a16_dense_ops.load_error()
        )
        if reason is not None and c.weight_type in _QUANT_TYPES:
            oracle.count_other_linear(reason)
        return reason is None, reason

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            DeviceFamily,
            device_family,
        )
        from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
        from vllm.model_executor.layers.quantization.hybrid_w4a16_dense_linear import (
            register_gpu_op,
        )

        family = device_family()
        assert isinstance(family, DeviceFamily), family
        self._family = family
        register_gpu_op()
        oracle.count_linear()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Convert the checkpoint's tensors to the layout of the class.

        Each word of the weights holds eight neighbours along K. They arrive as
        [K//8, N] (GPTQ, and AWQ after vLLM's conversion) or [N, K//8]
        (compressed-tensors).
        """
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packing
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            load_kernels,
        )

        load_kernels(self._family)
        weights = getattr(layer, self.w_q_name)
        assert weights.input_dim == weights.packed_dim
        k_first = weights.input_dim == 0
        to_exllama = packing.gptq_to_exllama if k_first else packing.rows_to_exllama
        self._transform_param(layer, self.w_q_name, lambda w: to_exllama(w.data))
        self._transform_param(layer, self.w_s_name, _rows_first)
        if self.config.zero_points:
            self._transform_param(layer, self.w_zp_name, _rows_first)
        elif getattr(layer, self.w_zp_name or "", None) is not None:
            setattr(layer, self.w_zp_name, None)  # the checkpoint stores them, all 8
        hybrid_w4a16_ops.set_dense_parameters(
            layer, self.w_q_name, self.w_s_name, self.w_zp_name
        )
        # fork: begin pair
        pair_up(layer)
        # fork: end

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x @ w^.T + bias`` in ``x``'s dtype, [..., N] for ``x`` [..., K]."""
        # fork: begin pair
        pair = pair_of(layer)
        both = None if pair is None else pair.product(layer, x, self._multiply)
        if both is not None:
            return both
        # fork: end
        out = self._multiply(x, *self._get_weight_params(layer))
        if bias is not None:
            out.add_(bias)
        return out

    def _multiply(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
    ) -> torch.Tensor:
        from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear

        return hybrid_w4a16_dense_linear.multiply(
            x, weights, scales, zero_points, 4, self.config.group_size, self._family
        )


def incompatibility_reason(
    c: MPLinearLayerConfig, family: "DeviceFamily"
) -> str | None:
    """Why the kernel does not support a layer on a device; ``None`` if it does."""
    return layer_reason(c, family) or _switch_reason(c, family)


def layer_reason(c: MPLinearLayerConfig, family: "DeviceFamily") -> str | None:
    """Why the ops do not support such a layer on a device; ``None`` if they do."""
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import GROUP_SIZES

    if c.weight_type not in _QUANT_TYPES:
        return f"weights of type {c.weight_type}, supported: {_QUANT_TYPES}"
    if c.zero_points and c.weight_type != scalar_types.uint4:
        return f"zero points beside the offset of {c.weight_type}"
    if c.act_type not in (torch.float16, torch.bfloat16):
        return f"activations in {c.act_type}, supported: fp16 and bf16"
    if c.out_type not in (None, c.act_type):
        return f"outputs in {c.out_type}, supported: the activations' {c.act_type}"
    if c.group_size not in GROUP_SIZES:
        return f"group size {c.group_size}, supported: {GROUP_SIZES}"
    inputs, outputs = c.partition_weight_shape
    if inputs % c.group_size:
        return f"input size {inputs} is not a multiple of the group size {c.group_size}"
    if outputs % 8:
        return f"output size {outputs} is not a multiple of 8"
    if family.tuning is not None and inputs > _MAX_GPU_INPUT_SIZE:
        return f"input size {inputs}, supported: up to {_MAX_GPU_INPUT_SIZE}"
    return None


def _switch_reason(c: MPLinearLayerConfig, family: "DeviceFamily") -> str | None:
    """Why the kernel is not enabled on a device; ``None`` if it is."""
    # fork: begin overlay
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )
    from vllm.model_executor.layers.quantization import (
        hybrid_w4a16_linear_table as linear_table,
    )

    if switch.value() == "0":
        return f"{switch.NAME}=0"
    asked_for = switch.linear_value()
    if asked_for == "0":
        return f"{switch.LINEAR_NAME}=0"
    if asked_for == "1":
        return None
    otherwise = f", set {switch.LINEAR_NAME}=1 to use it all the same"
    if family.opt_in and switch.value() == "auto":
        return f"on {family.name} it is opt-in, set {switch.NAME}=1"
    if family.tuning is not None and not family.opt_in:  # an AMD GPU
        reason = linear_table.reason(family.name, family.cu_count, _shape_of(c))
        return None if reason is None else reason + otherwise
    # fork: end
    # There vLLM computes in int8. On a Xeon with two threads that took 1.1 to 1.9 times
    # as long as this kernel at 1 and 4 rows, but 0.8 to 0.9 times as long at 512.
    if (
        family.tuning is None
        and c.act_type == torch.bfloat16
        and torch.cpu._is_amx_tile_supported()
        and envs.VLLM_CPU_INT4_W4A8
    ):
        reason = "vLLM's AMX kernel is faster on prompts"
        # fork: begin overlay
        reason += otherwise
        # fork: end
        return reason
    return None


# fork: begin overlay
def _shape_of(c: MPLinearLayerConfig) -> "LinearShape":
    from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
        LinearShape,
    )

    inputs, outputs = c.partition_weight_shape
    dtype = "bf16" if c.act_type == torch.bfloat16 else "fp16"
    return LinearShape(outputs, inputs, c.group_size, bool(c.zero_points), dtype)


# fork: end
def _rows_first(parameter: Any) -> torch.Tensor:
    """The scales or zero points with N as the first dimension, contiguous."""
    data = parameter.data
    return (data.t() if parameter.output_dim == 1 else data).contiguous()
