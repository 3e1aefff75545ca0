# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Time a decode step of an int4 MoE layer on the hybrid_w4a16 ops.

    python benchmark_hybrid_w4a16_moe.py --experts 128 --top-k 8 --hidden 2048 \
        --intermediate 768 --tokens 1 2 4 8

Prints the median and GB/s, which count the int4 weights and scales of the distinct
experts that were picked. Layers take turns, so that weights do not stay in a cache.
"""

import statistics
import time

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
    load_kernels,
)
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Layer:
    """Random packed weights of one layer."""

    def __init__(self, args, dtype: torch.dtype, device: str) -> None:
        hidden, inter, group = args.hidden, args.intermediate, args.group_size

        def words(n: int, k: int) -> torch.Tensor:
            shape = (args.experts, n, k // 8)
            return torch.randint(
                -(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device
            )

        def scales(n: int, k: int) -> torch.Tensor:
            return torch.rand(args.experts, n, k // group, device=device).to(dtype)

        self.w13, self.s13 = words(2 * inter, hidden), scales(2 * inter, hidden)
        self.w2, self.s2 = words(hidden, inter), scales(hidden, inter)

    def expert_bytes(self) -> int:
        tensors = (self.w13, self.s13, self.w2, self.s2)
        return sum(t[0].numel() * t.element_size() for t in tensors)


def decode_step(layer: Layer, x, between, out, ids, weights, cu_count, group) -> None:
    ops.fused_moe_wvSplitK_int4_gate_up(
        x, layer.w13, layer.s13, between, ids, "silu", cu_count, group
    )
    ops.fused_moe_wvSplitK_int4_down(
        between, layer.w2, layer.s2, out, ids, weights, cu_count, group
    )


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(args, layers: list[Layer], tokens: int, family, dtype, device) -> None:
    x = torch.randn(tokens, args.hidden, device=device).to(dtype)
    between = x.new_empty(tokens * args.top_k, args.intermediate)
    out = torch.empty_like(x)
    logits = torch.rand(tokens, args.experts, device=device)
    weights, ids = logits.topk(args.top_k)
    times = []
    for repeat in range(args.warmup + args.repeats):
        layer = layers[repeat % len(layers)]
        synchronize(device)
        start = time.perf_counter()
        decode_step(
            layer, x, between, out, ids, weights, family.cu_count, args.group_size
        )
        synchronize(device)
        if repeat >= args.warmup:
            times.append(time.perf_counter() - start)
    median = statistics.median(times)
    read = len(ids.unique()) * layers[0].expert_bytes()
    print(f"{tokens:6} {1e6 * median:10.1f} {read / median / 1e9:8.1f}")


def main() -> None:
    parser = FlexibleArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()

    family = device_family()
    if not isinstance(family, DeviceFamily):
        parser.error(family)
    load_kernels(family)
    device, dtype = current_platform.device_type, DTYPES[args.dtype]
    layers = [Layer(args, dtype, device) for _ in range(args.layers)]
    print(f"{family.name}\n{'tokens':>6} {'us':>10} {'GB/s':>8}")
    for tokens in args.tokens:
        measure(args, layers, tokens, family, dtype, device)


if __name__ == "__main__":
    main()
