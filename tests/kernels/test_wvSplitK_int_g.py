# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The dense op and rescoring against float64, on every device and CPU instruction set.

Themes: products with both weight widths, repeatable bits, rescoring, quantization,
arguments that must be rejected, tracing.
"""

import pytest
import torch

from tests.kernels.test_moe_int4_ops import (
    Output,
    needs_cpu_ops,
    odd_rows,
    pack_weights,
    pack_zeros,
    strided_copy,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # relative, Frobenius norm
WIDTHS = [(4, False), (4, True), (8, False)]  # bits, zero points
CU_COUNT = 4


@pytest.fixture(autouse=True, scope="module")
def _library():
    assert ops.load_error() is None, ops.load_error()


class Matrix:
    """Random packed weights [N, K] and their values in float64."""

    def __init__(self, n, k, group, bits, zeros, dtype, pad=0):
        q = torch.randint(0, 2**bits, (n, k))
        z = torch.randint(0, 16, (n, k // group)) if zeros else None
        s = ((0.5 + torch.rand(n, k // group)) / (2**bits * k**0.5)).to(dtype)
        centre = 2 ** (bits - 1) if z is None else z.repeat_interleave(group, 1)
        self.dense = (q - centre).double() * s.double().repeat_interleave(group, 1)
        if bits == 4:
            words = pack_weights(q[None])[0]
            w = torch.full((n, k // 8 + pad), 0x7F0FF0F7, dtype=torch.int32)
        else:
            words = q.to(torch.uint8)
            w = torch.full((n, k + 4 * pad), 0xA5, dtype=torch.uint8)
        self.w = w[:, : words.shape[1]].copy_(words)
        scales = torch.full((n, k // group + pad), float("nan"), dtype=dtype)
        self.scales = scales[:, : k // group].copy_(s)
        self.zero_points = None if z is None else pack_zeros(z[None])[0]
        self.group, self.bits = group, bits

    def multiply(self, a, c, device):
        zeros = self.zero_points
        ops.wvSplitK_int_g(
            a,
            strided_copy(self.w, device),
            strided_copy(self.scales, device),
            c,
            CU_COUNT,
            self.group,
            self.bits,
            None if zeros is None else zeros.to(device),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits, zeros", WIDTHS)
def test_products(device, every_isa, dtype, group, bits, zeros):
    for isa in every_isa():
        # GPUs take up to 16 rows, the CPU any number
        for rows in (1, 2, 5, 7, 8, 16) + ((40,) if device == "cpu" else ()):
            n = 8 * int(torch.randint(1, 80, ()))
            k = group * int(torch.randint(1, 9, ()))
            pad = 4 * int(torch.randint(0, 3, ()))
            matrix = Matrix(n, k, group, bits, zeros, dtype, pad)
            a = odd_rows(torch.randn(rows, k).to(dtype), gap=3)
            c = Output(rows, n, dtype, device, gap=5)
            matrix.multiply(strided_copy(a, device), c.view, device)
            c.check_surroundings()
            expected = a.double() @ matrix.dense.T
            error = (c.view.cpu().double() - expected).norm() / expected.norm()
            assert error < TOLERANCE[dtype], (isa, rows, n, k, float(error))


@pytest.mark.parametrize("bits, group", [(4, 128), (8, 32)])
def test_bits_repeat_whatever_the_threads(device, threads, bits, group):
    matrix = Matrix(2000, 512, group, bits, False, torch.bfloat16)
    a = torch.randn(3, 512).bfloat16().to(device)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        c = torch.empty(3, 2000, dtype=torch.bfloat16, device=device)
        matrix.multiply(a, c, device)
        results.append(c)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ------------------------------------------------------------------ rescoring
def head(rows, n, k, dtype, spread):
    """Return weights, hidden states, int4 products and errors of a peaked lm_head."""
    w = (torch.randn(n, k) / k**0.5).to(dtype)
    a = torch.randn(rows, k) + spread * w[torch.randint(0, n, (rows,))].float()
    packed, scales, errors = ops.quantize(w, 4, 128)
    return w, a.to(dtype), packed, scales, errors


def rescored(w, a, packed, scales, errors, window, bound, device):
    c = torch.empty(len(a), len(w), dtype=a.dtype, device=device)
    to = [t.to(device) for t in (a, packed, scales, w, errors)]
    ops.wvSplitK_int_g(to[0], to[1], to[2], c, CU_COUNT, 128, 4)
    before = c.clone()
    partials = torch.full((len(a), 2 * ops.PARTS), float("nan"), device=device)
    ops.wvSplitK_int_g_rescore(to[0], to[3], to[4], c, partials, window, bound)
    return before.cpu(), c.cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, window", [(1, 0.5), (3, 0.0), (8, 1.0), (16, 1e9)])
def test_what_is_asked_for_is_exact(device, every_isa, dtype, rows, window):
    w, a, packed, scales, errors = head(rows, 1500, 384, dtype, 30)
    errors[::11] = -1  # padding rows
    exact = a.double() @ w.double().T
    for isa in every_isa():
        before, after = rescored(w, a, packed, scales, errors, window, 7.0, device)
        asked = ops.rescored_rows(a, errors, before, window, 7.0)
        assert 0 < asked.sum() < asked.numel(), isa
        assert torch.equal(after[~asked], before[~asked]), isa
        # Off by at most the rounding of the result and of an fp32 sum.
        off = (after.double() - exact).abs() - exact.abs() * 2**-8
        assert off[asked].max() < 1e-5, isa


def test_a_product_has_the_same_bits_whatever_else_is_asked(device, every_isa):
    """A GPU shares k among waves for few columns of a part, and columns for many."""
    w, a, packed, scales, errors = head(3, 80000, 384, torch.bfloat16, 30)
    exact = a.double() @ w.double().T
    for isa in every_isa():
        args = w, a, packed, scales, errors
        before, few = rescored(*args, 0.5, 7.0, device)
        _, all_ = rescored(*args, 1e9, 7.0, device)
        asked = ops.rescored_rows(a, errors, before, 0.5, 7.0)
        assert 0 < asked.sum() < 3000, isa
        assert torch.equal(few[asked], all_[asked]), isa
        off = (all_.double() - exact).abs() - exact.abs() * 2**-8
        assert off.max() < 1e-5, isa


def test_first_tokens_are_those_of_the_16_bit_head(device):
    """Even if rows nearly tie: every other row is its neighbour plus a little."""
    lost_without = 0
    for _ in range(8):
        w, _, _, _, _ = head(1, 3000, 256, torch.bfloat16, 0)
        w[1::2] = (w[::2].float() + 2e-3 * torch.randn(1500, 256)).bfloat16()
        packed, scales, errors = ops.quantize(w, 4, 128)
        near = w[torch.randint(0, 3000, (16,))].float()
        a = (torch.randn(16, 256) + 20 * near).bfloat16()
        before, after = rescored(w, a, packed, scales, errors, 8.0, 7.0, device)
        exact = (a.double() @ w.double().T).bfloat16()
        assert torch.equal(after.argmax(1), exact.argmax(1))
        lost_without += (before.argmax(1) != exact.argmax(1)).sum()
    assert lost_without > 0  # else the test says nothing


def test_a_large_product_of_a_row_that_does_not_exist_changes_nothing(device):
    """A vocabulary's padding has products of 0, which may exceed all real ones."""
    w, a, packed, scales, errors = head(2, 640, 256, torch.bfloat16, 0)
    w[0] = 0.01 * a[0]
    padded = w.clone()
    padded[-40:] = 100 * a[0]  # would be the largest by far
    packed, scales, errors = ops.quantize(padded, 4, 128)
    errors[-40:] = -1
    args = (packed, scales, errors, 0.5, 7.0, device)
    before, after = rescored(padded, a, *args)
    asked = ops.rescored_rows(a, errors, before, 0.5, 7.0)
    assert not asked[:, -40:].any() and asked[:, :-40].any(1).all()
    assert torch.equal(after[:, -40:], before[:, -40:])


