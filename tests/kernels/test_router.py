# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Router logits against float64; scores and top-k against torch, given the logits.

On a GPU also against vLLM's own top-k ops. On every available device and instruction
set.
"""

import itertools

import pytest
import torch

from tests.kernels.test_moe_int4_ops import needs_cpu_ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router as router

DTYPES = (torch.float16, torch.bfloat16)
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}


@pytest.fixture(autouse=True)
def op():
    assert router.load_error() is None, router.load_error()


class Case:
    """Tokens, router weights and the arguments of a call, on the CPU.

    ``weights`` and ``logits`` are dtypes. ``ties``: rows of weights repeat, so that
    their logits are equal.
    """

    def __init__(self, experts, tokens, hidden, top_k, dtype, weights, logits, ties):
        torch.manual_seed(experts * 1000 + tokens)
        self.shape = (tokens, experts, top_k)
        self.a = torch.randn(tokens, hidden + 3).to(dtype)[:, :hidden]
        self.w = (torch.randn(experts, hidden) * 2 * hidden**-0.5).to(weights)
        if ties:
            self.w[experts // 2 :] = self.w[: experts - experts // 2].clone()
        self.logits_dtype = logits
        self.bias = torch.randn(experts) * 0.1

    def run(self, device, scoring, renormalize, bias, scale=1.0, padding=None):
        """Logits, weights and ids; checks that the counter is 0 again."""
        tokens, experts, top_k = self.shape
        new = dict(device=device)
        logits = torch.full((tokens, experts), -7.0, dtype=self.logits_dtype, **new)
        weights = torch.full((tokens, top_k), -7.0, **new)
        ids = torch.full((tokens, top_k), -7, dtype=torch.int32, **new)
        arrived = torch.zeros(1, dtype=torch.int32, **new)
        on = [None if t is None else t.to(device) for t in (bias, padding)]
        router.fused_moe_router_topk(
            *(self.a.to(device), self.w.to(device), logits, weights, ids, arrived),
            *(scoring, renormalize, 40, *on, scale),
        )
        assert arrived.item() == 0
        return logits.cpu(), weights.cpu(), ids.cpu()

    def check_logits(self, logits):
        exact = self.a.double() @ self.w.double().T
        terms = self.a.double().abs() @ self.w.double().abs().T
        error = (logits.double() - exact).abs()
        assert (error <= exact.abs() * STEP[self.logits_dtype] + terms * 2**-19).all()


def selected(logits, top_k, scoring, renormalize, bias, scale):
    """Weights and ids of the selected experts, with scores in float64."""
    scores = logits.double()
    scores = scores.softmax(1) if scoring == "softmax" else scores.sigmoid()
    scores = torch.where(scores.isfinite(), scores, 0)
    choice = scores.float() if bias is None else scores.float() + bias
    order = choice.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, order)
    if renormalize:
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    return weights * scale, order.int(), choice.double()


def check_selection(case, found, scoring, renormalize, bias, scale=1.0):
    """Exact ids, but for experts whose scores differ by less than fp32 can tell."""
    logits, weights, ids = found
    top_k = case.shape[2]
    expected, order, choice = selected(logits, top_k, scoring, renormalize, bias, scale)
    # what fp32 can tell apart; a bias of up to 1 has larger steps than its sum
    step = 3e-7 * (choice.abs() + (0 if bias is None else 1))
    for token in range(len(ids)):
        assert len(set(ids[token].tolist())) == top_k
        for mine, other in zip(ids[token].tolist(), order[token].tolist(), strict=True):
            if mine != other:
                equal = bias is None and logits[token, mine] == logits[token, other]
                assert not equal, "experts of equal score are in the wrong order"
                difference = abs(choice[token, mine] - choice[token, other])
                assert difference <= step[token, other]
    torch.testing.assert_close(weights.double(), expected, rtol=3e-6, atol=1e-12)


SHAPES = [
    (256, 2048, 8),
    (128, 136, 8),
    (60, 72, 4),
    (512, 264, 10),
    (160, 64, 32),
    (3, 8, 3),
]
KINDS = [
    (d, w, x)
    for d in DTYPES
    for w, x in ((d, d), (d, torch.float32), (torch.float32,) * 2)
]
GRID = list(itertools.product(SHAPES, (1, 2, 5, 8), KINDS, (False, True)))
SAMPLE = [
    (SHAPES[0], 1, KINDS[3], False),
    (SHAPES[2], 8, KINDS[0], True),
    (SHAPES[3], 5, KINDS[5], True),
    (SHAPES[4], 2, KINDS[1], False),
    (SHAPES[5], 8, KINDS[4], True),
]
CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.nightly)
    for case in GRID
]


@pytest.mark.parametrize(("shape", "tokens", "kind", "ties"), CASES)
def test_against_float64(shape, tokens, kind, ties, device, every_isa):
    experts, hidden, top_k = shape
    case = Case(experts, tokens, hidden, top_k, *kind, ties)
    for _ in every_isa():
        for scoring, renormalize, biased in itertools.product(
            ("softmax", "sigmoid"), (True, False), (True, False)
        ):
            bias, scale = case.bias if biased else None, 2.5 if biased else 1.0
            found = case.run(device, scoring, renormalize, bias, scale)
            case.check_logits(found[0])
            check_selection(case, found, scoring, renormalize, bias, scale)
            again = case.run(device, scoring, renormalize, bias, scale)
            assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def with_logits(logits, dtype, top_k):
    """A case whose logits are exactly these, [M, E]: tokens are unit vectors."""
    tokens, experts = logits.shape
    case = Case(experts, tokens, 8, top_k, dtype, dtype, dtype, False)
    case.a = torch.eye(tokens, 8).to(dtype)
    case.w = torch.zeros(experts, 8, dtype=dtype)
    case.w[:, :tokens] = logits.T.to(dtype)
    return case


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [64, 48, 512])
def test_ties_and_numbers_that_are_not_finite(scoring, experts, device):
    """As vLLM's kernels: scores that are not finite count as 0, then the lower id."""
    inf, nan = float("inf"), float("nan")
    few = torch.randint(0, 3, (1, experts), generator=torch.Generator().manual_seed(3))
    tokens = [few[0].float(), torch.zeros(experts)]
    for special in (-inf, nan, inf):
        case = with_logits(torch.stack(tokens), torch.bfloat16, 6)
        case.w[5, 1] = special  # 0 * special is NaN: the first token gets it as well
        found = case.run(device, scoring, True, None)
        assert found[0].isnan()[0, 5] and not found[0].isfinite()[1, 5]
        check_selection(case, found, scoring, True, None)
    case = with_logits(torch.stack(tokens), torch.bfloat16, 6)
    _, weights, ids = found = case.run(device, scoring, True, None)
    check_selection(case, found, scoring, True, None)
    assert ids[1].tolist() == [0, 1, 2, 3, 4, 5] and torch.equal(
        weights[1], weights[1, :1].expand(6)
    )
    largest = (few[0] == few[0].max()).nonzero().flatten()[:6]
    assert ids[0, : len(largest)].tolist() == largest.tolist()
    case.w[:] = nan
    _, weights, ids = case.run(device, scoring, True, None)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and (weights == 0).all()


