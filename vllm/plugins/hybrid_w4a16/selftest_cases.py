# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The inputs of ``selftest``'s cases, and the checks of their outputs."""

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
GUARD = 64  # sentinel elements before and after an output
# An element may be off by this many times the average error allowed: the largest of 1e6
# normal deviates is about 5 deviations.
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
    """An output [rows, cols] that is full of NaN and lies between sentinels.

    Integers are full of the smallest number.
    """

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
        self.flat = torch.empty(
            rows * cols + 2 * GUARD, dtype=dtype, device=device
        ).fill_(SENTINEL)
        self.view = self.flat[GUARD : GUARD + rows * cols].view(rows, cols)
        self.poison()

    @classmethod
    def of(cls, case: "Case", op: str, tokens: int, device: str) -> "Poisoned":
        """The output of ``op`` for ``tokens`` tokens of a case."""
        columns = case.expected[op].shape[1]
        return cls(case.rows(op, tokens), columns, case.shape.dtype, device)

    def poison(self) -> None:
        """Fill the output with NaN again."""
        dtype = self.view.dtype
        nothing = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        self.view.fill_(nothing)

    def bits(self) -> torch.Tensor:
        """A copy of the output and its sentinels as int16, flat."""
        return self.flat.view(torch.int16).clone()

    def check(self, expected: torch.Tensor, tolerance: float) -> float:
        """Check the output against ``expected`` and return the relative error.

        ``expected`` is NaN where nothing may be written. Raises ``WrongResultError``
        that names the first wrong element, or a damaged sentinel.
        """
        got, want = self.view.double().cpu(), expected
        self.check_guards()
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

    def check_guards(self) -> None:
        """Raise ``WrongResultError`` if a sentinel is damaged."""
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
    """Raise ``WrongResultError`` for the first element where ``wrong`` is true."""
    places = wrong.nonzero()
    if len(places):
        at = tuple(places[0].tolist())
        raise WrongResultError(
            f"first wrong element {list(at)} is {got[at]:.6g}, expected "
            f"{expected[at]:.6g} ({why}; {len(places)} of {wrong.numel()} are wrong)"
        )


@dataclass
class DenseCase:
    """A matrix quantized by group and its products in float64."""

    dtype: torch.dtype
    bits: int
    group_size: int
    x: torch.Tensor
    """``dtype`` [16, K]"""
    words: torch.Tensor
    """The packed weights: int32 [N, K//8] for 4 bits, uint8 [N, K] for 8 bits."""
    scales: torch.Tensor
    """``dtype`` [N, K//G]"""
    zero_points: torch.Tensor | None
    """int32 [N//8, K//G]"""
    expected: torch.Tensor
    """float64 [16, N]"""

    @classmethod
    def make(
        cls,
        dtype: torch.dtype,
        bits: int,
        symmetric: bool,
        group_size: int,
        generator: torch.Generator,
    ) -> "DenseCase":
        """A random case on the CPU; ``bits`` is 4 or 8."""
        n, k = 344, 896  # not powers of two; a partial block in each
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
        """The case with its inputs on ``device``."""
        zeros = self.zero_points
        return dataclasses.replace(
            self,
            x=self.x.to(device),
            words=self.words.to(device),
            scales=self.scales.to(device),
            zero_points=None if zeros is None else zeros.to(device),
        )

    def launch(self, c: torch.Tensor, cu_count: int) -> None:
        """Run ``wvSplitK_int_g`` on the first ``len(c)`` rows of ``x``, into ``c``."""
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
    """Products with known errors, and which of them have to be computed again."""

    dtype: torch.dtype
    window: float
    x: torch.Tensor
    """[5, K]"""
    w: torch.Tensor
    """[N, K]"""
    errors: torch.Tensor
    before: torch.Tensor
    """[5, N]: the products before rescoring."""
    expected: torch.Tensor
    """[5, N]: float64 where the product is computed again, ``before`` elsewhere."""
    either: torch.Tensor
    """Bool [5, N]: so close to the threshold that rounding decides."""

    BOUND = 7.0

    @classmethod
    def make(
        cls, dtype: torch.dtype, window: float, generator: torch.Generator
    ) -> "RescoreCase":
        """A random case on the CPU; ``window`` is as in ``wvSplitK_int_g_rescore``."""
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
        """The case with its inputs on ``device``."""
        moved = {n: getattr(self, n).to(device) for n in ("x", "w", "errors", "before")}
        return dataclasses.replace(self, **moved)

    def launch(self, c: torch.Tensor) -> None:
        """Copy ``before`` to ``c`` [5, N] and rescore it."""
        partials = torch.full((len(c), 2 * dense_ops.PARTS), math.nan, device=c.device)
        c.copy_(self.before)
        dense_ops.wvSplitK_int_g_rescore(
            self.x, self.w, self.errors, c, partials, self.window, self.BOUND
        )

    def __str__(self) -> str:
        return f"rescore_{random_layers.dtype_name(self.dtype)}, window {self.window:g}"


class at:  # noqa: N801
    """Context manager that prefixes errors raised inside it with ``where``."""

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
    """The weights and inputs of one shape, and the outputs of the ops in float64."""

    shape: LayerShape
    activation: tuple[str, float, float, float | None]
    layer: random_layers.RandomLayer
    x: torch.Tensor
    """[M, H]; M is the largest of ``TOKENS``."""
    middle: torch.Tensor
    """[M * top_k, I]: input of down."""
    ids: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: LayerShape, number: int, seed: int) -> "Case":
        """Case ``number``; every second case has an expert map."""
        generator = torch.Generator().manual_seed(seed + number)
        layer = random_layers.random_layer(shape, generator)
        tokens, dtype = max(TOKENS), shape.dtype
        x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
        pairs = tokens * shape.top_k
        middle = torch.randn(pairs, shape.intermediate, generator=generator).to(dtype)
        expert_map = None
        wide = shape
        if number % 2:
            # two experts more than this rank holds
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
        """int64 [M, top_k]: the local expert, or -1."""
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
        """Output rows of ``op`` for ``tokens`` tokens."""
        per_token = op in ("down", "prefill")
        return tokens if per_token else tokens * self.shape.top_k

    def expect(self, op: str, tokens: int) -> torch.Tensor:
        """float64 [rows, columns]: the output of ``op`` for the first tokens."""
        return self.expected[op][: self.rows(op, tokens)]

    def to(self, device: str) -> "Case":
        """The case with its weights and inputs on ``device``."""
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
    """The three ops on one device, on any range of a case's tokens.

    Args:
        cu_count: compute units, passed to the ops.
        plan: launch plan; ``None``: the rule's.
    """

    def __init__(self, cu_count: int, plan: tuple[int, ...] | None = None) -> None:
        self.cu_count = cu_count
        self.plan: dict[str, Any] = {} if plan is None else {"plan": plan}

    def gate_up(self, case: Case, c: torch.Tensor, first: int, tokens: int) -> None:
        """Run gate_up on ``tokens`` tokens from ``first`` on, into c [M * top_k, I]."""
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
        """Run down on ``tokens`` tokens from ``first`` on, into c [M, H]."""
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
        """Run the gemm with w13 on ``tokens`` tokens from ``first`` on, into
        c [M * top_k, 2 * I].
        """
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
    """Pairs in blocks of one expert, as gemm takes them, with 1 to 5 rows per block."""
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
    """The kernel's name, without the number of tokens that share a wave."""
    dtype = random_layers.dtype_name(shape.dtype)
    zeros = "sym" if shape.symmetric else "asym"
    return f"moe_int4_{op}_{dtype}_g{shape.group_size}_{zeros}"