# --------------------------------------------------------------- quantization
@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, 32)])
def test_quantization_is_what_its_errors_say(bits, group):
    w = torch.randn(300, 4 * group).bfloat16()
    w[7] = 0
    packed, scales, errors = ops.quantize(w, bits, group)
    back = ops.dequantize(packed, scales, bits)
    expected = (w.float() - back).norm(dim=1) / (4 * group) ** 0.5
    torch.testing.assert_close(errors, expected)
    assert errors[7] == 0 and back[7].eq(0).all()
    # No worse than scales that map the largest magnitude to the largest integer. With 8
    # bits there is little to gain, and these scales are not rounded to bf16.
    groups = w.float().unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    plain = groups.abs().amax(2, keepdim=True) / (half - 1)
    rounded = (groups / plain.clamp(min=1e-9)).round() * plain
    naive = (groups - rounded).flatten(1).norm(dim=1) / (4 * group) ** 0.5
    assert errors.mean() < naive.mean() * (1 if bits == 4 else 1.02)


# ------------------------------------------------------------------- refusals
GOOD = dict(m=2, n=64, k=256, group=128, bits=4)


def dense_arguments(**changes):
    s = GOOD | changes
    columns, dtype = (s["k"] // 8, torch.int32) if s["bits"] == 4 else (s["k"], None)
    return dict(
        a=torch.zeros(s["m"], s["k"], dtype=torch.bfloat16),
        w=torch.zeros(s["n"], columns, dtype=dtype or torch.uint8),
        scales=torch.zeros(s["n"], s["k"] // s["group"], dtype=torch.bfloat16),
        c=torch.zeros(s["m"], s["n"], dtype=torch.bfloat16),
        cu_count=1,
        group_size=s["group"],
        bits=s["bits"],
        zero_points=None,
    )


@needs_cpu_ops
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(bits=3), "bits: expected 4 or 8, got 3"),
        (dict(group_size=256), "group_size: expected 32, 64 or 128, got 256"),
        (dict(a=torch.zeros(2, 256)), "a: expected dtype Half or BFloat16, got Float"),
        (dict(a=torch.zeros(2, 200).bfloat16()), "a: expected columns a multiple of"),
        (dict(w=torch.zeros(64, 256).to(torch.uint8)), "w: expected dtype Int"),
        (dict(w=torch.zeros(64, 16).int()), "w: expected shape [N, K//8 = 32]"),
        (dict(w=torch.zeros(64, 33).int()[:, :32]), "w: expected row stride"),
        (dict(scales=torch.zeros(64, 3).bfloat16()), "scales: expected shape"),
        (dict(c=torch.zeros(2, 65).bfloat16()), "c: expected shape"),
        (dict(cu_count=0), "cu_count: expected at least 1"),
        (dict(zero_points=torch.zeros(8, 3).int()), "zero_points: expected shape"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(RuntimeError, match="wvSplitK_int_g: ") as error:
        ops.wvSplitK_int_g(**(dense_arguments() | changes))
    assert message in str(error.value)


@needs_cpu_ops
def test_many_rows_are_cut_where_their_memory_ends():
    """On the CPU: 64 MiB of activations at a time, here 256 rows."""
    matrix = Matrix(8, 1 << 18, 128, 4, False, torch.bfloat16)
    a = torch.randn(300, 1 << 18).bfloat16()
    c = Output(300, 8, torch.bfloat16, "cpu", gap=3)
    matrix.multiply(a, c.view, "cpu")
    c.check_surroundings()
    expected = a.float() @ matrix.dense.T.float()
    assert (c.view.float() - expected).norm() / expected.norm() < 8e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_16_rows():
    arguments = dense_arguments(m=17)
    with pytest.raises(RuntimeError, match="a: expected 0 to 16, got 17"):
        ops.wvSplitK_int_g(
            **{
                name: value.cuda() if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
        )


@needs_cpu_ops
def test_zero_points_with_bytes_are_refused():
    arguments = dense_arguments(bits=8)
    with pytest.raises(RuntimeError, match="zero_points: expected None with 8 bits"):
        ops.wvSplitK_int_g(**arguments | {"zero_points": torch.zeros(8, 2).int()})


def rescore_arguments():
    return dict(
        a=torch.zeros(2, 256).bfloat16(),
        w=torch.zeros(64, 256).bfloat16(),
        errors=torch.zeros(64),
        c=torch.zeros(2, 64).bfloat16(),
        partials=torch.zeros(2, 2 * ops.PARTS),
        window=8.0,
        bound=7.0,
    )


@needs_cpu_ops
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(w=torch.zeros(64, 256)), "w: expected dtype BFloat16 as a"),
        (dict(w=torch.zeros(64, 255).bfloat16()), "w: expected shape"),
        (dict(errors=torch.zeros(63)), "errors: expected shape"),
        (dict(partials=torch.zeros(2, 8)), "partials: expected shape"),
        (dict(window=-1.0), "window: expected a finite number of at least 0"),
        (dict(bound=float("nan")), "bound: expected a finite number of at least 0"),
    ],
)
def test_rescore_arguments_that_do_not_fit(changes, message):
    with pytest.raises(RuntimeError, match="wvSplitK_int_g_rescore: ") as error:
        ops.wvSplitK_int_g_rescore(**(rescore_arguments() | changes))
    assert message in str(error.value)


def test_ops_are_traced_as_mutations():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in dense_arguments().items()
        }
        assert torch.ops._rocm_C.wvSplitK_int_g(**fakes) is None
        fakes = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in rescore_arguments().items()
        }
        assert torch.ops._rocm_C.wvSplitK_int_g_rescore(**fakes) is None