def test_a_token_does_not_depend_on_the_others(device, every_isa):
    case = Case(256, 8, 2048, 8, *(torch.bfloat16,) * 3, False)
    everything = case.a
    for _ in every_isa():
        case.a, case.shape = everything, (8, 256, 8)
        together = case.run(device, "softmax", True, None)
        for token in range(8):
            case.a, case.shape = everything[token : token + 1], (1, 256, 8)
            alone = case.run(device, "softmax", True, None)
            for mine, all_of_them in zip(alone, together, strict=True):
                assert torch.equal(mine[0], all_of_them[token])


def test_padding(device):
    case = Case(64, 4, 64, 4, *(torch.bfloat16,) * 3, False)
    padding = torch.tensor([False, True, False, True])
    _, weights, ids = case.run(device, "sigmoid", True, case.bias)
    _, padded, skipped = case.run(device, "sigmoid", True, case.bias, padding=padding)
    assert torch.equal(weights, padded)
    assert torch.equal(skipped, ids.masked_fill(padding[:, None], -1))


def test_no_tokens(device):
    case = Case(64, 0, 64, 4, *(torch.bfloat16,) * 3, False)
    assert [len(x) for x in case.run(device, "softmax", True, None)] == [0, 0, 0]


def arguments():
    case = Case(64, 2, 64, 4, *(torch.bfloat16,) * 3, False)
    return {
        "a": case.a,
        "w": case.w,
        "logits": torch.empty(2, 64, dtype=torch.bfloat16),
        "topk_weights": torch.empty(2, 4),
        "topk_ids": torch.empty(2, 4, dtype=torch.int32),
        "arrived": torch.zeros(1, dtype=torch.int32),
        "scoring": "softmax",
        "renormalize": True,
        "cu_count": 1,
    }


