# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What ``selftest`` feeds to the ops, and how it looks at what they wrote."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as dense_ops
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape

SENTINEL = 1234.0
GUARD = 64  # elements before and behind an output
# An element may be off by this many times the error that is allowed on average: the
# largest of 1e6 normal deviates is about 5 deviations.
ELEMENT_FACTOR = 8.0
TOKENS = (1, 2, 3, 5, 8, 33)
ACTIVATIONS: tuple[tuple[str, float, float, float | None], ...] = (
    ("silu", 1.0, 0.0, None),
    ("silu", 1.0, 0.0, 0.7),
    ("gelu", 1.0, 0.0, None),
    ("gelu_tanh", 1.0, 0.0, None),
    ("swigluoai", 1.702, 1.0, 1.5),
)


class WrongResultError(Exception):
    """An output is wrong; the message says where."""


class Poisoned:
    """An output [rows, cols] full of NaN between sentinels."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
        self.flat = torch.empty(
            rows * cols + 2 * GUARD, dtype=dtype, device=device
        ).fill_(SENTINEL)
        self.view = self.flat[GUARD : GUARD + rows * cols].view(rows, cols)
        self.poison()

    @classmethod
    def of(cls, case: "Case", op: str, tokens: int, device: str) -> "Poisoned":
        """For ``op`` on so many tokens of a case."""
        columns = case.expected[op].shape[1]
        return cls(case.rows(op, tokens), columns, case.shape.dtype, device)

    def poison(self) -> None:
        self.view.fill_(float("nan"))

    def bits(self) -> torch.Tensor:
        return self.flat.view(torch.int16).clone()

    def check(self, expected: torch.Tensor, tolerance: float) -> float:
        """The relative error; ``expected`` is NaN where nothing may be written.

        Raises ``WrongResultError`` naming the first wrong element.
        """
        got, want = self.view.double().cpu(), expected
        self._check_guards()
        skipped = want.isnan()
        first_wrong(
            got, want, skipped & ~got.isnan(), "written, expected to be skipped"
        )
        first_wrong(got, want, ~skipped & got.isnan(), "not written, or NaN")
        got, want = got[~skipped], want[~skipped]
        if not len(want):
            return 0.0
        error = reference.relative_error(got, want)
        rms = float(want.norm()) / math.sqrt(want.numel())
        allowed = ELEMENT_FACTOR * tolerance * max(rms, 1e-30) + tolerance * want.abs()
        wrong = torch.zeros_like(skipped)
        wrong[~skipped] = (got - want).abs() > allowed
        full_got = self.view.double().cpu()
        first_wrong(full_got, expected, wrong, f"relative error of all {error:.2g}")
        if not error <= tolerance:
            far = torch.zeros_like(skipped)
            far[~skipped] = (got - want).abs() == (got - want).abs().max()
            first_wrong(
                full_got,
                expected,
                far,
                f"the largest difference; relative error of all {error:.2g}, allowed "
                f"{tolerance:.0e}",
            )
        return error

    def _check_guards(self) -> None:
        rest = self.flat.clone()
        rest[GUARD : len(rest) - GUARD] = SENTINEL
        wrong = (rest != SENTINEL).nonzero()
        if len(wrong):
            at = int(wrong[0])
            place = at - GUARD if at < GUARD else at - (len(rest) - GUARD)
            side = "before" if at < GUARD else "behind"
            raise WrongResultError(
                f"wrote {abs(place) + (side == 'behind')} elements {side} the output"
            )


def first_wrong(
    got: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor, why: str
) -> None:
    """Raises ``WrongResultError`` for the first place where ``wrong`` is true."""
    places = wrong.nonzero()
    if len(places):
        at = tuple(places[0].tolist())
        raise WrongResultError(
            f"first wrong element {list(at)} is {got[at]:.6g}, expected "
            f"{expected[at]:.6g} ({why}; {len(places)} of {wrong.numel()} are wrong)"
        )


@dataclass
class DenseCase:
    """Weights quantized by group, one matrix, and its products in float64."""

    dtype: torch.dtype
    bits: int
    group_size: int
    x: torch.Tensor
    """[16, K]"""
    words: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    expected: torch.Tensor
    """[16, N]"""

    @classmethod
    def make(
        cls,
        dtype: torch.dtype,
        bits: int,
        symmetric: bool,
        group_size: int,
        generator: torch.Generator,
    ) -> "DenseCase":
        n, k = 344, 896  # no power of two, and a part of a block of either
        shape = LayerShape(1, 1, k, n, group_size, dtype, symmetric)
        matrix = random_layers.random_matrix(shape, n, k, generator)
        words, scales = matrix.words[0], matrix.scales[0]
        zeros = None if matrix.zero_points is None else matrix.zero_points[0]
        if bits == 8:
            words = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
            scales = scales / 16
            q = words.double().unflatten(1, (-1, group_size)) - 128
            w = (q * scales.double()[..., None]).flatten(1)
        else:
            w = matrix.dequantized(0, torch.float64)
        x = torch.randn(dense_ops.MAX_ROWS, k, generator=generator).to(dtype)
        args = (x, words.contiguous(), scales.contiguous(), zeros)
        return cls(dtype, bits, group_size, *args, x.double() @ w.T)

    def to(self, device: str) -> "DenseCase":
        zeros = self.zero_points
        return dataclasses.replace(
            self,
            x=self.x.to(device),
            words=self.words.to(device),
            scales=self.scales.to(device),
            zero_points=None if zeros is None else zeros.to(device),
        )

    def launch(self, c: torch.Tensor, cu_count: int) -> None:
        """Of the first ``len(c)`` rows."""
        dense_ops.wvSplitK_int_g(
            self.x[: len(c)],
            self.words,
            self.scales,
            c,
            cu_count,
            self.group_size,
            self.bits,
            self.zero_points,
        )

    def __str__(self) -> str:
        zeros = "sym" if self.zero_points is None else "zp"
        name = random_layers.dtype_name(self.dtype)
        return f"wvSplitK_int_g_{name}_b{self.bits}_g{self.group_size}_{zeros}"


@dataclass
class RescoreCase:
    """Products that are off by known errors, and which of them matter."""

    dtype: torch.dtype
    window: float
    x: torch.Tensor
    """[5, K]"""
    w: torch.Tensor
    """[N, K]"""
    errors: torch.Tensor
    before: torch.Tensor
    """[5, N]: what rescoring starts from."""
    expected: torch.Tensor
    """[5, N]: float64 where the product is computed again, ``before`` elsewhere."""
    either: torch.Tensor
    """[5, N]: so close to the edge that rounding decides."""

    BOUND = 7.0

    @classmethod
    def make(
        cls, dtype: torch.dtype, window: float, generator: torch.Generator
    ) -> "RescoreCase":
        rows, n, k = 5, 1200, 328
        x = torch.randn(rows, k, generator=generator).to(dtype)
        w = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
        exact = x.double() @ w.double().T
        errors = 0.01 + 0.01 * torch.rand(n, generator=generator)
        norms = x.double().norm(dim=1, keepdim=True)
        noise = 3 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        off = exact + noise.clamp(-cls.BOUND, cls.BOUND) * norms * errors
        before = off.to(dtype)
        edge = 1e-3
        asked, more, less = (
            dense_ops.rescored_rows(x, errors, before, window + wider, bound)
            for wider, bound in (
                (0.0, cls.BOUND),
                (edge, cls.BOUND + edge),
                (-edge if window else 0.0, cls.BOUND - edge),
            )
        )
        expected = torch.where(asked, exact, before.double())
        return cls(dtype, window, x, w, errors, before, expected, more ^ less)

    def to(self, device: str) -> "RescoreCase":
        moved = {n: getattr(self, n).to(device) for n in ("x", "w", "errors", "before")}
        return dataclasses.replace(self, **moved)

    def launch(self, c: torch.Tensor) -> None:
        partials = torch.full((len(c), 2 * dense_ops.PARTS), math.nan, device=c.device)
        c.copy_(self.before)
        dense_ops.wvSplitK_int_g_rescore(
            self.x, self.w, self.errors, c, partials, self.window, self.BOUND
        )

    def __str__(self) -> str:
        return f"rescore_{random_layers.dtype_name(self.dtype)}, window {self.window:g}"


class at:  # noqa: N801
    """Context that puts ``where`` before the message of what goes wrong inside."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, WrongResultError):
            raise WrongResultError(f"{self.where}: {error}") from None
        if isinstance(error, RuntimeError):
            reason = (str(error).splitlines() or [""])[0]
            raise WrongResultError(f"{self.where}: {reason}") from error


