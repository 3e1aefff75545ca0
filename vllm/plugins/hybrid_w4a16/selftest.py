# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 selftest``: do the kernels compute what they should, here.

Every kernel of the op library runs in several shapes: on a CPU those of each
instruction set, on a GPU those of decode and prefill. Outputs are held against float64
(on a GPU also against the CPU ops), element by element; they are filled with NaN before
and lie between sentinels. Repeated runs must write the same bits. The conversion of
every checkpoint format is held against the format's definition.

Exit status: 0 when all that ran is right; 1 when something is not, or nothing could
run; 2 for a bad argument.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packing
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch
from vllm.plugins.hybrid_w4a16 import random_layers
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape

SENTINEL = 1234.0
GUARD = 64  # elements before and behind an output
RUNS = 20
# No case starts later, so that a run ends within a minute.
TIME_LIMIT_S = 55.0
# An element may be off by this many times the error that is allowed on average: the
# largest of 1e6 normal deviates is about 5 deviations.
ELEMENT_FACTOR = 8.0
TOKENS = (1, 2, 3, 5, 8, 33)
# experts, top_k, hidden, intermediate: multiples of 128. The last has a reduction that
# spreads over many waves and is no power of two.
SIZES = ((6, 2, 384, 128), (8, 4, 1024, 256), (4, 3, 1664, 384))
ACTIVATIONS: tuple[tuple[str, float, float, float | None], ...] = (
    ("silu", 1.0, 0.0, None),
    ("silu", 1.0, 0.0, 0.7),
    ("gelu", 1.0, 0.0, None),
    ("gelu_tanh", 1.0, 0.0, None),
    ("swigluoai", 1.702, 1.0, 1.5),
)
# Launch plans that bring every kernel to run, whatever the rule would choose. Those
# that the device has no kernel for are refused by the op.
PLANS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": ((0, 4, 0, 0), (1, 4, 0, 0), (2, 4, 8, 1), (2, 4, 16, 2)),
    "down": ((0, 4, 2, 0), (1, 4, 2, 0), (2, 4, 2, 8), (2, 4, 2, 16)),
    "gemm": (),
}
PACKINGS = (packing.GPTQ_V1, packing.GPTQ_V2, packing.AWQ, packing.PACK_QUANTIZED)


