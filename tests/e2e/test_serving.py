# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm serve`` on the bundled checkpoint against the float32 reference."""

import inspect
import shlex
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.demo import SUMMARY

from ..support.against_reference import Tolerance, check_greedy, check_text
from ..support.api_client import Client
from ..support.reference_model import ReferenceModel

pytestmark = pytest.mark.e2e

TOLERANCE = Tolerance(
    # transformers' own bf16 on this checkpoint, teacher-forced on 9,216 tokens of text,
    # prefers another token than float32 at 93 positions. Half of these tokens are less
    # than 0.025 below float32's first choice, all but one less than 0.17 (a router that
    # ties sends a token to other experts). On 2,880 tokens of greedy completions there
    # are 22, at most 0.093 below.
    tie_gap=0.25,
    tie_share=0.05,
    mean=0.01,
    # transformers' own bf16 differs from float32 by 0.0133. The server, when this was
    # written: 0.011 to 0.013, and 0.016 on the long prompt. The reference with one of
    # the 96 experts damaged differs from the intact one by 0.026 (gate and up swapped)
    # to 0.070 (halves of K swapped), while its perplexity changes by 0.3% to 1.8%.
    absolute=0.02,
    perplexity_ratio=1.005,
)

WINDOW = 512  # tokens; the model's training length
LONG = 1500  # tokens

PROMPTS = [
    'def copyfile(src, dst):\n    """',
    '    def read(self, size=-1):\n        """',
    "import os\nimport sys\n",
    "class Queue:\n",
    "for i in range(",
]


@pytest.fixture(scope="module")
def text(reference: ReferenceModel) -> list[int]:
    """Return tokens of two standard library modules of the running Python."""
    sources = [inspect.getsource(module) for module in (textwrap, shlex)]
    encode = reference.tokenizer.encode
    return [token for source in sources for token in encode(source, verbose=False)]


def windows(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]


def short_prompts(text: list[int], count: int) -> list[list[int]]:
    """Different prompts of different lengths, 5 to 24 tokens."""
    return [text[97 * i : 97 * i + 5 + i % 20] for i in range(count)]


def test_every_moe_layer_is_hybrid(client: Client) -> None:
    found = SUMMARY.findall(client.server.log_text())
    assert [(taken, total) for taken, total, *_ in found] == [("6", "6")]


def test_greedy_completions_of_texts(client: Client, reference: ReferenceModel) -> None:
    answers = [client.greedy([prompt], 64)[0] for prompt in PROMPTS]
    for prompt, (tokens, _) in zip(PROMPTS, answers, strict=True):
        assert tokens == reference.tokenizer.encode(prompt)
    check_greedy(reference, answers, 64, TOLERANCE)


def test_two_requests_at_once(client: Client, reference: ReferenceModel) -> None:
    with ThreadPoolExecutor(2) as pool:
        requests = [pool.submit(client.greedy, [p], 64) for p in PROMPTS[:2]]
        answers = [request.result()[0] for request in requests]
    assert [tokens for tokens, _ in answers] == [
        reference.tokenizer.encode(prompt) for prompt in PROMPTS[:2]
    ]
    check_greedy(reference, answers, 64, TOLERANCE)


@pytest.mark.parametrize("count", [4, 8, 16, 40])
def test_batches_from_decode_to_prefill_sizes(
    client: Client, reference: ReferenceModel, text: list[int], count: int
) -> None:
    prompts = short_prompts(text, count)
    answers = client.greedy(prompts, 24)
    assert [tokens for tokens, _ in answers] == prompts
    check_greedy(reference, answers, 24, TOLERANCE)


@pytest.mark.parametrize(("count", "at_once"), [(16, 1), (4, 2)])
def test_logprobs_and_perplexity_of_a_text(
    client: Client,
    reference: ReferenceModel,
    text: list[int],
    count: int,
    at_once: int,
) -> None:
    check_text(reference, client, windows(text, WINDOW)[:count], TOLERANCE, at_once)


def test_long_prompt(
    client: Client, reference: ReferenceModel, text: list[int]
) -> None:
    prompt = text[:LONG]
    check_text(reference, client, [prompt], TOLERANCE)
    check_greedy(reference, client.greedy([prompt], 64), 64, TOLERANCE)
