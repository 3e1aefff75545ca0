#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times a whole MoE block with a 16-bit shared expert: hidden states to summed output.

``ours`` takes three launches: gate with top-k, gate_up and down, with the shared expert
in the last two. ``outside`` computes the shared expert with vLLM's ops after them,
``without`` leaves it out. ``vllm`` is stock vLLM at its best: gate GEMM, top-k and
Marlin on one stream and the shared expert on another. Every figure is the median over
replays of a CUDA graph of several layers. Exit status: 0; 2 for a bad argument.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_bench.inputs import Batch, Case, random_layer
from moe_bench.machine import describe, load_kernels
from moe_bench.routing import route
from moe_bench.shapes import SHAPES, MoEShape
from moe_bench.vllm_experts import (
    Unavailable,
    build_hybrid,
    build_peer,
    vllm_config,
)

from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_graph_timing as graph_timing,
)
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router as router
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    MAX_TOKENS,
    SharedDown,
    SharedGateUp,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

# Intermediate size of each model's shared expert, from its published config.json. GLM's
# has no gate; it is timed with one.
SHARED = {"qwen3.5-35b-a3b": 512, "qwen3-next-80b-a3b": 512, "glm-4.5-air": 1408}
linear = torch.nn.functional.linear


class Blocks:
    """Random MoE blocks of one shape, bf16 with int4 experts in groups of 128."""

    def __init__(self, shape: MoEShape, count: int, cu_count: int) -> None:
        self.shape, self.cu_count = shape, cu_count
        case = Case(shape, torch.bfloat16, 128, torch.device("cuda"))
        layer = random_layer(case)
        self.experts: Any = build_hybrid(case, layer, count)
        self.marlin: Any = None
        try:
            self.marlin = build_peer("MARLIN", "needs CUDA")(case, layer, count)
        except Unavailable as reason:
            print(f"vllm: {reason}")

        def matrices(rows: int, columns: int) -> torch.Tensor:
            w = torch.randn(count, rows, columns, device="cuda")
            return (w * columns**-0.5).to(torch.bfloat16)

        inter = SHARED[shape.name]
        self.gates = matrices(shape.num_experts, shape.hidden)
        self.up = matrices(2 * inter, shape.hidden)
        self.down = matrices(shape.hidden, inter)
        self.shared_gates = matrices(1, shape.hidden)
        self.arrived = torch.zeros(count, 1, dtype=torch.int32, device="cuda")
        self.stream = torch.cuda.Stream()

    def route(self, x: torch.Tensor, layer: int) -> Batch:
        """Gate and top-k in one launch."""
        gate, arrived = self.gates[layer], self.arrived[layer]
        weights, ids = route(x, gate, self.shape.top_k, arrived, self.cu_count)
        return Batch(x, ids, weights, 0)

    def shared(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """The shared expert with vLLM's ops, [M, H]."""
        both = linear(x, self.up[layer])
        middle = x.new_empty(len(x), both.shape[1] // 2)
        torch.ops._C.silu_and_mul(middle, both)
        factors = torch.sigmoid(linear(x, self.shared_gates[layer]))
        return factors * linear(middle, self.down[layer])

    def ours(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """x [M, H] through layer ``layer`` in three launches; returns [M, H]."""
        batch = self.route(x, layer)
        experts, w13, w2 = self.experts.layers[layer]
        middle = x.new_empty(len(x), self.down.shape[2])
        factors = x.new_empty(len(x), dtype=torch.float32)
        out = torch.empty_like(x)
        routed: torch.Tensor = experts.apply_with_shared_expert(
            *(x, w13, w2, batch.topk_weights, batch.topk_ids),
            *(experts.moe_config.activation, None),
            (
                SharedGateUp(
                    self.up[layer], self.shared_gates[layer][0], middle, factors
                ),
                SharedDown(middle, self.down[layer], factors, out),
            ),
        )
        return routed + out

    def outside(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """The same with the shared expert after the launches."""
        routed: torch.Tensor = self.experts(layer, self.route(x, layer))
        return routed + self.shared(x, layer)

    def without(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """The same with x in place of the shared expert's output."""
        routed: torch.Tensor = self.experts(layer, self.route(x, layer))
        return routed + x

    def vllm(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """The same with stock vLLM's kernels."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            shared = self.shared(x, layer)
        logits = linear(x, self.gates[layer])
        weights, ids = fused_topk(x, logits, self.shape.top_k, True)[:2]
        routed: torch.Tensor = self.marlin(layer, Batch(x, ids, weights, 0))
        main.wait_stream(self.stream)
        return routed + shared


def measure(blocks: Blocks, tokens: int, count: int) -> dict[str, float]:
    """Microseconds per block, and the largest relative difference from ``outside``."""
    x = torch.randn(tokens, blocks.shape.hidden, device="cuda").to(torch.bfloat16)
    calls: dict[str, Callable[[torch.Tensor, int], torch.Tensor]]
    calls = {"ours": blocks.ours, "outside": blocks.outside, "without": blocks.without}
    if blocks.marlin is not None:
        calls["vllm"] = blocks.vllm
    expected = blocks.outside(x, 0).float()
    found = {}
    for name, call in calls.items():
        graph = graph_timing.capture(partial(call, x), count)
        found[name] = statistics.median(graph_timing.replay(graph, 15, count))
        if name != "without":
            error = (call(x, 0).float() - expected).norm() / expected.norm()
            found["difference"] = max(found.get("difference", 0.0), error.item())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8])
    parser.add_argument("--layers", type=int, default=12, help="to rotate over")
    parser.add_argument("--json", type=Path, metavar="F", help="write the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    if not all(1 <= count <= MAX_TOKENS for count in options.tokens):
        parser.error(f"--tokens: expected 1 to {MAX_TOKENS}")
    error = router.load_error()
    if error is not None:
        parser.error(error)
    try:
        cu_count = load_kernels("cuda")
    except ValueError as unsupported:
        parser.error(str(unsupported))
    torch.manual_seed(1)
    table: list[dict[str, Any]] = []
    with torch.inference_mode(), vllm_config():
        for name in options.shapes:
            blocks = Blocks(SHAPES[name], options.layers, cu_count)
            for tokens in options.tokens:
                us = measure(blocks, tokens, options.layers)
                table.append({"shape": name, "tokens": tokens, **us})
                columns = "  ".join(
                    f"{key} {value:.4f}"
                    if key == "difference"
                    else f"{key} {value:.1f}"
                    for key, value in us.items()
                )
                print(f"{name}  {tokens} tokens  {columns}")
            del blocks
    if options.json:
        document = {"machine": describe("cuda", torch.get_num_threads()), "us": table}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
