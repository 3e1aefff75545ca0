# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The shared expert inside gate_up and down, against float64.

On every available device and instruction set.
"""

import itertools

import pytest
import torch

from tests.kernels.test_moe_int4_ops import (
    Experts,
    Output,
    activation,
    check,
    local_experts,
    odd_rows,
    products,
    strided_copy,
)
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    SharedDown,
    SharedGateUp,
)

DTYPES = (torch.float16, torch.bfloat16)
SILU = activation("silu", 1.0, 0.0, None)


class Matrix:
    """Random weights of a shared expert, and their values in float64.

    ``quantized``: bits, group size and whether there are zero points; ``None``: 16
    bits. Rows start at multiples of 16 bytes, with `gap` times as many between them.
    """

    def __init__(self, rows, columns, dtype, quantized=None, gap=0):
        self.scales = self.zero_points = None
        bits, group, zeros = quantized or (16, 0, False)
        if bits == 4:
            packed = Experts(1, rows, columns, group, dtype, zeros, pad=4 * gap)
            self.w, self.scales, self.dense = (
                packed.w[0],
                packed.scales[0],
                packed.dense[0],
            )
            self.zero_points = packed.zero_points[0] if zeros else None
            return
        gap *= 128 // bits
        if bits == 16:
            w = torch.randn(rows, columns) * columns**-0.5
            self.w = torch.full((rows, columns + gap), float("nan"), dtype=dtype)
            self.w = self.w[:, :columns].copy_(w)
            self.dense = self.w.double()
            return
        self.w = torch.randint(0, 256, (rows, columns + gap), dtype=torch.uint8)
        self.w = self.w[:, :columns]
        scales = (0.5 + torch.rand(rows, columns // group)) / (80 * columns**0.5)
        self.scales = scales.to(dtype)
        wide = self.scales.double().repeat_interleave(group, 1)
        self.dense = (self.w.double() - 128) * wide

    def to(self, device):
        """Tensors for the op, with the same strides."""
        return tuple(
            None if t is None else strided_copy(t, device)
            for t in (self.w, self.scales, self.zero_points)
        )


class Layer:
    """A layer with a shared expert, its input, and the results in float64.

    ``gap``: elements between rows, in addition to what alignment needs; ``quantized``:
    as `Matrix` takes it, for gate_up and for down.
    """

    GROUP = 32

    def __init__(
        self, tokens, hidden, inter, shared, dtype, gated, gap, device, quantized=None
    ):
        torch.manual_seed(tokens * 1000 + shared)
        self.dtype, self.device, self.gap, self.shared = dtype, device, gap, shared
        experts, top_k = 4, 3
        self.w13 = Experts(experts, 2 * inter, hidden, self.GROUP, dtype)
        self.w2 = Experts(experts, hidden, inter, self.GROUP, dtype)
        self.x = odd_rows(torch.randn(tokens, hidden).to(dtype), gap).to(device)
        # One of the global experts is on another rank.
        self.expert_map = torch.tensor([2, 0, -1, 3, 1], dtype=torch.int32)
        self.ids = torch.randint(0, 5, (tokens, top_k))
        self.weights = torch.rand(tokens, top_k)
        formats = quantized or (None, None)
        gate_up = Matrix(2 * shared, hidden, dtype, formats[0], gap)
        down = Matrix(hidden, shared, dtype, formats[1], gap)
        self.gate_up, self.down = gate_up.to(device), down.to(device)
        self.down_dense = down.dense
        self.gate = None
        if gated:
            self.gate = Matrix(1, hidden, dtype).to(device)[0][0]

        x = self.x.double().cpu()
        local = local_experts(self.ids, self.expert_map, experts)
        y = products(self.w13.dense, local.flatten(), x.repeat_interleave(top_k, 0))
        y = SILU(y).to(dtype)
        y = products(self.w2.dense, local.flatten(), y).view(*local.shape, hidden)
        y = y * self.weights.double()[..., None]
        self.routed = y.masked_fill((local == -1)[..., None], 0).sum(1)
        self.middle = SILU(x @ gate_up.dense.T)
        self.factors = torch.ones(tokens, dtype=torch.float64)
        if gated:
            self.factors = torch.sigmoid(x @ self.gate.double().cpu())

    def run(self):
        """Outputs: routed, middle, factors, shared."""
        tokens, hidden = self.x.shape
        new = dict(dtype=self.dtype, device=self.device)
        pairs = torch.full((self.ids.numel(), self.w2.dense.shape[2]), 0.0, **new)
        middle = Output(tokens, self.shared, gap=self.gap, **new)
        routed = Output(tokens, hidden, gap=self.gap, **new)
        shared = Output(tokens, hidden, gap=self.gap, **new)
        factors = None
        if self.gate is not None:
            factors = torch.full((tokens,), float("nan"), device=self.device)
        ids, expert_map = self.ids.to(self.device), self.expert_map.to(self.device)
        w13, w2 = self.w13.args(self.device), self.w2.args(self.device)
        ops.fused_moe_wvSplitK_int4_gate_up(
            *(self.x, *w13[:2], pairs, ids, "silu", 40, self.GROUP),
            expert_map=expert_map,
            shared=SharedGateUp(
                *(self.gate_up[0], self.gate, middle.view, factors), *self.gate_up[1:]
            ),
        )
        ops.fused_moe_wvSplitK_int4_down(
            *(pairs, *w2[:2], routed.view, ids, self.weights.to(self.device)),
            *(40, self.GROUP),
            expert_map=expert_map,
            shared=SharedDown(
                *(middle.view, self.down[0], factors, shared.view), *self.down[1:]
            ),
        )
        return routed, middle, factors, shared

    def check(self, where):
        routed, middle, factors, shared = self.run()
        check(routed, self.routed, f"routed, {where}")
        check(middle, self.middle, f"gate_up, {where}")
        if factors is not None:
            torch.testing.assert_close(
                *(factors.double().cpu(), self.factors), rtol=1e-4, atol=1e-6
            )
        expected = middle.view.double().cpu() @ self.down_dense.T
        check(shared, self.factors[:, None] * expected, f"down, {where}")


SIZES = [(8, 0), (136, 1), (520, 0)]  # of the shared expert, and gaps
GRID = list(itertools.product(SIZES, (1, 2, 5, 9), DTYPES, (True, False)))
SAMPLE = [
    ((8, 0), 5, torch.float16, True),
    ((136, 1), 1, torch.bfloat16, True),
    ((136, 1), 9, torch.float16, False),
    ((520, 0), 2, torch.bfloat16, False),
]


@pytest.mark.parametrize(
    ("size", "tokens", "dtype", "gated"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.nightly)
        for case in GRID
    ],
)
def test_shared_expert(size, tokens, dtype, gated, device, every_isa, threads):
    threads(2)
    shared, gap = size
    layer = Layer(tokens, 288, 64, shared, dtype, gated, gap, device)
    for isa in every_isa():
        layer.check(isa or device)


INT4 = [(4, group, zeros) for group in (32, 64, 128) for zeros in (False, True)]
INT8 = [(8, group, False) for group in (32, 64, 128)]
QUANTIZED = list(
    itertools.product([None, *INT4, *INT8], [*INT4, *INT8], (1, 2, 5), DTYPES)
)
QUANTIZED_SAMPLE = [
    ((4, 128, False), (4, 64, True), 1, torch.bfloat16),
    ((4, 32, True), (4, 128, False), 5, torch.float16),
    ((8, 32, False), (4, 32, False), 2, torch.float16),
    (None, (8, 64, False), 5, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("gate_up", "down", "tokens", "dtype"),
    [
        pytest.param(
            *case, marks=() if case in QUANTIZED_SAMPLE else pytest.mark.nightly
        )
        for case in QUANTIZED
    ],
)
def test_quantized(gate_up, down, tokens, dtype, device, every_isa, threads):
    """Other groups than the routed experts', another format in gate_up than in down.

    The sizes are no multiples of what a wave reads.
    """
    threads(2)
    layer = Layer(
        tokens, 384, 64, 128, dtype, tokens != 2, tokens % 2, device, (gate_up, down)
    )
    for isa in every_isa():
        layer.check(isa or device)


def test_odd_size_of_a_quantized_shared_expert(device, every_isa):
    """The size need not be a multiple of a tile, only of down's group."""
    formats = (4, 64, True), (4, 32, False)
    layer = Layer(3, 320, 64, 36 * 8, torch.bfloat16, True, 0, device, formats)
    for isa in every_isa():
        layer.check(isa or device)


