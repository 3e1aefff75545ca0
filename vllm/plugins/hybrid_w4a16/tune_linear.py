# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times a dense int4 linear for ``tune``: our kernel beside the one vLLM would choose.

On AMD GPUs our kernel runs by default only where this has found it faster
(``hybrid_w4a16_linear_table``). Of our ways for a number of rows the fastest is
recorded. The weights are cold, as in ``tune_bench``.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    HybridW4A16LinearKernel,
    layer_reason,
)
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_graph_timing as timing
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_linear as dense
from vllm.model_executor.layers.quantization import hybrid_w4a16_linear_table as table
from vllm.model_executor.layers.quantization.hybrid_w4a16_dense_ops import MAX_ROWS
from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
    LinearShape,
)
from vllm.plugins.hybrid_w4a16 import random_linears
from vllm.plugins.hybrid_w4a16.random_layers import DTYPES
from vllm.plugins.hybrid_w4a16.tune_bench import CALLS, LEAST_CACHE, ROTATE_CACHES
from vllm.plugins.hybrid_w4a16.tune_search import Sampler, alternate

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
MANY = 4  # rows from which the GEMM for many is tried
PEER = "peer"
MOST_COPIES = 64


class LinearBench(Protocol):
    """Our kernel and a peer on random weights of one linear."""

    peer: str | None
    """Name of the kernel that vLLM would choose instead of ours."""

    def ways(self, rows: int) -> list[str]:
        """Our ways for this number of rows whose result is right."""
        ...

    def runs_peer(self, rows: int) -> bool:
        """Whether the peer multiplies this number of rows."""
        ...

    def sample(self, rows: int) -> Sampler:
        """A sampler that times one of our ways, or ``PEER``."""
        ...


