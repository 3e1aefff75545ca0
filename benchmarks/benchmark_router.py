#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times gate, scores and top-k in one launch beside vLLM's gate GEMM and top-k.

On a GPU every figure is the median over replays of a CUDA graph of all layers; on the
CPU the median of alternating rounds. ``selected`` is the share of tokens for which both
select the same experts: the order of the GEMM's sums decides the others. Exit status:
0; 2 for a bad argument.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_bench.machine import describe, load_kernels
from moe_bench.routing import route

from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_graph_timing as graph_timing,
)
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router as router
from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

SHAPES = {  # experts, hidden size, top_k
    "qwen3-30b-a3b": (128, 2048, 8),
    "qwen3.5-35b-a3b": (256, 2048, 8),
    "qwen3-next-80b-a3b": (512, 2048, 10),
}
Routing = tuple[torch.Tensor, torch.Tensor]


class Layers:
    """Random bf16 gates of several layers; softmax, renormalized."""

    def __init__(self, shape: str, layers: int, device: str, cu_count: int) -> None:
        self.experts, self.hidden, self.top_k = SHAPES[shape]
        self.device, self.cu_count = device, cu_count
        gates = torch.randn(layers, self.experts, self.hidden, device=device)
        self.gates = (gates * 2 * self.hidden**-0.5).to(torch.bfloat16)
        self.arrived = torch.zeros(layers, 1, dtype=torch.int32, device=device)

    def tokens(self, count: int) -> torch.Tensor:
        """bf16 [count, H]."""
        return torch.randn(count, self.hidden, device=self.device).to(torch.bfloat16)

    def ours(self, x: torch.Tensor, layer: int) -> Routing:
        """Weights and ids in one launch."""
        gate, arrived = self.gates[layer], self.arrived[layer]
        return route(x, gate, self.top_k, arrived, self.cu_count)

    def vllm(self, x: torch.Tensor, layer: int) -> Routing:
        """The same with the kernels that vLLM's default gate and router use."""
        logits = torch.nn.functional.linear(x, self.gates[layer])
        if self.device == "cpu":
            return _softmax_topk(logits, self.top_k, True)
        return fused_topk(x, logits, self.top_k, True)[:2]


def times_on_gpu(layers: Layers, x: torch.Tensor) -> dict[str, float]:
    """Microseconds per layer by option."""
    found = {}
    calls = len(layers.gates)
    for name, call in (("ours", layers.ours), ("vllm", layers.vllm)):
        graph = graph_timing.capture(partial(call, x), calls)
        found[name] = statistics.median(graph_timing.replay(graph, 15, calls))
    return found


def times_on_cpu(layers: Layers, x: torch.Tensor) -> dict[str, float]:
    """Microseconds per layer by option."""
    options: dict[str, Callable[[torch.Tensor, int], Routing]]
    options = {"ours": layers.ours, "vllm": layers.vllm}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(31):
        for name, call in options.items():
            begin = time.perf_counter()
            for layer in range(len(layers.gates)):
                call(x, layer)
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: 1e6 * statistics.median(taken) / len(layers.gates)
        for name, taken in seconds.items()
    }


def same_selection(layers: Layers, count: int) -> float:
    """Share of tokens for which both select the same set of experts."""
    same = total = 0
    for layer in range(len(layers.gates)):
        x = layers.tokens(count)
        ours, other = layers.ours(x, layer)[1], layers.vllm(x, layer)[1]
        equal = ours.sort(1).values == other.int().sort(1).values
        same += int(equal.all(1).sum())
        total += count
    return same / total


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=64, help="gates to rotate over")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="F", help="write the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs without one")
    if not all(1 <= count <= router.MAX_TOKENS for count in options.tokens):
        parser.error(f"--tokens: expected 1 to {router.MAX_TOKENS}")
    error = router.load_error()
    if error is not None:
        parser.error(error)
    try:
        cu_count = load_kernels(options.device)
    except ValueError as unsupported:
        parser.error(str(unsupported))
    torch.manual_seed(1)
    table: list[dict[str, Any]] = []
    for shape in options.shapes:
        layers = Layers(shape, options.layers, options.device, cu_count)
        same = same_selection(layers, router.MAX_TOKENS)
        for count in options.tokens:
            on_cpu = options.device == "cpu"
            us = (times_on_cpu if on_cpu else times_on_gpu)(
                layers, layers.tokens(count)
            )
            table.append({"shape": shape, "tokens": count, **us, "selected": same})
            print(
                f"{shape}  {count} tokens  ours {us['ours']:.1f} us  "
                f"vllm {us['vllm']:.1f} us  selected {100 * same:.2f}%"
            )
    if options.json:
        machine = describe(options.device, torch.get_num_threads())
        document = {"machine": machine, "us": table}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
