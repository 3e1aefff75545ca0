# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The part of the int4 MoE methods that all checkpoint formats share."""

from typing import TYPE_CHECKING, Any

import torch

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    int4_w4a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_moe_helper import (
    is_packed,
    make_kernel,
    setup_hybrid_w4a16_moe,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    CheckpointPacking,
    advise_huge_pages,
    empty_experts,
    shard_group_size,
)

# fork: begin token
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_router import FusedRouter
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    FusingSharedExperts,
)

# fork: end
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import row_padding
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.moe_output import UnfinalizedMoEOutput
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.routed_experts import (
    FusedMoeWeightScaleSupported,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_loading import (
    BIAS,
    PART,
    ExpertTensorLoader,
)
from vllm.model_executor.utils import set_weight_attrs

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExperts,
    )

logger = init_logger(__name__)


class HybridW4A16MoEMethod(FusedMoEMethodBase):
    """An int4 MoE layer on the hybrid path; a subclass per format names its packing.

    Args:
        moe: the layer's MoE configuration.
        group_size: 32, 64 or 128 weights along K per scale.
        symmetric: whether every zero point is 8.
        packing: how the checkpoint stores the experts.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        group_size: int,
        symmetric: bool,
        packing: CheckpointPacking,
    ) -> None:
        super().__init__(moe)
        self.group_size = group_size
        self.symmetric = symmetric
        self.packing = packing
        # fork: begin token
        self.shared_experts: FusingSharedExperts | None = None
        """The layer's shared expert where the kernels may compute it."""
        self.fused_router: FusedRouter | None = None
        """The layer's gate and router where a kernel may compute both."""
        # fork: end

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors for E local experts.

        With [N, K] = [2*I, H] for w13 and [H, I] for w2 these are ``_<qweight>`` int32,
        ``_<scales>`` in ``params_dtype`` and ``_<zeros>`` int32, each [E, ...] with the
        packing's shape. w2 has smaller groups if tensor parallelism splits the
        checkpoint's (``shard_group_size``).
        """
        packing = self.packing
        with_zeros = packing.symmetric_zeros or not self.symmetric
        self._loader = ExpertTensorLoader(
            layer,
            packing,
            self.group_size,
            with_zeros,
            extra_weight_attrs["weight_loader"],
        )
        layer.load_weights = self._loader.load_weights
        config = get_current_vllm_config_or_none()
        self._weights_are_made_up = (
            config is not None and config.load_config.load_format == "dummy"
        )
        attributes = {
            **extra_weight_attrs,
            "weight_loader": self._loader.load,
            "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
            "is_transposed": packing.k_first,
        }
        family = device_family()
        tuning = family.tuning if isinstance(family, DeviceFamily) else None
        gate_up = self.moe.w13_num_shards * intermediate_size_per_partition
        inter = intermediate_size_per_partition
        down_group = shard_group_size(self.group_size, inter)
        if down_group != self.group_size:
            logger.info_once(
                "HybridW4A16 MoE: tensor parallel shards of %d columns cut groups of "
                "%d; scales of down_proj are stored per %d",
                inter,
                self.group_size,
                down_group,
            )
        layer.num_groups_w13 = hidden_size // self.group_size
        layer.num_groups_w2 = inter // down_group
        self.padding_bytes = 0
        for weight, n, k, group in (
            ("w13", gate_up, hidden_size, self.group_size),
            ("w2", hidden_size, inter, down_group),
        ):
            padding = 0 if tuning is None else row_padding(tuning, k)
            self.padding_bytes += 4 * num_experts * n * padding
            for suffix, shape in packing.shapes(n, k, group).items():
                if suffix == packing.qweight:
                    tensor = empty_experts(num_experts, shape, n, k, padding)
                elif suffix == packing.scales or with_zeros:
                    dtype = params_dtype if suffix == packing.scales else torch.int32
                    tensor = torch.zeros(num_experts, *shape, dtype=dtype)
                    advise_huge_pages(tensor)
                else:
                    continue
                _register(layer, weight, suffix, tensor, attributes)
            if with_zeros and self.symmetric:  # for --load-format dummy
                zeros = getattr(layer, f"{weight}_{packing.zeros}")
                zeros.dummy_weight_value = packing.symmetric_word
            no_bias = torch.zeros(num_experts, 0, dtype=params_dtype)
            _register(layer, weight, BIAS, no_bias, attributes)
            if packing.weight_shape is not None:
                shapes = torch.zeros(num_experts, 2, 2, dtype=torch.int64)
                if weight == "w2":
                    shapes = shapes[:, :1].clone()
                _register(layer, weight, packing.weight_shape, shapes, attributes)

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Convert the loaded tensors and set up the kernel; also after a reload.

        Raises an error naming the layer if a tensor was not loaded or the check of the
        converted weights fails.
        """
        loaded = not is_packed(getattr(layer, f"w13_{self.packing.qweight}"))
        if loaded and not self._weights_are_made_up:
            self._loader.check_complete(layer)
        kernel = setup_hybrid_w4a16_moe(self, layer)
        if self.moe_kernel is None:
            self._install(kernel)
        # Otherwise weights were reloaded: vLLM copies them into the existing tensors,
        # which the kernel, compiled code and captured graphs read.
        for weight in ("w13", "w2"):
            setattr(layer, f"{weight}_{BIAS}", None)
        # fork: begin token
        if self.shared_experts is not None:
            self.shared_experts.prepare(self.moe_kernel.fused_experts)
        if self.fused_router is not None:
            self.fused_router.prepare(self.moe_kernel.fused_experts)
        # fork: end
        oracle.report_ready(layer.layer_name, self.padding_bytes)

    def _install(self, kernel: FusedMoEKernel) -> None:
        self.moe_kernel = kernel
        self.moe_quant_config = kernel.fused_experts.quant_config

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig:
        """vLLM's description of the layer's scales, zero points and group size."""
        scales, zeros = self.packing.scales, self.packing.zeros
        return int4_w4a16_moe_quant_config(
            w1_scale=getattr(layer, f"w13_{scales}"),
            w2_scale=getattr(layer, f"w2_{scales}"),
            w1_zp=getattr(layer, f"w13_{zeros}", None),
            w2_zp=getattr(layer, f"w2_{zeros}", None),
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
        config = self.moe_quant_config
        assert config is not None
        if not torch.compiler.is_compiling() and config.w1_scale is not getattr(
            layer, f"w13_{self.packing.scales}"
        ):
            # the converted tensors were replaced after loading
            self._install(make_kernel(self, layer))
        # fork: begin token
        if isinstance(shared_experts, FusingSharedExperts) and (
            shared_experts.takes_over(x)
        ):
            return shared_experts.run(self, layer, x, topk_weights, topk_ids)
        # fork: end
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


def _register(
    layer: "RoutedExperts",
    weight: str,
    suffix: str,
    tensor: torch.Tensor,
    attributes: dict[str, Any],
) -> None:
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    layer.register_parameter(f"{weight}_{suffix}", parameter)
    set_weight_attrs(parameter, attributes | {PART: (weight, suffix)})
