# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The cases of ``selftest`` that route tokens: logits and top-k in one op."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router as router
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.selftest_cases import (
    Poisoned,
    WrongResultError,
    at,
    first_wrong,
)

TOKENS = (1, router.MAX_TOKENS)  # each number of slots that kernels have
# Experts and top-k: of Qwen3-30B-A3B, of GLM-4.5 (160 is no power of two, which has
# another order of sums), of Qwen3.5-35B-A3B and of Qwen3-Next.
SIZES = ((128, 8), (160, 8), (256, 8), (512, 10))
HIDDEN = 328  # no multiple of what a wave reads at once
# What a product in fp32 may be off, as a part of the sum of its terms' magnitudes, and
# what rounding it once adds, as a part of itself.
_SUM_ERROR = 2.0**-19
_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}
# Scores that differ by less may change places: what fp32 can tell apart. The largest
# relative error of a router weight.
_SCORE_STEP = 3e-7
TOLERANCE = 3e-6


class Routing(NamedTuple):
    """What a router computes from its logits."""

    scoring: str
    renormalize: bool
    biased: bool
    """Whether there is a correction bias."""
    scale: float
    padded: bool
    """Whether some tokens are padding."""

    def __str__(self) -> str:
        named = [self.scoring, *["renormalized"] * self.renormalize]
        named += ["bias"] * self.biased + ["padding"] * self.padded
        return " ".join(named + [f"scale {self.scale:g}"] * (self.scale != 1))


class Kind(NamedTuple):
    """Dtypes of activations, of the gate's weights and of logits."""

    dtype: torch.dtype
    weights: torch.dtype
    logits: torch.dtype


def kinds() -> list[Kind]:
    """The combinations that the op takes."""
    float32 = torch.float32
    return [
        Kind(*dtypes)
        for half in random_layers.DTYPES.values()
        for dtypes in (
            (half, half, half),
            (half, half, float32),
            (half, *[float32] * 2),
        )
    ]


def routings() -> list[Routing]:
    """Each scoring with and without each of the rest."""
    return [
        Routing("softmax", True, False, 1.0, True),
        Routing("sigmoid", True, True, 2.5, False),
        Routing("softmax", False, True, 1.0, False),
        Routing("sigmoid", False, False, 1.0, True),
    ]


@dataclass
class RouterCase:
    """Tokens, a gate and the op's other arguments."""

    kind: Kind
    routing: Routing
    top_k: int
    x: torch.Tensor
    """[M, K]"""
    w: torch.Tensor
    """[E, K]"""
    bias: torch.Tensor | None
    """fp32 [E]"""
    padding: torch.Tensor | None
    """bool [M]"""

    @classmethod
    def make(
        cls,
        kind: Kind,
        routing: Routing,
        sizes: tuple[int, int],
        ties: bool,
        generator: torch.Generator,
    ) -> "RouterCase":
        """A random case on the CPU.

        ``sizes``: experts and top-k. ``ties``: the second half of the experts equals
        the first.
        """

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        experts, top_k = sizes
        x = random(max(TOKENS), HIDDEN).to(kind.dtype)
        w = (random(experts, HIDDEN) * 2 * HIDDEN**-0.5).to(kind.weights)
        bias = random(experts) / 10 if routing.biased else None
        if ties:
            half = experts // 2
            w[half:] = w[:half].clone()
            if bias is not None:
                bias[half:] = bias[:half].clone()
        padding = torch.arange(len(x)) % 3 == 1 if routing.padded else None
        return cls(kind, routing, top_k, x, w, bias, padding)

    def to(self, device: str) -> "RouterCase":
        """The case with its inputs on ``device``."""
        bias, padding = self.bias, self.padding
        return dataclasses.replace(
            self,
            x=self.x.to(device),
            w=self.w.to(device),
            bias=None if bias is None else bias.to(device),
            padding=None if padding is None else padding.to(device),
        )

    def __str__(self) -> str:
        name = random_layers.dtype_name(self.kind.dtype)
        bits = 32 if self.kind.weights == torch.float32 else 16
        logits = "fp32" if self.kind.logits == torch.float32 else name
        return (
            f"moe_router_topk_{name}_w{bits}, {logits} logits, {len(self.w)} experts, "
            f"top-{self.top_k}, {self.routing}"
        )