@dataclass
class Group:
    """What was found about the kernels of one line of the output."""

    name: str
    cases: int = 0
    rounds: int = 0
    """Shapes that ran ..."""
    planned: int = 0
    """... of so many."""
    error: float = 0.0
    """Worst relative error of an output, in the Frobenius norm."""
    tolerance: float = 0.0
    """What was allowed there."""
    where: str = ""
    repeated: int = 0
    """Cases of which ``RUNS`` runs wrote the same bits."""
    alone: tuple[int, int] = (0, 0)
    """Rows whose bits do not depend on the batch they come in, of rows compared."""
    failure: str | None = None

    def note(self, error: float, tolerance: float, where: str) -> None:
        self.cases += 1
        worst = self.error / self.tolerance if self.tolerance else -1.0
        if error / tolerance > worst:
            self.error, self.tolerance, self.where = error, tolerance, where

    def line(self) -> str:
        text = f"{'ok ' if self.failure is None else 'NO '} {self.name:<24}"
        text += f" {self.cases:>4} cases"
        if self.rounds < self.planned and self.failure is None:
            text += f" ({self.rounds} of {self.planned} shapes, out of time)"
        if self.tolerance:
            text += (
                f", worst error {self.error:.1e} of {self.tolerance:.0e} ({self.where})"
            )
        if self.repeated:
            text += f"; {RUNS} runs alike in {self.repeated} cases"
        same, rows = self.alone
        if rows:
            text += f"; {same}/{rows} rows the same alone as in a batch"
        return text


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
        _first(got, want, skipped & ~got.isnan(), "written, expected to be skipped")
        _first(got, want, ~skipped & got.isnan(), "not written, or NaN")
        got, want = got[~skipped], want[~skipped]
        if not len(want):
            return 0.0
        error = reference.relative_error(got, want)
        rms = float(want.norm()) / math.sqrt(want.numel())
        allowed = ELEMENT_FACTOR * tolerance * max(rms, 1e-30) + tolerance * want.abs()
        wrong = torch.zeros_like(skipped)
        wrong[~skipped] = (got - want).abs() > allowed
        full_got = self.view.double().cpu()
        _first(full_got, expected, wrong, f"relative error of all {error:.2g}")
        if not error <= tolerance:
            far = torch.zeros_like(skipped)
            far[~skipped] = (got - want).abs() == (got - want).abs().max()
            _first(
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


def _first(
    got: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor, why: str
) -> None:
    places = wrong.nonzero()
    if len(places):
        at = tuple(places[0].tolist())
        raise WrongResultError(
            f"first wrong element {list(at)} is {got[at]:.6g}, expected "
            f"{expected[at]:.6g} ({why}; {len(places)} of {wrong.numel()} are wrong)"
        )


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
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

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
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

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
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

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


class Selftest:
    """One run of the command.

    Args:
        device: "cpu" or "cuda", as torch calls it.
        family: what ``device_family`` says of it.
        isas: the CPU's instruction sets to run, best first.
        seed: of all inputs.
        time_limit_s: no case starts later than this.
        progress: called with the name of the group after each case.
    """

    def __init__(
        self,
        device: str,
        family: Any,
        isas: tuple[str, ...],
        seed: int = 0,
        time_limit_s: float = TIME_LIMIT_S,
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device, self.family, self.isas = device, family, isas
        self.seed, self.time_limit_s, self.progress = seed, time_limit_s, progress
        self.start = time.monotonic()
        self.groups: dict[str, Group] = {}
        self.cpu_ops = DecodeOps(1)
        self.ops = DecodeOps(family.cu_count)

    # ------------------------------------------------------------------ planning
    def shapes(self) -> Iterator[LayerShape]:
        """Sizes change slowest: every kernel has run once before any runs twice."""
        for sizes in SIZES:
            for symmetric in (True, False):
                for group_size in random_layers.GROUP_SIZES:
                    for dtype in random_layers.DTYPES.values():
                        yield LayerShape(*sizes, group_size, dtype, symmetric)

    def steps(self) -> int:
        """Calls of ``progress`` in a whole run."""
        shapes = len(list(self.shapes()))
        prefill = len(self.prefill_plan())
        return shapes * 3 * max(1, len(self.isas)) + len(PACKINGS) + prefill

    def prefill_plan(self) -> list[tuple[LayerShape, Any]]:
        """Shapes and tiles: each format and each tile of the table at least once."""
        if self.family.tuning is None:
            return []
        tiles = table_tiles(self.family.tuning)
        formats = [shape for shape in self.shapes() if shape.hidden == SIZES[0][2]]
        return [
            (formats[i % len(formats)], tiles[i % len(tiles)])
            for i in range(max(len(formats), len(tiles)))
        ]

    # ------------------------------------------------------------------- running
    def run(self) -> list[Group]:
        for format in PACKINGS:
            self._in_group(
                f"repacking {format.name}", functools.partial(repack, format=format)
            )
        pool = None
        plan = self.prefill_plan()
        formats = [shape for shape in self.shapes() if shape.hidden == SIZES[0][2]]
        if plan and self.device != "cpu":
            from vllm.plugins.hybrid_w4a16 import prefill_kernels

            pool = prefill_kernels.CompilePool(plan)
        try:
            for number, shape in enumerate(self.shapes()):
                case = None
                if self.seconds_left() > 0:
                    case = Case.make(shape, number, self.seed)
                self._decode(case)
                if number + 1 == len(formats):  # before any kernel runs twice
                    self._prefill_all(plan, pool)
        finally:
            if pool is not None:
                pool.close()
        return list(self.groups.values())

    def _prefill_all(self, plan: list[tuple[LayerShape, Any]], pool: Any) -> None:
        for number, (shape, tiles) in enumerate(plan):
            work = functools.partial(
                self._prefill, number=number, shape=shape, tiles=tiles, pool=pool
            )
            self._in_group("prefill", work)

    def seconds_left(self) -> float:
        return self.time_limit_s - (time.monotonic() - self.start)

    def _in_group(self, name: str, work: Callable[[Group], None]) -> None:
        group = self.groups.setdefault(name, Group(name))
        group.planned += 1
        self.progress(name)
        if group.failure is not None or self.seconds_left() <= 0:
            return
        group.rounds += 1
        try:
            work(group)
        except WrongResultError as error:
            group.failure = str(error)
        except RuntimeError as error:  # the op refused, or the device failed
            group.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _decode(self, case: Case | None) -> None:
        """All ops on one case; ``None`` when the time is up."""
        here = None if case is None else case.to(self.device)
        for isa in self.isas or ("",):
            if isa:
                torch.ops._rocm_C.hybrid_w4a16_cpu_isa(isa)
            for op in ("gate_up", "down", "gemm"):
                name = f"{op} {isa}" if isa else op
                work = functools.partial(self._run_op, op=op, case=case, here=here)
                self._in_group(name, work)

    def _run_op(
        self, group: Group, op: str, case: Case | None, here: Case | None
    ) -> None:
        if case is None or here is None:
            return
        launch: Launch = getattr(self.ops, op)
        shape, tolerance = case.shape, reference.TOLERANCE[case.shape.dtype]
        columns = case.expected[op].shape[1]
        kernel = kernel_name(op, shape)
        plans = PLANS[op] if self.device != "cpu" else ()
        for plan in (None, *plans):
            launch = getattr(DecodeOps(self.family.cu_count, plan), op)
            named = kernel if plan is None else f"{kernel}, plan {list(plan)}"
            for tokens in TOKENS:
                where = f"{named}, {tokens} tokens, {shape}"
                rows = case.rows(op, tokens)
                output = Poisoned(rows, columns, shape.dtype, self.device)
                with at(where):
                    try:
                        launch(here, output.view, 0, tokens)
                    except RuntimeError as error:
                        if plan is not None and ": plan:" in str(error):
                            continue
                        raise
                    off = output.check(case.expect(op, tokens), tolerance)
                    if self.device != "cpu":
                        self._compare_with_cpu(op, case, tokens, output, tolerance)
                    group.note(off, tolerance, f"{named}, {tokens} tokens")
            if plan is not None and group.failure is None:
                self._repeat_if_taken(launch, here, op, f"{named}, {shape}")
        launch = getattr(self.ops, op)
        tokens = 3
        with at(f"{kernel}, {tokens} tokens, {shape}"):
            self._repeat(launch, here, op, tokens)
            group.repeated += 1
        if op != "gemm":  # its blocks are the caller's: a row alone is another call
            same, rows = group.alone
            for first in range(8):
                same += self._same_alone(launch, here, op, first, 8)
            group.alone = same, rows + 8

    def _repeat_if_taken(self, launch: Launch, here: Case, op: str, where: str) -> None:
        with at(where):
            try:
                self._repeat(launch, here, op, 3)
            except RuntimeError as error:
                if ": plan:" not in str(error):
                    raise

    def _compare_with_cpu(
        self, op: str, case: Case, tokens: int, output: Poisoned, tolerance: float
    ) -> None:
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

        if "cpu" not in ops.build_info():
            return
        rows, columns = output.view.shape
        cpu = Poisoned(rows, columns, case.shape.dtype, "cpu")
        getattr(self.cpu_ops, op)(case, cpu.view, 0, tokens)
        written = ~cpu.view.isnan()
        error = reference.relative_error(output.view.cpu()[written], cpu.view[written])
        if not error <= 2 * tolerance:
            raise WrongResultError(
                f"the GPU's and the CPU's results differ by {error:.2g}, allowed "
                f"{2 * tolerance:.0e}"
            )

    def _repeat(self, launch: Launch, here: Case, op: str, tokens: int) -> None:
        """The same bits in ``RUNS`` runs and, on a GPU, in replays of a graph."""
        columns = here.expected[op].shape[1]
        output = Poisoned(here.rows(op, tokens), columns, here.shape.dtype, self.device)
        launch(here, output.view, 0, tokens)
        first = output.bits()
        for run in range(1, RUNS):
            output.poison()
            launch(here, output.view, 0, tokens)
            if not torch.equal(output.bits(), first):
                raise WrongResultError(f"run {run + 1} wrote other bits than the first")
        if self.device == "cpu" or op == "gemm":  # gemm's blocks come from the host
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(here, output.view, 0, tokens)
        for run in range(RUNS):
            output.poison()
            graph.replay()
            if not torch.equal(output.bits(), first):
                raise WrongResultError(
                    f"replay {run + 1} of a graph wrote other bits than a plain call"
                )

    def _same_alone(
        self, launch: Launch, here: Case, op: str, row: int, tokens: int
    ) -> bool:
        dtype, columns = here.shape.dtype, here.expected[op].shape[1]
        batch = Poisoned(here.rows(op, tokens), columns, dtype, self.device)
        launch(here, batch.view, 0, tokens)
        one = Poisoned(here.rows(op, 1), columns, dtype, self.device)
        launch(here, one.view, row, 1)
        per_token = here.rows(op, 1)
        mine = batch.view[row * per_token : (row + 1) * per_token].contiguous()
        bits = mine.view(torch.int16), one.view.contiguous().view(torch.int16)
        return torch.equal(*bits)

    def _prefill(
        self, group: Group, number: int, shape: LayerShape, tiles: Any, pool: Any
    ) -> None:
        from vllm.plugins.hybrid_w4a16 import prefill_kernels

        if pool is not None:
            pool.wait(shape, tiles)
        case = Case.make(shape, number, self.seed)
        here = case.to(self.device)
        tolerance = reference.TOLERANCE[shape.dtype]
        tokens = max(TOKENS)
        where = f"prefill, {tiles}, {tokens} tokens, {shape}"
        output = Poisoned(tokens, shape.hidden, shape.dtype, self.device)
        call = prefill_kernels.PrefillCall(
            here.layer, shape, here.x, here.ids, here.weights, here.expert_map, tiles
        )
        with at(where):
            call.run(output.view, here.activation)
            error = output.check(case.expect("prefill", tokens), 2 * tolerance)
            first = output.bits()
            output.poison()
            call.run(output.view, here.activation)
            if not torch.equal(output.bits(), first):
                raise WrongResultError("the second run wrote other bits than the first")
        group.repeated += 1
        group.note(error, 2 * tolerance, f"{tiles.gate_up}, {shape}")


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


def kernel_name(op: str, shape: LayerShape) -> str:
    """As the kernels are called, but for how many tokens share a wave."""
    dtype = random_layers.dtype_name(shape.dtype)
    zeros = "sym" if shape.symmetric else "asym"
    return f"moe_int4_{op}_{dtype}_g{shape.group_size}_{zeros}"


def table_tiles(name: str) -> list[Any]:
    """Distinct prefill tiles of the tuning table."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning

    tiles = []
    for row in tuning.table(name)["rows"]:
        block_m = row["block_m"]
        pair = tuning.PrefillTiles(
            tuning.Tile(block_m, *row["gate_up"]), tuning.Tile(block_m, *row["down"])
        )
        if pair not in tiles:
            tiles.append(pair)
    return tiles


def repack(group: Group, format: packing.CheckpointPacking) -> None:
    """Random stored tensors, which always mean something, before and after."""
    generator = torch.Generator().manual_seed(len(format.name))
    for n, k, group_size in ((64, 128, 32), (256, 512, 128), (24, 192, 64)):
        shapes = format.shapes(n, k, group_size)
        words = random_layers.random_words(shapes[format.qweight], generator)
        zeros = random_layers.random_words(shapes[format.zeros], generator)
        where = f"{n} x {k}, g{group_size}"
        for what, expected, got in (
            (
                "weights",
                reference.stored_weights(format, words),
                reference.packed_weights(format.to_exllama(words)),
            ),
            (
                "zero points",
                reference.stored_zero_points(format, zeros),
                reference.packed_zero_points(format.to_row_zeros(zeros)),
            ),
        ):
            with at(f"repacking {format.name}, {what}, {where}"):
                _first(got, expected, got != expected, "after the conversion")
            group.cases += 1


# ------------------------------------------------------------------------ command
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random inputs (default: 0)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TIME_LIMIT_S,
        help=f"no test starts later than this (default: {TIME_LIMIT_S:g})",
    )


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit status."""
    from vllm.plugins.hybrid_w4a16.progress import Progress

    switch.register()
    with Progress("selftest") as progress:
        report = selftest(args.seed, args.seconds, progress)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for line in as_text(report):
            print(line)
    return 0 if report["ok"] else 1


def selftest(seed: int, time_limit_s: float, progress: Any) -> dict[str, Any]:
    """What the command prints, as the object of its ``--json``."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
    from vllm.platforms import current_platform

    start = time.monotonic()
    family = devices.device_family()
    if isinstance(family, str):
        return {"ok": False, "device": None, "error": family, "groups": []}
    device = "cpu" if current_platform.is_cpu() else "cuda"
    isas = ops.build_info()["cpu"] if device == "cpu" else ()
    test = Selftest(device, family, isas, seed, time_limit_s)
    progress.total(test.steps())
    test.progress = progress.step
    try:
        groups = test.run()
    finally:
        if device == "cpu":
            torch.ops._rocm_C.hybrid_w4a16_cpu_isa("")
    failed = [group for group in groups if group.failure is not None]
    return {
        "ok": not failed and any(group.cases for group in groups),
        "device": family.name,
        "decode": family.decode,
        "prefill": family.prefill,
        "library": {kind: list(names) for kind, names in ops.build_info().items()},
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "groups": [dataclasses.asdict(group) for group in groups],
        "not_run": [g.name for g in groups if g.cases == 0 and g.failure is None],
        "keep_serving": f"{switch.NAME}=0" if failed else None,
    }


def as_text(report: dict[str, Any]) -> list[str]:
    """The report as the command prints it."""
    if report.get("error"):
        return [
            f"NO  {report['error']}",
            "nothing could run: see vllm-hybrid-w4a16 doctor",
        ]
    groups = [Group(**{**g, "alone": tuple(g["alone"])}) for g in report["groups"]]
    lines = [group.line() for group in groups]
    failures = [group.failure for group in groups if group.failure is not None]
    lines.append("")
    lines += [f"FAILED: {failure}" for failure in failures]
    if failures:
        lines.append(
            f"Keep these kernels from serving: export {report['keep_serving']} (vLLM's "
            "own MoE path)."
        )
    elif not report["ok"]:
        lines.append("nothing ran within the time allowed: raise --seconds")
    else:
        ran = sum(group.cases for group in groups)
        left = sum(group.planned > 0 and group.cases == 0 for group in groups)
        lines.append(
            f"{report['device']}: all right, {ran} cases in {report['seconds']} s"
            + (f"; {left} groups not run, out of time" if left else "")
        )
    return lines


if __name__ == "__main__":
    sys.exit("run: vllm-hybrid-w4a16 selftest")
