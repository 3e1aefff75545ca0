#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Writes an AutoRound int4 checkpoint of random weights in a published model's shape.

It is for timing servers, and for comparing them with a reference, without a real
checkpoint: a Qwen3-MoE with the experts of ``--shape``, attention as in Qwen3-30B-A3B,
all linears except the routers in 4 bits (``auto_round:auto_gptq``, symmetric, group
size 128), and the tokenizer of the bundled checkpoint. One file per layer.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from moe_bench.shapes import SHAPES, MoEShape
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[1] / "demo/int4-autoround-g128"
GROUP = 128
# num_attention_heads, num_key_value_heads and head_dim of Qwen3-30B-A3B's config.json
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
# The symmetric zero point, 8, stored minus 1 in every nibble.
ZEROS = 0x77777777
# Standard deviation of integers drawn uniformly from -7..7.
NIBBLE_DEVIATION = 4.32


def model_config(shape: MoEShape, layers: int, vocabulary: int) -> dict:
    """Return the contents of config.json."""
    routers = {f"model.layers.{i}.mlp.gate" for i in range(layers)}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "quantization_config": {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "data_type": "int",
            "block_name_to_quantize": "model.layers",
            "extra_config": {
                name: {"bits": 16, "data_type": "fp"} for name in sorted(routers)
            },
        },
    }


class RandomTensors:
    """Makes a checkpoint's tensors on ``device`` and returns them on the CPU."""

    def __init__(self, seed: int, device: str) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def dense(self, *size: int, deviation: float) -> torch.Tensor:
        """A normally distributed bf16 tensor."""
        values = torch.randn(*size, generator=self._generator, device=self._device)
        return (deviation * values).to(torch.bfloat16).cpu()

    def linears(
        self, names: list[str], n: int, k: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """int4 [n, k] linears with a variance of about 1/k."""
        count, groups = len(names), k // GROUP
        words = torch.zeros(count, k // 8, n, dtype=torch.int32, device=self._device)
        for nibble in range(8):
            # -7..7 without -8: a nonzero mean would make all tokens alike
            q = torch.randint(
                *(1, 16, words.shape),
                generator=self._generator,
                device=self._device,
                dtype=torch.int32,
            )
            words |= q << (4 * nibble)
        scales = torch.rand(
            count, groups, n, generator=self._generator, device=self._device
        )
        scales = ((scales + 0.5) / (NIBBLE_DEVIATION * k**0.5)).half()
        words, scales = words.cpu(), scales.cpu()
        zeros = torch.full((groups, n // 8), ZEROS, dtype=torch.int32)
        for i, name in enumerate(names):
            yield f"{name}.qweight", words[i].clone()
            yield f"{name}.qzeros", zeros.clone()
            yield f"{name}.scales", scales[i].clone()


def layer_tensors(
    prefix: str, shape: MoEShape, random: RandomTensors
) -> dict[str, torch.Tensor]:
    """Return all tensors of a decoder layer by name."""
    hidden, inner = shape.hidden, shape.intermediate
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        f"{prefix}.input_layernorm.weight": ones,
        f"{prefix}.post_attention_layernorm.weight": ones.clone(),
        f"{prefix}.self_attn.q_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
        f"{prefix}.self_attn.k_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
        # 0.05: the experts' scores differ by about 2
        f"{prefix}.mlp.gate.weight": random.dense(
            shape.num_experts, hidden, deviation=0.05
        ),
    }
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    for name, (n, k) in attention.items():
        tensors.update(random.linears([f"{prefix}.self_attn.{name}"], n, k))
    experts = [f"{prefix}.mlp.experts.{e}" for e in range(shape.num_experts)]
    mlp = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    for name, (n, k) in mlp.items():
        tensors.update(random.linears([f"{e}.{name}" for e in experts], n, k))
    return tensors


def make_checkpoint(
    folder: Path,
    layers: int,
    shape: MoEShape = SHAPES["qwen3-30b-a3b"],
    device: str = "cpu",
    seed: int = 0,
    vocabulary: int | None = None,
    alike: bool = False,
) -> Path:
    """Write the checkpoint, unless it is there; returns ``folder``.

    ``vocabulary``: rows of embedding and head, at least the tokenizer's, by default as
    many. ``alike``: all layers have the first one's weights, which is enough for timing
    and faster to make. The weights depend on ``device``'s random generator, too.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    if vocabulary is None:
        config = json.loads((TOKENIZER / "config.json").read_text())
        vocabulary = config["vocab_size"]
    random = RandomTensors(seed, device)
    index: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for i in range(layers):
        prefix = f"model.layers.{i}"
        if i == 0 or not alike:
            first = layer_tensors(prefix, shape, random)
        layer = (
            {
                name.replace("model.layers.0", prefix): value
                for name, value in first.items()
            }
            if alike
            else first
        )
        write(f"model-layer-{i:03}.safetensors", layer)
    size = (vocabulary, shape.hidden)
    rest = {
        # about as large as the output that a layer adds
        "model.embed_tokens.weight": random.dense(*size, deviation=0.2),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        # logits differ by about 2 nats
        "lm_head.weight": random.dense(*size, deviation=0.05),
    }
    write("model-rest.safetensors", rest)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = model_config(shape, layers, vocabulary)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--device", default="cpu", help="where random numbers are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, help="default: the tokenizer's")
    options = parser.parse_args()
    print(
        make_checkpoint(
            options.folder,
            options.layers,
            SHAPES[options.shape],
            options.device,
            options.seed,
            options.vocabulary,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
