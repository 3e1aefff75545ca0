# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What a server answered, against the float32 reference fed with the same tokens.

Each token of a greedy completion must be the reference's first choice or, where bf16
cannot tell them apart, a token that the reference likes almost as well. A completion
without such ties is the one that the reference itself would have generated.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .api_client import Client
from .reference_model import ReferenceModel


@dataclass(frozen=True)
class Tolerance:
    """How far bf16 may take a server from the float32 reference."""

    tie_gap: float
    """Nats that a token may lie below the reference's first choice."""
    tie_share: float
    """Of the tokens of a test's completions, that may lie below it at all."""
    mean: float
    """Nats per token of a text, signed."""
    absolute: float
    """Nats per token of a text, unsigned."""
    perplexity_ratio: float


def tie_gaps(
    reference: ReferenceModel,
    logprobs: torch.Tensor,
    completion: list[int],
    largest: float,
) -> list[float]:
    """How far the tokens that are not the reference's first choice lie below it.

    ``logprobs``: the reference's distributions of the completion's tokens. Fails on a
    token that lies further below than ``largest``.
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
    """Each (prompt, completion) has ``count`` tokens that the reference confirms."""
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
    """Log-probabilities and perplexity of ``pieces`` agree with the reference."""
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
    """Kept, since servers in several modes are asked for the same texts."""
    return reference.text_logprobs(list(tokens))
