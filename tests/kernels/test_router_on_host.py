# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The GPU kernels of the router, run on the host with the real launcher.

As in test_moe_int4_on_host.py: several orders of lanes, waves and blocks, so that each
block is the last to arrive in some of them; AddressSanitizer and UBSan.
"""

import numpy as np
import pytest

from tests.support.kernels_on_host import (
    BF16,
    HALF,
    SEED,
    build_programs,
    check,
    check_every_kernel_ran,
    from_bits,
    run_all,
    spread,
    to_bits,
)

pytestmark = pytest.mark.slow

SOFTMAX, SIGMOID = 0, 1  # moe_int4::Scoring


class RouterCase:
    """A random call; what is not given is chosen by ``rng``."""

    def __init__(self, rng, dtype, w_is_float, tokens, experts, hidden, top_k):
        pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
        self.dtype, self.w_is_float, self.top_k = dtype, w_is_float, top_k
        self.tokens, self.experts = tokens, experts
        a = to_bits(rng.standard_normal((tokens, hidden)), dtype)
        w = rng.standard_normal((experts, hidden)) * 2 / np.sqrt(hidden)
        w[experts // 2 :] = w[: experts - experts // 2].copy()  # equal logits
        self.w = w.astype(np.float32) if w_is_float else to_bits(w, dtype)
        dense = self.w.astype(np.float64) if w_is_float else from_bits(self.w, dtype)
        self.exact = from_bits(a, dtype) @ dense.T
        self.terms = np.abs(from_bits(a, dtype)) @ np.abs(dense).T
        self.logits_are_float = bool(w_is_float or pick(0, 1))
        self.scoring, self.renormalize = pick(SOFTMAX, SIGMOID), pick(0, 1)
        self.scale = pick(1.0, 2.5)
        self.bias = pick(None, rng.standard_normal(experts).astype(np.float32) * 0.1)
        self.padding = pick(None, rng.integers(0, 2, tokens, dtype=np.uint8))
        stride, w_stride = hidden + pick(0, 1, 8), hidden + pick(0, 8)
        logits = np.full((tokens, experts), 0x7FFF, dtype=np.uint16)
        if self.logits_are_float:
            logits = np.full((tokens, experts), np.nan, dtype=np.float32)
        self.fields = dict(
            op=b"router",
            dtype=dtype,
            a=spread(a, (stride,)),
            a_stride_m=stride,
            m=tokens,
            k=hidden,
            w=spread(self.w, (w_stride,)),
            w_stride_e=w_stride,
            w_is_float=w_is_float,
            experts=experts,
            logits=logits.tobytes(),
            logits_are_float=self.logits_are_float,
            c=np.full((tokens, top_k), np.nan, dtype=np.float32).tobytes(),
            topk_ids=np.full((tokens, top_k), -7, dtype=np.int32).tobytes(),
            arrived=np.zeros(1, dtype=np.int32).tobytes(),
            scoring=self.scoring,
            renormalize=self.renormalize,
            scale=self.scale,
            top_k=top_k,
            cu_count=pick(1, 20, 132, 1000),
        )
        self.fields["a.offset"] = pick(0, 2)
        if self.bias is not None:
            self.fields["bias"] = self.bias.tobytes()
        if self.padding is not None:
            self.fields["padding"] = self.padding.tobytes()
        self.label = (
            f"seed {SEED}, router {tokens} tokens, {experts} experts, hidden {hidden}, "
            f"dtype {dtype}, fp32 weights {w_is_float}, {self.fields['cu_count']} CUs"
        )

    def check_reply(self, reply):
        """Assert that logits are close to float64's, and ids those of the logits."""
        assert np.frombuffer(reply["arrived"], dtype=np.int32).tolist() == [0]
        if self.logits_are_float:
            logits, step = np.frombuffer(reply["logits"], dtype=np.float32), 2**-22
        else:
            bits = np.frombuffer(reply["logits"], dtype=np.uint16)
            logits = from_bits(bits, self.dtype)
            step = 2**-11 if self.dtype == HALF else 2**-8
        logits = logits.astype(np.float64).reshape(self.exact.shape)
        error = np.abs(logits - self.exact)
        assert (error <= step * np.abs(self.exact) + 2**-19 * self.terms).all()
        ids = np.frombuffer(reply["topk_ids"], dtype=np.int32)
        weights = np.frombuffer(reply["c"], dtype=np.float32).reshape(-1, self.top_k)
        for token, of_token in enumerate(ids.reshape(-1, self.top_k)):
            self.check_token(logits[token], weights[token], of_token, token)

    def check_token(self, logits, weights, ids, token):
        if self.scoring == SOFTMAX:
            scores = np.exp(logits - logits.max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        choice = scores if self.bias is None else scores + self.bias
        order = np.lexsort((np.arange(self.experts), -choice))[: self.top_k]
        if self.padding is not None and self.padding[token]:
            assert (ids == -1).all(), self.label
            ids = order
        assert len(set(ids.tolist())) == self.top_k, self.label
        for mine, other in zip(ids, order, strict=True):
            if mine != other:
                equal = self.bias is None and logits[mine] == logits[other]
                assert not equal, f"{self.label}: the order of equal experts"
                assert abs(choice[mine] - choice[other]) < 1e-6, self.label
        expected = scores[ids]
        if self.renormalize:
            expected = expected / expected.sum()
        np.testing.assert_allclose(weights, expected * self.scale, rtol=3e-6)


SHAPES = [
    (256, 528, 8),
    (60, 264, 4),
    (300, 40, 10),
    (5, 8, 5),
]  # experts, hidden, top_k
KINDS = [(dtype, f) for dtype in (HALF, BF16) for f in (False, True)]


@pytest.fixture(scope="module")
def programs():
    return build_programs()


def cases(shapes, tokens):
    rng = np.random.default_rng(SEED)
    for i, kind in enumerate(KINDS):
        for j, count in enumerate(tokens):
            for experts, hidden, top_k in shapes or [SHAPES[(i + j) % len(SHAPES)]]:
                yield RouterCase(rng, *kind, count, experts, hidden, top_k)


def test_results_are_right_whichever_block_is_last(programs):
    """Every kernel, without matrix instructions: the router uses none."""
    (outcome,) = run_all({0: (programs[False], list(cases(None, (1, 3, 5))))}).values()
    check(outcome)
    check_every_kernel_ran(programs[False], "moe_router_topk_", [outcome])


@pytest.mark.nightly
@pytest.mark.parametrize("mma", [False, True])
def test_all_shapes(programs, mma):
    jobs = {n: (programs[mma], list(cases(SHAPES, (n,)))) for n in (1, 2, 3, 8)}
    for outcome in run_all(jobs).values():
        check(outcome)
