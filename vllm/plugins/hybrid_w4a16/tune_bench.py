# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs the kernels on random layers of one shape for ``tune``: verifies and times them.

The weights are cold: calls rotate over more of them than the last-level cache holds.
There are ``BATCHES`` routings for every number of tokens, half of them skewed: models
do not use all experts alike, and a plan has to be fast for both.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_graph_timing as timing
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    SharedDown,
    SharedGateUp,
)
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
    Plan,
    PrefillTiles,
    Tile,
)
from vllm.plugins.hybrid_w4a16 import prefill_kernels, random_layers
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape
from vllm.plugins.hybrid_w4a16.tune_search import (
    Family,
    Sampler,
    plan_families,
    tile_sizes,
)

# Bytes of weights that calls rotate over: at least ROTATE_CACHES times the last-level
# cache (32 MiB on gfx1151, which torch does not report), and at most MOST_BYTES.
ROTATE_CACHES = 8
LEAST_CACHE = 32 << 20
MOST_BYTES = 6 << 30
CALLS = 24  # launches in a graph
BATCHES = 8  # different routings that the launches rotate over


class Bench(Protocol):
    """The kernels on random layers of one shape."""

    def families(self, op: str) -> list[Family]:
        """The grids of launch plans for ``op`` ("gate_up" or "down") on this device."""
        ...

    def is_right(self, op: str, tokens: int, plan: Plan | None) -> bool:
        """Whether ``op`` accepts the plan and its result is right."""
        ...

    def sample_decode(
        self, op: str, tokens: int
    ) -> Callable[[Plan | None, int], list[float]]:
        """A function that times a plan: (plan, count) to ``count`` samples in us."""
        ...

    def tile_candidates(self, op: str, block_m: int, tokens: int) -> list[Tile]:
        """The tiles of ``block_m`` rows that compile and whose result is right."""
        ...

    def sample_tile(self, op: str, tokens: int) -> Sampler:
        """A sampler that times ``op`` of prefill with a ``Tile``."""
        ...

    def sample_whole(
        self, tokens: int, plans: tuple[Plan | None, Plan | None], tiles: PrefillTiles
    ) -> Sampler:
        """A sampler that times all of an experts call, by "decode" or by "prefill"."""
        ...

    def sample_pair(self, tokens: int) -> Sampler:
        """A sampler that times gate_up and then down, by their two plans."""
        ...

    def drop_graphs(self) -> None:
        """Free the captured graphs."""
        ...


