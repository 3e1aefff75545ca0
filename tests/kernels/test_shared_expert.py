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
)
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_shared_expert import (
    SharedDown,
    SharedGateUp,
)

DTYPES = (torch.float16, torch.bfloat16)
SILU = activation("silu", 1.0, 0.0, None)


class Layer:
    """A layer with a shared expert, its input, and the results in float64.

    ``gap``: elements between rows, in addition to what alignment needs.
    """

    GROUP = 32

    def __init__(self, tokens, hidden, inter, shared, dtype, gated, gap, device):
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
        self.gate_up = self.matrix(2 * shared, hidden)
        self.down = self.matrix(hidden, shared)
        self.gate = self.matrix(1, hidden)[0] if gated else None

        x = self.x.double().cpu()
        local = local_experts(self.ids, self.expert_map, experts)
        y = products(self.w13.dense, local.flatten(), x.repeat_interleave(top_k, 0))
        y = SILU(y).to(dtype)
        y = products(self.w2.dense, local.flatten(), y).view(*local.shape, hidden)
        y = y * self.weights.double()[..., None]
        self.routed = y.masked_fill((local == -1)[..., None], 0).sum(1)
        self.middle = SILU(x @ self.gate_up.double().cpu().T)
        self.factors = torch.ones(tokens, dtype=torch.float64)
        if gated:
            self.factors = torch.sigmoid(x @ self.gate.double().cpu())

    def matrix(self, rows, columns):
        """Random weights with rows that start at multiples of 16 bytes."""
        w = torch.full((rows, columns + 8 * self.gap), float("nan"), dtype=self.dtype)
        w = w[:, :columns].copy_(torch.randn(rows, columns) * columns**-0.5)
        return w.to(self.device) if self.gap == 0 else w_on(w, self.device)

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
            shared=SharedGateUp(self.gate_up, self.gate, middle.view, factors),
        )
        ops.fused_moe_wvSplitK_int4_down(
            *(pairs, *w2[:2], routed.view, ids, self.weights.to(self.device)),
            *(40, self.GROUP),
            expert_map=expert_map,
            shared=SharedDown(middle.view, self.down, factors, shared.view),
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
        expected = middle.view.double().cpu() @ self.down.double().cpu().T
        check(shared, self.factors[:, None] * expected, f"down, {where}")


def w_on(w, device):
    """A copy on `device` with the same strides."""
    flat = torch.as_strided(w, (w.untyped_storage().nbytes() // 2,), (1,), 0)
    return flat.to(device).as_strided(w.shape, w.stride())


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


def test_bits_repeat(device, threads):
    layer = Layer(3, 2048, 64, 512, torch.bfloat16, True, 0, device)
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
        (DOWN, dict(a=None), "shared_a: expected a tensor as shared_w, got None"),
        (DOWN, dict(a=(3, 16)), "shared_a: expected shape .*M = 2"),
        (DOWN, dict(a=(2, 12), w=(64, 12)), "shared_w: expected K a multiple of 8"),
        (DOWN, dict(w=(56, 16)), "shared_w: expected shape .*N = 64"),
        (DOWN, dict(factors=(1,)), r"shared_factors: expected shape \[M = 2\]"),
        (DOWN, dict(c=(2, 56)), "shared_c: expected shape .*N = 64"),
    ],
)
def test_what_does_not_fit_is_rejected(part, changes, message, device):
    good = {
        GATE_UP: dict(w=(32, 64), gate=(64,), c=(2, 16), factors=(2,)),
        DOWN: dict(a=(2, 16), w=(64, 16), factors=(2,), c=(2, 64)),
    }[part]
    tensors = {
        name: None
        if shape is None
        else torch.zeros(
            shape,
            dtype=torch.float32 if name == "factors" else torch.bfloat16,
            device=device,
        )
        for name, shape in (good | changes).items()
    }
    layer = Layer(2, 64, 32, 16, torch.bfloat16, True, 0, device)
    ids = layer.ids.to(device)
    pairs = torch.zeros(6, 32, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match=message):
        if part is GATE_UP:
            ops.fused_moe_wvSplitK_int4_gate_up(
                *(layer.x, *layer.w13.args(device)[:2], pairs, ids, "silu", 40, 32),
                shared=GATE_UP(**tensors),
            )
        else:
            ops.fused_moe_wvSplitK_int4_down(
                *(
                    pairs,
                    *layer.w2.args(device)[:2],
                    layer.x.clone(),
                    ids,
                    None,
                    40,
                    32,
                ),
                shared=DOWN(**tensors),
            )


def test_unaligned_weights_are_rejected(device):
    layer = Layer(2, 64, 32, 16, torch.bfloat16, False, 0, device)
    layer.gate_up = torch.zeros(32 * 64 + 1, dtype=torch.bfloat16, device=device)
    layer.gate_up = layer.gate_up[1:].view(32, 64)
    with pytest.raises(RuntimeError, match="shared_w: expected data aligned to 16"):
        layer.run()
    layer.gate_up = torch.zeros(32, 68, dtype=torch.bfloat16, device=device)[:, :64]
    with pytest.raises(RuntimeError, match="shared_w: expected row stride a multiple"):
        layer.run()
