# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The int4 MoE ops against float64, on every available device and instruction set.

Themes: a randomized sweep per op, values at the limits of the formats, bitwise
repeatability, arguments that must be rejected, schema and tracing.
"""

import dataclasses
import random

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # relative, Frobenius norm
SENTINEL = 1234.0
NOT_HERE = -1
# For tests with tensors on the CPU. A library that cannot be loaded fails them.
needs_cpu_ops = pytest.mark.skipif(
    ops.load_error() is None and "cpu" not in ops.build_info(),
    reason="the op library has no CPU kernels",
)


# ------------------------------------------------------------------ reference
def to_int32(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def pack_weights(q: torch.Tensor) -> torch.Tensor:
    """0..15 [E, N, K] to words [E, N, K//8]: v0|v2<<4|v4<<8|v6<<12|v1<<16|..."""
    v = q.unflatten(2, (-1, 8)).to(torch.int64)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return to_int32(sum(v[..., i] << (4 * p) for p, i in enumerate(order)))


def pack_zeros(z: torch.Tensor) -> torch.Tensor:
    """0..15 [E, N, K//G] to words [E, N//8, K//G]: row n at bits 4*(n%8)."""
    v = z.unflatten(1, (-1, 8)).to(torch.int64)
    return to_int32(sum(v[:, :, i] << (4 * i) for i in range(8)))


class Experts:
    """Random packed weights and their values in float64."""

    def __init__(self, e, n, k, group, dtype, zeros=False, pad=0, gain=1.0):
        q = torch.randint(0, 16, (e, n, k))
        z = torch.randint(0, 16, (e, n, k // group)) if zeros else None
        sign = torch.randint(0, 2, (e, n, k // group)) * 2 - 1
        s = (0.5 + torch.rand(e, n, k // group)) * sign * gain / (5 * k**0.5)
        s = s.to(dtype)
        centre = 8 if z is None else z.repeat_interleave(group, 2)
        self.dense = (q - centre).double() * s.double().repeat_interleave(group, 2)
        # Padding and gaps hold garbage that must not reach a result.
        self.w = torch.full((e, n, k // 8 + pad), 0x7F0FF0F7, dtype=torch.int32)
        self.w = self.w[:, :, : k // 8].copy_(pack_weights(q))
        self.scales = torch.full((e, n, k // group + pad), float("nan"), dtype=dtype)
        self.scales = self.scales[:, :, : k // group].copy_(s)
        self.zero_points = None if z is None else pack_zeros(z)

    def args(self, device):
        zeros = self.zero_points
        # .to() keeps the strides of dense tensors only
        return (
            strided_copy(self.w, device),
            strided_copy(self.scales, device),
            None if zeros is None else zeros.to(device),
        )


def strided_copy(t: torch.Tensor, device: str) -> torch.Tensor:
    base = torch.as_strided(
        t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0
    )
    return base.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def activation(name, alpha, beta, limit):
    def apply(y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if name in ("silu", "swigluoai"):
            act = gate * torch.sigmoid(alpha * gate)
        else:
            approximate = "tanh" if name == "gelu_tanh" else "none"
            act = torch.nn.functional.gelu(gate, approximate=approximate)
        return act * (up + beta)

    return apply


def local_experts(ids: torch.Tensor, expert_map: torch.Tensor | None, e: int):
    local = ids.long() if expert_map is None else expert_map.long()[ids.long()]
    return torch.where((local >= 0) & (local < e), local, NOT_HERE)


def products(dense: torch.Tensor, local: torch.Tensor, rows: torch.Tensor):
    """``dense[local[i]] @ rows[i]`` for every row in float64; NaN if not local."""
    y = torch.full((len(rows), dense.shape[1]), float("nan"), dtype=torch.float64)
    for expert in local.unique().tolist():
        if expert != NOT_HERE:
            picked = local == expert
            y[picked] = rows[picked].double() @ dense[expert].T
    return y


# -------------------------------------------------------------------- buffers
def odd_rows(t: torch.Tensor, gap: int, fill: float = float("nan")) -> torch.Tensor:
    """A copy that starts `gap` elements late and has `gap` extra between its rows."""
    rows, cols = t.shape
    flat = torch.full((gap + rows * (cols + gap),), fill, dtype=t.dtype)
    return flat[gap:].view(rows, cols + gap)[:, :cols].copy_(t)


class Output:
    """A poisoned output between sentinels, `gap` elements between its rows."""

    GUARD = 67

    def __init__(self, rows, cols, dtype, device, gap, guard=GUARD):
        self.guard = guard
        self.flat = torch.full(
            (2 * guard + rows * (cols + gap),),
            SENTINEL,
            dtype=dtype,
            device=device,
        )
        self.shape, self.stride = (rows, cols), (cols + gap, 1)
        self.view = self.flat.as_strided(self.shape, self.stride, guard)
        self.view.fill_(float("nan"))

    def check_surroundings(self):
        rest = self.flat.clone()
        rest.as_strided(self.shape, self.stride, self.guard).fill_(SENTINEL)
        assert (rest == SENTINEL).all(), "wrote outside of the output"


def check(c: Output, expected: torch.Tensor, context: str):
    """Check `c`; `expected` is NaN where nothing may be written."""
    c.check_surroundings()
    got, skipped = c.view.cpu().double(), expected.isnan()
    assert got[skipped].isnan().all(), f"{context}: wrote to skipped rows"
    assert not got[~skipped].isnan().any(), f"{context}: elements left unwritten"
    error = (got - expected)[~skipped].norm()
    bound = TOLERANCE[c.view.dtype] * expected[~skipped].norm()
    assert error <= bound, f"{context}: error {error:.3g}, allowed {bound:.3g}"


# ---------------------------------------------------------------------- sweep
ACTIVATIONS = {
    "silu": ("silu", 1.0, 0.0, None),
    "silu-limit": ("silu", 1.0, 0.0, 0.7),
    "gelu": ("gelu", 1.0, 0.0, None),
    "gelu_tanh": ("gelu_tanh", 1.0, 0.0, None),
    "swigluoai": ("swigluoai", 1.702, 1.0, 1.5),
}


@dataclasses.dataclass(frozen=True)
class Case:
    seed: int
    dtype: torch.dtype
    group: int
    k: int
    n: int
    experts: int
    tokens: int
    top_k: int
    zeros: bool
    mapped: bool
    ids: torch.dtype
    pad: int  # extra words, scales between weight rows
    gap: int  # extra elements between rows of activations
    block: int  # rows per block (gemm)
    gain: float  # size of the values before the activation
    activation: str
    threads: int

    def __str__(self):
        values = dataclasses.asdict(self).items()
        return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in values)


def cases(op: str, count: int) -> list[Case]:
    rng = random.Random(op)
    result = []
    for seed in range(count):
        group = rng.choice([32, 64, 128])
        # Every seventh case is long enough for several blocks of k.
        k = group * (rng.randint(1, 6) if seed % 7 else 1152 // group + 2)
        result.append(
            Case(
                seed=seed,
                dtype=rng.choice([torch.float16, torch.bfloat16]),
                group=group,
                k=k,
                n=8 * rng.randint(1, 14),
                experts=rng.randint(1, 6),
                tokens=rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 17, 64]),
                top_k=rng.randint(1, 8),
                zeros=rng.random() < 0.5,
                mapped=rng.random() < 0.4,
                ids=rng.choice([torch.int32, torch.int64]),
                pad=rng.choice([0, 4, 32]),
                gap=rng.choice([0, 1, 5]),
                block=rng.randint(1, 5),
                gain=rng.choice([1.0, 1.0, 20.0]),
                activation=rng.choice(list(ACTIVATIONS)),
                threads=rng.randint(1, 2),
            )
        )
    return result


def experts_of(case: Case, n: int) -> Experts:
    torch.manual_seed(case.seed)
    return Experts(
        *(case.experts, n, case.k, case.group, case.dtype),
        zeros=case.zeros,
        pad=case.pad,
        gain=case.gain,
    )


def routing_of(case: Case):
    """Return topk_ids (with gaps between rows), expert map or None, local experts."""
    shape, e = (case.tokens, case.top_k), case.experts
    if case.mapped:
        local = torch.cat([torch.arange(e), torch.full((3,), NOT_HERE)])
        expert_map = local[torch.randperm(e + 3)].to(torch.int32)
        ids = torch.randint(0, e + 3, shape)
    else:
        expert_map = None
        ids = torch.randint(0, e, shape)
        outside = torch.tensor([NOT_HERE, e, 2**31 - 1])[torch.randint(0, 3, shape)]
        ids = torch.where(torch.rand(shape) < 0.15, outside, ids)
    spaced = torch.full((case.tokens, case.top_k + case.gap), 0, dtype=case.ids)
    ids = spaced[:, : case.top_k].copy_(ids)
    return ids, expert_map, local_experts(ids, expert_map, e)


def run_everywhere(case, device, every_isa, threads, call, expected):
    threads(case.threads)
    rows, cols = expected.shape
    for isa in every_isa():
        c = Output(rows, cols, case.dtype, device, case.gap)
        call(c.view)
        check(c, expected, isa or device)


@pytest.mark.parametrize("case", cases("gate_up", 110), ids=str)
def test_gate_up(case, device, every_isa, threads):
    experts = experts_of(case, 2 * case.n)
    a = odd_rows(torch.randn(case.tokens, case.k).to(case.dtype), case.gap)
    ids, expert_map, local = routing_of(case)
    name, alpha, beta, limit = ACTIVATIONS[case.activation]
    pairs = a.repeat_interleave(case.top_k, 0)
    y = products(experts.dense, local.flatten(), pairs)
    y = activation(name, alpha, beta, limit)(y)
    w, scales, zero_points = experts.args(device)
    a, ids = strided_copy(a, device), strided_copy(ids, device)
    expert_map = None if expert_map is None else expert_map.to(device)

    def call(c):
        ops.fused_moe_wvSplitK_int4_gate_up(
            *(a, w, scales, c, ids, name, 40, case.group, zero_points, expert_map),
            *(alpha, beta, limit),
        )

    run_everywhere(case, device, every_isa, threads, call, y)


@pytest.mark.parametrize("case", cases("down", 110), ids=str)
def test_down(case, device, every_isa, threads):
    experts = experts_of(case, case.n)
    ids, expert_map, local = routing_of(case)
    rows = case.tokens * case.top_k
    a = torch.randn(rows, case.k).to(case.dtype)
    a[local.flatten() == NOT_HERE] = float("nan")  # rows that gate_up did not write
    a = odd_rows(a, case.gap)
    weights = None
    if case.seed % 4:
        weights = odd_rows(torch.rand(case.tokens, case.top_k), case.gap)
    y = products(experts.dense, local.flatten(), a).view(*local.shape, case.n)
    if weights is not None:
        y = y * weights.double()[..., None]
    y = y.masked_fill((local == NOT_HERE)[..., None], 0).sum(1)
    w, scales, zero_points = experts.args(device)
    a, ids = strided_copy(a, device), strided_copy(ids, device)
    weights = None if weights is None else strided_copy(weights, device)
    expert_map = None if expert_map is None else expert_map.to(device)

    def call(c):
        ops.fused_moe_wvSplitK_int4_down(
            *(a, w, scales, c, ids, weights, 40, case.group, zero_points, expert_map),
        )

    run_everywhere(case, device, every_isa, threads, call, y)


def blocks_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random blocks over the row ids: in random order, some skipped, padded."""
    rows = case.tokens * case.top_k
    order = torch.randperm(rows)
    expert_ids, sorted_ids = [], []
    while len(order):
        count = int(torch.randint(1, case.block + 1, ()))
        padding = torch.full((case.block,), rows)
        padding[: len(order[:count])] = order[:count]
        sorted_ids.append(padding[torch.randperm(case.block)])
        expert_ids.append(int(torch.randint(NOT_HERE, case.experts, ())))
        order = order[count:]
    unused = torch.zeros(3, dtype=torch.int64)  # entries past the last block
    return (
        torch.tensor(expert_ids, dtype=torch.int32),
        torch.cat([*sorted_ids, unused]).to(torch.int32),
    )


@pytest.mark.parametrize("case", cases("gemm", 110), ids=str)
def test_gemm(case, device, every_isa, threads):
    experts = experts_of(case, case.n)
    a = odd_rows(torch.randn(case.tokens, case.k).to(case.dtype), case.gap)
    rows = case.tokens * case.top_k
    if case.seed % 3:
        expert_ids, sorted_ids = blocks_of(case)
    else:
        blocks = (rows + case.block - 1) // case.block
        expert_ids = torch.randint(NOT_HERE, case.experts, (blocks,), dtype=torch.int32)
        sorted_ids = None
    local = torch.full((rows,), NOT_HERE)
    for b, expert in enumerate(expert_ids.tolist()):
        for slot in range(b * case.block, (b + 1) * case.block):
            row = slot if sorted_ids is None else int(sorted_ids[slot])
            if row < rows:
                local[row] = expert
    expected = products(experts.dense, local, a.repeat_interleave(case.top_k, 0))
    w, scales, zero_points = experts.args(device)
    a, expert_ids = strided_copy(a, device), expert_ids.to(device)
    sorted_ids = None if sorted_ids is None else sorted_ids.to(device)

    def call(c):
        ops.fused_moe_wvSplitK_int4_gemm(
            *(a, w, scales, c, expert_ids, case.block, 40, case.group),
            *(zero_points, sorted_ids, case.top_k),
        )

    run_everywhere(case, device, every_isa, threads, call, expected)


def test_weight_rows_that_are_no_multiple_of_anything(device, every_isa):
    torch.manual_seed(0)
    experts = Experts(2, 2 * 37, 96, 32, torch.bfloat16)
    w, scales, _ = experts.args(device)
    for tokens in (1, 3, 9):
        a = torch.randn(tokens, 96).to(torch.bfloat16)
        ids = torch.randint(0, 2, (tokens, 1))
        y = torch.einsum("mtnk,mk->mtn", experts.dense[ids], a.double())
        expected = activation("silu", 1.0, 0.0, None)(y)[:, 0]
        for isa in every_isa():
            c = Output(tokens, 37, torch.bfloat16, device, 0)
            ops.fused_moe_wvSplitK_int4_gate_up(
                *(a.to(device), w, scales, c.view, ids.to(device), "silu", 40, 32)
            )
            check(c, expected, isa or device)


# --------------------------------------------------------------- large shapes
class PickedExperts:
    """A stack of experts in which only the picked ones contain data.

    The memory of the others is reserved but never touched.
    """

    def __init__(self, picked, e, n, k, group, dtype, zeros):
        self.picked, self.group, self.dtype = picked, group, dtype
        self.w = torch.empty(e, n, k // 8, dtype=torch.int32)
        self.scales = torch.empty(e, n, k // group, dtype=dtype)
        self.zero_points = None
        if zeros:
            self.zero_points = torch.empty(e, n // 8, k // group, dtype=torch.int32)
        for expert in picked:
            self.w[expert].random_(-(2**31), 2**31)
            scales = (0.5 + torch.rand(n, k // group)) / (5 * k**0.5)
            self.scales[expert] = scales.to(dtype)
            if zeros:
                self.zero_points[expert].random_(-(2**31), 2**31)

    def args(self, device):
        zeros = self.zero_points
        return (
            self.w.to(device),
            self.scales.to(device),
            None if zeros is None else zeros.to(device),
        )

    def products(self, local: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Like the function of that name, but in float32 and 1024 dequantized weight
        rows at a time. The error of float32 is a thousandth of the tolerance."""
        n, k = self.w.shape[1], rows.shape[1]
        shift = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)
        y = torch.empty(len(rows), n)
        for expert in self.picked:
            mine = local == expert
            for begin in range(0, n, 1024):
                part = slice(begin, min(begin + 1024, n))
                q = (self.w[expert, part, :, None] >> shift) & 15
                centre = torch.tensor(8)
                if self.zero_points is not None:
                    index = torch.arange(part.start, part.stop, dtype=torch.int32)
                    words = self.zero_points[expert, index // 8]
                    centre = (words >> (4 * (index % 8))[:, None] & 15)[..., None]
                w = q.view(len(q), -1, self.group) - centre
                w = w.float() * self.scales[expert, part].float()[..., None]
                y[mine, part] = rows[mine].float() @ w.view(-1, k).T
        return y.double()


@pytest.mark.parametrize(
    ("experts", "hidden", "inter", "group", "dtype", "zeros"),
    [
        pytest.param(*(8, 4096, 14336, 128, torch.bfloat16, False), id="mixtral-8x7b"),
        pytest.param(*(128, 4096, 1408, 128, torch.float16, True), id="glm-4.5-air"),
        pytest.param(*(256, 3072, 1536, 64, torch.bfloat16, False), id="minimax-m2"),
        pytest.param(*(512, 2048, 512, 32, torch.bfloat16, True), id="qwen3-next"),
    ],
)
def test_large_shapes(device, experts, hidden, inter, group, dtype, zeros):
    torch.manual_seed(0)
    picked = [experts - 1, 3]  # the last one has the largest offsets
    local = torch.tensor(
        [[picked[0], picked[1]], [picked[1], experts], [picked[0], -1]]
    )
    ids, flat = local.to(device), local.flatten()
    x = torch.randn(3, hidden).to(dtype)
    weights = torch.rand(3, 2)
    w13 = PickedExperts(picked, experts, 2 * inter, hidden, group, dtype, zeros)
    h = Output(6, inter, dtype, device, 0)
    w, scales, zero_points = w13.args(device)
    ops.fused_moe_wvSplitK_int4_gate_up(
        *(x.to(device), w, scales, h.view, ids, "silu", 40, group, zero_points)
    )
    y = w13.products(flat, x.repeat_interleave(2, 0))
    y = activation("silu", 1.0, 0.0, None)(y)
    outside = (flat < 0) | (flat >= experts)
    y[outside] = float("nan")
    check(h, y, "gate_up")

    w2 = PickedExperts(picked, experts, hidden, inter, group, dtype, zeros)
    c = Output(3, hidden, dtype, device, 0)
    w, scales, zero_points = w2.args(device)
    ops.fused_moe_wvSplitK_int4_down(
        *(h.view, w, scales, c.view, ids, weights.to(device), 40, group, zero_points)
    )
    y = w2.products(flat, h.view.cpu())
    y[outside] = 0
    y = y.view(3, 2, hidden) * weights.double()[..., None]
    check(c, y.sum(1), "down")


# -------------------------------------------------------------------- numbers
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("dtype", "size", "gain"),
    [
        (torch.float16, 6e4, 0.1),  # near the largest
        (torch.float16, 2e-7, 1e4),  # subnormal
        (torch.bfloat16, 1e30, 1.0),
        (torch.bfloat16, 1e-30, 1.0),
    ],
    ids=str,
)
def test_activations_at_the_ends_of_their_format(
    device, every_isa, dtype, size, gain, rows
):
    torch.manual_seed(0)
    experts = Experts(1, 32, 256, 64, dtype, zeros=True, gain=gain)
    a = ((torch.rand(rows, 256) - 0.5) * 2 * size).to(dtype)
    expected = a.double() @ experts.dense[0].T
    w, scales, zero_points = experts.args(device)
    ids = torch.zeros(rows, 1, dtype=torch.int32, device=device)
    for isa in every_isa():
        c = Output(rows, 32, dtype, device, 0)
        ops.fused_moe_wvSplitK_int4_down(
            *(a.to(device), w, scales, c.view, ids, None, 40, 64, zero_points)
        )
        check(c, expected, isa or device)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row(device, every_isa, dtype, rows):
    torch.manual_seed(0)
    experts = Experts(1, 32, 128, 128, dtype)
    a = torch.randn(rows, 128).to(dtype)
    a[0, 5] = float("nan")
    w, scales, _ = experts.args(device)
    ids = torch.zeros(rows, 1, dtype=torch.int32, device=device)
    for isa in every_isa():
        c = Output(rows, 32, dtype, device, 0)
        ops.fused_moe_wvSplitK_int4_down(
            *(a.to(device), w, scales, c.view, ids, None, 40, 128)
        )
        assert c.view[0].isnan().all(), isa
        assert c.view[1:].isfinite().all(), isa


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("k,group_size", [(64, 32), (192, 32), (192, 64)])
def test_nan_stays_in_its_call(device, every_isa, k, group_size, rows):
    # Kernels keep memory between calls, and may read past a row's last group.
    torch.manual_seed(0)
    dtype = torch.bfloat16
    before = Experts(1, 64, 2048, 32, dtype)
    experts = Experts(1, 40, k, group_size, dtype)
    ids = torch.zeros(rows, 1, dtype=torch.int32, device=device)
    for isa in every_isa():
        for layer, size, value in ((before, 32, torch.nan), (experts, group_size, 1)):
            w, scales, _ = layer.args(device)
            a = torch.full((rows, 8 * w.shape[2]), value, dtype=dtype, device=device)
            c = Output(rows, w.shape[1], dtype, device, 0)
            ops.fused_moe_wvSplitK_int4_down(
                *(a, w, scales, c.view, ids, None, 40, size)
            )
        assert c.view.isfinite().all(), isa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 33])
def test_same_bits_every_time(device, every_isa, threads, dtype, tokens):
    torch.manual_seed(tokens)
    w13 = Experts(5, 2 * 96, 256, 64, dtype, zeros=True)
    w2 = Experts(5, 256, 96, 32, dtype, zeros=True)
    a = torch.randn(tokens, 256).to(dtype).to(device)
    ids = torch.randint(0, 5, (tokens, 4)).to(device)
    weights = torch.rand(tokens, 4).to(device)
    expert_ids = torch.randint(0, 5, (tokens,), dtype=torch.int32).to(device)
    args13, args2 = w13.args(device), w2.args(device)

    def bits():
        h, c, g = (
            torch.zeros(shape, dtype=dtype, device=device)
            for shape in ((tokens * 4, 96), (tokens, 256), (tokens, 192))
        )
        w, scales, zero_points = args13
        ops.fused_moe_wvSplitK_int4_gate_up(
            a, w, scales, h, ids, "silu", 40, 64, zero_points
        )
        ops.fused_moe_wvSplitK_int4_gemm(
            a, w, scales, g, expert_ids, 1, 40, 64, zero_points
        )
        w, scales, zero_points = args2
        ops.fused_moe_wvSplitK_int4_down(
            h, w, scales, c, ids, weights, 40, 32, zero_points
        )
        return torch.cat([x.flatten() for x in (h, c, g)]).view(torch.int16).cpu()

    for isa in every_isa():
        threads(1)
        first = bits()
        assert first.count_nonzero() > 0
        for count in (1, 2, 2, 3):
            threads(count)
            assert torch.equal(first, bits()), (isa, count)


def test_more_tokens_than_are_worked_on_together(device):
    # With such a large K * top_k the CPU handles 256 tokens at a time
    # (tokens_together).
    torch.manual_seed(5)
    tokens, together, k, top_k = 300, 256, 16384, 8
    w = Experts(2, 64, k, 128, torch.bfloat16, zeros=True)
    packed, scales, zero_points = w.args(device)
    x = odd_rows(torch.randn(tokens, k).bfloat16(), 8).to(device)
    pairs = odd_rows(torch.randn(tokens * top_k, k).bfloat16(), 8).to(device)
    ids = odd_rows(torch.randint(0, 2, (tokens, top_k)), 3, 0).to(device)
    weights = odd_rows(torch.rand(tokens, top_k), 5, 0.0).to(device)

    def run(begin, end):
        h = Output((end - begin) * top_k, 32, torch.bfloat16, device, 3)
        c = Output(end - begin, 64, torch.bfloat16, device, 3)
        ops.fused_moe_wvSplitK_int4_gate_up(
            x[begin:end],
            packed,
            scales,
            h.view,
            ids[begin:end],
            "silu",
            40,
            128,
            zero_points,
        )
        ops.fused_moe_wvSplitK_int4_down(
            pairs[begin * top_k : end * top_k],
            packed,
            scales,
            c.view,
            ids[begin:end],
            weights[begin:end],
            40,
            128,
            zero_points,
        )
        h.check_surroundings()
        c.check_surroundings()
        return h.view.cpu(), c.view.cpu()

    whole, first, rest = run(0, tokens), run(0, together), run(together, tokens)
    for all_rows, *pieces in zip(whole, first, rest, strict=True):
        assert all_rows.isfinite().all()
        assert torch.equal(all_rows, torch.cat(pieces))


# ------------------------------------------------------------------ arguments
def good_arguments(op: str, device: str = "cpu") -> dict:
    """Return a valid call: 3 tokens, top 2, 4 experts, K = 128, N = 48, G = 32."""
    k, n, dtype = 128, 48, torch.bfloat16
    args = {
        "a": torch.zeros(6 if op == "down" else 3, k, dtype=dtype),
        "w": torch.zeros(4, n, k // 8, dtype=torch.int32),
        "scales": torch.zeros(4, n, k // 32, dtype=dtype),
        "zero_points": torch.zeros(4, n // 8, k // 32, dtype=torch.int32),
        "cu_count": 40,
        "group_size": 32,
    }
    ids = torch.zeros(3, 2, dtype=torch.int32)
    if op == "gemm":
        args |= {
            "c": torch.zeros(6, n, dtype=dtype),
            "expert_ids": torch.zeros(3, dtype=torch.int32),
            "sorted_token_ids": torch.arange(6, dtype=torch.int32),
            "block_size_m": 2,
            "top_k": 2,
        }
    else:
        args |= {"topk_ids": ids, "expert_map": torch.zeros(9, dtype=torch.int32)}
    if op == "gate_up":
        args |= {"c": torch.zeros(6, n // 2, dtype=dtype), "activation": "silu"}
    if op == "down":
        args |= {"c": torch.zeros(3, n, dtype=dtype)}
        args |= {"topk_weights": torch.zeros(3, 2)}
    return {
        name: v.to(device) if isinstance(v, torch.Tensor) else v
        for name, v in args.items()
    }


def call(op: str, args: dict) -> None:
    getattr(ops, f"fused_moe_wvSplitK_int4_{op}")(**args)


def transposed(t):
    return t.mT.contiguous().mT


def misaligned(t):
    return torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)


def overlapping(t):
    return t.new_zeros(t.numel() + t.size(1)).as_strided(t.shape, (t.size(1) - 1, 1))


ALL = ("gemm", "gate_up", "down")
PAIR = ("gate_up", "down")
# Ops, argument, how it is changed, and the message after "<op>: ".
BAD = [
    (ALL, "a", lambda t: t.float(), "a: expected dtype Half or BFloat16, got Float"),
    (ALL, "a", lambda t: t[0], r"a: expected shape \[.*K\], got \[128\]"),
    (ALL, "a", transposed, "a: expected innermost stride 1, got "),
    (
        ALL,
        "a",
        lambda t: t[:, :96],
        r"w: expected shape .*K//8 = 12\], got \[4, 48, 16",
    ),
    (
        ALL,
        "a",
        lambda t: t[:, :80],
        "a: expected columns a multiple of group_size 32, g",
    ),
    (
        ALL,
        "a",
        lambda t: t[:, :0],
        "a: expected columns a multiple of group_size 32, g",
    ),
    (
        PAIR,
        "a",
        lambda t: t[1:],
        r"a: expected shape \[M.* = [36], K\], got \[[25], 128",
    ),
    (ALL, "w", lambda t: t.long(), "w: expected dtype Int, got Long"),
    (
        ALL,
        "w",
        lambda t: t[0],
        r"w: expected shape \[E, N, K//8 = 16\], got \[48, 16\]",
    ),
    (ALL, "w", transposed, "w: expected innermost stride 1, got 48"),
    (ALL, "w", misaligned, "w: expected data aligned to 16 bytes, got "),
    (
        ALL,
        "w",
        lambda t: t.new_zeros(4, 48, 18)[:, :, :16],
        "w: expected row stride a multiple of 4 words and at least 16, got 18",
    ),
    (
        ALL,
        "w",
        lambda t: t[:, :1].expand(4, 48, 16),
        "w: expected row stride a multiple of 4 words and at least 16, got 0",
    ),
    (
        ALL,
        "w",
        lambda t: t.new_zeros(4 * 770).as_strided((4, 48, 16), (770, 16, 1)),
        "w: expected expert stride a multiple of 4 words, got 770",
    ),
    (ALL, "w", lambda t: t[:0], "w: expected at least 1, got 0"),
    (
        ALL,
        "scales",
        lambda t: t.half(),
        "scales: expected dtype BFloat16 as a, got Half",
    ),
    (
        ALL,
        "scales",
        lambda t: t[..., :2],
        r"scales: expected shape \[E = 4, N = 48, K//G = 4\], got \[4, 48, 2\]",
    ),
    (ALL, "scales", lambda t: t[:, :8], r"scales: expected shape .*, got \[4, 8, 4\]"),
    (ALL, "scales", lambda t: t[:2], r"scales: expected shape .*, got \[2, 48, 4\]"),
    (ALL, "scales", transposed, "scales: expected innermost stride 1, got 48"),
    (
        ALL,
        "zero_points",
        lambda t: t.float(),
        "zero_points: expected dtype Int, got Fl",
    ),
    (
        ALL,
        "zero_points",
        lambda t: t.repeat(1, 8, 1),
        r"zero_points: expected shape \[E = 4, N//8 = 6, K//G = 4\], got \[4, 48, 4\]",
    ),
    (ALL, "zero_points", transposed, "zero_points: expected innermost stride 1, got 6"),
    (ALL, "c", lambda t: t.half(), "c: expected dtype BFloat16 as a, got Half"),
    (ALL, "c", lambda t: t[1:], r"c: expected shape \[M.* = [36], [NI] = \d+\], got"),
    (ALL, "c", lambda t: t[:, 1:], r"c: expected shape .* [NI] = \d+\], got \[[36], "),
    (ALL, "c", transposed, "c: expected innermost stride 1, got "),
    (ALL, "c", overlapping, r"c: expected row stride of at least \d+, got \d+"),
    (ALL, "group_size", lambda _: 16, "group_size: expected 32, 64 or 128, got 16"),
    (ALL, "group_size", lambda _: -1, "group_size: expected 32, 64 or 128, got -1"),
    (ALL, "group_size", lambda _: 64, "scales: expected shape .*K//G = 2"),
    (ALL, "cu_count", lambda _: 0, "cu_count: expected at least 1, got 0"),
    (
        PAIR,
        "topk_ids",
        lambda t: t.short(),
        "topk_ids: expected dtype Int or Long, got S",
    ),
    (
        PAIR,
        "topk_ids",
        lambda t: t[0],
        r"topk_ids: expected shape \[M, top_k\], got \[2",
    ),
    (PAIR, "topk_ids", transposed, "topk_ids: expected innermost stride 1, got 3"),
    (PAIR, "topk_ids", lambda t: t[:, :0], "topk_ids: expected at least 1, got 0"),
    (
        PAIR,
        "expert_map",
        lambda t: t.long(),
        "expert_map: expected dtype Int, got Long",
    ),
    (PAIR, "expert_map", lambda t: t[:0], "expert_map: expected at least 1, got 0"),
    (
        PAIR,
        "expert_map",
        lambda t: t[::2],
        "expert_map: expected innermost stride 1, g",
    ),
    (
        ("down",),
        "topk_weights",
        lambda t: t.bfloat16(),
        "topk_weights: expected dtype Float, got BFloat16",
    ),
    (
        ("down",),
        "topk_weights",
        lambda t: t[:, :1],
        r"topk_weights: expected shape \[M = 3, top_k = 2\], got \[3, 1\]",
    ),
    (
        ("down",),
        "topk_weights",
        transposed,
        "topk_weights: expected innermost stride 1, got 3",
    ),
    (
        ("gate_up",),
        "activation",
        lambda _: "relu2",
        "activation: expected silu, swigluoai, gelu or gelu_tanh, got 'relu2'",
    ),
    (("gate_up",), "limit", lambda _: 0.0, "limit: expected a number above 0, got 0"),
    (("gemm",), "block_size_m", lambda _: 0, "block_size_m: expected 1 to 5, got 0"),
    (("gemm",), "block_size_m", lambda _: 6, "block_size_m: expected 1 to 5, got 6"),
    (("gemm",), "top_k", lambda _: 0, "top_k: expected at least 1, got 0"),
    (
        ("gemm",),
        "top_k",
        lambda _: 3,
        r"c: expected shape \[M\*top_k = 9, N = 48\], got",
    ),
    (
        ("gemm",),
        "expert_ids",
        lambda t: t.long(),
        "expert_ids: expected dtype Int, got Long",
    ),
    (
        ("gemm",),
        "expert_ids",
        lambda t: t.repeat(2)[::2],
        "expert_ids: expected innermost stride 1, got 2",
    ),
    (
        ("gemm",),
        "sorted_token_ids",
        lambda t: t[:5],
        r"sorted_token_ids: expected num_blocks\*block_size_m = 6 entries.* got 5",
    ),
    (
        ("gemm",),
        "sorted_token_ids",
        lambda t: t.long(),
        "sorted_token_ids: expected dtype Int, got Long",
    ),
]


@pytest.mark.parametrize("op", ALL)
def test_the_unchanged_arguments_are_accepted(device, op):
    call(op, good_arguments(op, device))


@pytest.mark.parametrize(
    ("op", "argument", "change", "message"),
    [
        pytest.param(op, argument, change, message, id=f"{op}-{message[:40]}")
        for names, argument, change, message in BAD
        for op in names
    ],
)
def test_bad_argument(device, op, argument, change, message):
    args = good_arguments(op, device)
    args[argument] = change(args.get(argument))
    with pytest.raises(RuntimeError, match=f"^fused_moe_wvSplitK_int4_{op}: {message}"):
        call(op, args)


def test_odd_number_of_gate_and_up_rows(device):
    args = good_arguments("gate_up", device) | {"zero_points": None}
    args["w"], args["scales"] = args["w"][:, :47], args["scales"][:, :47]
    with pytest.raises(
        RuntimeError, match=r"gate_up: w: expected an even N .*, got 47"
    ):
        call("gate_up", args)


def test_zero_points_need_rows_in_eights(device):
    args = good_arguments("down", device)
    args["w"], args["scales"] = args["w"][:, :44], args["scales"][:, :44]
    with pytest.raises(RuntimeError, match="down: w: expected N a multiple of 8 .* 44"):
        call("down", args)


def test_alpha_belongs_to_silu(device):
    args = good_arguments("gate_up", device) | {"activation": "gelu", "alpha": 1.702}
    with pytest.raises(RuntimeError, match="alpha: expected 1.0 with activation gelu"):
        call("gate_up", args)


@pytest.mark.parametrize("op", PAIR)
@pytest.mark.parametrize("size", [0, 1, 9])
def test_launch_plan_that_the_device_cannot_take(device, op, size):
    if device == "cpu":
        message = f"plan: expected None on the CPU, got a list of {size} integers"
    elif size == 1:
        pytest.skip("for the launcher to judge")
    else:
        message = f"plan: expected None or 1 to 8 integers, got {size}"
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        call(op, good_arguments(op, device) | {"plan": [1] * size})


@pytest.mark.parametrize("op", ALL)
def test_all_tensors_on_one_device(device, op):
    if device == "cpu":
        pytest.skip("needs a GPU for a second device")
    good = good_arguments(op, device)
    for name in (n for n, v in good.items() if isinstance(v, torch.Tensor)):
        if name == "a":
            message = "a: expected a tensor on cuda, got cpu"
        else:
            message = f"{name}: expected device cuda:0 as a, got cpu"
        with pytest.raises(RuntimeError, match=f"{op}: {message}"):
            call(op, good | {name: good[name].cpu()})


@pytest.mark.parametrize("op", ALL)
def test_no_tokens(device, op):
    args = good_arguments(op, device)
    for name in ("a", "c", "topk_ids", "topk_weights", "expert_ids"):
        if name in args:
            args[name] = args[name][:0]
    call(op, args)


def test_blocks_without_rows_touch_nothing(device):
    args = good_arguments("gemm", device)
    args["c"].fill_(SENTINEL)
    args["expert_ids"] = args["expert_ids"][:0]
    call("gemm", args)
    assert (args["c"] == SENTINEL).all()


# --------------------------------------------------- schema, tracing, selection
@pytest.mark.parametrize("op", ALL)
def test_schema_and_fake_agree_with_the_kernel(device, op):
    args = good_arguments(op, device)
    overload = getattr(torch.ops._rocm_C, f"fused_moe_wvSplitK_int4_{op}").default
    names = {argument.name for argument in overload._schema.arguments}
    assert names >= args.keys()
    torch.library.opcheck(
        overload, (), args, test_utils=("test_schema", "test_faketensor")
    )


def test_traces_in_one_graph(device):
    torch.manual_seed(0)
    w13 = Experts(4, 64, 64, 32, torch.bfloat16)
    w2 = Experts(4, 64, 32, 32, torch.bfloat16)
    (w13_q, w13_s, _), (w2_q, w2_s, _) = w13.args(device), w2.args(device)

    def layer(a, ids, weights):
        h = a.new_empty(ids.numel(), 32)
        ops.fused_moe_wvSplitK_int4_gate_up(a, w13_q, w13_s, h, ids, "silu", 40, 32)
        c = torch.empty_like(a)
        ops.fused_moe_wvSplitK_int4_down(h, w2_q, w2_s, c, ids, weights, 40, 32)
        return c + 1

    args = (
        torch.randn(3, 64).to(torch.bfloat16).to(device),
        torch.randint(0, 4, (3, 2)).to(device),
        torch.rand(3, 2).to(device),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), layer(*args))


def test_instruction_sets(device):
    if device != "cpu":
        pytest.skip("there is nothing to select on a GPU")
    select = torch.ops._rocm_C.hybrid_w4a16_cpu_isa
    names = ops.build_info()["cpu"]
    assert names[-1] == "portable"
    assert select("") == names[0]
    with pytest.raises(
        RuntimeError, match="isa: expected one of .*portable.*, got 'sse9'"
    ):
        select("sse9")


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_kernels_that_run_are_named(device, group_size, every_isa):
    if device != "cpu":
        pytest.skip("a GPU has one kernel for all")
    many = {"avx512_vnni": "avx512"}  # its own kernel only runs few rows
    few = {"amx_bf16": "avx512_vnni", "avx512_bf16": "avx512_vnni"}
    for isa in every_isa():
        (first, rows), *_, (last, _) = ops.cpu_kernels(group_size, torch.half) * 2
        assert (first, last) == (few.get(isa, isa), many.get(isa, isa))
        assert rows == 1
        if isa == "amx_bf16":
            assert ops.cpu_kernels(group_size, torch.half) == [
                ("avx512_vnni", 1),
                ("amx_int8", 2),
                ("amx_bf16", 17 if group_size == 128 else 9),
            ]
        elif isa == "avx512_bf16":
            assert ops.cpu_kernels(group_size, torch.half)[1] == ("avx512_bf16", 65)
            assert ops.cpu_kernels(group_size, torch.bfloat16)[1][1] == 13


@needs_cpu_ops
def test_kernels_of_what_no_kernel_takes(device):
    kernels = torch.ops._rocm_C.hybrid_w4a16_cpu_kernels
    with pytest.raises(RuntimeError, match="group_size: expected 32, 64 or 128, got 8"):
        kernels(8, torch.half)
    with pytest.raises(RuntimeError, match="dtype: expected Half or .*, got Float"):
        kernels(32, torch.float)
