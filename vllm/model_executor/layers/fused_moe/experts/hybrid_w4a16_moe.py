# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Modular-kernel experts over the int4 wvSplitK ops.

The weights are in the layout that ``setup_hybrid_w4a16_moe`` produces
(``hybrid_w4a16_packing``): w1 int32 [E, 2*I, H//8], w2 int32 [E, H, I//8], where E
counts the experts of this rank. A decode step is two op calls: gate and up with the
activation, then down with the weighted sum over top-k. On a GPU many tokens (prefill)
run through Triton instead, on the same weights.
"""

# fork: begin token
import dataclasses

# fork: end
import functools

# fork: begin token
import sys

# fork: end
from types import ModuleType
from typing import Any

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
    load_kernels,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
    shard_group_size,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt4Static,
    kInt4Static32,
    kInt4Static32Asym,
    kInt4StaticAsym,
)


@functools.cache
def _triton() -> ModuleType:
    """The prefill kernels, imported on first use: a CPU machine may have no Triton."""
    from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_triton

    return hybrid_w4a16_triton


class HybridW4A16MoEExperts(mk.FusedMoEExpertsModular):
    """W4A16 experts: fp16/bf16 activations, int4 weights, fp32 accumulation.

    Construction raises ``ValueError`` on a device that the op library does not support.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
    ) -> None:
        super().__init__(moe_config, quant_config)
        family = device_family()
        if not isinstance(family, DeviceFamily):
            raise ValueError(f"HybridW4A16MoEExperts: {family}")
        assert quant_config.block_shape is not None
        load_kernels(family)
        self.cu_count = family.cu_count
        self.group_size = quant_config.block_shape[1]
        self.down_group_size = shard_group_size(
            self.group_size, moe_config.intermediate_size_per_partition
        )
        self.tuned: tuning.Tuned | None = None
        # The tables depend on the number of tokens, and Triton sums in another order.
        if family.tuning is not None and not ops.row_invariant():
            shape = tuning.MoEShape(
                moe_config.num_experts,
                moe_config.experts_per_token,
                moe_config.hidden_dim,
                moe_config.intermediate_size_per_partition,
                self.group_size,
                "fp16" if moe_config.in_dtype == torch.float16 else "bf16",
            )
            self.tuned = tuning.lookup(family.name, family.cu_count, shape)
        # fork: begin token
        self.tuned_with_shared: tuning.Tuned | None = None
        # fork: end
        self.prefill_from = None if self.tuned is None else self.tuned.prefill_from
        self._matrices: tuple[Any, Any] | None = None

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return isinstance(device_family(), DeviceFamily)

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # hybrid_w4a16_ops.set_row_invariant

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        int4 = (kInt4Static, kInt4Static32, kInt4StaticAsym, kInt4Static32Asym)
        return activation_key is None and weight_key in int4

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ops.ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # Other back ends pass tokens in another form (per expert, or not yet
        # dispatched).
        config = moe_parallel_config
        # fork: begin overlay
        # vLLM 0.30 and 0.31 have neither such a back end nor the property.
        # fork: end
        passthrough = getattr(config, "use_passthrough_all2all", False)
        return not passthrough and (
            config.use_ag_rs_all2all_kernels or not config.use_all2all_kernels
        )

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of workspace13, workspace2 and the output.

        M tokens, N = 2*I, K = H. All intermediate results are in workspace2, since
        vLLM may place the output in workspace13: [M * topk, I] for decode, and the
        elements of ``hybrid_w4a16_triton.Workspace`` for prefill.
        """
        if self._is_prefill(M):
            elements = _triton().Workspace.elements(M, topk, K, N // 2)
            return (0,), (elements,), (M, K)
        return (0,), (M * topk, N // 2), (M, K)

    # fork: begin token
    def shares_launches(self, intermediate: int) -> None:
        """A shared expert with this intermediate size comes into the launches.

        It takes part of the device, so the launches have plans of their own.
        """
        if self.tuned is not None:
            shape = dataclasses.replace(self.tuned.shape, shared=intermediate)
            self.tuned_with_shared = tuning.lookup(
                self.tuned.arch, self.cu_count, shape
            )

    @property
    def decode_up_to(self) -> int:
        """Most tokens that run through the decode kernels."""
        return sys.maxsize if self.prefill_from is None else self.prefill_from - 1

    # fork: end
    def _is_prefill(self, tokens: int) -> bool:
        return self.prefill_from is not None and tokens >= self.prefill_from

    def _activation_arguments(
        self, activation: MoEActivation
    ) -> tuple[float, float, float | None]:
        """alpha, beta and limit of the op's formula."""
        config = self.activation_config
        if activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            return config.alpha, config.beta, config.clamp_limit
        if activation == MoEActivation.SILU:
            return 1.0, 0.0, config.clamp_limit
        return 1.0, 0.0, None

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Run the routed experts.

        Args:
            output: fp16/bf16 [M, H], every element is written.
            hidden_states: [M, H] in the same dtype.
            w1, w2: packed weights, see the module docstring.
            topk_weights: [M, top_k]; unused if ``apply_router_weight_on_input``: then
                they are already part of ``hidden_states``.
            topk_ids: int32/int64 [M, top_k], global expert ids.
            expert_map: int32 [global experts] to local expert or -1, or ``None``.
            workspace2: with the shape from ``workspace_shapes``.

        Raises ``RuntimeError`` if a tensor does not fit the ops (its message names the
        argument), ``ValueError`` if the workspace of prefill is too small.
        """
        assert self.w1_scale is not None and self.w2_scale is not None
        name = ops.ACTIVATIONS[activation].name
        arguments = self._activation_arguments(activation)
        weights = None if apply_router_weight_on_input else topk_weights.float()
        if self._is_prefill(hidden_states.shape[0]):
            self._prefill(
                output,
                hidden_states,
                w1,
                w2,
                weights,
                topk_ids,
                (name, *arguments),
                global_num_experts,
                expert_map,
                workspace2,
            )
            return
        self._decode(
            output,
            hidden_states,
            w1,
            w2,
            weights,
            topk_ids,
            (name, *arguments),
            expert_map,
            workspace2,
        )

    # fork: begin token
    def apply_with_shared_expert(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        expert_map: torch.Tensor | None,
        shared: tuple[ops.SharedTensors, ops.SharedTensors],
    ) -> torch.Tensor:
        """Run the decode kernels for the routed experts and the shared expert.

        For up to ``decode_up_to`` tokens. Arguments are as in ``apply``; returns
        the routed experts' output, fp16/bf16 [M, H]. ``shared``: ``SharedGateUp`` and
        ``SharedDown``.
        """
        output = torch.empty_like(hidden_states)
        self._decode(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights.float(),
            topk_ids,
            (ops.ACTIVATIONS[activation].name, *self._activation_arguments(activation)),
            expert_map,
            hidden_states.new_empty(topk_ids.numel(), w1.shape[1] // 2),
            shared,
        )
        return output

    # fork: end
    def _decode(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        activation: tuple[str, float, float, float | None],
        expert_map: torch.Tensor | None,
        workspace: torch.Tensor,
        shared: tuple[ops.SharedTensors, ops.SharedTensors] = ops.NO_SHARED_EXPERT,
    ) -> None:
        plans: tuple[tuning.Plan | None, tuning.Plan | None] = (None, None)
        tuned = self.tuned
        # fork: begin token
        if shared is not ops.NO_SHARED_EXPERT:
            tuned = self.tuned_with_shared
        # fork: end
        if tuned is not None:
            plans = tuned.decode_plans(x.shape[0])
        name, alpha, beta, limit = activation
        ops.fused_moe_wvSplitK_int4_gate_up(
            x,
            w1,
            self.w1_scale,
            workspace,
            topk_ids,
            name,
            self.cu_count,
            self.group_size,
            self.w1_zp,
            expert_map,
            alpha,
            beta,
            limit,
            plan=plans[0],
            shared=shared[0],
        )
        ops.fused_moe_wvSplitK_int4_down(
            workspace,
            w2,
            self.w2_scale,
            output,
            topk_ids,
            topk_weights,
            self.cu_count,
            self.down_group_size,
            self.w2_zp,
            expert_map,
            plan=plans[1],
            shared=shared[1],
        )

    def _prefill_matrices(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Any, Any]:
        """The layer's two ``Int4Matrix``, made again if vLLM replaced a tensor."""
        kept = self._matrices
        if (
            kept is None
            or not kept[0].is_of(w1, self.w1_scale)
            or not kept[1].is_of(w2, self.w2_scale)
        ):
            matrix = _triton().Int4Matrix
            kept = self._matrices = (
                matrix(w1, self.w1_scale, self.w1_zp, self.group_size),
                matrix(w2, self.w2_scale, self.w2_zp, self.down_group_size),
            )
        return kept

    def _prefill(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        activation: tuple[str, float, float, float | None],
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        workspace: torch.Tensor,
    ) -> None:
        # Outside of CUDA graphs the host's time limits short prompts: what depends on
        # the layer alone is computed once.
        prefill = _triton()
        w13, down = self._prefill_matrices(w1, w2)
        assert self.tuned is not None
        tokens, top_k = topk_ids.shape
        tiles = self.tuned.prefill_tiles(tokens * top_k)
        blocks = prefill.sort_pairs(
            topk_ids,
            tiles.gate_up.block_m,
            w13.experts if expert_map is None else global_num_experts,
            expert_map,
        )
        prefill.prefill_experts(
            x,
            w13,
            down,
            output,
            prefill.Workspace.split(workspace, tokens, top_k, down.rows, w13.rows // 2),
            topk_ids,
            topk_weights,
            expert_map,
            blocks,
            prefill.Activation(*activation),
            tiles,
        )
