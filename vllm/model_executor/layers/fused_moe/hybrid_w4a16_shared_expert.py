# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The shared expert of an int4 MoE layer, computed inside gate_up and down.

vLLM runs a shared expert as four to seven launches of its own. For a few tokens the
gate_up and down kernels compute it as well, from 16-bit weights or from those of
``hybrid_w4a16_dense_ops``. With more tokens vLLM runs it.

``FusingSharedExperts`` replaces the ``SharedExperts`` object of vLLM's runner. It tells
the runner that the kernel computes the shared expert, and receives the result. As
before, vLLM adds it to the output of the routed experts and sums over ranks.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm import envs
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import device_family
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import table
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
    SharedExperts,
    SharedExpertsOrder,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

MAX_TOKENS = 8
"""Most tokens for which the kernels compute the shared expert.

Read when weights are loaded, so an experiment can set another value before; with 0
vLLM runs every shared expert. On the CPU a layer of Qwen3.5-35B-A3B's sizes takes as
long either way at 8 tokens (Zen 4, 2 threads, 16-bit weights). On an H200 its whole MoE
block takes 70 us instead of 79 at 8 tokens. The kernels for GPUs read the weights once
per 4 tokens, or once per 2 if they are quantized.
"""

_PART = "shared expert"  # in the log
# Largest relative difference, in the Frobenius norm, between a model's shared expert
# and the formula of the kernels. bf16 rounds to 0.4%, in four places.
_TOLERANCE = 0.03


class SharedGateUp(NamedTuple):
    """The shared expert's part of gate_up: one more expert, which every token uses.

    The op writes ``c[m] = silu(w[:I] @ a[m]) * (w[I:] @ a[m])`` and, if there is a
    gate, ``factors[m] = sigmoid(gate @ a[m])``, both with fp32 sums. ``w`` is in the
    activations' dtype, with H a multiple of 8, or quantized as in
    ``hybrid_w4a16_dense_ops``: int32 for 4 bits, uint8 for 8.
    """

    w: torch.Tensor
    """[2*I, H] or int32 [2*I, H//8], rows 0..I-1 gate, I..2I-1 up; rows start at
    multiples of 16 bytes."""
    gate: torch.Tensor | None
    """[H] in the activations' dtype at a multiple of 16 bytes, or ``None``."""
    c: torch.Tensor
    """Output, [M, I]."""
    factors: torch.Tensor | None
    """Output, fp32 [M]; ``None`` without a gate."""
    scales: torch.Tensor | None = None
    """Of quantized weights, [2*I, H//G] with G 32, 64 or 128."""
    zero_points: torch.Tensor | None = None
    """Of 4-bit weights, int32 [2*I//8, H//G]; ``None``: 8."""


class SharedDown(NamedTuple):
    """The shared expert's part of down: ``c[m] = factors[m] * (w @ a[m])``.

    A result of its own, because tensor and expert parallelism sum it differently.
    """

    a: torch.Tensor
    """``SharedGateUp.c``, [M, I]; I is a multiple of 8."""
    w: torch.Tensor
    """[H, I] or int32 [H, I//8], in any format of ``SharedGateUp.w``."""
    factors: torch.Tensor | None
    """``SharedGateUp.factors``; with ``None`` all factors are 1."""
    c: torch.Tensor
    """Output, [M, H]."""
    scales: torch.Tensor | None = None
    """Of quantized weights, [H, I//G]."""
    zero_points: torch.Tensor | None = None
    """Of 4-bit weights, int32 [H//8, I//G]; ``None``: 8."""


