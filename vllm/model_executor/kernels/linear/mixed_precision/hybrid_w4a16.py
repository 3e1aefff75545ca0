# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Dense int4 (W4A16) linears on the ops of the MoE layers, as with one expert.

The weights are stored once, ExLlama-shuffled (layout in ``hybrid_w4a16_dense_ops``). On
the CPU one C++ op takes any number of activation rows. On a GPU a skinny GEMM takes few
rows and the Triton GEMM of the MoE prefill takes more.
"""

import functools
from typing import Any

import torch

from vllm import envs
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from .MPLinearKernel import MPLinearKernel, MPLinearLayerConfig

_QUANT_TYPES = (scalar_types.uint4, scalar_types.uint4b8)
_GROUP_SIZES = (32, 64, 128)
# The skinny GEMM keeps a row of activations in a block's shared memory: 39 of at least
# 48 KiB at this size.
_MAX_GPU_INPUT_SIZE = 16384


class HybridW4A16LinearKernel(MPLinearKernel):
    """fp16/bf16 activations, int4 weights in groups, fp32 accumulation.

    After loading the layer holds, with K inputs, N outputs and groups of G::

        weights      int32 [N, K//8], ExLlama-shuffled
        scales       activation dtype [N, K//G]
        zero points  int32 [N//8, K//G], row n at word n//8, bits 4*(n%8);
                     ``None`` where every zero point is 8
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return 0 if current_platform.is_cuda_alike() else -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        reason = _layer_reason(c) or _device_reason(c) or _switch_reason(c)
        return reason is None, reason

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            DeviceFamily,
            device_family,
        )
        from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle

        family = device_family()
        assert isinstance(family, DeviceFamily), family
        self._family = family
        if family.tuning is not None:
            _register_gpu_op()
        oracle.count_linear()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the checkpoint's tensors into the layout of the class.

        Weights arrive with eight neighbours along K in a word, as [K//8, N] (GPTQ, and
        AWQ as vLLM converts it) or [N, K//8] (compressed-tensors).
        """
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
            setattr(layer, self.w_zp_name, None)  # stored all the same, every one 8

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x @ w^.T + bias`` in ``x``'s dtype, [..., N] for ``x`` [..., K]."""
        arguments = (
            x.reshape(-1, x.shape[-1]),
            *self._get_weight_params(layer),
            self._family.cu_count,
            self.config.group_size,
        )
        if self._family.tuning is None:
            out = _multiply_few(*arguments)
        else:
            out = torch.ops.vllm.hybrid_w4a16_linear(*arguments, self._family.tuning)
        if bias is not None:
            out.add_(bias)
        return out.view(*x.shape[:-1], out.shape[-1])


def _layer_reason(c: MPLinearLayerConfig) -> str | None:
    """Why the op does not compute such a layer, ``None`` if it does."""
    if c.weight_type not in _QUANT_TYPES:
        return f"weights of type {c.weight_type}, supported: {_QUANT_TYPES}"
    if c.zero_points and c.weight_type != scalar_types.uint4:
        return f"zero points beside the offset of {c.weight_type}"
    if c.act_type not in (torch.float16, torch.bfloat16):
        return f"activations in {c.act_type}, supported: fp16 and bf16"
    if c.out_type not in (None, c.act_type):
        return f"outputs in {c.out_type}, supported: the activations' {c.act_type}"
    if c.group_size not in _GROUP_SIZES:
        return f"group size {c.group_size}, supported: {_GROUP_SIZES}"
    # vLLM 0.30 says so here; later versions do not take such layers at all
    if getattr(c, "has_g_idx", False):
        return "desc_act: groups follow the activation order"
    inputs, outputs = c.partition_weight_shape
    if inputs % c.group_size:
        return f"input size {inputs} is not a multiple of the group size {c.group_size}"
    if outputs % 8:
        return f"output size {outputs} is not a multiple of 8"
    return None


def _device_reason(c: MPLinearLayerConfig) -> str | None:
    """Why the ops do not compute it on this device, ``None`` if they do."""
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import device_family
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

    family = device_family()
    if isinstance(family, str):
        return family
    inputs = c.partition_weight_shape[0]
    if family.tuning is not None and inputs > _MAX_GPU_INPUT_SIZE:
        return f"input size {inputs}, supported: up to {_MAX_GPU_INPUT_SIZE}"
    return ops.load_error()


def _switch_reason(c: MPLinearLayerConfig) -> str | None:
    """Why the kernel is not wanted on this device, ``None`` if it is."""
    otherwise = ""
    # fork: begin overlay
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )

    if switch.value() == "0":
        return f"{switch.NAME}=0"
    asked_for = switch.linear_value()
    if asked_for == "0":
        return f"{switch.LINEAR_NAME}=0"
    if asked_for == "1":
        return None
    otherwise = f", set {switch.LINEAR_NAME}=1 to use it all the same"
    if current_platform.is_rocm():
        return f"not compared with vLLM's RDNA kernel yet{otherwise}"
    if current_platform.is_cuda() and switch.value() == "auto":
        return f"on CUDA it is opt-in, set {switch.NAME}=1"
    # fork: end
    # There vLLM computes in int8. On a Xeon with two threads that took 1.1 to 1.9 times
    # as long as this kernel at 1 and 4 rows, but 0.8 to 0.9 times as long at 512.
    if (
        current_platform.is_cpu()
        and c.act_type == torch.bfloat16
        and torch.cpu._is_amx_tile_supported()
        and envs.VLLM_CPU_INT4_W4A8
    ):
        return f"vLLM's AMX kernel is faster on prompts{otherwise}"
    return None


def _multiply_few(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    cu_count: int,
    group_size: int,
) -> torch.Tensor:
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

    out = x.new_empty(x.shape[0], weights.shape[0])
    ops.wvSplitK_int_g(
        x, weights, scales, out, cu_count, group_size, 4, zero_points=zero_points
    )
    return out


def _multiply_on_gpu(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    cu_count: int,
    group_size: int,
    tuning: str,
) -> torch.Tensor:
    """Choose by the number of rows. ``tuning`` names the table of the Triton tiles."""
    from vllm.model_executor.layers.fused_moe.experts import (
        hybrid_w4a16_triton as prefill,
    )
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import prefill_tiles
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

    rows, inputs = x.shape
    if rows <= ops.MAX_ROWS:
        return _multiply_few(x, weights, scales, zero_points, cu_count, group_size)
    zeros = None if zero_points is None else zero_points.unsqueeze(0)
    matrix = prefill.Int4Matrix(
        weights.unsqueeze(0), scales.unsqueeze(0), zeros, group_size
    )
    tiles = prefill_tiles(tuning, rows, 1, weights.shape[0], inputs)
    return prefill.dense(x, matrix, tiles.down)


def _output_on_gpu(x: torch.Tensor, weights: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights.shape[0])


@functools.cache
def _register_gpu_op() -> None:
    """An op that torch.compile does not look into: it branches on the rows."""
    direct_register_custom_op(
        "hybrid_w4a16_linear", _multiply_on_gpu, fake_impl=_output_on_gpu
    )


def _rows_first(parameter: Any) -> torch.Tensor:
    """Scales or zero points with N as the first dimension, in memory too."""
    data = parameter.data
    return (data.t() if parameter.output_dim == 1 else data).contiguous()
