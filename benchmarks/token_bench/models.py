# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Models to time: config.json of int4 checkpoints without weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.shapes import SHAPES

GROUP_SIZE = 128
GDN_GATES = r".*linear_attn\.in_proj_(a|b|ba)$"
TINY_LAYERS = 4  # three GDN layers and one with attention
FORMATS = ("auto-round", "gptq")


@dataclass(frozen=True)
class Model:
    """A model at its published size; ``tiny`` is what a small one for tests changes.

    ``in_16_bit`` are regular expressions for the linears that published AutoRound
    checkpoints leave in 16 bits.
    """

    name: str
    layers: int
    config: dict[str, Any]
    tiny: dict[str, Any]
    in_16_bit: tuple[str, ...]
    blocks: tuple[str, ...] = ("model.layers",)
    has_mtp: bool = False


def _experts(name: str) -> dict[str, int]:
    shape = SHAPES[name]
    return {
        "hidden_size": shape.hidden,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.intermediate,
    }


_SHARED = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_TINY = {
    "hidden_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 3072,
}
_ROUTER = r".*mlp\.gate$"

# Sizes from each model's published config.json.
MODELS = {
    model.name: model
    for model in (
        Model(
            "qwen3.5-35b-a3b",
            40,
            {
                **_SHARED,
                **_experts("qwen3.5-35b-a3b"),
                "architectures": ["Qwen3_5MoeForCausalLM"],
                "model_type": "qwen3_5_moe_text",
                "vocab_size": 248320,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e7,
                    "partial_rotary_factor": 0.25,
                },
                "shared_expert_intermediate_size": 512,
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_value_head_dim": 128,
                "linear_num_value_heads": 32,
                "mamba_ssm_dtype": "float32",
                "mtp_num_hidden_layers": 1,
            },
            {
                **_TINY,
                "shared_expert_intermediate_size": 128,
                "linear_key_head_dim": 64,
                "linear_num_key_heads": 2,
                "linear_value_head_dim": 64,
                "linear_num_value_heads": 16,
            },
            # with "mtp" in it, vLLM leaves a GPTQ checkpoint's MTP layer in 16 bits
            (_ROUTER, r".*shared_expert.*", r".*\.fc$"),
            ("model.layers", "mtp.layers"),
            has_mtp=True,
        ),
        Model(
            "qwen3-30b-a3b",
            48,
            {
                **_SHARED,
                **_experts("qwen3-30b-a3b"),
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "vocab_size": 151936,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "rope_theta": 1e6,
                "intermediate_size": 6144,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            {**_TINY, "intermediate_size": 512},
            (_ROUTER,),
        ),
    )
}


def write_config(
    folder: Path,
    model: Model,
    layers: int | None = None,
    tiny: bool = False,
    checkpoint: str = "auto-round",
    in_16_bit: Sequence[str] = (),
) -> dict[str, Any]:
    """Write ``folder``/config.json and return its contents.

    Args:
        folder: made if it does not exist.
        layers: number of decoder layers; ``None``: as many as the model has.
        tiny: small sizes, for tests.
        checkpoint: one of ``FORMATS``; both store the same tensors.
        in_16_bit: more linears to leave in 16 bits, as regular expressions.
    """
    config = {**model.config, **(model.tiny if tiny else {})}
    layers = layers or (TINY_LAYERS if tiny else model.layers)
    config["num_hidden_layers"] = layers
    interval = config.get("full_attention_interval")
    if interval is not None:
        config["layer_types"] = [
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(layers)
        ]
    patterns = [*model.in_16_bit, *in_16_bit]
    quantization: dict[str, Any] = {"bits": 4, "group_size": GROUP_SIZE, "sym": True}
    if checkpoint == "gptq":
        quantization |= {
            "quant_method": "gptq",
            "desc_act": False,
            "dynamic": {f"-:{pattern}": {} for pattern in patterns},
        }
    else:
        quantization |= {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "data_type": "int",
            "block_name_to_quantize": list(model.blocks),
            "extra_config": dict.fromkeys(patterns, {"bits": 16, "data_type": "float"}),
        }
    config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return config