@pytest.mark.parametrize("quantized", [None, ((4, 128, True), (8, 32, False))])
def test_bits_repeat(quantized, device, threads):
    layer = Layer(3, 2048, 64, 512, torch.bfloat16, True, 0, device, quantized)
    results = []
    for count in (1, 2, 2):
        threads(count)
        routed, middle, factors, shared = layer.run()
        results.append((routed.view, middle.view, factors, shared.view))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_no_tokens(device):
    Layer(0, 64, 32, 16, torch.bfloat16, True, 0, device).run()


GATE_UP, DOWN = SharedGateUp, SharedDown
WORDS, BYTES = torch.int32, torch.uint8


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (GATE_UP, dict(w=(30, 64)), "shared_c: expected shape"),
        (GATE_UP, dict(w=(33, 64)), "shared_w: expected an even number of rows"),
        (GATE_UP, dict(w=(32, 56)), "shared_w: expected shape .*K = 64"),
        (GATE_UP, dict(w=None), "shared_c: expected None as shared_w, got a tensor"),
        (GATE_UP, dict(c=None), "shared_c: expected a tensor as shared_w, got None"),
        (GATE_UP, dict(gate=(56,)), "shared_gate: expected shape .*K = 64"),
        (GATE_UP, dict(gate=None), "shared_factors: expected None as shared_gate"),
        (GATE_UP, dict(factors=(3,)), r"shared_factors: expected shape \[M = 2\]"),
        (GATE_UP, dict(scales=(32, 2)), "shared_scales: expected None with 16-bit"),
        (GATE_UP, dict(w=(32, 8, WORDS)), "shared_scales: expected a tensor"),
        (GATE_UP, dict(w=(32, 8, WORDS), scales=(32, 3)), "of K = 64, got 3 groups"),
        (GATE_UP, dict(w=(32, 64, WORDS), scales=(32, 2)), r"K//8 = 8\], got \[32, 64"),
        (GATE_UP, dict(w=(32, 8, BYTES), scales=(32, 2)), r"K = 64\], got \[32, 8\]"),
        (
            GATE_UP,
            dict(w=(32, 8, WORDS), scales=(32, 2), zero_points=(4, 1)),
            r"shared_zero_points: expected shape \[N//8 = 4, K//G = 2\], got \[4, 1\]",
        ),
        (DOWN, dict(a=None), "shared_a: expected a tensor as shared_w, got None"),
        (DOWN, dict(a=(3, 16)), "shared_a: expected shape .*M = 2"),
        (DOWN, dict(a=(2, 12), w=(64, 12)), "shared_w: expected K a multiple of 8"),
        (DOWN, dict(w=(56, 16)), "shared_w: expected shape .*N = 64"),
        (DOWN, dict(factors=(1,)), r"shared_factors: expected shape \[M = 2\]"),
        (DOWN, dict(c=(2, 56)), "shared_c: expected shape .*N = 64"),
        (
            DOWN,
            dict(a=(2, 32), w=(64, 32, BYTES), scales=(64, 1), zero_points=(8, 1)),
            "shared_zero_points: expected None unless shared_w is Int",
        ),
        (
            DOWN,
            dict(a=None, w=None, c=None, factors=None, scales=(64, 1)),
            "shared_w: expected a tensor as shared_scales, got None",
        ),
    ],
)
def test_what_does_not_fit_is_rejected(part, changes, message, device):
    good = {
        GATE_UP: dict(w=(32, 64), gate=(64,), c=(2, 16), factors=(2,)),
        DOWN: dict(a=(2, 16), w=(64, 16), factors=(2,), c=(2, 64)),
    }[part]
    of_name = {"factors": torch.float32, "zero_points": torch.int32}
    tensors = {}
    for name, shape in (good | changes).items():
        tensors[name] = None
        if shape is not None:
            dtype = of_name.get(name, torch.bfloat16)
            if isinstance(shape[-1], torch.dtype):
                shape, dtype = shape[:-1], shape[-1]
            tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match=message):
        run_one(part(**tensors), device)


