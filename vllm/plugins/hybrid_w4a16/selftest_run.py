# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The order in which ``selftest`` runs its cases, and its report."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packing
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch
from vllm.platforms import current_platform
from vllm.plugins.hybrid_w4a16 import (
    random_layers,
    selftest_router,
    selftest_shared,
)
from vllm.plugins.hybrid_w4a16.random_layers import LayerShape
from vllm.plugins.hybrid_w4a16.selftest_cases import (
    TOKENS,
    Case,
    DecodeOps,
    DenseCase,
    Launch,
    Poisoned,
    RescoreCase,
    WrongResultError,
    at,
    first_wrong,
    kernel_name,
)
from vllm.plugins.hybrid_w4a16.selftest_group import RUNS, Group

# experts, top_k, hidden, intermediate: multiples of 128. The last one has a reduction
# size that is spread over many waves and is not a power of two.
SIZES = ((6, 2, 384, 128), (8, 4, 1024, 256), (4, 3, 1664, 384))
# First every kernel runs once: the first size in every format, with the fewest numbers
# of tokens that reach all of them (one token, few rows per expert, many). A busy
# machine may have time for no more.
COVER_TOKENS = (1, 3, 33)
# Launch plans that together run every kernel, whatever the rule would choose. The op
# rejects those for which the device has no kernel.
PLANS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": (
        (0, 4, 0, 0),
        (1, 4, 0, 0),
        (2, 4, 8, 1),
        (2, 4, 16, 2),
        (3, 4, 0, 2),
    ),
    "down": (
        (0, 4, 2, 0),
        (1, 4, 2, 0),
        (2, 4, 2, 4),
        (2, 4, 2, 8),
        (3, 4, 2, 4),
        (3, 4, 2, 8),
    ),
    "gemm": (),
}
PACKINGS = (packing.GPTQ_V1, packing.GPTQ_V2, packing.AWQ, packing.PACK_QUANTIZED)
DENSE_FORMATS = ((4, True), (4, False), (8, True))  # bits, symmetric
DENSE_ROWS = (1, 3, 16)
WINDOWS = (0.0, 0.5, 1e4)


class Round(NamedTuple):
    """One shape and the numbers of tokens to run it with."""

    number: int
    shape: LayerShape
    tokens: tuple[int, ...]
    repeats: bool
    """Whether to repeat runs and to compare rows with the same rows run alone."""


