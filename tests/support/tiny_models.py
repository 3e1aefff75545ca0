# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Tiny random MoE checkpoints in every format, and their expected results.

    python -m tests.support.tiny_models qwen3_moe compressed-tensors OUTPUT_FOLDER

transformers makes the model from a config and writes it. The linears of the experts,
and of attention where the recipe says so, are replaced by random int4 ones. Everything
else stays bf16. A second folder has the same weights dequantized, from which
transformers computes the expected results in float32.
"""

import argparse
import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Glm4MoeConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
)

from .int4_formats import FORMATS

WEIGHTS = "model.safetensors"
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 256, 4, 2
# Large enough that logits differ by several nats and tokens do not tie.
INITIALIZER_RANGE = 0.1
_EXPERT_WEIGHT = re.compile(r"(.*\.experts\.\d+\.\w+)\.weight")
_ATTENTION_WEIGHT = re.compile(
    r"(.*(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_\w+|out_proj)))\.weight"
)

_COMMON = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K,
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=512,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        norm_topk_prob=True,
    )


def _mixtral() -> PretrainedConfig:
    return MixtralConfig(
        **_COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS
    )


def _glm4_moe() -> PretrainedConfig:
    """A dense first layer, shared experts, sigmoid routing with a correction bias."""
    return Glm4MoeConfig(
        **_COMMON,
        intermediate_size=512,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )


def _qwen3_5_moe() -> PretrainedConfig:
    """As published: a text model inside a vision-language model.

    A shared expert, linear attention and one layer of full attention.
    """
    text = _COMMON | {
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS,  # every expert is chosen, so bf16 has no ties
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 16,  # in_proj_a has as many rows; 8 are a word
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }
    del text["tie_word_embeddings"], text["torch_dtype"]
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
    }
    return Qwen3_5MoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    )


MODELS = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
    "qwen3_5_moe": _qwen3_5_moe,
}


def _model_class(config: PretrainedConfig) -> type:
    if hasattr(config, "vision_config"):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@dataclass(frozen=True)
class Recipe:
    """The properties of a checkpoint."""

    model: str = "qwen3_moe"
    format: str = "auto_round:auto_gptq"
    symmetric: bool = True
    group_size: int = 128
    moe_intermediate_size: int = INTERMEDIATE
    int4_attention: bool = False
    experts: int = EXPERTS
    """Other than the default only for ``qwen3_moe``; then with the top 10."""

    @property
    def folder_name(self) -> str:
        sign = "sym" if self.symmetric else "asym"
        name = f"{self.model}-{self.format}-{sign}-g{self.group_size}"
        if self.moe_intermediate_size != INTERMEDIATE:
            name += f"-i{self.moe_intermediate_size}"
        if self.experts != EXPERTS:
            name += f"-e{self.experts}"
        return name.replace(":", "-") + "-int4-attention" * self.int4_attention


def make_checkpoint(recipe: Recipe, parent: Path, seed: int = 0) -> Path:
    """Make the checkpoint in ``parent`` and return its folder.

    Its subfolder ``dense`` has the dequantized weights. Several processes may ask for
    the same one.
    """
    folder = parent / recipe.folder_name
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f"{recipe.folder_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _write_checkpoint(recipe, folder, seed)
    return folder


def _write_checkpoint(recipe: Recipe, folder: Path, seed: int) -> None:
    dense = folder / "dense"
    torch.manual_seed(seed)
    model_config = MODELS[recipe.model]()
    if recipe.moe_intermediate_size != INTERMEDIATE:
        model_config.moe_intermediate_size = recipe.moe_intermediate_size
    if recipe.experts != EXPERTS:
        model_config.num_experts, model_config.num_experts_per_tok = recipe.experts, 10
    model = _model_class(model_config).from_config(model_config, dtype=torch.bfloat16)
    model.save_pretrained(dense)
    format = FORMATS[recipe.format]
    rng = np.random.default_rng(seed)
    stored: dict[str, torch.Tensor] = {}
    dequantized: dict[str, torch.Tensor] = {}
    kept = set()
    for name, tensor in sorted(load_file(dense / WEIGHTS).items()):
        quantized = _EXPERT_WEIGHT.fullmatch(name)
        if quantized is None and recipe.int4_attention:
            quantized = _ATTENTION_WEIGHT.fullmatch(name)
        if quantized is None:
            stored[name] = tensor
            dequantized[name] = tensor.float()
            kept.add(name.removesuffix(".weight"))
            continue
        n, k = tensor.shape
        # the nibbles' standard deviation is 4.6
        linear = format.random_linear(
            rng, n, k, recipe.group_size, recipe.symmetric, scale=1 / (4.6 * k**0.5)
        )
        dequantized[name] = torch.from_numpy(format.dequantize(linear)).float()
        for suffix, array in linear.items():
            stored[f"{quantized[1]}.{suffix}"] = torch.from_numpy(array)
    save_file(dequantized, dense / WEIGHTS, {"format": "pt"})
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    attention = ["self_attn", "linear_attn"]
    if recipe.int4_attention:
        attention = []
    skipped = [
        *attention,
        "mlp.gate$",
        "shared_expert",
        "visual",
        "lm_head",
        r"layers.0.mlp.\w+_",
    ]
    if recipe.format == "awq":
        skipped = sorted(kept)
    if recipe.model == "mixtral":
        skipped.append(r"block_sparse_moe.gate$")
    config["quantization_config"] = format.config(
        recipe.group_size, recipe.symmetric, skipped
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))


class DenseReference:
    """float32 results of transformers on a checkpoint's dequantized weights."""

    def __init__(self, folder: Path) -> None:
        dense = folder / "dense"
        model_class = _model_class(AutoConfig.from_pretrained(dense))
        self.model = model_class.from_pretrained(dense, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """float32 [T, vocabulary]: row t is the log-distribution of token t + 1."""
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


def prompts(count: int, length: int, seed: int = 0) -> Iterator[list[int]]:
    """Random token ids."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.integers(0, _COMMON["vocab_size"], length).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    options = parser.parse_args()
    recipe = Recipe(
        options.model, options.format, not options.asymmetric, options.group_size
    )
    print(make_checkpoint(recipe, options.folder))


if __name__ == "__main__":
    main()
