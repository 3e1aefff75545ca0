# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Generates from prompts in a batch and one by one, and prints how many are the same.

    VLLM_BATCH_INVARIANT=1 python -m tests.support.invariance_worker CHECKPOINT

Prints one JSON object on a line that begins with ``MARK``.

vLLM has no batch-invariant mode on the CPU: setting it up installs Triton kernels in
place of torch's mean, softmax and bmm, and fails (``'function' object is not
subscriptable``). Here that step is left out on the CPU. What remains there of vLLM's
own, attention and the bf16 router of the demo checkpoint, is invariant anyway.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

MARK = "=== answers: "
PROMPTS = 17  # more than the 16 rows that the lm_head's kernels take at a time
NEW_TOKENS = 5
# A small model does not need vLLM's default share of a GPU's memory.
ON_A_GPU = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 28}


def answers(llm: Any, prompts: list[str]) -> list[Any]:
    """Tokens with the log-probabilities of the likeliest ones."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=3)
    return [
        [
            sorted((token, entry.logprob) for token, entry in step.items())
            for step in output.outputs[0].logprobs
        ]
        for output in llm.generate(prompts, parameters, use_tqdm=False)
    ]


def main() -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_HYBRID_W4A16_LINEAR="1",
        VLLM_HYBRID_W4A16_LM_HEAD="int4_rescored",
        VLLM_HYBRID_W4A16_MOE="require",
        VLLM_NO_USAGE_STATS="1",
    )
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from vllm.model_executor.determinism import batch_invariant

        batch_invariant.enable_batch_invariant_mode = lambda: None
    from vllm import LLM
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=256,
        # no prompt in two parts: vLLM's CPU attention sums those in another order
        max_num_batched_tokens=PROMPTS * 256,
        max_num_seqs=PROMPTS,
        **(ON_A_GPU if on_gpu else {}),
    )
    text = Path(__file__).read_text()
    generator = random.Random(0)
    starts = [generator.randrange(len(text) // 2) for _ in range(PROMPTS)]
    prompts = [text[s : s + generator.randrange(20, 300)] for s in starts]
    batch = answers(llm, prompts)
    alone = [answers(llm, [prompt])[0] for prompt in prompts]
    same = sum(a == b for a, b in zip(alone, batch, strict=True))
    found = {"row_invariant": ops.row_invariant(), "same": same, "prompts": PROMPTS}
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
