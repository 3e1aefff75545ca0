# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checks the first layer of a model when it is ready to run.

Silently wrong text is the worst failure of a kernel. So before a model serves, its
converted weights are compared with the checkpoint's (one expert). Then the decode and
prefill kernels run on them for a few tokens, and the results are compared with plain
torch on the same device (two experts, row by row). Later layers are checked if their
shape or format differs. This also compiles the Triton kernels that the model will use,
so that no request waits for them.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_guard_sums as sums
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_guard_kernels import KernelCheck
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import Int4MoEMethod
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

logger = init_logger(__name__)

_checked: set[tuple[object, ...]] = set()


class Kept(NamedTuple):
    """What ``check`` needs of a layer as it was before the conversion."""

    signature: tuple[object, ...]
    expert: int
    """The local expert that checksums were made of."""
    sums: dict[str, sums.Sums]
    """By "w13" and "w2"."""


def keep(method: "Int4MoEMethod", layer: "RoutedExperts") -> Kept | None:
    """Checksums of a part of what is about to be converted, for ``check``.

    ``None`` where nothing will be checked: a layer like one that was checked, weights
    on the meta device, and while torch.compile or a graph capture looks on.
    """
    if oracle.begins_model(layer.layer_name):
        _checked.clear()
    signature = _signature(method, layer)
    if signature in _checked or not _can_run(method, layer):
        return None
    expert = layer.local_num_experts - 1
    return Kept(signature, expert, sums.stored(method, layer, expert))


def check(
    method: "Int4MoEMethod",
    layer: "RoutedExperts",
    kernel: "FusedMoEKernel",
    kept: Kept | None,
) -> None:
    """Compare the layer with ``kept`` and its kernels with plain torch.

    Does nothing for ``kept is None``. Raises ``RuntimeError`` naming the layer, what is
    wrong and where, and how to serve without these kernels.
    """
    if kept is None:
        return
    start = time.monotonic()
    _checked.add(kept.signature)
    problem = sums.conversion_problem(method, layer, kept.expert, kept.sums)
    compiled, compile_s = 0, 0.0
    if problem is None:
        run = KernelCheck(method, layer, kernel, kept.expert)
        problem = run.problem()
        compiled, compile_s = run.compiled, run.compile_s
    if problem is not None:
        raise RuntimeError(
            f"layer {layer.layer_name}: {problem}. Text would be wrong. To serve "
            f"without these kernels set {switch.NAME}=0; please report it with "
            "the output of `vllm-hybrid-w4a16 selftest`."
        )
    if compiled:
        logger.info(
            "HybridW4A16 MoE: %d prefill kernels ready, %.1f s to compile or load them",
            compiled,
            compile_s,
        )
    logger.debug(
        "HybridW4A16 MoE: layer %s checked in %.3f s",
        layer.layer_name,
        time.monotonic() - start - compile_s,
    )


def _signature(method: "Int4MoEMethod", layer: "RoutedExperts") -> tuple[object, ...]:
    """Layers that agree in it run the same code on weights of the same form."""
    moe = method.moe
    return (
        method.packing.name,
        method.symmetric,
        moe.in_dtype,
        moe.experts_per_token,
        layer.activation,
        getattr(layer, f"w13_{method.packing.scales}").shape,
        getattr(layer, f"w2_{method.packing.scales}").shape,
    )


def _can_run(method: "Int4MoEMethod", layer: "RoutedExperts") -> bool:
    weights = getattr(layer, f"w13_{method.packing.qweight}")
    if weights.is_meta or weights.numel() == 0 or torch.compiler.is_compiling():
        return False
    return not (weights.is_cuda and torch.cuda.is_current_stream_capturing())