@dataclass
class Case:
    """One shape's weights and inputs, and what the ops make of them in float64."""

    shape: LayerShape
    activation: tuple[str, float, float, float | None]
    layer: random_layers.RandomLayer
    x: torch.Tensor
    """[M, H]; M is the most tokens of ``TOKENS``."""
    middle: torch.Tensor
    """[M * top_k, I]: input of down."""
    ids: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: LayerShape, number: int, seed: int) -> "Case":
        """Case ``number``; every second one with an expert map."""
        generator = torch.Generator().manual_seed(seed + number)
        layer = random_layers.random_layer(shape, generator)
        tokens, dtype = max(TOKENS), shape.dtype
        x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
        pairs = tokens * shape.top_k
        middle = torch.randn(pairs, shape.intermediate, generator=generator).to(dtype)
        expert_map = None
        wide = shape
        if number % 2:
            # two experts more than are here
            wide = dataclasses.replace(shape, experts=shape.experts + 2)
            expert_map = torch.full((wide.experts,), -1, dtype=torch.int32)
            places = torch.randperm(wide.experts, generator=generator)
            expert_map[places[: shape.experts]] = torch.arange(
                shape.experts, dtype=torch.int32
            )
        ids, weights = random_layers.random_routing(tokens, wide, generator)
        activation = ACTIVATIONS[number % len(ACTIVATIONS)]
        case = cls(shape, activation, layer, x, middle, ids, weights, expert_map)
        case._compute()
        return case

    @property
    def local(self) -> torch.Tensor:
        """int64 [M, top_k]: local expert or -1."""
        ids = self.ids.long()
        return ids if self.expert_map is None else self.expert_map.long()[ids]

    def _compute(self) -> None:
        shape, local = self.shape, self.local.flatten()
        x, middle = self.x.double(), self.middle.double()
        gate_up = torch.full((len(local), shape.intermediate), math.nan).double()
        plain = torch.full((len(local), 2 * shape.intermediate), math.nan).double()
        down = torch.zeros(len(x), shape.hidden, dtype=torch.float64)
        experts = torch.zeros(len(x), shape.hidden, dtype=torch.float64)
        for expert in range(shape.experts):
            pairs = (local == expert).nonzero()[:, 0]
            tokens = pairs // shape.top_k
            w13 = self.layer.w13.dequantized(expert, torch.float64)
            w2 = self.layer.w2.dequantized(expert, torch.float64)
            plain[pairs] = x[tokens] @ w13.T
            gate, up = plain[pairs].chunk(2, 1)
            gate_up[pairs] = reference.activate(gate, up, *self.activation)
            weight = self.weights.flatten()[pairs, None].double()
            down.index_add_(0, tokens, weight * (middle[pairs] @ w2.T))
            rounded = gate_up[pairs].to(shape.dtype).double()
            experts.index_add_(0, tokens, weight * (rounded @ w2.T))
        self.expected = {
            "gate_up": gate_up,
            "down": down,
            "gemm": plain,
            "prefill": experts,
        }

    def rows(self, op: str, tokens: int) -> int:
        per_token = op in ("down", "prefill")
        return tokens if per_token else tokens * self.shape.top_k

    def expect(self, op: str, tokens: int) -> torch.Tensor:
        return self.expected[op][: self.rows(op, tokens)]

    def to(self, device: str) -> "Case":
        moved: dict[str, Any] = {
            "layer": self.layer.to(device),
            "expert_map": None
            if self.expert_map is None
            else self.expert_map.to(device),
        }
        for name in ("x", "middle", "ids", "weights"):
            moved[name] = getattr(self, name).to(device)
        return dataclasses.replace(self, **moved)


