#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times the host's part of a prefill call of the experts, without a GPU.

Tensors are on the CPU. Triton compiles for ``--arch`` and does everything up to the
launch, which does nothing; vLLM's compiled ops do nothing either. What remains is the
Python of a layer call. Prints microseconds and the number of launches per call, for
``HybridW4A16MoEExperts.apply``, for vLLM's ``fused_marlin_moe`` on the same shape, and
for the dense linear from hidden to intermediate size (Marlin's is one compiled op). A
compiled op counts as one launch, and none of its own C++ is in the time.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

SAMPLES = 15
CALLS = 200
_INDICES = itertools.count()


class NoLaunches:
    """A Triton driver whose device does nothing; ``launches`` counts by kernel."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        # Triton caches kernels by device, and with them this object's launches.
        self.index = next(_INDICES)
        nvidia = arch.startswith("sm_")
        self.target = (
            GPUTarget("cuda", int(arch[3:]), 32)
            if nvidia
            else GPUTarget("hip", arch, 32)
        )
        self.launches: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 1 << 17},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = metadata.name

        def launch(*_: Any) -> None:
            self.launches[name] += 1

        return launch

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def no_ops(launches: Counter[str]) -> Iterator[None]:
    """Replace the compiled ops of both paths by functions that do nothing."""
    import triton

    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe import moe_align_block_size

    def nothing(name: str, result: int | None = None) -> Callable[..., Any]:
        def op(*args: Any, **_: Any) -> Any:
            launches[name] += 1
            return None if result is None else args[result]

        return op

    with contextlib.ExitStack() as stack:
        # vLLM switches Triton off on the CPU
        stack.enter_context(mock.patch.object(moe_align_block_size, "triton", triton))
        for name, result in (
            ("moe_align_block_size", None),
            ("moe_wna16_marlin_gemm", 1),
        ):
            op = nothing(name, result)
            stack.enter_context(mock.patch.object(_custom_ops, name, op))
        for name in ("gate_up", "down"):  # a library for the CPU lacks these
            name = f"fused_moe_wvSplitK_int4_tiled_{name}"
            stack.enter_context(
                mock.patch.object(torch.ops._rocm_C, name, nothing(name), create=True)
            )
        yield


def hybrid_call(arch: str, tokens: int, sizes: tuple[int, ...]) -> Callable[[], None]:
    """A call of our experts; sizes: experts, top_k, hidden, intermediate, group."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
        int4_w4a16_moe_quant_config,
    )
    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
        HybridW4A16MoEExperts,
    )

    experts, top_k, hidden, inter, group = sizes
    x, ids, weights = inputs(tokens, sizes)
    w13 = torch.empty(experts, 2 * inter, hidden // 8, dtype=torch.int32)
    w2 = torch.empty(experts, hidden, inter // 8, dtype=torch.int32)
    scales = [
        torch.empty(*w.shape[:2], w.shape[2] * 8 // group, dtype=x.dtype)
        for w in (w13, w2)
    ]
    config = FusedMoEConfig(
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=inter,
        num_local_experts=experts,
        num_logical_experts=experts,
        activation=MoEActivation.SILU,
        device=torch.device("cpu"),
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=x.dtype,
    )
    kernel = HybridW4A16MoEExperts(
        config, int4_w4a16_moe_quant_config(*scales, block_shape=[0, group])
    )
    shape = tuning.MoEShape(experts, top_k, hidden, inter, group, "bf16")
    kernel.tuned = tuning.lookup(arch, 0, shape)
    kernel.prefill_from = 1
    activation = MoEActivation.SILU
    shapes = kernel.workspace_shapes(
        tokens, 2 * inter, hidden, top_k, experts, experts, None, activation
    )
    first, second, out = (torch.empty(shape, dtype=x.dtype) for shape in shapes)

    def call() -> None:
        kernel.apply(
            out,
            x,
            w13,
            w2,
            weights,
            ids,
            activation,
            experts,
            None,
            None,
            None,
            first,
            second,
            None,
            False,
        )

    return call


def marlin_call(
    launches: Counter[str], tokens: int, sizes: tuple[int, ...]
) -> Callable[[], None]:
    """A call of vLLM's Marlin path on the same shape."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    experts, top_k, hidden, inter, group = sizes
    x, ids, weights = inputs(tokens, sizes)
    w1 = torch.empty(experts, hidden // 16, 4 * inter, dtype=torch.int32)
    w2 = torch.empty(experts, inter // 16, 2 * hidden, dtype=torch.int32)
    scales = [
        torch.empty(experts, k // group, n, dtype=x.dtype)
        for k, n in ((hidden, 2 * inter), (inter, hidden))
    ]
    workspace = torch.empty(1, dtype=torch.int32)
    caches = [
        torch.empty(tokens * top_k * max(2 * inter, hidden), dtype=x.dtype),
        torch.empty(tokens * top_k, inter, dtype=x.dtype),
    ]
    out = torch.empty_like(x)

    def activation(*_: Any, **__: Any) -> None:
        launches["activation"] += 1

    def moe_sum(*_: Any) -> torch.Tensor:
        launches["moe_sum"] += 1
        return out

    def call() -> None:
        fused_marlin_moe(
            x,
            w1,
            w2,
            None,
            None,
            *scales,
            weights,
            ids,
            quant_type_id=scalar_types.uint4b8.id,
            global_num_experts=experts,
            activation_func=activation,
            moe_sum=moe_sum,
            workspace=workspace,
            intermediate_cache13=caches[0],
            intermediate_cache2=caches[1],
            output=out,
        )

    return call


def linear_call(arch: str, tokens: int, sizes: tuple[int, ...]) -> Callable[[], None]:
    """A call of a dense int4 linear from the hidden to the intermediate size."""
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear

    _, _, k, n, group = sizes
    x = torch.empty(tokens, k, dtype=torch.bfloat16)
    w = torch.empty(n, k // 8, dtype=torch.int32)
    scales = torch.empty(n, k // group, dtype=torch.bfloat16)

    def call() -> None:
        hybrid_w4a16_dense_linear._multiply_on_gpu(
            x, w, scales, None, 1, group, 4, arch
        )

    return call


def inputs(tokens: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """x bf16 [tokens, hidden], ids int32 and weights fp32 [tokens, top_k]."""
    experts, top_k, hidden, _, _ = sizes
    ids = torch.randint(0, experts, (tokens, top_k), dtype=torch.int32)
    return (
        torch.empty(tokens, hidden, dtype=torch.bfloat16),
        ids,
        torch.empty(tokens, top_k),
    )


def microseconds(call: Callable[[], None]) -> tuple[float, float]:
    """The median and the least processor time of a call: SAMPLES of CALLS calls."""
    times = []
    for _ in range(SAMPLES):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - start) / CALLS * 1e6)
    return statistics.median(times), min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", help="default: sm_90")
    parser.add_argument("--tokens", default="64,2048", help="default: 64,2048")
    parser.add_argument(
        "--shape",
        default="8,2,2048,768,128",
        help="experts, top_k, hidden, intermediate, group size (default: %(default)s; "
        "the number of experts only takes memory)",
    )
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from triton.runtime.driver import driver

    device = NoLaunches(args.arch)
    driver.set_active(device)
    sizes = tuple(map(int, args.shape.split(",")))
    print(f"{'path':10} {'tokens':>6} {'us':>7} {'least':>7}  launches")
    with torch.inference_mode(), no_ops(device.launches):
        for tokens in map(int, args.tokens.split(",")):
            for name, call in (
                ("hybrid", hybrid_call(args.arch, tokens, sizes)),
                ("marlin", marlin_call(device.launches, tokens, sizes)),
                ("linear", linear_call(args.arch, tokens, sizes)),
            ):
                call()
                device.launches.clear()
                call()
                launches = ", ".join(f"{n} {k}" for k, n in device.launches.items())
                us, least = microseconds(call)
                print(f"{name:10} {tokens:6} {us:7.1f} {least:7.1f}  {launches}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