class GpuBench:
    """``Bench`` on the current GPU; it times graph replays with events.

    Args:
        shape: of the random layers.
        cu_count: compute units, passed to the ops.
        variants: pool that compiles prefill tiles in advance; ``None``: no pool.
        shared: intermediate size of a 16-bit shared expert with a gate, which the
            launches of decode compute as well; 0: none.

    Raises ``ValueError`` if one layer takes more than half of the free memory.
    """

    def __init__(
        self, shape: LayerShape, cu_count: int, variants: Any = None, shared: int = 0
    ) -> None:
        self.shape, self.cu_count, self.pool = shape, cu_count, variants
        device = "cuda"
        generator = torch.Generator(device).manual_seed(0)
        layer_bytes = shape.experts * shape.expert_bytes
        cache = max(LEAST_CACHE, torch.cuda.get_device_properties().L2_cache_size)
        free = torch.cuda.mem_get_info()[0]
        wanted = min(max(ROTATE_CACHES * cache, 2 * layer_bytes), MOST_BYTES, free // 2)
        copies = max(1, min(12, -(-wanted // layer_bytes)))
        if layer_bytes > free // 2:
            raise ValueError(
                f"{shape}: a layer takes {layer_bytes / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free"
            )
        self.layers = [
            random_layers.random_layer(shape, generator) for _ in range(copies)
        ]
        self.shared = [
            tuple(
                torch.randn(*size, generator=generator, device=device).to(shape.dtype)
                for size in (
                    (2 * shared, shape.hidden),
                    (shape.hidden, shared),
                    (shape.hidden,),
                )
            )
            for _ in self.layers
            if shared
        ]
        self.inputs: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self.buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.right: dict[tuple[str, int], torch.Tensor] = {}
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self.matrix_units = torch.version.hip is None

    # ---------------------------------------------------------------------- decode
    def batches(self, tokens: int) -> list[tuple[torch.Tensor, ...]]:
        """``BATCHES`` inputs: x [M, H], ids and weights [M, top_k], middle
        [M * top_k, I], with x and middle in the shape's dtype.
        """
        if tokens not in self.inputs:
            generator = torch.Generator().manual_seed(tokens)
            shape, made = self.shape, []
            for i in range(BATCHES):
                ids, weights = random_layers.random_routing(
                    tokens, shape, generator, skewed=i % 2 == 1
                )
                x = torch.randn(tokens, shape.hidden, generator=generator)
                pairs = tokens * shape.top_k
                middle = torch.randn(pairs, shape.intermediate, generator=generator)
                made.append(
                    tuple(
                        t.cuda()
                        for t in (
                            x.to(shape.dtype),
                            ids,
                            weights,
                            middle.to(shape.dtype),
                        )
                    )
                )
            self.inputs = {tokens: made}  # only for one number of tokens at a time
            self.right.clear()
        return self.inputs[tokens]

    def launch(
        self,
        op: str,
        tokens: int,
        call: int,
        plan: Plan | None,
        out: torch.Tensor,
        middle: torch.Tensor | None = None,
    ) -> None:
        """Launch ``op`` once, writing ``out``.

        down reads ``middle`` [M * top_k, I], by default that of the batch.
        """
        layer = self.layers[call % len(self.layers)]
        x, ids, weights, own_middle = self.batches(tokens)[call % BATCHES]
        cu_count, group = self.cu_count, self.shape.group_size
        of_gate_up, of_down = self.shared_arguments(tokens, call)
        if op == "gate_up":
            w, scales, zeros = layer.w13
            ops.fused_moe_wvSplitK_int4_gate_up(
                x,
                w,
                scales,
                out,
                ids,
                "silu",
                cu_count,
                group,
                zeros,
                plan=plan,
                shared=of_gate_up,
            )
            return
        w, scales, zeros = layer.w2
        a = own_middle if middle is None else middle
        ops.fused_moe_wvSplitK_int4_down(
            a,
            w,
            scales,
            out,
            ids,
            weights,
            cu_count,
            group,
            zeros,
            plan=plan,
            shared=of_down,
        )

    def shared_arguments(
        self, tokens: int, call: int
    ) -> tuple[ops.SharedTensors, ops.SharedTensors]:
        """The shared expert's arguments of call number ``call`` of gate_up and down."""
        if not self.shared:
            return ops.NO_SHARED_EXPERT
        up, down, gate = self.shared[call % len(self.shared)]
        if tokens not in self.buffers:  # for one number of tokens at a time
            sizes = (down.shape[1], self.shape.hidden)
            middle, out = (
                torch.zeros(tokens, n, dtype=self.shape.dtype, device=up.device)
                for n in sizes
            )
            factors = torch.zeros(tokens, device=up.device)
            self.buffers = {tokens: (middle, factors, out)}
        middle, factors, out = self.buffers[tokens]
        return (
            SharedGateUp(up, gate, middle, factors),
            SharedDown(middle, down, factors, out),
        )

    def output(self, op: str, tokens: int) -> torch.Tensor:
        """An output of ``op`` filled with NaN: [M * top_k, I] or [M, H]."""
        shape = self.shape
        rows = tokens * shape.top_k if op == "gate_up" else tokens
        columns = shape.intermediate if op == "gate_up" else shape.hidden
        nan = float("nan")
        return torch.full((rows, columns), nan, dtype=shape.dtype, device="cuda")

    def expected(self, op: str, tokens: int) -> torch.Tensor:
        """The result of call 0, in fp32 from dequantized weights."""
        if (op, tokens) not in self.right:
            x, ids, weights, middle = self.batches(tokens)[0]
            shape, layer = self.shape, self.layers[0]
            result = torch.zeros(self.output(op, tokens).shape, device="cuda")
            for expert in ids.unique().tolist():
                pairs = (ids.flatten() == expert).nonzero()[:, 0]
                of = pairs // shape.top_k
                if op == "gate_up":
                    w = layer.w13.dequantized(expert, torch.float32)
                    gate, up = (x[of].float() @ w.T).chunk(2, 1)
                    result[pairs] = reference.activate(gate, up, "silu")
                else:
                    w = layer.w2.dequantized(expert, torch.float32)
                    part = middle[pairs].float() @ w.T
                    result.index_add_(0, of, part * weights.flatten()[pairs, None])
            self.right[op, tokens] = result
        return self.right[op, tokens]

    def families(self, op: str) -> list[Family]:
        """The grids of launch plans for ``op`` on this GPU."""
        return plan_families(op, self.matrix_units)

    def is_right(self, op: str, tokens: int, plan: Plan | None) -> bool:
        """Whether ``op`` accepts the plan and its result is right.

        Prints a warning for a wrong result. Raises ``RuntimeError`` for any error of
        the op other than a rejected plan.
        """
        out = self.output(op, tokens)
        try:
            self.launch(op, tokens, 0, plan, out)
        except RuntimeError as refusal:
            if ": plan:" in str(refusal):  # not for this shape or device
                return False
            raise
        error = reference.relative_error(out, self.expected(op, tokens))
        if not error <= 2 * reference.TOLERANCE[self.shape.dtype]:
            print(
                f"WRONG: {op} with plan {plan}, {tokens} tokens, {self.shape}: "
                f"error {error:.2g}, not used: run vllm-hybrid-w4a16 selftest",
                file=sys.stderr,
            )
            return False
        return True

    def sample_decode(
        self, op: str, tokens: int
    ) -> Callable[[Plan | None, int], list[float]]:
        """A function that times a plan: (plan, count) to ``count`` samples in us."""
        out = self.output(op, tokens)

        def sample(plan: Plan | None, count: int) -> list[float]:
            def launch(call: int) -> None:
                self.launch(op, tokens, call, plan, out)

            return self.replay((op, tokens, plan), launch, count)

        return sample

    # --------------------------------------------------------------------- prefill
    def call(self, tokens: int, call: int, tiles: PrefillTiles) -> Any:
        """Prefill number ``call`` on ``tokens`` tokens; its launches are separate."""
        x, ids, weights, _ = self.batches(tokens)[call % BATCHES]
        layer = self.layers[call % len(self.layers)]
        return prefill_kernels.PrefillCall(
            layer, self.shape, x, ids, weights, None, tiles
        )

    def tile_candidates(self, op: str, block_m: int, tokens: int) -> list[Tile]:
        """The tiles of ``block_m`` rows that compile and whose result is right."""
        good = []
        for tile in tile_sizes(block_m):
            pair = PrefillTiles(tile, tile)
            if self.pool is not None and self.pool.wait(self.shape, pair) is not None:
                continue
            call = self.call(tokens, 0, pair)
            out = torch.full_like(call.x, float("nan"))
            call.run(out)
            error = reference.relative_error(out, self.whole(tokens))
            if error <= 4 * reference.TOLERANCE[self.shape.dtype]:
                good.append(tile)
            else:
                print(
                    f"WRONG: prefill with {tile}, {tokens} tokens, {self.shape}: "
                    f"relative error {error:.2g}; it is not used.",
                    file=sys.stderr,
                )
        return good

    def whole(self, tokens: int) -> torch.Tensor:
        """Call 0 of the whole layer with the decode ops, fp32 [M, H], planned by the
        rule.
        """
        if ("whole", tokens) not in self.right:
            middle = self.output("gate_up", tokens)
            self.launch("gate_up", tokens, 0, None, middle)
            out = self.output("down", tokens)
            self.launch("down", tokens, 0, None, out, middle)
            self.right["whole", tokens] = out.float()
        return self.right["whole", tokens]

    def sample_tile(self, op: str, tokens: int) -> Sampler:
        """A sampler that times ``op`` of prefill with a ``Tile``."""
        calls: dict[Tile, list[Any]] = {}

        def sample(tile: Tile, count: int) -> list[float]:
            pair = PrefillTiles(tile, tile)
            if tile not in calls:
                calls.clear()
                calls[tile] = [self.call(tokens, i, pair) for i in range(BATCHES)]
            made = calls[tile]
            blocks = [call.blocks() for call in made]

            def launch(index: int) -> None:
                number = index % BATCHES
                made[number].launch(op, blocks[number])

            key = ("tile", op, tokens, tile)
            return self.replay(key, launch, count, calls=BATCHES, keep=False)

        return sample

    def sample_whole(
        self, tokens: int, plans: tuple[Plan | None, Plan | None], tiles: PrefillTiles
    ) -> Sampler:
        """A sampler that times all of an experts call, by "decode" or by "prefill"."""
        out, decode = self.output("down", tokens), self.sample_pair(tokens)
        calls = [self.call(tokens, i, tiles) for i in range(BATCHES)]

        def prefill(index: int) -> None:
            calls[index % BATCHES].run(out)

        def sample(kind: str, count: int) -> list[float]:
            if kind == "decode":
                return decode(plans, count)
            return self.replay(("whole", kind, tokens), prefill, count)

        return sample

    def sample_pair(self, tokens: int) -> Sampler:
        """A sampler that times gate_up and then down, by their two plans."""
        middle, out = self.output("gate_up", tokens), self.output("down", tokens)

        def sample(plans: tuple[Plan | None, Plan | None], count: int) -> list[float]:
            def launch(call: int) -> None:
                self.launch("gate_up", tokens, call, plans[0], middle)
                self.launch("down", tokens, call, plans[1], out, middle)

            return self.replay(("pair", tokens, plans), launch, count)

        return sample

    # ---------------------------------------------------------------------- timing
    def replay(
        self,
        key: Any,
        launch: Callable[[int], None],
        count: int,
        calls: int = CALLS,
        keep: bool = True,
    ) -> list[float]:
        """``count`` samples in microseconds per call, each of a graph of ``calls``
        calls. The graph is captured once per ``key`` if ``keep``.
        """
        graph = self.graphs.get(key)
        if graph is None:
            graph = timing.capture(launch, calls)
            if keep:
                self.graphs[key] = graph
        return timing.replay(graph, count, calls)

    def drop_graphs(self) -> None:
        """Free the captured graphs."""
        self.graphs.clear()