Launch = Callable[[Case, torch.Tensor, int, int], None]
"""``launch(case, output, first token, tokens)``"""


class DecodeOps:
    """The three ops on one device, on any run of a case's tokens."""

    def __init__(self, cu_count: int, plan: tuple[int, ...] | None = None) -> None:
        self.cu_count = cu_count
        self.plan: dict[str, Any] = {} if plan is None else {"plan": plan}

    def gate_up(self, case: Case, c: torch.Tensor, first: int, tokens: int) -> None:
        w, scales, zeros = case.layer.w13
        name, alpha, beta, limit = case.activation
        rows = slice(first, first + tokens)
        ops.fused_moe_wvSplitK_int4_gate_up(
            case.x[rows],
            w,
            scales,
            c,
            case.ids[rows],
            name,
            self.cu_count,
            case.shape.group_size,
            zeros,
            case.expert_map,
            alpha,
            beta,
            limit,
            **self.plan,
        )

    def down(self, case: Case, c: torch.Tensor, first: int, tokens: int) -> None:
        w, scales, zeros = case.layer.w2
        top_k = case.shape.top_k
        rows = slice(first, first + tokens)
        ops.fused_moe_wvSplitK_int4_down(
            case.middle[first * top_k : (first + tokens) * top_k],
            w,
            scales,
            c,
            case.ids[rows],
            case.weights[rows],
            self.cu_count,
            case.shape.group_size,
            zeros,
            case.expert_map,
            **self.plan,
        )

    def gemm(self, case: Case, c: torch.Tensor, first: int, tokens: int) -> None:
        w, scales, zeros = case.layer.w13
        top_k = case.shape.top_k
        sorted_ids, expert_ids, size = _blocks(case, first, tokens)
        ops.fused_moe_wvSplitK_int4_gemm(
            case.x[first : first + tokens],
            w,
            scales,
            c,
            expert_ids,
            size,
            self.cu_count,
            case.shape.group_size,
            zeros,
            sorted_ids,
            top_k,
        )


def _blocks(
    case: Case, first: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pairs in blocks of one expert, as gemm takes them; 1 to 5 rows to a block."""
    size = 1 + (tokens - 1) % 5
    local = case.local[first : first + tokens].flatten().cpu()
    nothing = len(local)
    sorted_ids: list[int] = []
    experts: list[int] = []
    for expert in range(-1, case.shape.experts):
        pairs = (local == expert).nonzero()[:, 0].tolist()
        pairs += [nothing] * (-len(pairs) % size)
        sorted_ids += pairs
        experts += [expert] * (len(pairs) // size)
    device = case.x.device
    return (
        torch.tensor(sorted_ids, dtype=torch.int32, device=device),
        torch.tensor(experts, dtype=torch.int32, device=device),
        size,
    )


def kernel_name(op: str, shape: LayerShape) -> str:
    """As the kernels are called, but for how many tokens share a wave."""
    dtype = random_layers.dtype_name(shape.dtype)
    zeros = "sym" if shape.symmetric else "asym"
    return f"moe_int4_{op}_{dtype}_g{shape.group_size}_{zeros}"
