# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Greedy tokens of a checkpoint with vLLM's router and with the fused one, on the CPU.

    python -m tests.support.router_worker FOLDER '{"enforce_eager": true}'

The last line is ``{"vllm": [[[token, {token: log-probability}], ...], ...], "fused":
[...]}``, with the log-probabilities of the five likeliest tokens. The same process runs
both engines.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from .tiny_models import prompts


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_router

    folder, arguments = sys.argv[1], json.loads(sys.argv[2])
    found = {}
    for name in ("vllm", "fused"):
        hybrid_w4a16_router.ON_CPU = name == "fused"
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=4,
            kv_cache_memory_bytes=1 << 26,
            **arguments,
        )
        asked = [{"prompt_token_ids": tokens} for tokens in prompts(4, 12)]
        sampling = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, logprobs=5
        )
        answers = llm.generate(asked, sampling, use_tqdm=False)
        found[name] = [
            [
                [token, {other: entry.logprob for other, entry in likely.items()}]
                for token, likely in zip(answer.token_ids, answer.logprobs, strict=True)
            ]
            for (answer,) in (request.outputs for request in answers)
        ]
        del llm
        cleanup_dist_env_and_memory()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
