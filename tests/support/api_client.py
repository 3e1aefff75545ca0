# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Requests that the tests send to a server, through its OpenAI API."""

from typing import Any

import openai

from benchmarks.serve_bench.vllm_server import MODEL_NAME, VllmServer

REQUEST_TIMEOUT_S = 120.0


class Client:
    """Token ids and log-probabilities through the OpenAI API of a server."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self._completions = openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            timeout=REQUEST_TIMEOUT_S,
            max_retries=0,
        ).completions

    def greedy(
        self, prompts: list[str] | list[list[int]], count: int
    ) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of each prompt and of its greedy completion.

        Args:
            prompts: texts or token ids; all of them run at the same time.
            count: number of tokens to generate, even past an end of text.
        """
        answer = self._completions.create(
            model=MODEL_NAME,
            prompt=prompts,
            max_tokens=count,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        return [(c.prompt_token_ids, c.token_ids) for c in choices]  # type: ignore[attr-defined]

    def text_logprobs(self, tokens: list[int]) -> list[float]:
        """Return the log-probability of every token but the first."""
        answer = self._completions.create(
            model=MODEL_NAME,
            prompt=tokens,
            max_tokens=0,
            echo=True,
            logprobs=0,
            temperature=0,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == len(tokens)
        return logprobs.token_logprobs[1:]

    def complete(
        self, prompts: list[str], count: int, logprobs: int, **sampling: Any
    ) -> list[Any]:
        """Choices of the API, with the likeliest ``logprobs`` tokens of each step."""
        answer = self._completions.create(
            model=MODEL_NAME,
            prompt=prompts,
            max_tokens=count,
            logprobs=logprobs,
            extra_body={"ignore_eos": True},
            timeout=10 * REQUEST_TIMEOUT_S,
            **sampling,
        )
        return sorted(answer.choices, key=lambda choice: choice.index)