def make_cases(seed: int) -> list[RouterCase]:
    """Every number of experts with every kind, on the CPU.

    Routings and equal experts take turns, differently for each number of experts.
    """
    generator = torch.Generator().manual_seed(seed)
    turns = routings()
    return [
        RouterCase.make(
            *(kind, turns[(i + j) % len(turns)], sizes, (i // 2 + j) % 2 == 1),
            generator,
        )
        for i, kind in enumerate(kinds())
        for j, sizes in enumerate(SIZES)
    ]


class RouterCall:
    """The op on some tokens of a case, and its outputs.

    Args:
        case: on ``device``.
        first: the first token.
        tokens: number of tokens.
        device: "cpu" or "cuda".
        cu_count: compute units, passed to the op.
    """

    def __init__(
        self, case: RouterCase, first: int, tokens: int, device: str, cu_count: int
    ) -> None:
        self.case, self.cu_count = case, cu_count
        self.rows = slice(first, first + tokens)
        self.logits = Poisoned(tokens, len(case.w), case.kind.logits, device)
        self.weights = Poisoned(tokens, case.top_k, torch.float32, device)
        self.ids = Poisoned(tokens, case.top_k, torch.int32, device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def run(self) -> None:
        """Run the op."""
        case, rows = self.case, self.rows
        router.fused_moe_router_topk(
            *(case.x[rows], case.w, self.logits.view, self.weights.view),
            *(self.ids.view, self.arrived, case.routing.scoring),
            *(case.routing.renormalize, self.cu_count, case.bias),
            None if case.padding is None else case.padding[rows],
            case.routing.scale,
        )

    def of_token(self, token: int) -> list[torch.Tensor]:
        """The outputs of one token."""
        return [x.view[token] for x in (self.logits, self.weights, self.ids)]

    def poison(self) -> None:
        """Fill the outputs with what the op never writes."""
        for output in (self.logits, self.weights, self.ids):
            output.poison()

    def bits(self) -> torch.Tensor:
        """A copy of the outputs, their sentinels and the counter, as int16, flat."""
        outputs = [x.bits() for x in (self.logits, self.weights, self.ids)]
        return torch.cat([*outputs, self.arrived.view(torch.int16)])

    def check(self) -> float:
        """Check all outputs; returns the largest relative error of a router weight.

        Logits are compared with float64, ids and weights with what vLLM's routers
        compute from these logits: the largest score first, the lower number first among
        equals, and scores that are not finite count as 0. Raises ``WrongResultError``
        that names the output and the element.
        """
        logits = self.logits.view.double().cpu()
        with at("logits"):
            self.logits.check_guards()
            self._check_logits(logits)
        weights, order, choice = self._expected(logits)
        with at("ids"):
            self.ids.check_guards()
            self._check_ids(self.ids.view.cpu().long(), order, choice)
        with at("weights"):
            self.weights.check_guards()
            got = self.weights.view.double().cpu()
            error = (got - weights).abs() / weights.abs().clamp(min=1e-30)
            wrong = ~(error <= TOLERANCE)
            first_wrong(got, weights, wrong, f"relative error {error.max():.2g}")
        if self.arrived.item() != 0:
            raise WrongResultError(
                f"the counter of blocks is {self.arrived.item()} after the call, "
                "expected 0"
            )
        return float(error.max())

    def _check_logits(self, got: torch.Tensor) -> None:
        x, w = self.case.x[self.rows].double().cpu(), self.case.w.double().cpu()
        exact, terms = x @ w.T, x.abs() @ w.abs().T
        allowed = exact.abs() * _ROUNDING[self.case.kind.logits] + terms * _SUM_ERROR
        right = ((got - exact).abs() <= allowed) | (got == exact)  # infinite ones
        right |= got.isnan() & exact.isnan()
        first_wrong(got, exact, ~right, "against float64")

    def _expected(
        self, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights and ids of the selected experts [M, top_k], and what was compared to
        select them [M, E]; scores in float64.
        """
        case, routing = self.case, self.case.routing
        softmax = routing.scoring == "softmax"
        scores = logits.softmax(1) if softmax else logits.sigmoid()
        scores = torch.where(scores.isfinite(), scores, 0)
        choice = scores.float()
        if case.bias is not None:
            choice = choice + case.bias.cpu()
        order = choice.sort(dim=1, descending=True, stable=True).indices
        order = order[:, : case.top_k]
        weights = scores.gather(1, order)
        if routing.renormalize:
            total = weights.sum(1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        return weights * routing.scale, order, choice.double()

    def _check_ids(
        self, got: torch.Tensor, order: torch.Tensor, choice: torch.Tensor
    ) -> None:
        case, experts = self.case, len(self.case.w)
        if case.padding is not None:
            padded = case.padding[self.rows].cpu()[:, None].expand_as(got)
            nothing = torch.full_like(got, -1)
            first_wrong(got, nothing, padded & (got != -1), "the token is padding")
            got = torch.where(padded, order, got)
        outside = (got < 0) | (got >= experts)
        first_wrong(got, order, outside, f"there are {experts} experts")
        ordered, places = got.sort(dim=1, stable=True)
        again = torch.zeros_like(outside)
        again.scatter_(1, places[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        first_wrong(got, order, again, "selected twice")
        mine, best = choice.gather(1, got), choice.gather(1, order)
        # a bias has larger steps than a score
        step = _SCORE_STEP * (best.abs() + (case.bias is not None))
        swapped = (got != order) & (mine == best)
        first_wrong(got, order, swapped, "the lower one of two equal experts is first")
        wrong = (mine - best).abs() > step
        first_wrong(got, order, wrong, "another expert has a larger score")


def repeated_cases(seed: int) -> list[RouterCase]:
    """Some of ``make_cases``, with every number of experts."""
    return make_cases(seed)[:: len(SIZES) + 1]


def special_cases() -> list[RouterCase]:
    """Tokens whose logits are equal in groups, or not finite for some experts or all.

    Tokens are unit vectors, so the columns of the weights are the logits.
    """
    dtype = torch.bfloat16
    kind = Kind(dtype, dtype, dtype)
    x = torch.eye(max(TOKENS), HIDDEN).to(dtype)
    cases = []
    for scoring, special in itertools.product(
        ("softmax", "sigmoid"), (0.0, math.inf, -math.inf, math.nan)
    ):
        routing = Routing(scoring, True, False, 1.0, False)
        w = torch.zeros(128, HIDDEN, dtype=dtype)
        w[:, 0] = torch.arange(128) % 5
        w[7, 1] = special  # 0 * special is NaN: the other tokens get it as well
        cases.append(RouterCase(kind, routing, 8, x, w, None, None))
    return cases
