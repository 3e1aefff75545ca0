# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs engines with and without MTP drafts in one process and prints their output.

    python -m tests.support.mtp_worker CHECKPOINT \\
        '{"NAME": {"drafts": 2, "eager": true}}'

Per engine: ``drafts``, the number of drafts per step, 0 for none; ``eager``. Prints one
JSON object per engine, on a line that begins with ``MARK``: the greedy tokens and the
log-probabilities of the likeliest ones per prompt, the counters of speculative
decoding, and what the drafter's MoE layer is and holds.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .mtp_checkpoints import EXTRA_WEIGHTS, LAYER, RECIPE

if __name__ == "__main__":  # tests import this module for its constants
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_HYBRID_W4A16_LINEAR="1",
        VLLM_NO_USAGE_STATS="1",
    )
    os.environ.setdefault("VLLM_HYBRID_W4A16_MOE", "1")

MARK = "=== answers: "
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 20, 32
# Bits of the eight weights of a packed word, in order of k (hybrid_w4a16_packing.py).
_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)


def greedy(llm: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    from .tiny_models import prompts

    parameters = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        logprobs=5,
        detokenize=False,
        ignore_eos=True,
    )
    texts = [{"prompt_token_ids": ids} for ids in prompts(PROMPTS, PROMPT_TOKENS)]
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in output.outputs[0].logprobs
            ],
        }
        for output in llm.generate(texts, parameters, use_tqdm=False)
    ]


def counters(llm: Any) -> dict[str, float]:
    """Drafts and accepted tokens."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }


def experts_of(model: torch.nn.Module) -> dict[str, Any]:
    """The model's routed experts by name."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return {n: m for n, m in model.named_modules() if isinstance(m, RoutedExperts)}


def drafter_facts(worker: Any, checkpoint: str) -> dict[str, Any]:
    """The method of the drafter's MoE layer, and whether its weights are the file's."""
    runner = worker.model_runner  # on a GPU vLLM has two, with another name each
    drafter = runner.drafter if hasattr(runner, "drafter") else runner.speculator
    ((name, layer),) = experts_of(drafter.model).items()
    facts = {"layer": name, "method": type(layer.quant_method).__name__}
    if hasattr(layer, "w13_qweight"):
        facts["weights_of_the_file"] = holds_the_file(layer, Path(checkpoint))
    return facts


def holds_the_file(layer: Any, checkpoint: Path) -> bool:
    """Whether the dequantized weights are exactly the checkpoint's."""
    from safetensors.torch import load_file

    from .int4_formats import FORMATS

    file, format = load_file(checkpoint / EXTRA_WEIGHTS), FORMATS[RECIPE.format]

    def stored(expert: int, linear: str) -> np.ndarray:
        prefix = f"{LAYER}.mlp.experts.{expert}.{linear}_proj"
        parts = {s: file[f"{prefix}.{s}"] for s in ("qweight", "qzeros", "scales")}
        # vLLM loads the scales in the activations' dtype
        parts["scales"] = parts["scales"].to(layer.w13_scales.dtype).float()
        return format.dequantize({s: tensor.numpy() for s, tensor in parts.items()})

    def loaded(words: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
        q = words.cpu().numpy().view(np.uint32)[..., None] >> _SHIFTS & 15
        q = q.reshape(*words.shape[:-1], -1).astype(np.float64) - 8
        scales = scales.double().cpu().numpy()
        return q * scales.repeat(q.shape[-1] // scales.shape[-1], -1)

    w13 = loaded(layer.w13_qweight, layer.w13_scales)
    w2 = loaded(layer.w2_qweight, layer.w2_scales)
    return all(
        np.array_equal(
            w13[e], np.concatenate([stored(e, "gate"), stored(e, "up")], axis=0)
        )
        and np.array_equal(w2[e], stored(e, "down"))
        for e in range(len(w2))
    )


def run(checkpoint: str, drafts: int, eager: bool) -> dict[str, Any]:
    """Run one engine."""
    from vllm import LLM

    arguments: dict[str, Any] = {}
    if drafts:
        arguments["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": drafts,
        }
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = 0.2
    llm = LLM(
        checkpoint,
        skip_tokenizer_init=True,
        language_model_only=True,
        enforce_eager=eager,
        enable_prefix_caching=False,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=1 << 26,
        dtype="bfloat16",
        disable_log_stats=False,
        **arguments,
    )
    result: dict[str, Any] = {"answers": greedy(llm), "counters": counters(llm)}
    if drafts:
        (result["drafter"],) = llm.collective_rpc(drafter_facts, args=(checkpoint,))
    return result


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    checkpoint, engines = sys.argv[1], json.loads(sys.argv[2])
    for name, engine in engines.items():
        gc.freeze()  # see matrix_worker
        result = run(checkpoint, **engine)
        print(MARK + json.dumps({"name": name, **result}), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
