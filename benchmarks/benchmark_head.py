#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times a quantized lm_head beside the 16-bit one, and checks its first tokens.

On a GPU every figure is the median over replays of a CUDA graph. On the CPU the options
alternate, and each round begins with a measurement of the read bandwidth; % is what a
scan reads per second relative to that bandwidth, the median over rounds. The weights
exceed any cache. ``all rescored`` is the worst case: every logit is within the window.
The check counts the rows whose first token differs from the 16-bit head's, including
rows with near ties and with heavy-tailed weights and activations.
Exit status: 0; 1 if a first token differs; 2 for a bad argument.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_bench.ceilings import ReadNow
from moe_bench.machine import describe, load_kernels

from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_graph_timing as graph_timing,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

WINDOW, BOUND = 8.0, 7.0  # as in hybrid_w4a16_head
NAMES = {"int4_g128": (4, 128), "int4_g32": (4, 32), "int8_g32": (8, 32)}


class Head:
    """A random head [N, K]: rows of different sizes, near ties and heavy tails."""

    def __init__(self, n: int, k: int, device: str, cu_count: int = 1):
        self.device, self.cu_count = device, cu_count
        weight = torch.randn(n, k, device=device) * 0.02
        weight *= torch.exp(0.3 * torch.randn(n, 1, device=device))
        self.tails = torch.arange(0, n, 97, device=device)
        scale = (
            torch.distributions.StudentT(2.0).sample((len(self.tails), k)).to(device)
        )
        weight[self.tails] *= (1 + scale.abs()).clamp(max=30)
        self.ties = torch.arange(1, n, 50, device=device)[:2000]
        noise = 2e-4 * torch.randn(len(self.ties), k, device=device)
        weight[self.ties] = weight[self.ties - 1] + noise
        self.weight = weight.to(torch.bfloat16)
        self.quantized = {
            name: ops.quantize(self.weight, *width) for name, width in NAMES.items()
        }

    def rows(self, count: int, kind: str = "peaked") -> torch.Tensor:
        """bf16 [count, K]: hidden states whose logits have a deviation of about 2 and a
        few peaks.
        """
        n, k = self.weight.shape
        among = {"ties": self.ties, "tails": self.tails}.get(kind)
        limit = n if among is None else len(among)
        chosen = torch.randint(0, limit, (count,), device=self.device)
        towards = self.weight[chosen if among is None else among[chosen]].float()
        x = torch.randn(count, k, device=self.device)
        if kind == "heavy":
            x = torch.distributions.StudentT(2.5).sample((count, k)).to(self.device)
        x /= x.norm(dim=1, keepdim=True)
        towards /= towards.norm(dim=1, keepdim=True)
        strength = torch.rand(count, 1, device=self.device) / 2
        return ((x + strength * towards) * 90).to(torch.bfloat16)

    def scan(self, name: str, a: torch.Tensor, c: torch.Tensor) -> None:
        """Write the logits of ``a`` in the format ``name`` to ``c`` [M, N]."""
        bits, group = NAMES[name]
        packed, scales, _ = self.quantized[name]
        ops.wvSplitK_int_g(a, packed, scales, c, self.cu_count, group, bits)

    def rescored(
        self, a: torch.Tensor, c: torch.Tensor, p: torch.Tensor, window: float = WINDOW
    ) -> None:
        """As ``scan`` for int4_g128, then rescored; ``p`` is the op's scratch."""
        self.scan("int4_g128", a, c)
        errors = self.quantized["int4_g128"][2]
        ops.wvSplitK_int_g_rescore(a, self.weight, errors, c, p, window, BOUND)


def microseconds(call: Callable[[], Any], calls: int = 10, replays: int = 9) -> float:
    """Median time of a call, in a graph of ``calls`` calls."""
    graph = graph_timing.capture(lambda _: call(), calls)
    return statistics.median(graph_timing.replay(graph, replays, calls))


