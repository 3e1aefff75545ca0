# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compares a server's output with the float32 reference, fed with the same tokens.

Each token of a greedy completion must be the reference's first choice or, if bf16
cannot distinguish them, a token that the reference finds almost as likely. Without such
ties the completion is the one that the reference itself would have generated.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .api_client import Client
from .reference_model import ReferenceModel


@dataclass(frozen=True)
class Tolerance:
    """How far a bf16 server may differ from the float32 reference."""

    tie_gap: float
    """Largest distance of a token below the reference's first choice, in nats."""
    tie_share: float
    """Largest share of a test's completion tokens that are not the first choice."""
    mean: float
    """Mean signed difference of a text's log-probabilities, in nats per token."""
    absolute: float
    """Mean absolute difference of a text's log-probabilities, in nats per token."""
    perplexity_ratio: float


def tie_gaps(
    reference: ReferenceModel,
    logprobs: torch.Tensor,
    completion: list[int],
    largest: float,
) -> list[float]:
    """Return how far tokens lie below the reference's first choice, where they differ.

    ``logprobs``: the reference's distributions for the completion's tokens. Fails if a
    token lies more than ``largest`` nats below.
    """
    best, first = logprobs.max(dim=1)
    gaps = best - logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
    tokenizer = reference.tokenizer
    wrong = [
        f"token {i}: {tokenizer.decode(completion[i])!r} is {gaps[i]:.3f} nats below "
        f"{tokenizer.decode(first[i])!r} after {tokenizer.decode(completion[:i])!r}"
        for i in (gaps > largest).nonzero()[:, 0].tolist()
    ]
    assert not wrong, "\n".join(wrong)
    return gaps[gaps > 0].tolist()


def check_greedy(
    reference: ReferenceModel,
    answers: list[tuple[list[int], list[int]]],
    count: int,
    tolerance: Tolerance,
) -> None:
    """Check that each completion has ``count`` tokens and that the reference agrees."""
    gaps = []
    sequences = [prompt + completion for prompt, completion in answers]
    found = reference.logprobs_of(sequences)
    for (prompt, completion), logprobs in zip(answers, found, strict=True):
        assert len(completion) == count
        of_completion = logprobs[len(prompt) - 1 : -1]
        gaps += tie_gaps(reference, of_completion, completion, tolerance.tie_gap)
    total = count * len(answers)
    print(
        f"{total} greedy tokens, {len(gaps)} of them at ties, "
        f"largest gap {max(gaps, default=0):.3f} nats"
    )
    assert len(gaps) <= tolerance.tie_share * total


def check_text(
    reference: ReferenceModel,
    client: Client,
    pieces: list[list[int]],
    tolerance: Tolerance,
    at_once: int = 1,
) -> None:
    """Check that log-probabilities and perplexity of ``pieces`` match the reference."""
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(client.text_logprobs, pieces))
    served = torch.cat([torch.tensor(answer) for answer in answers])
    expected = torch.cat([_expected(reference, tuple(piece)) for piece in pieces])
    difference = served - expected
    mean, absolute = difference.mean().item(), difference.abs().mean().item()
    perplexity, wanted = ((-x.mean()).exp().item() for x in (served, expected))
    print(
        f"{len(served)} tokens: mean difference {mean:+.5f} nats, absolute "
        f"{absolute:.5f}, perplexity {perplexity:.4f}, reference {wanted:.4f}"
    )
    assert abs(mean) < tolerance.mean
    assert absolute < tolerance.absolute
    ratio = tolerance.perplexity_ratio
    assert 1 / ratio < perplexity / wanted < ratio


@functools.cache
def _expected(reference: ReferenceModel, tokens: tuple[int, ...]) -> torch.Tensor:
    """Cached, since servers in several modes run the same texts."""
    return reference.text_logprobs(list(tokens))
