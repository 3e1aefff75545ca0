# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the int4 MoE methods of all checkpoint formats share."""

from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    int4_w4a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_moe_helper import (
    CheckpointPacking,
    setup_hybrid_w4a16_moe,
)
from vllm.model_executor.layers.fused_moe.moe_output import UnfinalizedMoEOutput
from vllm.plugins.hybrid_w4a16 import gate

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExperts,
    )


class HybridW4A16MoEMethod(FusedMoEMethodBase):
    """Base of the methods: a subclass registers the parameters that its checkpoint
    format names (``create_weights``) and says how they are packed (``packing``).

    Args:
        moe: the layer's MoE configuration.
        group_size: 32, 64 or 128 weights along K per scale.
        symmetric: whether every zero point is 8.
    """

    packing: CheckpointPacking

    def __init__(self, moe: FusedMoEConfig, group_size: int, symmetric: bool) -> None:
        super().__init__(moe)
        self.group_size = group_size
        self.symmetric = symmetric

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        setup_hybrid_w4a16_moe(self, layer)
        gate.report_ready(layer.layer_name)

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig:
        scales, zeros = self.packing.scales, self.packing.zeros
        return int4_w4a16_moe_quant_config(
            w1_scale=getattr(layer, f"w13_{scales}"),
            w2_scale=getattr(layer, f"w2_{scales}"),
            w1_zp=getattr(layer, f"w13_{zeros}"),
            w2_zp=getattr(layer, f"w2_{zeros}"),
            block_shape=[0, self.group_size],
        )

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: "SharedExperts | None",
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor | UnfinalizedMoEOutput:
        """Run the routed experts on ``x`` [M, H]; returns [M, H] in ``x``'s dtype."""
        assert self.moe_kernel is not None
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=getattr(layer, f"w13_{self.packing.qweight}"),
            w2=getattr(layer, f"w2_{self.packing.qweight}"),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
