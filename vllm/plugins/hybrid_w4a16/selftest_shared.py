# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The cases of ``selftest`` in which gate_up and down compute a shared expert too."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    SharedDown,
    SharedGateUp,
)
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape
from vllm.plugins.hybrid_w4a16.selftest_cases import (
    Case,
    Poisoned,
    WrongResultError,
    at,
)

TOKENS = (1, 3, 5)
# Bits, symmetric, group sizes of gate_up and down; with 16 bits there are no groups.
FORMATS = (
    (16, True, 0, 0),
    (4, True, 128, 32),
    (4, False, 32, 64),
    (8, True, 64, 32),
)
# No multiple of what a block computes, but of every group size in FORMATS.
SIZE = 192
_FACTOR_TOLERANCE = 1e-4
"""Largest difference of a gate's sigmoid, computed in fp32, from float64."""


class Weights(NamedTuple):
    """A projection of the shared expert as the ops take it, and its values."""

    w: torch.Tensor
    scales: torch.Tensor | None
    zero_points: torch.Tensor | None
    exact: torch.Tensor
    """float64 [N, K]"""

    @classmethod
    def make(
        cls,
        shape: LayerShape,
        n: int,
        k: int,
        format: tuple[int, bool, int],
        generator: torch.Generator,
    ) -> "Weights":
        """Random weights [N, K]; ``format``: bits, symmetric, group size."""
        bits, symmetric, group_size = format
        if bits == 16:
            w = torch.randn(n, k, generator=generator) * k**-0.5
            w = w.to(shape.dtype)
            return cls(w, None, None, w.double())
        one = dataclasses.replace(
            shape, experts=1, group_size=group_size, symmetric=symmetric
        )
        matrix = random_layers.random_matrix(one, n, k, generator)
        zeros = None if symmetric else matrix.zero_points
        if bits == 4:
            exact = matrix.dequantized(0, torch.float64)
            first = None if zeros is None else zeros[0]
            return cls(matrix.words[0], matrix.scales[0], first, exact)
        w = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
        scales = matrix.scales[0] / 16
        q = w.double().unflatten(1, (-1, group_size)) - 128
        return cls(w, scales, None, (q * scales.double()[..., None]).flatten(1))

    def to(self, device: str) -> "Weights":
        """A copy on ``device``; ``exact`` stays where it is."""
        scales, zeros = self.scales, self.zero_points
        return Weights(
            self.w.to(device),
            None if scales is None else scales.to(device),
            None if zeros is None else zeros.to(device),
            self.exact,
        )


@dataclass
class SharedCase:
    """A layer with a shared expert, and the ops' outputs in float64."""

    name: str
    layer: Case
    gate_up: Weights
    down: Weights
    gate: torch.Tensor
    """[H]"""
    middle: torch.Tensor
    """[M, SIZE]: input of down."""
    factors: torch.Tensor
    """fp32 [M]: input of down."""
    expected: dict[str, torch.Tensor]

    @classmethod
    def make(
        cls, dtype: torch.dtype, format: tuple[int, bool, int, int], seed: int
    ) -> "SharedCase":
        """A random case on the CPU; ``format`` is one of ``FORMATS``."""
        bits, symmetric, *groups = format
        shape = LayerShape(6, 2, 384, 128, 64, dtype)
        layer = Case.make(shape, 0, seed)
        generator = torch.Generator().manual_seed(seed + sum(format))
        gate_up, down = (
            Weights.make(shape, n, k, (bits, symmetric, group), generator)
            for (n, k), group in zip(
                ((2 * SIZE, shape.hidden), (shape.hidden, SIZE)), groups, strict=True
            )
        )
        gate = (torch.randn(shape.hidden, generator=generator) / 20).to(dtype)
        tokens = len(layer.x)
        middle = torch.randn(tokens, SIZE, generator=generator).to(dtype)
        factors = torch.rand(tokens, generator=generator)
        x = layer.x.double()
        gates, ups = (x @ gate_up.exact.T).chunk(2, 1)
        expected = {
            "gate_up": reference.activate(gates, ups, "silu", 1.0, 0.0, None),
            "factors": (x @ gate.double()).sigmoid(),
            "down": factors.double()[:, None] * (middle.double() @ down.exact.T),
        }
        zeros = "" if bits == 16 else " sym" if symmetric else " zp"
        named = f"{random_layers.dtype_name(dtype)}, {bits} bits{zeros}"
        return cls(named, layer, gate_up, down, gate, middle, factors, expected)

    def to(self, device: str) -> "SharedCase":
        """The case with its inputs on ``device``."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device)
            for name in ("layer", "gate_up", "down", "gate", "middle", "factors")
        }
        return dataclasses.replace(self, **moved)


class SharedCall:
    """One op on the first tokens of a case; ``run`` writes ``routed`` and ``shared``.

    Args:
        op: "gate_up" or "down".
        case: on ``device``.
        plan: launch plan; ``None``: the rule's.
    """

    def __init__(
        self,
        op: str,
        case: SharedCase,
        tokens: int,
        device: str,
        cu_count: int,
        plan: tuple[int, ...] | None = None,
    ) -> None:
        self.op, self.case, self.tokens, self.cu_count = op, case, tokens, cu_count
        dtype = case.layer.shape.dtype
        self.plan: dict[str, Any] = {} if plan is None else {"plan": plan}
        self.routed = Poisoned.of(case.layer, op, tokens, device)
        self.shared = Poisoned(tokens, case.expected[op].shape[1], dtype, device)
        self.factors = case.factors[:tokens].clone()

    def run(self) -> None:
        """Run the op."""
        case, layer, tokens = self.case, self.case.layer, self.tokens
        shape, x, ids = layer.shape, layer.x[:tokens], layer.ids[:tokens]
        if self.op == "gate_up":
            w, scales, zeros = layer.layer.w13
            self.factors.fill_(float("nan"))
            ops.fused_moe_wvSplitK_int4_gate_up(
                *(x, w, scales, self.routed.view, ids, "silu"),
                *(self.cu_count, shape.group_size, zeros, layer.expert_map),
                shared=SharedGateUp(
                    *(case.gate_up.w, case.gate, self.shared.view, self.factors),
                    *case.gate_up[1:3],
                ),
                **self.plan,
            )
            return
        w, scales, zeros = layer.layer.w2
        pairs = layer.middle[: tokens * shape.top_k]
        ops.fused_moe_wvSplitK_int4_down(
            *(pairs, w, scales, self.routed.view, ids, layer.weights[:tokens]),
            *(self.cu_count, shape.group_size, zeros, layer.expert_map),
            shared=SharedDown(
                *(case.middle[:tokens], case.down.w, self.factors, self.shared.view),
                *case.down[1:3],
            ),
            **self.plan,
        )

    def check(self, tolerance: float) -> float:
        """Check all outputs; returns the relative error of the shared expert's.

        Raises ``WrongResultError`` that names the output and the element.
        """
        with at("routed experts beside a shared one"):
            self.routed.check(self.case.layer.expect(self.op, self.tokens), tolerance)
        error = self.shared.check(self.case.expected[self.op][: self.tokens], tolerance)
        if self.op == "gate_up":
            got = self.factors.double().cpu()
            off = (got - self.case.expected["factors"][: self.tokens]).abs().max()
            if not off <= _FACTOR_TOLERANCE:
                raise WrongResultError(
                    f"the gate's sigmoid is off by {off:.2g}, allowed "
                    f"{_FACTOR_TOLERANCE:.0e}"
                )
        return error
