# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The GPU kernels of the dense op and of rescoring, run on the host, against float64.

As in test_moe_int4_on_host.py: real launchers, several orders of lanes and waves,
AddressSanitizer and UBSan.
"""

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
    read_records,
    record,
    run_all,
    spread,
    to_bits,
)

pytestmark = pytest.mark.slow

BITS_AND_ZEROS = [(4, False), (4, True), (8, False)]
PARTS = 256  # kRescoreParts


class Maker:
    """Random calls of one combination of dtype, bits, group size and zero points."""

    def __init__(self, dtype, bits, group, zero_points):
        self.dtype, self.bits, self.group = dtype, bits, group
        self.zero_points = zero_points
        self.rng = np.random.default_rng([SEED, dtype, bits, group, int(zero_points)])

    def pick(self, *values):
        return values[self.rng.integers(len(values))]

    def activations(self, fields, rows, columns):
        bits = to_bits(self.rng.standard_normal((rows, columns)), self.dtype)
        fields["a_stride_m"] = columns + self.pick(0, 1, 8)
        fields["a"] = spread(bits, (fields["a_stride_m"],))
        fields["a.offset"] = self.pick(0, 2, 6)
        return from_bits(bits, self.dtype)

    def weights(self, fields, n, k):
        q = self.rng.integers(0, 2**self.bits, (n, k), dtype=np.uint32)
        if self.bits == 4:
            words = (q.reshape(n, k // 8, 8) << NIBBLE_SHIFTS).sum(-1, dtype=np.uint32)
        else:
            words = q.astype(np.uint8).view(np.uint32)
        stride = words.shape[1] + self.pick(0, 0, 4, 32)
        fields.update(q=spread(words, (stride,)), q_stride_n=stride, q_stride_e=0)
        groups = k // self.group
        scales = to_bits(self.rng.uniform(0.5, 1.5, (n, groups)), self.dtype)
        stride = groups + self.pick(0, 0, 1, 5)
        fields.update(scales=spread(scales, (stride,)), s_stride_n=stride, s_stride_e=0)
        fields["scales.offset"] = self.pick(0, 2)
        zeros = np.full((n, groups), 2 ** (self.bits - 1))
        fields.update(z_stride_n8=0, z_stride_e=0)
        if self.zero_points:
            zeros = self.rng.integers(0, 16, zeros.shape, dtype=np.uint32)
            shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
            packed = zeros.reshape(n // 8, 8, groups) << shifts
            stride = groups + self.pick(0, 1)
            words = packed.sum(-2, dtype=np.uint32)
            fields.update(zeros=spread(words, (stride,)), z_stride_n8=stride)
        fields.update(num_experts=1, n=n, k=k, group_size=self.group, bits=self.bits)
        value = q.astype(np.float64) - np.repeat(zeros, self.group, -1)
        return value * np.repeat(from_bits(scales, self.dtype), self.group, -1)

    def output(self, fields, rows, columns):
        stride = columns + self.pick(0, 0, 1, 16)
        size = (rows - 1) * stride + columns
        before = self.rng.integers(0x7FC1, 0x7FFF, size, dtype=np.uint16)  # NaNs
        fields.update(c=before.tobytes(), c_stride_m=stride, dtype=self.dtype)
        fields["c.offset"] = self.pick(0, 2)
        return before, stride

    def dense(self, rows, n, k):
        fields = {"op": b"dense", "m": rows, "cu_count": self.pick(1, 2, 40)}
        a = self.activations(fields, rows, k)
        w = self.weights(fields, n, k)
        before, stride = self.output(fields, rows, n)
        label = f"seed {SEED}, dense M {rows}, N {n}, K {k}, {fields['cu_count']} CUs"
        written = np.ones(rows, dtype=bool)
        return Case(fields, a @ w.T, written, before, stride, self.dtype, label)

    def cases(self, every):
        """One case per kernel; ``every``: all numbers of rows, short and long K."""
        step = 8 if self.zero_points else 1
        for rows in (1, 2, 3, 5, 8, 9, 16) if every else (1, 3, 8, 16):
            both = self.pick(1, 2, 3, 5) * self.group, 1024 + self.group
            for k in both if every else (self.pick(*both),):
                n = step * int(self.rng.integers(1, 48 // step + 1))
                yield self.dense(rows, n, k)


COMBINATIONS = [
    (mma, dtype, bits, group, zeros)
    for mma in (False, True)
    for dtype in (HALF, BF16)
    for bits, zeros in BITS_AND_ZEROS
    for group in (32, 64, 128)
]


@pytest.fixture(scope="module")
def programs():
    return build_programs()


def outcomes_of(programs, every):
    return run_all(
        {
            key: (programs[key[0]], list(Maker(*key[1:]).cases(every)))
            for key in COMBINATIONS
        }
    )


@pytest.fixture(scope="module")
def outcomes(programs):
    return outcomes_of(programs, every=False)


@pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=lambda c: "-".join(map(name_of, c))
)
def test_products_are_right_in_every_order(outcomes, combination):
    check(outcomes[combination])


@pytest.mark.nightly
def test_products_are_right_for_every_number_of_rows(programs):
    for outcome in outcomes_of(programs, every=True).values():
        check(outcome)


@pytest.mark.parametrize("mma", [False, True])
def test_every_kernel_ran(programs, outcomes, mma):
    of_program = [outcome for key, outcome in outcomes.items() if key[0] == mma]
    check_every_kernel_ran(programs[mma], "wvSplitK_", of_program)


def rescore_case(dtype, rows, n, k, window, rng):
    """A call, the products before it, and which of them have to be recomputed."""
    a = to_bits(rng.standard_normal((rows, k)), dtype)
    w = to_bits(rng.standard_normal((n, k)) / np.sqrt(k), dtype)
    exact = from_bits(a, dtype) @ from_bits(w, dtype).T
    errors = rng.uniform(0.01, 0.02, n).astype(np.float32)
    norms = np.linalg.norm(from_bits(a, dtype), axis=1, keepdims=True)
    # Off by up to 7 deviations, so that the bounds hold and are decisive.
    off = exact + np.clip(rng.standard_normal(exact.shape) * 3, -7, 7) * norms * errors
    missing = rng.random(n) < 0.1
    errors[missing] = -1
    off[:, missing] = 1e4  # larger than all others, but must be ignored
    bits = to_bits(off, dtype)
    products = from_bits(bits, dtype)
    reach = 7 * norms * errors + np.abs(products) * 2**-7
    seen = np.where(missing, -np.inf, products)
    reached = np.where(missing, -np.inf, products - reach).max(1, keepdims=True)
    largest = seen.max(1, keepdims=True)
    asked = (seen + reach >= reached) | (seen >= largest - window)
    # Closer to the threshold than the error of fp32 sums: either result is right.
    edge = (np.abs(seen + reach - reached) < 1e-3) | (
        np.abs(seen - largest + window) < 1e-4
    )
    stride = n + 3
    fields = dict(op=b"rescore", dtype=dtype, m=rows, n=n, k=k, window=float(window))
    fields.update(a=spread(a, (k + 1,)), a_stride_m=k + 1, bound=7.0)
    fields.update(w=spread(w, (k + 8,)), w_stride_n=k + 8, errors=errors.tobytes())
    fields.update(c=spread(bits, (stride,)), c_stride_m=stride)
    partials = np.full((rows, 2 * PARTS), np.nan, dtype=np.float32)
    fields.update(partials=partials.tobytes(), p_stride_m=2 * PARTS)
    return fields, exact, bits, asked & ~missing, edge & ~missing, stride


IN_CI = ((HALF, False, 3, 1.0), (BF16, True, 3, 1.0))
RESCORED = [
    pytest.param(
        *case,
        marks=() if case in IN_CI else pytest.mark.nightly,
    )
    for case in (
        (dtype, mma, *call)
        for dtype in (HALF, BF16)
        for mma in (False, True)
        for call in ((3, 1.0), (1, 0.5), (3, 0.0), (5, 1.0), (2, 1e6))
    )
]


@pytest.mark.parametrize(("dtype", "mma", "rows", "window"), RESCORED)
def test_rescoring_computes_what_is_asked_for(programs, dtype, mma, rows, window):
    rng = np.random.default_rng([SEED, mma, dtype, rows])
    run_rescoring(programs[mma], Rescoring(dtype, rows, 700, 264, window, rng))


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (2, 4500, 72),
        pytest.param(9, 300, 2600, marks=pytest.mark.nightly),
        pytest.param(9, 80000, 40, marks=pytest.mark.nightly),
    ],
    ids=["many columns", "long rows", "columns for each wave"],
)
def test_matrix_instructions_rescore_several_columns_at_a_time(programs, rows, n, k):
    """A block has more than 8 columns, or more than 256, or a wave over 128 of k."""
    rng = np.random.default_rng([SEED, n])
    run_rescoring(programs[True], Rescoring(BF16, rows, n, k, 1e6, rng))


class Rescoring:
    """A ``rescore_case``, checked like a ``Case``."""

    def __init__(self, *arguments):
        self.case = rescore_case(*arguments)
        self.fields = self.case[0]

    def check_reply(self, reply):
        """Assert that the products of a reply were recomputed, and nothing else."""
        check_rescored(self.case, self.fields["dtype"], reply["c"])


def rescorings(mma):
    """Calls with few and with many products to recompute, for sanitize_gpu.py."""
    rng = np.random.default_rng([SEED, mma])
    for dtype in (HALF, BF16):
        for rows, n, k, window in (
            *((1, 700, 264, 0.5), (3, 700, 264, 1.0), (2, 4500, 72, 1e6)),
            (9, 300, 2600, 1e6),
        ):
            yield Rescoring(dtype, rows, n, k, window, rng)


def run_rescoring(program, case):
    """Run a ``Rescoring`` on the host and check it."""
    done = subprocess.run(
        [program], input=record(case.fields), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[:4000]
    (reply,) = read_records(done.stdout)
    case.check_reply(reply)


def check_rescored(case, dtype, written):
    """The products of ``rescore_case`` were recomputed, and nothing else."""
    fields, exact, before, asked, edge, stride = case
    flat = np.frombuffer(written, dtype=np.uint16)
    after = np.lib.stride_tricks.as_strided(flat, before.shape, (2 * stride, 2))
    assert asked.sum() > 0
    kept = after == before
    assert kept[~asked & ~edge].all()
    right = np.abs(from_bits(after, dtype) - exact) <= np.abs(exact) * 2**-7 + 1e-5
    assert right[asked & ~edge].all()
    # The largest product of the rows that exist is among the recomputed ones.
    exists = np.frombuffer(fields["errors"], dtype=np.float32) >= 0
    winner = np.where(exists, exact, -np.inf).argmax(1)
    assert (asked | edge)[np.arange(len(exact)), winner].all()
