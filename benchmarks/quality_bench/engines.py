# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Log-probabilities of given tokens, by vLLM and by transformers.

Call both functions in a new process. The score of a sequence of T tokens is two lists
of T - 1 values: the log-probability (nats) of each token after the first, given the
tokens before it, and the model's own first choice at that position.
"""

import os
from typing import Any

Score = tuple[list[float], list[int]]


def vllm_scores(
    model: str,
    sequences: list[list[int]],
    prompts: list[list[int]],
    count: int,
    dtype: str,
    switch: str,
) -> dict[str, Any]:
    """Scores of ``sequences`` and greedy completions of ``prompts`` from vLLM.

    Args:
        model: checkpoint folder.
        count: tokens to generate per prompt, ignoring end of text.
        dtype: of the activations, as ``--dtype`` of vLLM.
        switch: value of ``VLLM_HYBRID_W4A16_MOE``.
    """
    os.environ["VLLM_HYBRID_W4A16_MOE"] = switch
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    length = max([*map(len, sequences), *(len(p) + count for p in prompts)]) + 1
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=length)
    try:
        return {
            "scores": _score(
                llm, [TokensPrompt(prompt_token_ids=s) for s in sequences]
            ),
            "completions": [
                list(answer.outputs[0].token_ids)
                for answer in llm.generate(
                    [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
                    SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
                )
            ],
        }
    finally:
        # otherwise this process and the engine's wait for each other at exit
        llm.llm_engine.engine_core.shutdown()


def _score(llm: Any, prompts: list[Any]) -> list[Score]:
    from vllm import SamplingParams

    scoring = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    scores = []
    for answer in llm.generate(prompts, scoring):
        found = answer.prompt_logprobs[1:]
        given = answer.prompt_token_ids[1:]
        scores.append(
            (
                [step[token].logprob for step, token in zip(found, given, strict=True)],
                [next(t for t, p in step.items() if p.rank == 1) for step in found],
            )
        )
    return scores


def transformers_scores(model: str, sequences: list[list[int]]) -> list[Score]:
    """Scores from transformers, computed in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    with torch.inference_mode():
        for tokens in sequences:
            logits = network(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            given = torch.tensor(tokens[1:])[:, None]
            scores.append(
                (logprobs.gather(1, given)[:, 0].tolist(), logprobs.argmax(1).tolist())
            )
    return scores
