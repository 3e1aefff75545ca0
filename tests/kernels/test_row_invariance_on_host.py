# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Row invariance of the GPU kernels, run on the host.

In a row-invariant call, each row has the bits of a call with that row alone. Real
launchers and kernels run, as in test_moe_int4_on_host.py.
"""

import itertools

import numpy as np
import pytest

from tests.support.kernels_on_host import BF16, HALF, Case, build_programs, run

from . import test_moe_int4_on_host as moe
from . import test_wvSplitK_int_g_on_host as dense

pytestmark = pytest.mark.slow
ITEM = 2  # bytes of fp16 and bf16


@pytest.fixture(scope="module")
def programs():
    return build_programs()


def rows_of(data, stride, width, item, first, count):
    """Rows [first, first + count) of ``width`` items, ``stride`` items apart."""
    begin = first * stride * item
    return data[begin : begin + ((count - 1) * stride + width) * item]


def alone(op, case, token):
    """The fields of ``case``, a call of ``op``, with one of its tokens."""
    fields = dict(case.fields)
    per_token = {"gate_up": 1, "down": fields.get("top_k")}.get(op, 1)
    fields["a"] = rows_of(
        fields["a"],
        fields["a_stride_m"],
        fields["k"],
        ITEM,
        token * per_token,
        per_token,
    )
    if op == "dense":
        fields["m"] = 1
        return fields
    top_k = fields["top_k"]
    item = 8 if fields["ids_are_int64"] else 4
    fields["ids"] = rows_of(
        fields["ids"], fields["ids_stride_m"], top_k, item, token, 1
    )
    if "topk_weights" in fields:
        weights = fields["topk_weights"], fields["tw_stride_m"]
        fields["topk_weights"] = rows_of(*weights, top_k, 4, token, 1)
    fields["num_tokens"] = 1
    return fields


def outputs(case, reply, count, first=0):
    """``count`` output rows from ``first`` on, as bits."""
    c = np.frombuffer(reply["c"], np.uint16)
    starts = (np.arange(count) + first) * case.c_stride
    return [c[s : s + case.expected.shape[1]] for s in starts]


def check_rows(program, op, case, tokens):
    """Tokens of ``case`` have the same bits in the whole call and alone.

    Three of them, because each call runs in several orders of lanes and waves.
    """
    some = (0, tokens // 2, tokens - 1)
    case.fields["row_invariant"] = 1
    calls = [case.fields] + [alone(op, case, t) for t in some]
    outcome = run(program, [Case(f, *vars_of(case)) for f in calls])
    assert outcome.returncode == 0, f"{case.label}\n{outcome.stderr[:2000]}"
    if op != "dense":  # where any kernel does
        assert kernels(outcome)[0].endswith("_t1") and len(kernels(outcome)) == 1
    whole, *single = outcome.replies
    case.check(whole["c"])
    rows = len(case.expected) // tokens
    for token, reply in zip(some, single, strict=True):
        got = outputs(case, reply, rows)
        expected = outputs(case, whole, rows, token * rows)
        for row, (a, b) in enumerate(zip(got, expected, strict=True)):
            written = case.written[token * rows + row]
            assert not written or np.array_equal(a, b), f"{case.label}, token {token}"


def kernels(outcome):
    """Names of the kernels that the calls launched."""
    return sorted({k for r in outcome.replies for k in r["kernels"].decode().split()})


def vars_of(case):
    return (
        case.expected,
        case.written,
        case.c_before,
        case.c_stride,
        case.dtype,
        case.label,
    )


def moe_case(mma, op, dtype, group, zero_points, tokens):
    """Few experts, so that tokens share them; several waves share k."""
    maker = moe.Maker(mma, op, dtype, group, zero_points)
    maker.aligned = True
    case = getattr(maker, op)(tokens, 24, 512 + group, moe.PAIRS, (3, 4))
    del case.fields["plan"]
    case.fields["cu_count"] = 40
    return case


def dense_case(dtype, group, bits, zero_points, rows):
    case = dense.Maker(dtype, bits, group, zero_points).dense(rows, 24, 512 + group)
    case.fields["cu_count"] = 40
    return case


FORMATS = list(itertools.product((HALF, BF16), (32, 64, 128), (False, True)))
SHORT = (BF16, 64, True)
MOE = [  # the build for NVIDIA takes longest
    pytest.param(
        *(mma, op, *format),
        marks=() if format == SHORT and not mma else pytest.mark.nightly,
    )
    for mma in (False, True)
    for op in ("gate_up", "down")
    for format in FORMATS
]


@pytest.mark.parametrize(("mma", "op", "dtype", "group", "zero_points"), MOE)
def test_moe_rows_are_the_same_alone(programs, mma, op, dtype, group, zero_points):
    case = moe_case(mma, op, dtype, group, zero_points, tokens=9)
    check_rows(programs[mma], op, case, 9)


@pytest.mark.parametrize("mma", [False, True])
def test_kernels_differ_without_the_mode(programs, mma):
    """The test above would notice: the rule's kernel depends on the tokens.

    Bits alone would show little: sums in another order seldom round differently.
    """
    case = moe_case(mma, "down", *SHORT, tokens=9)
    calls = [case.fields, alone("down", case, 0)]
    outcome = run(programs[mma], [Case(f, *vars_of(case)) for f in calls])
    assert outcome.returncode == 0 and len(kernels(outcome)) == 2


@pytest.mark.parametrize("mma", [False, True])
@pytest.mark.parametrize(
    ("dtype", "group", "bits", "zero_points"),
    [
        pytest.param(
            *format, marks=() if format == (BF16, 64, 4, True) else pytest.mark.nightly
        )
        for format in (
            (dtype, group, bits, zeros)
            for dtype in (HALF, BF16)
            for group in (32, 64, 128)
            for bits, zeros in dense.BITS_AND_ZEROS
        )
    ],
)
def test_dense_rows_are_the_same_alone(programs, mma, dtype, group, bits, zero_points):
    """For the lm_head and linears. 13 rows: kernels for 1, 8 and, with matrix
    instructions, 16 rows."""
    case = dense_case(dtype, group, bits, zero_points, rows=13)
    check_rows(programs[mma], "dense", case, 13)


@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_unaligned_rows_are_refused_with_matrix_instructions(programs, op):
    """Only the kernels that copy aligned rows keep pairs apart there."""
    case = moe_case(True, op, BF16, 128, False, tokens=3)
    case.fields |= {"row_invariant": 1, "a.offset": 2}
    outcome = run(programs[True], [case])
    assert outcome.returncode != 0
    assert "a: expected rows aligned to 16 bytes in a row-invariant" in outcome.stderr