class Selftest:
    """One run of the command.

    Args:
        device: "cpu" or "cuda", torch's name.
        family: the result of ``device_family``.
        isas: the CPU's instruction sets to run, best first.
        seed: for all inputs.
        deadline: no case starts later than this, by the clock of ``time.monotonic``.
        progress: called with the name of the group after each case.
    """

    def __init__(
        self,
        device: str,
        family: Any,
        isas: tuple[str, ...],
        seed: int,
        deadline: float,
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device, self.family, self.isas = device, family, isas
        self.seed, self.deadline, self.progress = seed, deadline, progress
        self.groups: dict[str, Group] = {}
        self.cpu_ops = DecodeOps(1)
        self.ops = DecodeOps(family.cu_count)
        self.threads = torch.get_num_threads()

    # ------------------------------------------------------------------ planning
    def rounds(self) -> list[Round]:
        """Every format in the first size, so that all kernels run; then more sizes."""
        shapes = [
            LayerShape(*sizes, group_size, dtype, symmetric)
            for sizes in SIZES
            for symmetric in (True, False)
            for group_size in random_layers.GROUP_SIZES
            for dtype in random_layers.DTYPES.values()
        ]
        first = len(shapes) // len(SIZES)
        return [
            Round(number, shape, COVER_TOKENS, False)
            if number < first
            else Round(number, shape, TOKENS, True)
            for number, shape in enumerate(shapes)
        ]

    def formats(self) -> list[LayerShape]:
        """The first size in every format."""
        return [round.shape for round in self.rounds() if not round.repeats]

    def dense_cases(self) -> list[tuple[torch.dtype, int, bool, int]]:
        """dtype, bits, symmetric and group size of every kernel of the dense op."""
        return [
            (dtype, bits, symmetric, group_size)
            for dtype in random_layers.DTYPES.values()
            for bits, symmetric in DENSE_FORMATS
            for group_size in random_layers.GROUP_SIZES
        ]

    def shared_cases(self) -> list[tuple[torch.dtype, tuple[int, bool, int, int]]]:
        """dtype and format of every kind of shared expert."""
        return [
            (dtype, format)
            for dtype in random_layers.DTYPES.values()
            for format in selftest_shared.FORMATS
        ]

    def router_cases(self, repeats: bool) -> list[selftest_router.RouterCase]:
        """Every kind of router, or those whose runs are repeated."""
        if repeats:
            return selftest_router.repeated_cases(self.seed)
        return [
            *selftest_router.make_cases(self.seed),
            *selftest_router.special_cases(),
        ]

    def steps(self) -> int:
        """Number of calls of ``progress`` in a whole run."""
        isas = max(1, len(self.isas))
        rescores = len(random_layers.DTYPES) * len(WINDOWS)
        dense = (len(self.dense_cases()) + rescores) * isas
        moe = len(self.rounds()) * 3 * isas
        shared = len(self.shared_cases()) * isas
        router = len(self.router_cases(True)) + len(self.router_cases(False))
        rest = len(PACKINGS) + len(self.prefill_plan())
        return moe + 2 * (dense + shared) + router * isas + rest

    def prefill_plan(self) -> list[tuple[LayerShape, Any]]:
        """Shapes and tiles that use each format and each tile of the table."""
        if self.family.tuning is None:
            return []
        tiles, formats = table_tiles(self.family.tuning), self.formats()
        return [
            (formats[i % len(formats)], tiles[i % len(tiles)])
            for i in range(max(len(formats), len(tiles)))
        ]

    # ------------------------------------------------------------------- running
    def _launch(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run an op with all threads; everything else uses one, see ``run``."""
        torch.set_num_threads(self.threads)
        try:
            call(*arguments)
        finally:
            torch.set_num_threads(1)

    def run(self) -> list[Group]:
        """Run everything; returns the groups in the order of their lines.

        References and comparisons are small and use one thread: on a busy machine,
        waiting for other threads would take most of the time.
        """
        torch.set_num_threads(1)
        try:
            return self._run()
        finally:
            torch.set_num_threads(self.threads)

    def _run(self) -> list[Group]:
        for format in PACKINGS:
            self._in_group(
                f"repacking {format.name}", functools.partial(repack, format=format)
            )
        pool = None
        plan = self.prefill_plan()
        if plan and self.device != "cpu":
            from vllm.plugins.hybrid_w4a16 import prefill_kernels

            pool = prefill_kernels.CompilePool(plan)
        try:
            rounds = self.rounds()
            first = len(self.formats())
            for round in rounds[:first]:
                self._decode(round)
            self._dense_all(repeats=False)
            self._shared_all(repeats=False)
            self._router_all(repeats=False)
            self._prefill_all(plan, pool)
            self._dense_all(repeats=True)
            self._shared_all(repeats=True)
            self._router_all(repeats=True)
            for round in rounds[first:]:
                self._decode(round)
        finally:
            if pool is not None:
                pool.close()
        return list(self.groups.values())

    def _dense_all(self, repeats: bool) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for dtype in random_layers.DTYPES.values():
            for window in WINDOWS:
                rescore = RescoreCase.make(dtype, window, generator)
                work = functools.partial(
                    self._run_rescore, case=rescore, repeats=repeats
                )
                self._on_each_isa("rescore", work)
        for arguments in self.dense_cases():
            case = DenseCase.make(*arguments, generator)
            run = self._repeat_dense if repeats else self._run_dense
            self._on_each_isa("dense", functools.partial(run, case=case))

    def _shared_all(self, repeats: bool) -> None:
        for dtype, format in self.shared_cases():
            case = selftest_shared.SharedCase.make(dtype, format, self.seed)
            run = self._repeat_shared if repeats else self._run_shared
            self._on_each_isa("shared expert", functools.partial(run, case=case))

    def _router_all(self, repeats: bool) -> None:
        run = self._repeat_router if repeats else self._run_router
        for case in self.router_cases(repeats):
            self._on_each_isa("router", functools.partial(run, case=case))

    def _on_each_isa(self, name: str, work: Callable[[Group], None]) -> None:
        for isa in self.isas or ("",):
            if isa:
                torch.ops._rocm_C.hybrid_w4a16_cpu_isa(isa)
            self._in_group(f"{name} {isa}" if isa else name, work)

    def _prefill_all(self, plan: list[tuple[LayerShape, Any]], pool: Any) -> None:
        for number, (shape, tiles) in enumerate(plan):
            work = functools.partial(
                self._prefill, number=number, shape=shape, tiles=tiles, pool=pool
            )
            self._in_group("prefill", work)

    def seconds_left(self) -> float:
        """Seconds until the deadline, negative after it."""
        return self.deadline - time.monotonic()

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
        except RuntimeError as error:  # the op rejected its arguments or the GPU failed
            group.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _decode(self, round: Round) -> None:
        """Run all ops on one shape."""
        case = here = None
        if self.seconds_left() > 0:
            case = Case.make(round.shape, round.number, self.seed)
            here = case.to(self.device)
        for op in ("gate_up", "down", "gemm"):
            work = functools.partial(
                self._run_op, op=op, round=round, case=case, here=here
            )
            self._on_each_isa(op, work)

    def _run_op(
        self,
        group: Group,
        op: str,
        round: Round,
        case: Case | None,
        here: Case | None,
    ) -> None:
        if case is None or here is None:  # out of time before the case was made
            return
        shape, tolerance = case.shape, reference.TOLERANCE[case.shape.dtype]
        kernel = kernel_name(op, shape)
        plans = PLANS[op] if self.device != "cpu" else ()
        for plan in (None, *plans):
            launch = getattr(DecodeOps(self.family.cu_count, plan), op)
            named = kernel if plan is None else f"{kernel}, plan {list(plan)}"
            for count in round.tokens:
                output = Poisoned.of(case, op, count, self.device)
                with at(f"{named}, {count} tokens, {shape}"):
                    try:
                        self._launch(launch, here, output.view, 0, count)
                    except RuntimeError as error:
                        if plan is not None and ": plan:" in str(error):
                            continue
                        raise
                    off = output.check(case.expect(op, count), tolerance)
                    if self.device != "cpu":
                        self._compare_with_cpu(op, case, count, output, tolerance)
                    group.note(off, tolerance, f"{named}, {count} tokens")
            if plan is not None and round.repeats:
                self._repeat_if_taken(launch, here, op, f"{named}, {shape}")
        if not round.repeats:
            return
        launch = getattr(self.ops, op)
        with at(f"{kernel}, 3 tokens, {shape}"):
            self._repeat(launch, here, op, 3)
            group.repeated += 1
        if op != "gemm":  # the caller makes its blocks: a row alone is another call
            with at(f"{kernel}, {shape}"):
                self._compare_alone(group, launch, here, op, 8)

    def _run_dense(self, group: Group, case: DenseCase) -> None:
        here, tolerance = case.to(self.device), reference.TOLERANCE[case.dtype]
        cu_count = self.family.cu_count
        columns = case.expected.shape[1]
        for rows in DENSE_ROWS:
            output = Poisoned(rows, columns, case.dtype, self.device)
            with at(f"{case}, {rows} rows, {columns} x {case.x.shape[1]}"):
                self._launch(here.launch, output.view, cu_count)
                off = output.check(case.expected[:rows], tolerance)
            group.note(off, tolerance, f"{case}, {rows} rows")

    def _repeat_dense(self, group: Group, case: DenseCase) -> None:
        here, rows = case.to(self.device), DENSE_ROWS[1]
        output = Poisoned(rows, case.expected.shape[1], case.dtype, self.device)
        with at(f"{case}, {rows} rows"):
            call = functools.partial(here.launch, output.view, self.family.cu_count)
            self._same_bits(call, output)
            for row in range(rows):
                one = Poisoned(1, case.expected.shape[1], case.dtype, self.device)
                single = dataclasses.replace(here, x=here.x[row : row + 1])
                self._launch(single.launch, one.view, self.family.cu_count)
                group.note_alone(output.view[row : row + 1], one.view)
            _check_alone(group)
        group.repeated += 1

    def _run_shared(self, group: Group, case: selftest_shared.SharedCase) -> None:
        here = case.to(self.device)
        tolerance = reference.TOLERANCE[case.layer.shape.dtype]
        for op in ("gate_up", "down"):
            plans = PLANS[op] if self.device != "cpu" else ()
            for plan in (None, *plans):
                for tokens in selftest_shared.TOKENS:
                    call = selftest_shared.SharedCall(
                        op, here, tokens, self.device, self.family.cu_count, plan
                    )
                    where = f"{op}, {case.name}, {tokens} tokens"
                    where += "" if plan is None else f", plan {list(plan)}"
                    with at(where):
                        try:
                            self._launch(call.run)
                        except RuntimeError as error:
                            if plan is not None and ": plan:" in str(error):
                                continue
                            raise
                        off = call.check(tolerance)
                    group.note(off, tolerance, where)

    def _repeat_shared(self, group: Group, case: selftest_shared.SharedCase) -> None:
        here = case.to(self.device)
        for op in ("gate_up", "down"):
            call = selftest_shared.SharedCall(
                op, here, 3, self.device, self.family.cu_count
            )
            with at(f"{op}, {case.name}, 3 tokens"):
                self._same_bits(call.run, call.shared)
        group.repeated += 1

    def _route(
        self, here: selftest_router.RouterCase, first: int, tokens: int
    ) -> selftest_router.RouterCall:
        return selftest_router.RouterCall(
            here, first, tokens, self.device, self.family.cu_count
        )

    def _run_router(self, group: Group, case: selftest_router.RouterCase) -> None:
        here = case.to(self.device)
        for tokens in selftest_router.TOKENS:
            call = self._route(here, 0, tokens)
            with at(f"{case}, {tokens} tokens"):
                self._launch(call.run)
                off = call.check()
            group.note(off, selftest_router.TOLERANCE, f"{case}, {tokens} tokens")

    def _repeat_router(self, group: Group, case: selftest_router.RouterCase) -> None:
        here, tokens = case.to(self.device), max(selftest_router.TOKENS)
        batch = self._route(here, 0, tokens)
        with at(f"{case}, {tokens} tokens"):
            self._same_bits(batch.run, batch)
            for token in range(tokens):
                alone = self._route(here, token, 1)
                self._launch(alone.run)
                pairs = zip(batch.of_token(token), alone.of_token(0), strict=True)
                if not all(torch.equal(mine, other) for mine, other in pairs):
                    raise WrongResultError(
                        f"token {token} has other results in a batch than alone"
                    )
        same, rows = group.alone
        group.alone = same + tokens, rows + tokens
        group.repeated += 1

    def _run_rescore(self, group: Group, case: RescoreCase, repeats: bool) -> None:
        here, tolerance = case.to(self.device), reference.TOLERANCE[case.dtype]
        rows, columns = case.before.shape
        output = Poisoned(rows, columns, case.dtype, self.device)
        with at(f"{case}, {rows} rows, {columns} x {case.x.shape[1]}"):
            launch = functools.partial(here.launch, output.view)
            self._launch(launch)
            got = output.view.double().cpu()
            wanted = torch.where(case.either, got, case.expected)
            off = output.check(wanted, tolerance)
            kept = case.expected == case.before.double()
            first_wrong(
                got,
                wanted,
                kept & (got != wanted),
                "rescoring should not have changed it",
            )
            if repeats:
                self._same_bits(launch, output)
                group.repeated += 1
        group.note(off, tolerance, str(case))

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
        if "cpu" not in ops.build_info():
            return
        rows, columns = output.view.shape
        cpu = Poisoned(rows, columns, case.shape.dtype, "cpu")
        self._launch(getattr(self.cpu_ops, op), case, cpu.view, 0, tokens)
        written = ~cpu.view.isnan()
        error = reference.relative_error(output.view.cpu()[written], cpu.view[written])
        if not error <= 2 * tolerance:
            raise WrongResultError(
                f"the GPU's and the CPU's results differ by {error:.2g}, allowed "
                f"{2 * tolerance:.0e}"
            )

    def _repeat(self, launch: Launch, here: Case, op: str, tokens: int) -> None:
        """``RUNS`` runs and, on a GPU, replays of a graph must write the same bits."""
        output = Poisoned.of(here, op, tokens, self.device)
        call = functools.partial(launch, here, output.view, 0, tokens)
        # gemm's blocks come from the host, so it cannot be captured
        self._same_bits(call, output, in_graph=op != "gemm")

    def _same_bits(
        self,
        call: Callable[[], None],
        output: Poisoned | selftest_router.RouterCall,
        in_graph: bool = True,
    ) -> None:
        """Check that ``call`` writes the same bits into ``output`` in every run."""
        self._launch(call)
        first = output.bits()
        for run in range(1, RUNS):
            output.poison()
            self._launch(call)
            if not torch.equal(output.bits(), first):
                raise WrongResultError(
                    f"run {run + 1} wrote different bits from the first"
                )
        if self.device == "cpu" or not in_graph:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(call)
        for run in range(RUNS):
            output.poison()
            graph.replay()
            if not torch.equal(output.bits(), first):
                raise WrongResultError(
                    f"replay {run + 1} of a graph wrote different bits from a plain "
                    "call"
                )

    def _compare_alone(
        self, group: Group, launch: Launch, here: Case, op: str, tokens: int
    ) -> None:
        """Compare the first tokens' results in a batch with those of a token alone.

        They must be equal if ``set_row_invariant`` is on.
        """
        batch = Poisoned.of(here, op, tokens, self.device)
        self._launch(launch, here, batch.view, 0, tokens)
        per_token = here.rows(op, 1)
        for token in range(tokens):
            one = Poisoned.of(here, op, 1, self.device)
            self._launch(launch, here, one.view, token, 1)
            mine = batch.view[token * per_token : (token + 1) * per_token]
            group.note_alone(mine, one.view)
        _check_alone(group)

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
            self._launch(call.run, output.view, here.activation)
            error = output.check(case.expect("prefill", tokens), 2 * tolerance)
            first = output.bits()
            output.poison()
            self._launch(call.run, output.view, here.activation)
            if not torch.equal(output.bits(), first):
                raise WrongResultError(
                    "the second run wrote different bits from the first"
                )
        group.repeated += 1
        group.note(error, 2 * tolerance, f"{tiles.gate_up}, {shape}")


def _check_alone(group: Group) -> None:
    same, rows = group.alone
    if same < rows and ops.row_invariant():
        raise WrongResultError(
            f"{rows - same} of {rows} rows have other bits in a batch than alone "
            f"(largest difference {group.alone_difference:.1e} of the row), in vLLM's "
            "batch-invariant mode"
        )


def table_tiles(name: str) -> list[Any]:
    """The distinct prefill tiles of the tuning table ``name``."""
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
    """Convert random stored tensors, all of which are valid, and check the result."""
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
                first_wrong(got, expected, got != expected, "after the conversion")
            group.cases += 1


def selftest(
    seed: int, time_limit_s: float, progress: Any, start: float | None = None
) -> dict[str, Any]:
    """Run everything; returns the object that the command prints for ``--json``.

    ``start`` is the time from which ``time_limit_s`` seconds count, by default now.
    """
    start = time.monotonic() if start is None else start
    family = devices.device_family()
    if isinstance(family, str):
        return {"ok": False, "device": None, "error": family, "groups": []}
    devices.load_kernels(family)
    device = "cpu" if current_platform.is_cpu() else "cuda"
    isas = ops.build_info()["cpu"] if device == "cpu" else ()
    test = Selftest(device, family, isas, seed, start + time_limit_s)
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