def run_one(shared, device):
    """Run the op that takes `shared` on a small layer with 2 tokens."""
    layer = Layer(2, 64, 32, 16, torch.bfloat16, True, 0, device)
    ids = layer.ids.to(device)
    pairs = torch.zeros(6, 32, dtype=torch.bfloat16, device=device)
    w13, w2 = layer.w13.args(device)[:2], layer.w2.args(device)[:2]
    if isinstance(shared, GATE_UP):
        ops.fused_moe_wvSplitK_int4_gate_up(
            *(layer.x, *w13, pairs, ids, "silu", 40, 32), shared=shared
        )
    else:
        ops.fused_moe_wvSplitK_int4_down(
            *(pairs, *w2, layer.x.clone(), ids, None, 40, 32), shared=shared
        )


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.bfloat16, 8), (WORDS, 4), (BYTES, 16)]
)
def test_unaligned_weights_are_rejected(dtype, multiple, device):
    columns = 8 if dtype is WORDS else 64
    scales = None
    if dtype is not torch.bfloat16:
        scales = torch.zeros(32, 2, dtype=torch.bfloat16, device=device)
    c = torch.zeros(2, 16, dtype=torch.bfloat16, device=device)
    flat = torch.zeros(32 * columns + 1, dtype=dtype, device=device)
    shared = SharedGateUp(flat[1:].view(32, columns), None, c, None, scales)
    with pytest.raises(RuntimeError, match="shared_w: expected data aligned to 16"):
        run_one(shared, device)
    w = torch.zeros(32, columns + multiple // 2, dtype=dtype, device=device)
    shared = shared._replace(w=w[:, :columns])
    message = f"shared_w: expected row stride a multiple of {multiple} and"
    with pytest.raises(RuntimeError, match=message):
        run_one(shared, device)
