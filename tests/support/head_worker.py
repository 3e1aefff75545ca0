# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs engines with different heads in one process and prints their output.

    python -m tests.support.head_worker CHECKPOINT '{"NAME": {"head": "int8_g32"}}'

Per engine: ``head``, a value of ``VLLM_HYBRID_W4A16_LM_HEAD`` or null; ``engine``,
arguments for ``LLM``; ``requests``, names in ``REQUESTS``, all by default; ``reload``:
whether to generate again after ``reload_weights``; ``sleep``: the same after both
levels of sleep mode.
Prints one JSON object per engine, on a line that begins with ``MARK``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tests import this module for its constants
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

MARK = "=== answers: "
ENV_NAME = "VLLM_HYBRID_W4A16_LM_HEAD"
PROMPTS = (
    'def copyfile(src, dst):\n    """',
    "import os\nimport sys\n\n\nclass Reader:\n    def read(self, size=-1):\n",
)
CHOICES = ["import os", "return None"]
ALLOWED_BIAS = {300: 100.0}

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "logprobs": 5, "max_tokens": 24},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 3, "max_tokens": 1},
    "n": {"n": 3, "temperature": 0.8, "top_p": 0.95, "seed": 7, "max_tokens": 16},
    "min_p": {"temperature": 1.0, "min_p": 0.1, "seed": 11, "max_tokens": 16},
    "logit_bias": {"temperature": 0, "logit_bias": ALLOWED_BIAS, "max_tokens": 4},
    "structured": {"temperature": 0, "max_tokens": 24, "structured": CHOICES},
}


def answer(llm: Any, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run all requests at once; return vLLM's output per name and prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompts, parameters = [], []
    for name in names:
        options = {**REQUESTS[name]}
        if choices := options.pop("structured", None):
            options["structured_outputs"] = StructuredOutputsParams(choice=choices)
        prompts += PROMPTS
        parameters += [SamplingParams(**options)] * len(PROMPTS)
    outputs = iter(llm.generate(prompts, parameters, use_tqdm=False))
    return {name: [_plain(next(outputs)) for _ in PROMPTS] for name in names}


def _plain(output: Any) -> dict[str, Any]:
    def table(logprobs: Any) -> Any:
        return logprobs and [
            step and {str(token): value.logprob for token, value in step.items()}
            for step in logprobs
        ]

    return {
        "tokens": [list(o.token_ids) for o in output.outputs],
        "texts": [o.text for o in output.outputs],
        "logprobs": [table(o.logprobs) for o in output.outputs],
        "prompt_logprobs": table(output.prompt_logprobs),
    }


def _spec_counts(llm: Any) -> dict[str, float]:
    """Return the counters of speculative decoding, without the ones per position."""
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }


def run(checkpoint: str, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from vllm import LLM

    os.environ.pop(ENV_NAME, None)
    if job.get("head") is not None:
        os.environ[ENV_NAME] = job["head"]
    names = job.get("requests") or list(REQUESTS)
    arguments = {"max_model_len": 256, "seed": 0, **job.get("engine", {})}
    if torch.cuda.is_available():  # a small model does not need vLLM's default share
        arguments = {
            "gpu_memory_utilization": 0.2,
            "kv_cache_memory_bytes": 1 << 28,
            **arguments,
        }
    llm = LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **arguments,
    )
    found: dict[str, Any] = {"answers": answer(llm, names), "again": []}
    if "speculative_config" in arguments:
        found["spec"] = _spec_counts(llm)
    if job.get("reload"):
        llm.collective_rpc("reload_weights")
        found["again"].append(answer(llm, names))
    if job.get("sleep"):
        for level in (1, 2):
            llm.sleep(level=level)
            llm.wake_up(tags=["weights"])
            if level == 2:
                llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
            found["again"].append(answer(llm, names))
    return found


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    checkpoint, jobs = sys.argv[1], json.loads(sys.argv[2])
    for name, job in jobs.items():
        try:
            found = run(checkpoint, job)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        print(f"{MARK}{json.dumps({'name': name, **found})}", flush=True)


def write_drafter(checkpoint: Path, folder: Path) -> Path:
    """Write an EAGLE drafter without a head for the target in ``checkpoint``.

    Its layer adds nothing, and ``fc`` passes on the target's hidden state. So its draft
    is the shared head's output for that state, the previous token, and rarely accepted.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((checkpoint / "config.json").read_text())
    hidden, heads, dim = config["hidden_size"], 4, 64
    folder.mkdir(parents=True)
    drafter = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(drafter))
    layer = "layers.0"
    shapes = {
        f"{layer}.self_attn.q_proj.weight": (heads * dim, hidden),
        f"{layer}.self_attn.k_proj.weight": (heads * dim, hidden),
        f"{layer}.self_attn.v_proj.weight": (heads * dim, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * dim),
        f"{layer}.mlp.gate_proj.weight": (hidden, hidden),
        f"{layer}.mlp.up_proj.weight": (hidden, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, hidden),
    }
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(hidden)
    tensors["fc.weight"] = torch.cat(
        [torch.zeros(hidden, hidden), torch.eye(hidden)], 1
    )
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main()
