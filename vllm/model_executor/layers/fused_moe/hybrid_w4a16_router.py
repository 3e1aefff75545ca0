# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Router and top-k of a MoE layer in one launch, for a few tokens.

vLLM runs the gate's GEMM and the top-k kernel as two launches or more. Where vLLM's
runner holds the gate, ``FusedRouter`` takes the place of both. With more tokens, and
where the gate or the router has another form, vLLM's own run.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch

from vllm import envs
from vllm._aiter_ops import rocm_aiter_ops
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    keep_weight_on_cpu,
    misfit_of_tokens,
)
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
    FusedTopKRouter,
)
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import (
    GroupedTopKRouter,
)
from vllm.model_executor.layers.linear import (
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

# Limits of the op library: kRouterTokens, kRouterExperts and kRouterTopK.
MAX_TOKENS = 8
MAX_EXPERTS = 512
MAX_TOP_K = 32

# vLLM's router for the CPU picks other experts among equals and rounds weights to 16
# bits. Tests set this.
ON_CPU = False

_OP = "fused_moe_router_topk"
_PART = "router"  # in the log


@functools.cache
def load_error() -> str | None:
    """Load the op library once; returns why the op is missing, or ``None``."""
    error = hybrid_w4a16_ops.load_error()
    if error is not None:
        return error
    if not hasattr(torch.ops._rocm_C, _OP):
        return f"the op library has another version: it lacks {_OP}"
    torch.library.register_fake(f"_rocm_C::{_OP}", _no_output)
    return None


def _no_output(*args: object, **kwargs: object) -> None:
    """Fake implementation: the op writes its outputs and returns nothing."""


def fused_moe_router_topk(
    a: torch.Tensor,
    w: torch.Tensor,
    logits: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    arrived: torch.Tensor,
    scoring: str,
    renormalize: bool,
    cu_count: int,
    bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Router logits and the selected experts of M tokens, in one launch.

    ``logits = a @ w.T``, summed in fp32 and rounded once. The scores are the softmax or
    sigmoid of the logits in fp32, 0 where that is not finite. The ``top_k`` experts
    with the largest ``score + bias`` are selected, largest first, the lower number
    first among equals. Their weights are ``score * scale``, divided by the sum of the
    selected scores if ``renormalize`` (and that sum is positive).

    Given the logits, ids are those of vLLM's ``topk_softmax`` and ``topk_sigmoid``; on
    CUDA scores have the same bits if E is a power of two, or a multiple of 64 that has
    a kernel of its own there. The same bits in every run. A token's result does not
    depend on the others.

    Args:
        a: fp16/bf16 [M, K], M up to 8, K a multiple of 8, innermost stride 1.
        w: [E, K] in ``a``'s dtype or fp32, E up to 512, 16-byte aligned, row stride a
            multiple of 8.
        logits: output, [M, E] in ``a``'s dtype or fp32, contiguous.
        topk_weights: output, fp32 [M, top_k], top_k up to 32 and E, contiguous.
        topk_ids: output, int32 [M, top_k], contiguous.
        arrived: int32 [1], 0 before and after the call. Calls that may run at the same
            time need one each. No effect on the CPU.
        scoring: ``softmax`` or ``sigmoid``.
        renormalize: see above.
        cu_count: compute units to spread the grid over, at least 1; no effect on CPU.
        bias: fp32 [E], added for the selection only; ``None``: zeros.
        is_padding: bool [M]: tokens whose ids become -1; ``None``: none.
        scale: see above; finite.

    Raises ``RuntimeError`` naming an argument that does not fit.
    """
    torch.ops._rocm_C.fused_moe_router_topk(
        a,
        w,
        logits,
        topk_weights,
        topk_ids,
        arrived,
        scoring,
        renormalize,
        cu_count,
        bias,
        is_padding,
        scale,
    )


class GateOfRouter(torch.nn.Module):
    """The runner's gate where the router computes the logits itself."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """In place of logits the tokens, which the router ignores."""
        return x, None


class FusedRouter:
    """Gate and router of a runner in one launch for a few tokens.

    It replaces one step of vLLM's router: from tokens and logits to weights and logical
    ids. What follows (capture, EPLB, the ids' dtype) remains vLLM's.

    Args:
        runner: its gate and router fit.
    """

    def __init__(self, runner: "MoERunner") -> None:
        self.fused_up_to = 0
        """Most tokens that the kernel takes; 0: never."""
        self._runner = runner
        self._arrived: torch.Tensor
        self._gate: Any = runner.gate
        self._router: Any = runner.router
        self._vllm_routing = self._router._compute_routing
        runner.gate = GateOfRouter()
        self._router._compute_routing = self.compute_routing

    def prepare(self, experts: HybridW4A16MoEExperts) -> None:
        """Take over calls with a few tokens, now that weights are loaded.

        Where the loaded weights do not fit, vLLM's kernels run; the summary in the log
        says why.
        """
        weight = self._gate.weight
        if self.fused_up_to:  # weights were reloaded
            self._arrived.zero_()
        else:
            reason = self._misfit_of_weights() or load_error()
            if reason is not None:
                oracle.report_not_fused(_PART, self._runner.layer_name, reason)
                return
            self._arrived = torch.zeros(1, dtype=torch.int32, device=weight.device)
            self._cu_count = experts.cu_count
            self.fused_up_to = MAX_TOKENS
        # A buffer, which vLLM's sleep mode preserves. Reloading removes those that were
        # registered after the model was built; captured graphs have this one's address.
        self._runner.register_buffer("router_arrived", self._arrived, persistent=False)
        limit = f"up to {self.fused_up_to} tokens"
        oracle.report_fused(_PART, self._runner.layer_name, limit)

    def _misfit_of_weights(self) -> str | None:
        """Why the op cannot read the loaded weights."""
        weight = self._gate.weight
        if weight.device.type != current_platform.device_type:
            return f"the gate's weights are on {weight.device}"
        if weight.data_ptr() % 16:
            return "the gate's weights are packed"
        dtype = self._runner.moe_config.in_dtype
        return _misfit_of_weights(self._gate, self._router, dtype)

    def compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``BaseRouter._compute_routing``, but ``router_logits`` is not used."""
        if torch.compiler.is_compiling():  # on the CPU, for any number of tokens
            return torch.ops.vllm.hybrid_w4a16_moe_route(
                hidden_states, self._runner.layer_name, self._router.top_k
            )
        if hidden_states.shape[0] <= self.fused_up_to:
            return self._run(hidden_states)
        logits, _ = self._gate(hidden_states)
        return self._vllm_routing(
            hidden_states, logits, indices_type, input_ids=input_ids
        )

    def _run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        router, tokens = self._router, x.shape[0]
        weight = self._gate.weight
        topk_weights = x.new_empty(tokens, router.top_k, dtype=torch.float32)
        topk_ids = x.new_empty(tokens, router.top_k, dtype=torch.int32)
        fused_moe_router_topk(
            x,
            weight,
            x.new_empty(tokens, weight.shape[0], dtype=_logits_dtype(self._gate)),
            topk_weights,
            topk_ids,
            self._arrived,
            router.scoring_func,
            router.renormalize,
            self._cu_count,
            _bias(router),
            _padding_mask(tokens),
            getattr(router, "routed_scaling_factor", 1.0),
        )
        return topk_weights, topk_ids


def _padding_mask(tokens: int) -> torch.Tensor | None:
    """The tokens to skip, as vLLM's routers find them."""
    if envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available():
        mask = get_forward_context().is_padding
        return None if mask is None else mask[:tokens]
    return None


def runner_built(runner: "MoERunner") -> None:
    """Let the kernel compute `runner`'s router if it can.

    Gate and router exist, but have no weights yet.
    """
    method = runner.routed_experts.quant_method
    if not hasattr(method, "fused_router"):
        return  # it is not HybridW4A16MoEMethod
    reason = misfit(runner, current_platform.is_cpu())
    if reason is not None:
        oracle.report_not_fused(_PART, runner.layer_name, reason)
        return
    if current_platform.is_cpu():
        _register_op()
        keep_weight_on_cpu(runner.gate)
    method.fused_router = FusedRouter(runner)


def misfit(runner: "MoERunner", on_cpu: bool) -> str | None:
    """Why vLLM computes the router of `runner`, as far as shows before weights exist;
    ``None``: nothing is in the way.
    """
    if on_cpu and not ON_CPU:
        return "on the CPU results would differ from stock vLLM's"
    return _misfit_of_runner(runner) or _misfit_of_router(runner.router)


def planned_misfit(runner: "MoERunner", on_cpu: bool) -> str | None:
    """As ``misfit``, for a runner with weights on the meta device."""
    return misfit(runner, on_cpu) or _misfit_of_weights(
        runner.gate, runner.router, runner.moe_config.in_dtype
    )


@functools.cache
def _register_op() -> None:
    """Register the op that branches on the number of tokens, for torch.compile."""
    direct_register_custom_op(
        "hybrid_w4a16_moe_route", _route_by_name, fake_impl=_route_fake
    )


def _route_by_name(
    x: torch.Tensor, layer_name: str, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    runner = get_forward_context().no_compile_layers[layer_name]
    router = runner.routed_experts.quant_method.fused_router
    return router.compute_routing(x, x, torch.int32)


def _route_fake(
    x: torch.Tensor, layer_name: str, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], top_k)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )


def _misfit_of_runner(runner: "MoERunner") -> str | None:
    """Why the router does not get the tokens of the gate, or not from this gate."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    gate, config = runner.gate, runner.moe_config
    if type(runner)._forward_impl is not MoERunner._forward_impl:
        return f"their runner's form is unknown ({type(runner).__name__})"
    if gate is None:
        return "the model applies the gate outside of vLLM's MoE runner"
    if runner.shared_expert_gate is not None:
        return "the gate is fused with a shared expert's"
    if type(gate) not in (GateLinear, ReplicatedLinear):
        return f"the gate's form is unknown ({type(gate).__name__})"
    if not isinstance(gate.quant_method, UnquantizedLinearMethod):
        return f"the gate is quantized ({type(gate.quant_method).__name__})"
    if getattr(gate, "bias", None) is not None:
        return "the gate has a bias"
    reason = misfit_of_tokens(runner)
    if reason is not None:
        return reason
    if config.is_lora_enabled:
        return "LoRA"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch-invariant mode"
    return None


def _misfit_of_weights(gate: Any, router: Any, dtype: torch.dtype) -> str | None:
    """Why the op cannot read weights of these shapes and dtypes.

    dtype: of the activations.
    """
    weight, bias, logits = gate.weight, _bias(router), _logits_dtype(gate)
    if weight.dtype not in (dtype, torch.float32):
        return f"the gate is in {weight.dtype}, activations are in {dtype}"
    if weight.dim() != 2 or weight.stride(1) != 1:
        return "the gate's weights are packed"
    experts, hidden = weight.shape
    if experts > MAX_EXPERTS:
        return f"there are {experts} experts, more than {MAX_EXPERTS}"
    if hidden % 8 or weight.stride(0) % 8:
        return f"the gate has {hidden} columns, not a multiple of 8"
    if bias is not None and bias.dtype != torch.float32:
        return f"the correction bias is in {bias.dtype}"
    if logits not in (dtype, torch.float32):
        return f"logits are in {logits}, activations are in {dtype}"
    if getattr(router, "bias_vl", None) is not None:
        return "the router has a bias for images"
    return None


def _logits_dtype(gate: Any) -> torch.dtype:
    """To what vLLM's gate rounds the logits."""
    weight, wanted = gate.weight, getattr(gate, "out_dtype", None)
    # From 16-bit weights only these have fp32 results that were never rounded.
    unrounded = any(
        getattr(gate, name, False)
        for name in ("allow_cublas_router_gemm", "allow_ll_bf16_gemm")
    )
    if wanted is None or (weight.dtype != torch.float32 and not unrounded):
        return weight.dtype
    return wanted


def _bias(router: Any) -> torch.Tensor | None:
    return getattr(router, "e_score_correction_bias", None)


def _misfit_of_router(router: Any) -> str | None:
    """Why the kernel does not compute what this router computes."""
    if type(router) is GroupedTopKRouter:
        return "they select groups of experts"
    if type(router) not in (FusedTopKRouter, FusedTopKBiasRouter, CPURouter):
        return f"their form is unknown ({type(router).__name__})"
    if router.scoring_func not in ("softmax", "sigmoid"):
        return f"their scores are {router.scoring_func}"
    if router.top_k > MAX_TOP_K:
        return f"they select {router.top_k} experts, more than {MAX_TOP_K}"
    if getattr(router, "_hash_indices_table", None) is not None:
        return "they select experts by token id"
    if getattr(router, "num_fused_shared_experts", 0):
        return "they select shared experts as well"
    if getattr(router, "use_grouped_topk", False):
        return "they select groups of experts"
    if getattr(router, "custom_routing_function", None) is not None:
        return "they are a function of the model"
    if rocm_aiter_ops.is_fused_moe_enabled():
        return "AITER"
    return None