class GpuLinearBench:
    """``LinearBench`` on the current GPU; needs ``random_linears.one_rank``.

    Raises ``ValueError`` if our kernel does not support the linear.
    """

    def __init__(self, shape: LinearShape, family: Any) -> None:
        dtype = DTYPES[shape.dtype]
        self.shape, self.family = shape, family
        linear = random_linears.RandomLinear(
            shape.outputs,
            shape.inputs,
            shape.group_size,
            dtype,
            "cuda",
            shape.zero_points,
        )
        reason = layer_reason(linear.config, family)
        if reason is not None:
            raise ValueError(f"{shape}: {reason}")
        cache = max(LEAST_CACHE, torch.cuda.get_device_properties().L2_cache_size)
        wanted = min(ROTATE_CACHES * cache, torch.cuda.mem_get_info()[0] // 8)
        self.copies = max(1, min(MOST_COPIES, -(-wanted // linear.nbytes)))
        self.weights = linear.dense().to("cuda")
        self.ours = [self._build(linear) for _ in range(self.copies)]
        self.peer, self.peers = self._build_peer(linear)
        self.inputs: dict[int, torch.Tensor] = {}

    @staticmethod
    def _build(linear: random_linears.RandomLinear) -> tuple[Any, ...]:
        _, layer = linear.build(HybridW4A16LinearKernel)
        zeros = layer.qzeros if linear.config.zero_points else None
        return layer.qweight, layer.scales, zeros

    def _build_peer(
        self, linear: random_linears.RandomLinear
    ) -> tuple[str | None, list[Callable[[Any], Any]]]:
        kernels = random_linears.kernels_for(linear.config)
        for kernel in kernels:
            if kernel is HybridW4A16LinearKernel:
                continue
            try:
                made = [linear.build(kernel)[0] for _ in range(self.copies)]
            except Exception as failure:  # noqa: BLE001  # vLLM would fail as well
                _say(f"{kernel.__name__} cannot load {self.shape}: {failure}")
                continue
            return kernel.__name__, made
        return None, []

    def _x(self, rows: int) -> torch.Tensor:
        if rows not in self.inputs:
            generator = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, self.shape.inputs, generator=generator)
            x = x.to(DTYPES[self.shape.dtype]).to(self.weights.device)
            self.inputs = {rows: x}  # for one number of rows at a time
        return self.inputs[rows]

    def launch(self, way: str, rows: int, call: int) -> torch.Tensor:
        """Multiply in one of our ways or by the peer; returns [rows, N]."""
        x = self._x(rows)
        if way == PEER:
            return self.peers[call % self.copies](x)
        w, scales, zeros = self.ours[call % self.copies]
        group = self.shape.group_size
        if way == table.DEQUANTIZED:
            return dense.multiply_dequantized(x, w, scales, zeros, 4, group)
        if way == table.TILES:
            return dense.multiply_in_tiles(x, w, scales, zeros, group, self.family.name)
        return dense.multiply_few(
            x, w, scales, zeros, self.family.cu_count, group, bits=4
        )

    def ways(self, rows: int) -> list[str]:
        """Our ways for this number of rows whose result is right."""
        ways = [table.SKINNY] if rows <= MAX_ROWS else []
        if rows >= MANY and self.family.tuning is not None:
            ways += [table.TILES]
        if rows > MAX_ROWS:
            ways += [table.DEQUANTIZED]
        expected = self._x(rows).float() @ self.weights.T
        right = []
        for way in ways:
            error = reference.relative_error(self.launch(way, rows, 0), expected)
            if error <= 4 * reference.TOLERANCE[DTYPES[self.shape.dtype]]:
                right.append(way)
            else:
                _say(
                    f"WRONG: {way}, {rows} rows, {self.shape}: relative error "
                    f"{error:.2g}, not used: run vllm-hybrid-w4a16 selftest"
                )
        return right

    def runs_peer(self, rows: int) -> bool:
        """Whether the peer multiplies this number of rows."""
        if self.peer is None:
            return False
        try:
            self.launch(PEER, rows, 0)
        except Exception as failure:  # noqa: BLE001  # ours is measured all the same
            _say(f"{self.peer}, {rows} rows, {self.shape}: {failure}")
            return False
        return True

    def sample(self, rows: int) -> Sampler:
        """A sampler that times one of our ways, or ``PEER``."""
        graphs: dict[str, torch.cuda.CUDAGraph] = {}

        def sample(way: str, count: int) -> list[float]:
            if way not in graphs:
                graphs[way] = timing.capture(
                    lambda call: self.launch(way, rows, call), CALLS
                )
            return timing.replay(graphs[way], count, CALLS)

        return sample


def tune_linear(
    bench: LinearBench,
    shape: LinearShape,
    compute_units: int,
    source: str,
    save: Callable[[dict[str, Any]], object],
    progress: Any,
    numbers: Sequence[int] = ROWS,
) -> dict[str, Any]:
    """Measure one linear; returns its entry for the owner's table.

    Args:
        save: called with the entry whenever it has grown.
        progress: has ``step(name)`` and ``say(text)``.
        numbers: of rows.
    """
    entry: dict[str, Any] = {
        **table.shape_fields(shape),
        "compute_units": compute_units,
        "kernel_version": tuning.KERNEL_VERSION,
        "source": source,
        "peer": bench.peer,
        "rows": [],
    }
    for rows in numbers:
        row = _measure(bench, rows, partial(progress.step, f"{shape}, {rows} rows"))
        entry["rows"].append(row)
        save(entry)
        if row["way"] is None:
            continue
        peer = "" if row["peer_us"] is None else f" ({bench.peer} {row['peer_us']})"
        progress.say(f"  {rows} rows: {row['way']} {row['us']} us{peer}")
    reason = table.why_not(entry)
    progress.say(f"  {'ours' if reason is None else f'not ours: {reason}'}")
    return entry


def _measure(bench: LinearBench, rows: int, step: Callable[[], None]) -> dict[str, Any]:
    """A row of an entry."""
    ways = bench.ways(rows)
    if not ways:
        return {"rows": rows, "way": None, "us": None, "peer_us": None}
    entrants = [*ways, PEER] if bench.runs_peer(rows) else ways
    passes = alternate(entrants, bench.sample(rows), lambda _: step())
    us = {
        way: round(statistics.median(passes[0][i] + passes[1][i]), 2)
        for i, way in enumerate(entrants)
    }
    peer_us = us.pop(PEER, None)
    best = min(us, key=us.__getitem__)
    return {"rows": rows, "way": best, "us": us[best], "peer_us": peer_us}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