@needs_cpu_ops
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(9, 64).bfloat16()}, "a: expected 0 to 8, got 9"),
        ({"a": torch.zeros(2, 60).bfloat16()}, "a: expected columns a multiple of 8"),
        ({"w": torch.zeros(64, 64).half()}, "w: expected dtype"),
        ({"w": torch.zeros(513, 64).bfloat16()}, "w: expected 1 to 512, got 513"),
        ({"w": torch.zeros(64, 68).bfloat16()[:, 4:]}, "w: expected row stride"),
        ({"logits": torch.zeros(2, 65)[:, 1:]}, "logits: expected row stride 64"),
        (
            {"topk_weights": torch.zeros(2, 33)},
            "topk_weights: expected 1 to 32, got 33",
        ),
        ({"topk_ids": torch.zeros(2, 4).long()}, "topk_ids: expected dtype Int"),
        ({"arrived": torch.zeros(2).int()}, "arrived: expected"),
        ({"scoring": "tanh"}, "scoring: expected softmax or sigmoid, got 'tanh'"),
        ({"bias": torch.zeros(63)}, "bias: expected"),
        ({"is_padding": torch.zeros(2).int()}, "is_padding: expected dtype Bool"),
        ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
        ({"cu_count": 0}, "cu_count: expected at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(RuntimeError) as error:
        router.fused_moe_router_topk(**(arguments() | changes))
    assert (
        str(error.value).splitlines()[0].startswith(f"fused_moe_router_topk: {message}")
    )


def test_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments().items()
        }
        assert torch.ops._rocm_C.fused_moe_router_topk(**fakes) is None


def vllm_topk(logits, top_k, scoring, renormalize, bias, scale, padding):
    """Weights and ids of vLLM's op."""
    from vllm import _custom_ops

    tokens = len(logits)
    new = dict(device=logits.device, dtype=torch.int32)
    weights = torch.empty(tokens, top_k, device=logits.device)
    ids, rows = torch.empty(tokens, top_k, **new), torch.empty(tokens, top_k, **new)
    if scoring == "softmax":
        _custom_ops.topk_softmax(weights, ids, rows, logits, renormalize, bias, padding)
        weights *= scale
    else:
        _custom_ops.topk_sigmoid(
            weights, ids, rows, logits, renormalize, bias, scale, padding
        )
    return weights, ids


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None,
    reason="the last bit of e^x is CUDA's",
)
@pytest.mark.parametrize("experts", [8, 64, 128, 160, 192, 256, 384, 512])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_selection_has_the_bits_of_vllm(experts, kind):
    """The same ids for the same logits; weights to fp32 rounding."""
    for tokens, ties in itertools.product((1, 8), (False, True)):
        top_k = min(8, experts)
        case = Case(experts, tokens, 256, top_k, *kind, ties)
        if experts != 160:  # vLLM's kernel for it has another order of sums
            case.w[1::7] *= 1e-3  # scores that differ in the last bits or not at all
        padding = torch.arange(tokens) % 5 == 4
        for scoring, renormalize, biased in itertools.product(
            ("softmax", "sigmoid"), (True, False), (True, False)
        ):
            bias, scale = case.bias if biased else None, 2.5 if biased else 1.0
            found = case.run("cuda", scoring, renormalize, bias, scale, padding)
            expected = vllm_topk(
                found[0].cuda(),
                *(top_k, scoring, renormalize),
                None if bias is None else bias.cuda(),
                scale,
                padding.cuda(),
            )
            where = f"{experts} experts, {kind}, {tokens} tokens, {scoring}, {biased}"
            assert torch.equal(found[2], expected[1].cpu()), where
            # vLLM's kernel for 160 experts has weights for padding, but no ids
            rows = ~padding if experts == 160 else slice(None)
            torch.testing.assert_close(
                *(found[1][rows], expected[0].cpu()[rows]),
                rtol=1e-6 if experts == 160 else 3e-7,
                atol=0,
                msg=lambda text, where=where: f"{where}: {text}",
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_graph_replays():
    """The counter is 0 after each replay; captured calls follow one another."""
    case = Case(256, 2, 2048, 8, *(torch.bfloat16,) * 3, False)
    a, w = case.a.contiguous().cuda(), case.w.cuda()
    logits = torch.empty(2, 256, dtype=torch.bfloat16, device="cuda")
    weights = torch.empty(4, 2, 8, device="cuda")
    ids = torch.empty(4, 2, 8, dtype=torch.int32, device="cuda")
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(4):
            router.fused_moe_router_topk(
                *(a, w, logits, weights[i], ids[i], arrived, "softmax", True, 132)
            )
    for _ in range(50):
        a.copy_(torch.randn_like(a))
        weights.fill_(-1), ids.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        case.a = a.cpu()
        check_selection(
            case, (logits.cpu(), weights[3].cpu(), ids[3].cpu()), "softmax", True, None
        )
        assert (ids == ids[0]).all() and (weights == weights[0]).all()
        assert arrived.item() == 0
