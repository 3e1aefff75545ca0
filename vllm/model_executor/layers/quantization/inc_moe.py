# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""AutoRound (INC) int4 MoE checkpoints on the hybrid path."""

from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_moe_helper import GPTQ_V1
from vllm.model_executor.layers.fused_moe.routed_experts import (
    FusedMoeWeightScaleSupported,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_moe import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.plugins.hybrid_w4a16 import gate, switch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.inc.config_parser import (
        INCLayerConfig,
    )
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig
    from vllm.model_executor.layers.quantization.inc.schemes.inc_scheme import (
        INCScheme,
    )


class INCHybridW4A16MoEMethod(HybridW4A16MoEMethod):
    """``auto_round:auto_gptq``: GPTQ names and packing, no activation order."""

    packing = GPTQ_V1

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register what the checkpoint holds, E local experts, [N, K] = [2*I, H] for
        w13 and [H, I] for w2: ``_qweight`` int32 [E, K//8, N], ``_scales``
        ``params_dtype`` [E, K//G, N], ``_qzeros`` int32 [E, K//G, N//8].
        """
        attributes = {
            **extra_weight_attrs,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            "is_transposed": True,
        }

        def register(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            # zeros, so that zero points that no tensor was loaded into are noticed
            parameter = torch.nn.Parameter(
                torch.zeros(num_experts, *shape, dtype=dtype), requires_grad=False
            )
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, attributes)

        layer.num_groups_w13 = hidden_size // self.group_size
        layer.num_groups_w2 = intermediate_size_per_partition // self.group_size
        gate_up = self.moe.w13_num_shards * intermediate_size_per_partition
        for name, n, k in (
            ("w13", gate_up, hidden_size),
            ("w2", hidden_size, intermediate_size_per_partition),
        ):
            groups = k // self.group_size
            register(f"{name}_qweight", (k // 8, n), torch.int32)
            register(f"{name}_scales", (groups, n), params_dtype)
            register(f"{name}_qzeros", (groups, n // 8), torch.int32)


@switch.unless_off
def inc_moe_method(
    scheme: "INCScheme",
    config: "INCConfig",
    layer: "RoutedExperts",
    prefix: str,
    layer_config: "INCLayerConfig",
) -> INCHybridW4A16MoEMethod | None:
    """Hook of ``INCWna16Scheme.get_moe_method``, called with its arguments.

    Returns the hybrid method, or ``None`` to leave the layer to vLLM. Raises
    ``ValueError`` where that is not allowed (``VLLM_HYBRID_W4A16_MOE=require``).
    """
    unsupported = None
    if layer_config.packing_format != "auto_round:auto_gptq":
        unsupported = (
            f"packing_format is {layer_config.packing_format!r}, "
            f"supported: 'auto_round:auto_gptq'"
        )
    if not gate.accept(
        layer, prefix, layer_config.bits, layer_config.group_size, unsupported
    ):
        return None
    assert isinstance(layer_config.group_size, int)
    return INCHybridW4A16MoEMethod(
        layer.moe_config, layer_config.group_size, layer_config.sym
    )