def buffers(head: Head, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output bf16 [count, N] and the scratch of rescoring, fp32."""
    n = len(head.weight)
    return (
        torch.empty(count, n, dtype=torch.bfloat16, device=head.device),
        torch.empty(count, 2 * ops.PARTS, device=head.device),
    )


def times(head: Head, counts: list[int]) -> Iterator[dict[str, float]]:
    """Microseconds by option, one row of the table per number of rows, on a GPU."""
    for count in counts:
        a = head.rows(count)
        c, p = buffers(head, count)
        linear = torch.nn.functional.linear
        row = {"rows": count, "bf16": microseconds(partial(linear, a, head.weight))}
        for name in NAMES:
            row[name] = microseconds(partial(head.scan, name, a, c))
        row["int4_rescored"] = microseconds(partial(head.rescored, a, c, p))
        everything = partial(head.rescored, a, c, p, 1e30)
        row["all rescored"] = microseconds(everything, calls=4)
        yield row


def times_on_cpu(
    head: Head, counts: list[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """The same on the CPU, with the read bandwidth in GB/s and shares of it in %."""
    reads = ReadNow(torch.get_num_threads())
    linear = torch.nn.functional.linear
    n, k = head.weight.shape
    for count in counts:
        a = head.rows(count)
        c, p = buffers(head, count)
        calls: dict[str, Callable[[], Any]] = {
            "bf16": partial(linear, a, head.weight),
            **{name: partial(head.scan, name, a, c) for name in NAMES},
            "int4_rescored": partial(head.rescored, a, c, p),
        }
        num_bytes = {"bf16": 2.0 * n * k}
        for name, (bits, group) in NAMES.items():
            num_bytes[name] = n * k * (bits / 8 + 2 / group)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        first = len(reads.gbps)
        for _ in range(rounds):
            reads.measure()
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
        row: dict[str, Any] = {"rows": count}
        row["read GB/s"] = statistics.median(reads.gbps[first:])
        for name, times in seconds.items():
            row[name] = 1e6 * statistics.median(times)
            if name in num_bytes:
                pairs = zip(times, reads.gbps[first:], strict=True)
                shares = [num_bytes[name] / t / 1e9 / gbps for t, gbps in pairs]
                row[f"{name} %"] = 100 * statistics.median(shares)
        yield row


def first_tokens(head: Head, count: int) -> dict[str, int]:
    """How many of ``count`` rows, by kind, have another first token than in 16 bits."""
    lost, lost_by_int4, total = 0, 0, 0
    for kind in ("peaked", "ties", "tails", "heavy"):
        for _ in range(0, count // 4, ops.MAX_ROWS):
            a = head.rows(ops.MAX_ROWS, kind)
            c, p = buffers(head, ops.MAX_ROWS)
            head.scan("int4_g128", a, c)
            plain = c.argmax(1)
            head.rescored(a, c, p)
            exact = products(a, head.weight)
            first = exact.to(torch.bfloat16).argmax(1)
            lost += int((c.argmax(1) != first).sum())
            lost_by_int4 += int((plain != first).sum())
            total += len(a)
    return {"rows": total, "lost": lost, "lost_by_int4_alone": lost_by_int4}


def products(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``a @ weight.T`` with fp32 sums."""
    if a.device.type == "cpu":
        return torch.cat([a.float() @ w.float().t() for w in weight.split(8192)], 1)
    return torch.mm(a, weight.t(), out_dtype=torch.float32)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=248320)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--check", type=int, default=20000, help="rows to check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=15, help="on the CPU")
    parser.add_argument("--json", type=Path, metavar="F", help="write the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs without one")
    if max(options.rows) > ops.MAX_ROWS:
        parser.error(f"--rows: at most {ops.MAX_ROWS}")
    error = ops.load_error()
    if error is not None:
        parser.error(error)
    try:
        cu_count = load_kernels(options.device)
    except ValueError as unsupported:
        parser.error(str(unsupported))
    torch.manual_seed(1)
    head = Head(options.vocabulary, options.hidden, options.device, cu_count)
    if options.device == "cpu":
        table = list(times_on_cpu(head, options.rows, options.rounds))
    else:
        table = list(times(head, options.rows))
    for row in table:
        print("  ".join(f"{name} {value:.1f}" for name, value in row.items()))
    checked = first_tokens(head, options.check)
    print(checked)
    if options.json:
        document = {
            "machine": describe(options.device, torch.get_num_threads()),
            "shape": [options.vocabulary, options.hidden],
            "us": table,
            "first_tokens": checked,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if checked["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
