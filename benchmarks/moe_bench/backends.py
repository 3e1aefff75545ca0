# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The backends to measure, our experts and their peers, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import silu

from moe_bench import llama_cpp, vllm_experts
from moe_bench.inputs import Batch, Case, Int4Layer, dequantize
from moe_bench.shapes import MoEShape

# Runs the experts of layer copy 0..copies-1 on a batch; returns [M, H], which the next
# call may overwrite.
Call = Callable[[int, Batch], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to run the routed experts of a layer."""

    devices: tuple[str, ...]
    weight_bits: int
    """Bits per stored weight, which determine a layer's memory."""
    max_error: float
    """Largest relative error (Frobenius) that still counts as correct."""
    build: Callable[[Case, Int4Layer, int], Call]
    """Prepares copies of a layer's weights; may raise ``vllm_experts.Unavailable``."""
    by_default: bool = True
    """Whether it runs where no backends are named."""

    def expert_bytes(self, shape: MoEShape, group_size: int) -> int:
        """Bytes of one expert as this backend stores it."""
        if self.weight_bits == 4:
            return shape.int4_bytes(group_size)
        return shape.expert_weights * self.weight_bits // 8


def _build_torch(case: Case, layer: Int4Layer, copies: int) -> Call:
    """Weights dequantized to 16 bits, then one torch matmul per expert and matrix."""

    def stack(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        experts, n, words_per_row = words.shape
        out = torch.empty(experts, n, 8 * words_per_row, dtype=scales.dtype)
        for expert in range(experts):
            out[expert] = dequantize(words[expert], scales[expert])
        return out

    first = stack(layer.w13, layer.s13), stack(layer.w2, layer.s2)
    weights = [first] + [
        (first[0].clone(), first[1].clone()) for _ in range(copies - 1)
    ]

    def call(index: int, batch: Batch) -> torch.Tensor:
        w13, w2 = weights[index]
        out = torch.zeros_like(batch.x)
        for expert in batch.topk_ids.unique().tolist():
            token, slot = (batch.topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (batch.x[token] @ w13[expert].t()).chunk(2, dim=-1)
            down = (silu(gate) * up) @ w2[expert].t()
            router_weight = batch.topk_weights[token, slot].unsqueeze(-1)
            out.index_add_(0, token, down * router_weight.to(down.dtype))
        return out

    return call


# "decode" and "prefill" are the two halves of "hybrid" for any number of tokens;
# prefill should begin where they cross.
# Error bounds: 16-bit activations stay well below 0.01 on these inputs; torch sums the
# experts in 16 bits; CPUExpertsInt4 and llama.cpp round activations to 8 bits.
BACKENDS = {
    "hybrid": Backend(("cpu", "cuda", "rocm"), 4, 0.02, vllm_experts.build_hybrid),
    "decode": Backend(
        ("cuda", "rocm"), 4, 0.02, partial(vllm_experts.build_hybrid, only="decode")
    ),
    "prefill": Backend(
        ("cuda", "rocm"), 4, 0.02, partial(vllm_experts.build_hybrid, only="prefill")
    ),
    # vLLM's batch-invariant mode, whatever VLLM_BATCH_INVARIANT says
    "row-invariant": Backend(
        ("cpu", "cuda", "rocm"),
        4,
        0.02,
        partial(vllm_experts.build_hybrid, only="row-invariant"),
        by_default=False,
    ),
    "cpu-int4": Backend(
        ("cpu",), 4, 0.05, vllm_experts.build_peer("CPU", "needs x86 with AMX")
    ),
    "llama-cpp": Backend(("cpu",), 4, 0.05, llama_cpp.build),
    "marlin": Backend(
        ("cuda", "rocm"), 4, 0.02, vllm_experts.build_peer("MARLIN", "needs CUDA")
    ),
    "triton": Backend(
        ("cuda", "rocm"), 4, 0.02, vllm_experts.build_peer("TRITON", "needs a GPU")
    ),
    "torch": Backend(("cpu",), 16, 0.03, _build_torch),
}