class FusingSharedExperts(SharedExperts):
    """vLLM's ``SharedExperts`` whose output comes from our kernels for a few tokens.

    Args:
        replaced: the runner's own object.
        layer_name: the layer's name in the log.
    """

    def __init__(self, replaced: SharedExperts, layer_name: str) -> None:
        super().__init__(
            replaced._layer,
            replaced._moe_config,
            replaced.enable_dbo,
            replaced._mk_can_overlap_shared_experts,
        )
        self.fused_up_to = 0
        """Most tokens that the kernels take; 0: never."""
        self._on_cpu = current_platform.is_cpu()
        self._layer_name = layer_name

    @property
    def module(self) -> Any:
        """The model's shared expert."""
        return self._layer

    def prepare(self, experts: HybridW4A16MoEExperts) -> None:
        """Take over calls with a few tokens, now that weights are loaded.

        Where the loaded weights do not fit, everything stays as it was; the summary in
        the log says why.
        """
        if self.fused_up_to == 0:  # otherwise weights were reloaded
            reason = _misfit_of_weights(self.module) or _other_formula(self.module)
            if reason is not None:
                oracle.report_not_fused(_PART, self._layer_name, reason)
                return
        self.fused_up_to = min(self._limit(), experts.decode_up_to)
        if self.fused_up_to > 0:
            experts.shares_launches(_weights(self.module.gate_up_proj)[0].shape[0] // 2)
            how = f"{_format(self.module)} up to {self.fused_up_to} tokens"
            oracle.report_fused(_PART, self._layer_name, how)
        else:
            reason = "the limit is 0 tokens"
            oracle.report_not_fused(_PART, self._layer_name, reason)

    def _limit(self) -> int:
        """Most tokens for weights of this size, according to the device's tuning table.

        Its entry ``shared_expert`` has ``bytes`` and ``tokens``: the kernels compute
        larger weights for at most so many tokens. Without it the size does not matter.
        """
        family = device_family()
        if isinstance(family, str) or family.tuning is None:
            return MAX_TOKENS
        entry = table(family.tuning).get("shared_expert")
        weights = [_weights(linear)[0] for linear in _linears(self.module)]
        if entry is None or sum(w.nbytes for w in weights) <= entry["bytes"]:
            return MAX_TOKENS
        return min(MAX_TOKENS, entry["tokens"])

    def takes_over(self, x: torch.Tensor) -> bool:
        """Whether the MoE method computes the shared expert for tokens `x` [M, H].

        On the CPU always, because torch.compile traces this for any number of tokens.
        """
        if self.fused_up_to == 0:
            return False
        return self._on_cpu or x.shape[0] <= self.fused_up_to

    def _determine_shared_experts_order(
        self, hidden_states: torch.Tensor
    ) -> SharedExpertsOrder:
        if self.takes_over(hidden_states):
            return SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
        return super()._determine_shared_experts_order(hidden_states)

    def run(
        self,
        method: Any,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Run routed and shared expert; returns the routed experts' output, [M, H].

        The runner fetches the shared expert's from this object. ``method`` is the
        layer's ``HybridW4A16MoEMethod``.
        """
        if torch.compiler.is_compiling():  # on the CPU, for any number of tokens
            shared, routed = torch.ops.vllm.hybrid_w4a16_moe_with_shared_expert(
                x, topk_weights, topk_ids, layer.layer_name
            )
        else:
            shared, routed = self._run_both(method, layer, x, topk_weights, topk_ids)
        self._output[self._output_idx] = shared
        return routed

    def _run_both(
        self,
        method: Any,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x.shape[0] > self.fused_up_to:
            routed = method.apply(layer, x, topk_weights, topk_ids, None, None)
            return self.module(x), routed
        gate_up, down = self.arguments(x)
        routed = method.moe_kernel.fused_experts.apply_with_shared_expert(
            x,
            getattr(layer, f"w13_{method.packing.qweight}"),
            getattr(layer, f"w2_{method.packing.qweight}"),
            topk_weights,
            topk_ids,
            layer.activation,
            layer.expert_map,
            (gate_up, down),
        )
        return down.c, routed

    def arguments(self, x: torch.Tensor) -> tuple[SharedGateUp, SharedDown]:
        """The ops' arguments for tokens `x` [M, H], with new output tensors."""
        module = self.module
        gate_up, *gate_up_groups = _weights(module.gate_up_proj)
        down, *down_groups = _weights(module.down_proj)
        gate = factors = None
        if getattr(module, "expert_gate", None) is not None:
            gate = module.expert_gate.weight[0]
            factors = x.new_empty(x.shape[0], dtype=torch.float32)
        middle = x.new_empty(x.shape[0], gate_up.shape[0] // 2)
        return (
            SharedGateUp(gate_up, gate, middle, factors, *gate_up_groups),
            SharedDown(middle, down, factors, torch.empty_like(x), *down_groups),
        )


def runner_built(runner: "MoERunner") -> None:
    """Let the kernels compute `runner`'s shared expert if they can.

    The routed experts and the shared expert exist, but have no weights yet.
    """
    method, replaced = runner.routed_experts.quant_method, runner.shared_experts
    if replaced is None or not hasattr(method, "shared_experts"):
        return  # there is none, or the method is not HybridW4A16MoEMethod
    reason = misfit(runner)
    if reason is not None:
        oracle.report_not_fused(_PART, runner.layer_name, reason)
        return
    if current_platform.is_cpu():
        _register_op()
        for linear in _linears(replaced._layer):
            if _is_unquantized(linear):
                keep_weight_on_cpu(linear)
    runner._shared_experts = method.shared_experts = FusingSharedExperts(
        replaced, runner.layer_name
    )


def keep_weight_on_cpu(linear: Any) -> None:
    """Have vLLM keep the weights of a 16-bit linear, which are not loaded yet.

    It would free them in favour of a packed copy.
    """
    linear._cpu_skip_gemm_dispatch = True
    linear.skip_weight_relayout = True  # the name in vLLM 0.30
    linear.cpu_linear = torch.nn.functional.linear


def misfit(runner: "MoERunner") -> str | None:
    """Why vLLM computes the shared expert of `runner`, which has one, as far as shows
    before weights exist; ``None``: nothing is in the way.
    """
    return _misfit_of_runner(runner) or _misfit_of_module(runner.shared_experts._layer)


def planned_misfit(runner: "MoERunner") -> str | None:
    """As ``misfit``, for a runner with 16-bit weights on the meta device.

    What only shows with loaded weights, whether the model computes the same function,
    is left out.
    """
    return misfit(runner) or _misfit_of_weights(runner.shared_experts._layer)


@functools.cache
def _register_op() -> None:
    """Register the op that branches on the number of tokens, for torch.compile."""
    direct_register_custom_op(
        "hybrid_w4a16_moe_with_shared_expert", _run_by_name, fake_impl=_run_fake
    )


def _run_by_name(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    runner = get_forward_context().no_compile_layers[layer_name]
    layer = runner.routed_experts
    return runner.shared_experts._run_both(
        layer.quant_method, layer, x, topk_weights, topk_ids
    )


def _run_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def misfit_of_tokens(runner: "MoERunner") -> str | None:
    """Why the runner's parts may get other tokens than its input has; ``None``: no."""
    parallel = runner.moe_config.moe_parallel_config
    if parallel.dp_size > 1 or parallel.use_all2all_kernels or parallel.pcp_size > 1:
        return "ranks have different tokens"
    if parallel.is_sequence_parallel:
        return "sequence parallel"
    if runner.enable_dbo:
        return "dual batch overlap is enabled"
    return None


def _misfit_of_runner(runner: "MoERunner") -> str | None:
    """Why a call of the method does not have the shared expert's tokens."""
    reason = misfit_of_tokens(runner)
    if reason is not None:
        return reason
    if runner.routed_input_transform or runner.routed_output_transform:
        return "the routed experts' input or output is transformed"
    if runner.routed_experts.apply_router_weight_on_input:
        return "router weights are applied to the input"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch-invariant mode"
    return None


def _linears(module: Any) -> list[Any]:
    found = [module.gate_up_proj, module.down_proj]
    gate = getattr(module, "expert_gate", None)
    return found if gate is None else [*found, gate]


def _is_unquantized(linear: Any) -> bool:
    return type(linear.quant_method) is UnquantizedLinearMethod


def _weights(
    linear: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Weights, scales and zero points as the ops take them, once loaded."""
    return ops.dense_parameters(linear) or (linear.weight, None, None)


def _format(module: Any) -> str:
    """The weights' format, for the log; gate_up's and down's if they differ."""
    names = {torch.int32: "int4", torch.uint8: "int8"}
    dtypes = [_weights(linear)[0].dtype for linear in _linears(module)[:2]]
    found = [names.get(dtype) or str(dtype).removeprefix("torch.") for dtype in dtypes]
    return "/".join(dict.fromkeys(found))


def _misfit_of_module(module: Any) -> str | None:
    """Why the kernels cannot compute this module, as far as its structure shows."""
    children = {name for name, child in module.named_children()}
    parts = {"gate_up_proj", "down_proj", "act_fn"}
    if children - {"expert_gate"} != parts or not isinstance(module.act_fn, SiluAndMul):
        return f"its form is unknown ({type(module).__name__})"
    for linear in _linears(module):
        if not isinstance(linear, LinearBase):
            return f"its form is unknown ({type(module).__name__})"
        if getattr(linear, "bias", None) is not None:
            return "it has a bias"
    gate = getattr(module, "expert_gate", None)
    if gate is not None and not _is_unquantized(gate):
        return f"its gate is quantized ({type(gate.quant_method).__name__})"
    down = module.down_proj
    if not isinstance(down, RowParallelLinear):
        return f"its form is unknown ({type(module).__name__})"
    if down.reduce_results and down.tp_size > 1:
        return "it sums over ranks itself"
    return None


def _misfit_of_weights(module: Any) -> str | None:
    """Why the ops cannot read the loaded weights."""
    dtypes = set()
    for linear in _linears(module):
        packed = ops.dense_parameters(linear)
        if packed is not None:
            dtypes.add(packed[1].dtype)  # scales have the activations'
            continue
        if not _is_unquantized(linear):
            return f"its weights are quantized ({type(linear.quant_method).__name__})"
        weight = linear.weight
        dtypes.add(weight.dtype)
        name = getattr(linear, "prefix", type(linear).__name__)
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"{name} is in {weight.dtype}"
        if weight.dim() != 2 or weight.stride(1) != 1:
            return f"{name} is packed"
        rows, columns = weight.shape
        if columns % 8 or (rows > 1 and weight.stride(0) % 8):
            return f"{name} has {columns} columns, not a multiple of 8"
    gate = getattr(module, "expert_gate", None)
    if gate is not None and gate.weight.shape[0] != 1:
        return f"its gate has {gate.weight.shape[0]} outputs"
    if len(dtypes) > 1:
        return "its weights differ in dtype"
    return None


def _other_formula(module: Any) -> str | None:
    """Why the module computes something else than the kernels; tries it on 2 tokens."""
    weight, scales, _ = _weights(module.gate_up_proj)
    x = torch.linspace(-1, 1, 2 * module.gate_up_proj.input_size).mul(1000).sin()
    dtype = weight.dtype if scales is None else scales.dtype
    x = x.view(2, -1).to(weight.device, dtype)

    def product(linear: Any, rows: torch.Tensor) -> torch.Tensor:
        return linear.quant_method.apply(linear, rows).float()

    with torch.inference_mode():
        got = module(x).float()
        gate, up = product(module.gate_up_proj, x).chunk(2, -1)
        middle = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        expected = product(module.down_proj, middle)
        if getattr(module, "expert_gate", None) is not None:
            expected *= product(module.expert_gate, x).sigmoid()
    if (got - expected).norm() <= _TOLERANCE * expected.norm():
        return None
    return f"{type(module).__name__} computes another function"
