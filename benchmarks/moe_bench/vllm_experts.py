# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""vLLM's modular experts classes, including ours, called the way vLLM calls them.

Imports vLLM only on request: the torch reference runs without it.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from moe_bench.inputs import Batch, Case, Int4Layer


class Unavailable(Exception):
    """A backend does not run here; the message says why."""


@contextlib.contextmanager
def vllm_config() -> Iterator[None]:
    """The current config that vLLM's experts require; does nothing without vLLM."""
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
    except ImportError:
        yield
        return
    with set_current_vllm_config(VllmConfig()):
        if torch.cuda.is_available():
            from vllm.v1.worker.workspace import init_workspace_manager

            init_workspace_manager(torch.device("cuda"))
        yield


def build_hybrid(
    case: Case, layer: Int4Layer, copies: int, only: str | None = None
) -> Callable[[int, Batch], torch.Tensor]:
    """``HybridW4A16MoEExperts`` on weights in its packed layout.

    ``only``: use "decode" or "prefill" for any number of tokens; "row-invariant": the
    kernels of vLLM's batch-invariant mode.
    """
    moe_config = _moe_config(case)
    try:
        from vllm.model_executor.layers.fused_moe.config import (
            int4_w4a16_moe_quant_config,
        )
        from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
            HybridW4A16MoEExperts,
        )
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import (
            advise_huge_pages,
            shuffle_exllama_,
        )
    except ImportError as error:
        raise Unavailable(
            f"the overlay is not installed beside vLLM: {error}"
        ) from None
    _require_support(HybridW4A16MoEExperts, moe_config, _hybrid_needs())

    def in_our_memory(tensor: torch.Tensor) -> torch.Tensor:
        # as for the layer's parameters
        return advise_huge_pages(torch.empty_like(tensor)).copy_(tensor)

    packed = [shuffle_exllama_(in_our_memory(w)) for w in (layer.w13, layer.w2)]
    scales = [in_our_memory(s) for s in (layer.s13, layer.s2)]

    def experts(w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> Any:
        quant_config = int4_w4a16_moe_quant_config(
            w13_scale, w2_scale, block_shape=[0, case.group_size]
        )
        with row_invariance(only == "row-invariant"):
            experts = HybridW4A16MoEExperts(moe_config, quant_config)
        if only in ("decode", "prefill"):
            experts.prefill_from = 1 if only == "prefill" else None
        return experts

    call = _ExpertsCall(case, experts, [*packed, *scales], copies, in_our_memory)
    if only != "row-invariant":
        return call

    def row_invariant_call(index: int, batch: Batch) -> torch.Tensor:
        with row_invariance(True):
            return call(index, batch)

    return row_invariant_call


@contextlib.contextmanager
def row_invariance(on: bool) -> Iterator[None]:
    """Row invariance inside, as it was afterwards; ``on=False`` changes nothing."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

    before = ops.row_invariant()
    ops.set_row_invariant(on or before)
    yield
    ops.set_row_invariant(before)


def build_peer(
    backend_name: str, needs: str
) -> Callable[[Case, Int4Layer, int], Callable[[int, Batch], torch.Tensor]]:
    """The class of vLLM's ``WNA16MoEBackend.<backend_name>``.

    vLLM's own loading code converts the weights. ``needs`` is the message if the class
    does not support the device, because vLLM's reason does not name the requirement.
    """

    def build(
        case: Case, layer: Int4Layer, copies: int
    ) -> Callable[[int, Batch], torch.Tensor]:
        moe_config = _moe_config(case)
        from compressed_tensors.quantization import QuantizationArgs

        import vllm.model_executor.layers.fused_moe.oracle.int_wna16 as oracle

        backend = oracle.WNA16MoEBackend[backend_name]
        experts_class = oracle.backend_to_kernel_cls(backend)[0]
        _require_support(experts_class, moe_config, needs)
        # of the layer, the conversion only asks for its width
        width: Any = SimpleNamespace(
            intermediate_size_per_partition=case.shape.intermediate
        )
        converted: Any = oracle.convert_to_wna16_moe_kernel_format(
            backend=backend,
            layer=width,
            quant_config=QuantizationArgs(
                num_bits=4, type="int", strategy="group", group_size=case.group_size
            ),
            input_dtype=None,
            w13=layer.w13,
            w2=layer.w2,
            w13_scale=layer.s13,
            w2_scale=layer.s2,
        )

        def experts(
            w13_scale: torch.Tensor,
            w2_scale: torch.Tensor,
            w13_zeros: torch.Tensor | None = None,
            w2_zeros: torch.Tensor | None = None,
        ) -> Any:
            quant_config = oracle.make_wna16_moe_quant_config(
                w1_scale=w13_scale,
                w2_scale=w2_scale,
                group_size=case.group_size,
                num_bits=4,
                w1_zp=w13_zeros,
                w2_zp=w2_zeros,
            )
            return experts_class(moe_config=moe_config, quant_config=quant_config)

        w13, w2, s13, s2, *zeros = converted[:6]
        zeros = [zero for zero in zeros if zero is not None]
        return _ExpertsCall(case, experts, [w13, w2, s13, s2, *zeros], copies)

    return build


def _moe_config(case: Case) -> Any:
    """``FusedMoEConfig`` of one rank without parallelism."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"vLLM is not installed: {error}") from None
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    shape = case.shape
    return FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.num_experts,
        num_logical_experts=shape.num_experts,
        activation=MoEActivation.SILU,
        device=case.device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=case.dtype,
    )


