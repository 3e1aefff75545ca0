# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs the Triton prefill kernels on random layers, and compiles them beforehand.

Compiling a variant takes seconds. Other processes do it in parallel, and Triton's cache
on disk passes the results on.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import PrefillTiles
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape, RandomLayer

MAX_WORKERS = 14
SILU = ("silu", 1.0, 0.0, None)


@dataclass
class PrefillCall:
    """One prefill call of the experts: x [M, H], ids and weights [M, top_k]."""

    layer: RandomLayer
    shape: LayerShape
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None
    tiles: PrefillTiles

    def __post_init__(self) -> None:
        from vllm.model_executor.layers.fused_moe.experts import (
            hybrid_w4a16_triton as prefill,
        )

        self.prefill = prefill
        group = self.shape.group_size
        self.w13 = prefill.Int4Matrix(*self.layer.w13, group)
        self.w2 = prefill.Int4Matrix(*self.layer.w2, group)
        self.sizes = (*self.ids.shape, self.shape.hidden, self.shape.intermediate)
        elements = prefill.Workspace.elements(*self.sizes)
        buffer = torch.zeros(elements, dtype=self.x.dtype, device=self.x.device)
        self.workspace = prefill.Workspace.split(buffer, *self.sizes)

    def blocks(self):
        """Return the pairs sorted into blocks for the gate_up tile."""
        known = self.shape.experts
        if self.expert_map is not None:
            known = self.expert_map.shape[0]
        block_m = self.tiles.gate_up.block_m
        return self.prefill.sort_pairs(self.ids, block_m, known, self.expert_map)

    def launch(self, op: str, blocks) -> None:
        """Run one of the two GEMMs, "gate_up" or "down", on the workspace's content."""
        prefill, space = self.prefill, self.workspace
        if op == "gate_up":
            natural = self.tiles.gate_up.natural
            prefill.gate_up(
                self.x if natural else space.planes,
                self.w13,
                space.middle,
                blocks,
                self.shape.top_k,
                prefill.Activation(*SILU),
                self.tiles,
            )
        else:
            prefill.down(
                space.middle,
                self.w2,
                space.down_out,
                blocks,
                self.weights,
                self.tiles.down,
            )

    def run(self, out: torch.Tensor, activation: tuple = SILU) -> None:
        """Run the whole call; out is [M, H]."""
        self.prefill.prefill_experts(
            self.x,
            self.w13,
            self.w2,
            out,
            self.workspace,
            self.ids,
            self.weights,
            self.expert_map,
            self.blocks(),
            self.prefill.Activation(*activation),
            self.tiles,
        )


def compile_variant(shape: LayerShape, tiles: PrefillTiles) -> str | None:
    """Compile for ``shape`` into Triton's cache on disk; return the error, if any.

    One expert's weights are enough, since the kernels do not depend on their number.
    """
    one = dataclasses.replace(shape, experts=1, top_k=1)
    device = "cuda"
    generator = torch.Generator(device).manual_seed(0)
    layer = random_layers.random_layer(one, generator)
    tokens = 16
    x = torch.zeros(tokens, one.hidden, dtype=one.dtype, device=device)
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
    weights = torch.ones(tokens, 1, device=device)
    try:
        call = PrefillCall(layer, one, x, ids, weights, None, tiles)
        call.run(torch.empty_like(x))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # such as a tile too large for this device
        reason = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason[:200]}"
    return None


class CompilePool:
    """Compiles variants (a shape and tiles each) in other processes."""

    def __init__(self, variants: Iterable[tuple[LayerShape, PrefillTiles]]) -> None:
        context = multiprocessing.get_context("spawn")
        workers = max(1, min(len(os.sched_getaffinity(0)) - 1, MAX_WORKERS))
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, context)
        self._results = {
            variant: self._pool.submit(compile_variant, *variant)
            for variant in dict.fromkeys(variants)
        }

    def wait(self, shape: LayerShape, tiles: PrefillTiles) -> str | None:
        """Wait until the variant is compiled; return the error, if any."""
        return self._results[shape, tiles].result()

    def close(self) -> None:
        """Cancel everything that has not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)
