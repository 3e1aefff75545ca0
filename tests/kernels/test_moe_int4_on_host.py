# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The GPU kernels of the int4 MoE ops, run on the host, against float64.

Every kernel of csrc/rocm runs with its real launcher, in five orders of lanes and
waves, under AddressSanitizer and UBSan (csrc/rocm/host): once as built for gfx11 and
gfx12, and once as built for matrix instructions. tests/support/kernels_on_host.py has
the data and the runner.
"""

import math
import subprocess

import numpy as np
import pytest

from tests.support.kernels_on_host import (
    BF16,
    HALF,
    NIBBLE_SHIFTS,
    SEED,
    Case,
    build_programs,
    check,
    check_every_kernel_ran,
    from_bits,
    name_of,
    record,
    run,
    run_all,
    spread,
    to_bits,
)

pytestmark = pytest.mark.slow

OPS = "gemm", "gate_up", "down", "tiled_gate_up", "tiled_down"
SILU, GELU, GELU_TANH = range(3)  # moe_int4::Activation
PAIRS, EIGHTS, GROUPED, WIDE = range(4)  # moe_int4::Kernel


class Maker:
    """Random cases of one combination of op, dtype, group size and zero points.

    ``mma``: the program has the grouped kernels. ``planned``: some of the calls bring a
    launch plan; the others leave it to the rule.
    """

    def __init__(self, mma, op, dtype, group, zero_points, planned=True):
        self.mma, self.planned = mma, planned
        self.op, self.dtype, self.group, self.zero_points = (
            op,
            dtype,
            group,
            zero_points,
        )
        names = OPS.index(op), dtype, group, int(zero_points)
        self.rng = np.random.default_rng([SEED, int(mma), *names])
        # whether rows of a start at 16-byte boundaries
        self.aligned = op.startswith("tiled")

    def pick(self, *values):
        return values[self.rng.integers(len(values))]

    def activations(self, fields, rows, columns, size=1.0):
        """Add a, normally distributed with deviation `size`; returns it as float64."""
        a = size * self.rng.standard_normal((rows, columns))
        bits = to_bits(a, self.dtype)
        gaps, offsets = ((0, 8, 24), (0,)) if self.aligned else ((0, 1, 8), (0, 2, 6))
        fields["a_stride_m"] = columns + self.pick(*gaps)
        fields["a"] = spread(bits, (fields["a_stride_m"],))
        fields["a.offset"] = self.pick(*offsets)
        return from_bits(bits, self.dtype)

    def weights(self, fields, experts, n, k):
        groups = k // self.group
        q = self.rng.integers(0, 16, (experts, n, k), dtype=np.uint32)
        words = (q.reshape(experts, n, k // 8, 8) << NIBBLE_SHIFTS).sum(
            -1, dtype=np.uint32
        )
        stride = k // 8 + self.pick(0, 0, 4, 32)
        fields["q_stride_n"], fields["q_stride_e"] = (
            stride,
            n * stride + self.pick(0, 8),
        )
        fields["q"] = spread(words, (fields["q_stride_e"], stride))

        scales = to_bits(self.rng.uniform(0.5, 1.5, (experts, n, groups)), self.dtype)
        stride = groups + self.pick(0, 0, 1, 5)
        fields["s_stride_n"], fields["s_stride_e"] = (
            stride,
            n * stride + self.pick(0, 3),
        )
        fields["scales"] = spread(scales, (fields["s_stride_e"], stride))
        fields["scales.offset"] = self.pick(0, 2)

        zeros = np.full((experts, n, groups), 8)
        fields["z_stride_n8"] = fields["z_stride_e"] = 0
        if self.zero_points:
            zeros = self.rng.integers(0, 16, zeros.shape, dtype=np.uint32)
            shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
            packed = (zeros.reshape(experts, n // 8, 8, groups) << shifts).sum(
                -2, dtype=np.uint32
            )
            stride = groups + self.pick(0, 1)
            fields["z_stride_n8"], fields["z_stride_e"] = stride, n // 8 * stride + 1
            fields["zeros"] = spread(packed, (fields["z_stride_e"], stride))
            fields["zeros.offset"] = self.pick(0, 4)
        fields.update(num_experts=experts, n=n, k=k, group_size=self.group)
        value = q.astype(np.float64) - np.repeat(zeros, self.group, -1)
        return value * np.repeat(from_bits(scales, self.dtype), self.group, -1)

    def routing(self, fields, tokens, top_k, experts):
        """Add the router's output; returns local experts [tokens, top_k], -1: none."""
        ids = self.rng.integers(0, experts, (tokens, top_k))
        local = ids
        fields["map_size"] = 0
        if self.pick(False, True):
            size = experts + 3
            table = np.full(size, -1, dtype=np.int32)
            table[self.rng.permutation(size)[:experts]] = np.arange(experts)
            ids = self.rng.integers(0, size, (tokens, top_k))
            local = table[ids]
            fields.update(expert_map=table.tobytes(), map_size=size)
        elif self.pick(False, True):
            ids = np.where(
                self.rng.random(ids.shape) < 0.2, self.pick(-1, experts), ids
            )
            local = np.where((ids < 0) | (ids >= experts), -1, ids)
        wide = self.pick(False, True)
        stride = top_k + self.pick(0, 2)
        fields["ids"] = spread(ids.astype(np.int64 if wide else np.int32), (stride,))
        fields.update(ids_are_int64=int(wide), ids_stride_m=stride)
        fields.update(num_tokens=tokens, top_k=top_k)
        return local

    def plan(self, fields, size, kernel=None):
        """Add a launch plan; if no kernel is named, possibly none. See plan.h."""
        if not self.planned:
            return ""
        if kernel is None:
            kernel = self.pick(None, PAIRS, EIGHTS)
        if kernel == PAIRS and self.mma and not self.aligned:
            kernel = EIGHTS
        if kernel is None:
            return ""
        waves = self.pick(1, 2, 3, 4)
        if kernel not in (GROUPED, WIDE):
            slots = row_tiles = 0
        else:
            few, many = (3, 8), (9, 16)  # separate kernels for up to 8 and for more
            slots = self.pick(*(few if size % 2 or self.op == "down" else many))
            if size <= 2:
                slots = self.pick(1, slots)
            row_tiles = self.pick(1, 2, 3)
        if kernel == WIDE and self.op == "gate_up":  # row tiles of one pair
            slots, row_tiles = 0, self.pick(1, 2, 3, 5)
        slices = self.pick(*(s for s in (1, 2, 4) if waves % s == 0))
        tail = (slots, row_tiles) if self.op == "gate_up" else (slices, slots)
        plan = (kernel, waves, *tail)
        fields["plan"] = np.array(plan, dtype=np.int64).tobytes()
        return f", plan {plan}"

    def shared_weights(self, fields, rows, columns, size):
        """Add weights of a shared expert, normally distributed with deviation `size`.

        They have 16 bits or, if a group fits the columns, 4 or 8. Returns them as
        float64.
        """
        rng = self.rng
        groups = [group for group in (32, 64, 128) if columns % group == 0]
        bits = self.pick(4, 4, 8, 16) if groups else 16
        group = self.pick(*groups) if bits < 16 else 0
        fields.update(shared_n=rows, shared_k=columns, shared_bits=bits)
        fields.update(shared_num_experts=1, shared_group_size=group)
        fields.update(shared_q_stride_e=0, shared_s_stride_e=0, shared_z_stride_e=0)
        fields.update(shared_s_stride_n=0, shared_z_stride_n8=0)
        stride = columns * bits // 32 + self.pick(0, 4)
        fields["shared_q_stride_n"] = stride
        if bits == 16:
            w = to_bits(rng.standard_normal((rows, columns)) * size, self.dtype)
            fields["shared_q"] = spread(w, (2 * stride,))
            return from_bits(w, self.dtype)
        q = rng.integers(0, 2**bits, (rows, columns), dtype=np.uint32)
        zeros = np.full((rows, columns // group), 2 ** (bits - 1))
        if bits == 8:
            fields["shared_q"] = spread(q.astype(np.uint8), (4 * stride,))
        else:
            words = (q.reshape(rows, -1, 8) << NIBBLE_SHIFTS).sum(-1, dtype=np.uint32)
            fields["shared_q"] = spread(words, (stride,))
        if bits == 4 and rows % 8 == 0 and self.pick(False, True):
            zeros = rng.integers(0, 16, zeros.shape, dtype=np.uint32)
            shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
            words = zeros.reshape(rows // 8, 8, -1) << shifts
            stride = fields["shared_z_stride_n8"] = zeros.shape[1] + self.pick(0, 1)
            words = words.sum(-2, dtype=np.uint32)
            fields["shared_zeros"] = spread(words, (stride,))
        scales = rng.uniform(0.5, 1.5, zeros.shape) * size / 2 ** (bits - 2)
        scales = to_bits(scales, self.dtype)
        stride = fields["shared_s_stride_n"] = zeros.shape[1] + self.pick(0, 1)
        fields["shared_scales"] = spread(scales, (stride,))
        value = q.astype(np.float64) - np.repeat(zeros, group, -1)
        return value * np.repeat(from_bits(scales, self.dtype), group, -1)

    def shared_expert(self, fields, a, n=None):
        """Add a shared expert of any size to half of the cases.

        ``a``: of gate_up. For down, without ``a``, `n` is the number of columns.
        """
        if self.pick(False, True):
            return None, None
        rng, gated = self.rng, self.pick(False, True)
        tokens = fields["num_tokens"]
        factors = np.ones(tokens)
        # gate_up has a block per row on CUDA
        size = self.pick(8, 24, 72) if a is not None else self.pick(8, 72, 264, 96, 384)
        if a is None:  # down
            x = to_bits(rng.standard_normal((tokens, size)), self.dtype)
            fields["shared_a_stride_m"] = size + self.pick(0, 1, 8)
            fields["shared_a"] = spread(x, (fields["shared_a_stride_m"],))
            fields["shared_a.offset"] = self.pick(0, 2)
            w = self.shared_weights(fields, n, size, 1.0)
            if gated:
                factors = rng.random(tokens).astype(np.float32)
                fields["shared_factors"] = factors.tobytes()
            expected = factors[:, None] * (from_bits(x, self.dtype) @ w.T)
        else:
            inter, k = size - self.pick(0, 0, 3), a.shape[1]
            w = self.shared_weights(fields, 2 * inter, k, 4.0)
            gate, up = (a @ w.T).reshape(tokens, 2, -1).swapaxes(0, 1)
            expected = activate(SILU, 1.0, gate) * up
            if gated:
                gate = to_bits(rng.standard_normal(k) * 4, self.dtype)
                factors = 1 / (1 + np.exp(-(a @ from_bits(gate, self.dtype))))
                fields["shared_gate"] = gate.tobytes()
                fields["shared_factors"] = np.full(tokens, np.nan, np.float32).tobytes()
        columns = expected.shape[1]
        stride = columns + self.pick(0, 1, 16)
        before = rng.integers(
            0x7FC1, 0x7FFF, (tokens - 1) * stride + columns, dtype=np.uint16
        )
        fields.update(shared_c=before.tobytes(), shared_c_stride_m=stride)
        fields["shared_c.offset"] = self.pick(0, 2)
        written = np.ones(tokens, dtype=bool)
        label = f"seed {SEED}, shared expert of {self.op}, size {size}, M {tokens}, "
        label += f"{fields['shared_bits']} bits, g{fields['shared_group_size']}"
        op = {"op": self.op.encode()}
        case = Case(op, expected, written, before, stride, self.dtype, label)
        return case, factors if gated else None

    def finish(self, fields, expected, written, label, shared=(None, None)):
        columns = expected.shape[1]
        tiled = self.op.startswith("tiled")  # stores two results at a time
        stride = columns + self.pick(0, 0, 2 if tiled else 1, 16)
        size = (expected.shape[0] - 1) * stride + columns
        before = self.rng.integers(0x7FC1, 0x7FFF, size, dtype=np.uint16)  # NaNs
        fields.update(
            op=self.op.encode(), dtype=self.dtype, cu_count=self.pick(1, 2, 40)
        )
        fields.update({"c": before.tobytes(), "c_stride_m": stride})
        fields["c.offset"] = self.pick(0, 4 if tiled else 2)
        label = f"seed {SEED}, {label}"
        return Case(
            *(fields, expected, written, before, stride, self.dtype, label),
            shared=shared[0],
            factors=shared[1],
        )

    def gemm(self, block_size, n, k):
        fields, rng = {}, self.rng
        tokens, top_k, experts = self.pick(1, 3, 4), self.pick(1, 2, 3), self.pick(1, 3)
        rows = tokens * top_k
        a = self.activations(fields, tokens, k)
        w = self.weights(fields, experts, n, k)
        if self.pick(False, True):
            ids = np.concatenate([rng.permutation(rows), [rows, rows + 7]])
            ids = rng.permutation(ids)[: rng.integers(1, ids.size + 1)]
            ids = np.pad(ids, (0, -ids.size % block_size), constant_values=rows)
            fields["sorted_token_ids"] = ids.astype(np.int32).tobytes()
        else:
            ids = np.arange(rows + -rows % block_size)
        ids = ids.reshape(-1, block_size)
        block_experts = rng.integers(-1, experts, len(ids))
        fields["expert_ids"] = block_experts.astype(np.int32).tobytes()
        fields.update(num_blocks=len(ids), block_size_m=block_size)
        fields.update(num_rows=rows, top_k=top_k)
        expected, written = np.zeros((rows, n)), np.zeros(rows, dtype=bool)
        for block, expert in zip(ids, block_experts, strict=True):
            for row in block[(block < rows) & (expert >= 0)]:
                expected[row], written[row] = w[expert] @ a[row // top_k], True
        label = f"gemm block {block_size}, N {n}, K {k}, M {tokens}, top_k {top_k}"
        return self.finish(fields, expected, written, label)

    def activation(self, fields):
        """Add a gated activation; returns it as a function of gate and up."""
        kind, alpha, beta, limit = self.pick(
            (SILU, 1.0, 0.0, math.inf),
            (SILU, 1.702, 1.0, 0.7),
            (GELU, 1.0, 0.0, math.inf),
            (GELU_TANH, 1.0, 0.0, 1.5),
        )
        fields.update(activation=kind, alpha=alpha, beta=beta, limit=limit)
        return lambda gate, up: (
            activate(kind, alpha, np.minimum(gate, limit))
            * (np.clip(up, -limit, limit) + beta)
        )

    def lists(self, fields, rows):
        """Add pairs sorted into lists of `rows`; returns each pair's expert, -1: none.

        A full list or none, two others, and a list past the valid ones.
        """
        rng, experts = self.rng, self.pick(1, 3)
        counts = [rows] * self.pick(0, 1) + list(rng.integers(0, rows + 1, 2))
        rng.shuffle(counts)
        top_k = self.pick(1, 3)
        num_pairs = (sum(counts) // top_k + 2) * top_k
        expert_of = np.full(num_pairs, -1)
        free = rng.permutation(num_pairs)
        ids = np.full((len(counts) + 1, rows), self.pick(num_pairs, num_pairs + 9))
        list_experts = np.append(rng.integers(-1, experts, len(counts)), 0)
        for i, count in enumerate(counts):
            ids[i, :count], free = free[:count], free[count:]
            expert_of[ids[i, :count]] = list_experts[i]
        ids[-1] = rng.integers(0, num_pairs, rows)  # must not be read as pairs
        fields["sorted_ids"] = ids.astype(np.int32).tobytes()
        fields["expert_ids"] = list_experts.astype(np.int32).tobytes()
        fields["num_padded"] = np.array([ids[:-1].size], np.int32).tobytes()
        fields.update(lists=len(ids), num_pairs=num_pairs, top_k=top_k, pairs=rows)
        fields.update(waves=self.pick(1, 2, 3), row_tiles=self.pick(1, 2))
        return expert_of, experts

    def tiled(self, rows, n, k):
        """A call of a tiled kernel for lists of `rows` pairs."""
        fields = {}
        expert_of, experts = self.lists(fields, rows)
        top_k, pairs = fields["top_k"], len(expert_of)
        gated = self.op == "tiled_gate_up"
        size = 0.25 / math.sqrt(k) if gated else 1.0
        a = self.activations(fields, pairs // top_k if gated else pairs, k, size)
        w = self.weights(fields, experts, n * 2 if gated else n, k)
        scale = np.ones(pairs)
        if gated:
            act = self.activation(fields)
        elif self.pick(False, True):
            scale = self.rng.random(pairs).astype(np.float32)
            fields["topk_weights"] = scale.tobytes()
        expected = np.zeros((pairs, n))
        for pair, expert in enumerate(expert_of):
            if expert < 0:
                continue
            if gated:
                gate, up = (w[expert] @ a[pair // top_k]).reshape(2, n)
                expected[pair] = act(gate, up)
            else:
                expected[pair] = scale[pair] * (w[expert] @ a[pair])
        label = f"{self.op} lists of {rows}, N {n}, K {k}, top_k {top_k}, E {experts}"
        return self.finish(fields, expected, expert_of >= 0, label)

    def gate_up(self, tokens, n, k, kernel=None, routed=None):
        """``routed``: top_k and experts; random by default."""
        fields = {}
        top_k, experts = routed or (self.pick(1, 2, 3), self.pick(1, 2, 4))
        a = self.activations(fields, tokens, k, size=0.25 / math.sqrt(k))
        w = self.weights(fields, experts, 2 * n, k)
        local = self.routing(fields, tokens, top_k, experts).reshape(-1)
        act = self.activation(fields)
        expected = np.zeros((tokens * top_k, n))
        for row, expert in enumerate(local):
            if expert >= 0:
                expected[row] = act(*(w[expert] @ a[row // top_k]).reshape(2, n))
        label = (
            f"gate_up M {tokens}, I {n}, K {k}, top_k {top_k}, E {experts}, "
            f"act {fields['activation']}" + self.plan(fields, tokens, kernel)
        )
        shared = self.shared_expert(fields, a)
        return self.finish(fields, expected, local >= 0, label, shared)

    def down(self, tokens, n, k, kernel=None, routed=None):
        """As ``gate_up``."""
        fields = {}
        # More than 32, because a wave handles that many pairs at a time, one per lane.
        most = 40 if tokens == 1 else 8
        top_k, experts = routed or (self.pick(1, 2, 3, most), self.pick(1, 2, 4))
        a = self.activations(fields, tokens * top_k, k)
        w = self.weights(fields, experts, n, k)
        local = self.routing(fields, tokens, top_k, experts)
        scale = np.ones((tokens, top_k))
        fields["tw_stride_m"] = 0
        if self.pick(False, True, True):
            scale = self.rng.random((tokens, top_k)).astype(np.float32)
            fields["tw_stride_m"] = top_k + self.pick(0, 3)
            fields["topk_weights"] = spread(scale, (fields["tw_stride_m"],))
        expected = np.zeros((tokens, n))
        for token, slot in np.argwhere(local >= 0):
            product = w[local[token, slot]] @ a[token * top_k + slot]
            expected[token] += scale[token, slot] * product
        written = np.ones(tokens, dtype=bool)
        label = f"down M {tokens}, N {n}, K {k}, top_k {top_k}, E {experts}"
        label += self.plan(fields, tokens, kernel)
        shared = self.shared_expert(fields, None, n)
        return self.finish(fields, expected, written, label, shared)

    def cases(self, every=False):
        """Block sizes or token counts, some of them with a short and a long K.

        A sample of the token counts, or all if ``every``.
        """
        if self.op.startswith("tiled"):
            for rows in (8, 16, 32, 64):
                n = 8 * int(self.rng.integers(1, 17 if every else 9))
                yield self.tiled(rows, n, self.pick(1, 2, 3) * self.group)
                if every:
                    yield self.tiled(rows, n, 1024 + self.group)
            return
        sizes = [1, 2, 3, 4, 5]
        if self.op != "gemm":
            few = [1, self.pick(2, 3, 5, 7), self.pick(8, 9)]
            sizes = [*sizes, 6, 7, 8, 9] if every else few
        step = 8 if self.zero_points else 1
        for size in sizes:
            both = (self.pick(1, 2, 3, 5) * self.group, 1024 + self.group)
            for k in both if size == 1 or every else (self.pick(*both),):
                n = step * int(self.rng.integers(1, 48 // step + 1))
                # Some of the kernels for one row require aligned rows.
                self.aligned = size == 1 or self.pick(True, False)
                yield getattr(self, self.op)(size, n, k)
        if self.op == "gemm":
            return
        for size, kernel in ((2, PAIRS), (7, EIGHTS)):
            self.aligned = True
            n = step * int(self.rng.integers(1, 48 // step + 1))
            k = self.pick(1, 3, 5) * self.group
            yield getattr(self, self.op)(size, n, k, kernel)
        if not self.mma:
            return
        self.aligned = True
        # Up to all tokens of a block on one expert, and a second block of tokens.
        sizes = (1, 2), (3, 5), (8, 24), (9, 17, 70)
        for size in sum(sizes, ()) if every else (self.pick(*few) for few in sizes):
            n = step * int(self.rng.integers(1, 48 // step + 1))
            long = size <= 2 and (every or self.group == 128)
            k = 1024 + self.group if long else self.pick(1, 2, 3, 5) * self.group
            yield getattr(self, self.op)(size, n, k, GROUPED)
            if self.op == "down" or size < (9 if every else 4):
                yield getattr(self, self.op)(size, n, k, WIDE)


def activate(kind, alpha, x):
    if kind == SILU:
        return x / (1 + np.exp(-alpha * x))
    if kind == GELU:
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / 2 * (1 + np.tanh(inner))


COMBINATIONS = [
    (mma, op, dtype, group, zero_points)
    for mma in (False, True)
    for op in OPS
    if mma or not op.startswith("tiled")
    for dtype in (HALF, BF16)
    for group in (32, 64, 128)
    for zero_points in (False, True)
]


def cases_of(key, planned=True, every=False):
    return list(Maker(*key, planned).cases(every))


@pytest.fixture(scope="module")
def programs():
    return build_programs()


@pytest.fixture(scope="module")
def outcomes(programs):
    return run_all({key: (programs[key[0]], cases_of(key)) for key in COMBINATIONS})


@pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=lambda c: "-".join(map(name_of, c))
)
def test_results_are_right_in_every_order(outcomes, combination):
    check(outcomes[combination])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "combination",
    [key for key in COMBINATIONS if key[1] != "gemm"],
    ids=lambda c: "-".join(map(name_of, c)),
)
def test_results_are_right_at_every_size(programs, combination):
    check(run(programs[combination[0]], cases_of(combination, every=True)))


def test_down_takes_fewer_waves_where_there_is_less_lds(programs):
    """sm_86 and sm_89 have 99 KiB per block. One wave of any kernel fits in 34,000
    bytes; as many waves as the rule prefers do not.
    """
    less = {"GPU_HOST_LDS_BYTES": "34000"}
    key = True, "down", BF16, 128, False
    check(run(programs[True], cases_of(key, planned=False), less))


@pytest.mark.parametrize(
    ("op", "mma", "plan", "message"),
    [
        ("gate_up", True, (2, 4, 8), "length: expected 4 integers, got 3"),
        ("gate_up", True, (3, 4, 8, 1), "slots (value 2): expected 0 to 0, got 8"),
        ("gate_up", True, (4, 4, 0, 1), "kernel (value 0): expected 0 to 3, got 4"),
        ("gate_up", True, (3, 4, 0, 17), "row_tiles (value 3): expected 1 to 16, got"),
        ("gate_up", True, (2, 17, 8, 1), "waves (value 1): expected 1 to 16, got 17"),
        ("gate_up", True, (2, 4, 17, 1), "slots (value 2): expected 1 to 16, got 17"),
        ("gate_up", True, (0, 4, 8, 0), "slots (value 2): expected 0 to 0, got 8"),
        ("gate_up", False, (2, 4, 8, 1), "kernel (value 0): expected 0 to 1, got 2"),
        ("down", True, (3, 6, 4, 8), "a power of two that divides waves 6, got 4"),
        ("down", True, (2, 4, 1, 9), "slots (value 3): expected 1 to 8, got 9"),
        ("down", True, (3, 16, 1, 8), "bytes of shared memory that it takes"),
        ("down", False, (3, 6, 1, 8), "kernel (value 0): expected 0 to 1, got 3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(programs, op, mma, plan, message):
    maker = Maker(mma, op, BF16, 128, False)
    maker.aligned = True
    fields = getattr(maker, op)(64, 32, 256, PAIRS).fields
    fields["plan"] = np.array(plan, dtype=np.int64).tobytes()
    done = subprocess.run(
        [programs[mma]], input=record(fields), capture_output=True, check=False
    )
    text = done.stderr.decode(errors="replace")
    assert done.returncode != 0 and not done.stdout
    assert f"fused_moe_wvSplitK_int4_{op}: plan: " in text and message in text


@pytest.mark.parametrize("mma", [False, True])
def test_every_kernel_ran(programs, outcomes, mma):
    of_program = [outcome for key, outcome in outcomes.items() if key[0] == mma]
    check_every_kernel_ran(programs[mma], "moe_int4_", of_program)