def _hybrid_needs() -> str:
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import device_family

    family = device_family()
    return family if isinstance(family, str) else f"runs on {family.name}"


def _require_support(experts_class: Any, moe_config: Any, needs: str) -> None:
    """Raise ``Unavailable`` if vLLM's own check rejects the class on this device."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import (
        FusedMoEActivationFormat,
    )
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static

    supported, reason = experts_class.is_supported_config(
        experts_class, moe_config, kInt4Static, None, FusedMoEActivationFormat.Standard
    )
    if not supported:
        raise Unavailable(f"{experts_class.__name__}: {reason} ({needs})")


class _ExpertsCall:
    """``apply`` of an experts class over several copies of a layer.

    ``tensors``: w13, w2 and the arguments of ``make_experts`` (scales, zero points).
    Copies have equal values and separate memory. Workspaces are allocated once per
    batch size, as in vLLM's workspace manager; the output is one of them.
    """

    def __init__(
        self,
        case: Case,
        make_experts: Callable[..., Any],
        tensors: list[torch.Tensor],
        copies: int,
        copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        self._case = case
        self._workspaces: dict[int, tuple[torch.Tensor, ...]] = {}
        self.layers = []
        for index in range(copies):
            mine = tensors if index == 0 else [copy(tensor) for tensor in tensors]
            self.layers.append((make_experts(*mine[2:]), mine[0], mine[1]))

    def _workspace(
        self, experts: Any, w13: torch.Tensor, w2: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, ...]:
        tokens = batch.x.shape[0]
        if tokens not in self._workspaces:
            num_experts = self._case.shape.num_experts
            _, m, n, k, top_k = experts.moe_problem_size(
                batch.x, w13, w2, batch.topk_ids
            )
            shapes = experts.workspace_shapes(
                m,
                n,
                k,
                top_k,
                num_experts,
                num_experts,
                None,
                experts.moe_config.activation,
            )
            dtype = experts.workspace_dtype(batch.x.dtype)
            self._workspaces[tokens] = tuple(
                torch.empty(shape, dtype=dtype, device=batch.x.device)
                for shape in shapes
            )
        return self._workspaces[tokens]

    def __call__(self, index: int, batch: Batch) -> torch.Tensor:
        experts, w13, w2 = self.layers[index]
        workspace13, workspace2, output = self._workspace(experts, w13, w2, batch)
        experts.apply(
            output=output,
            hidden_states=batch.x,
            w1=w13,
            w2=w2,
            topk_weights=batch.topk_weights,
            topk_ids=batch.topk_ids,
            activation=experts.moe_config.activation,
            global_num_experts=self._case.shape.num_experts,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output
