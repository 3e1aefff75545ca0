# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A tiny random Qwen3.5-MoE checkpoint with a multi-token-prediction (MTP) layer.

    python -m tests.support.mtp_checkpoints OUTPUT_FOLDER

It is laid out as AutoRound writes the published int4 checkpoints: the model's own
tensors in ``model.safetensors``, those of the MTP layer in
``model_extra_tensors.safetensors``, an index that names both files, and
``mtp.layers`` among the blocks of the quantization config. Experts and attention of the
MTP layer are int4; ``mtp.fc``, the shared expert and the router are bf16.

Random MTP layers predict nothing. Here the embedding outweighs what the layers add, so
that the next token depends mostly on the last one, and ``mtp.fc`` passes on the
embedding of the last token. Some drafts are then accepted and some are not.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .int4_formats import FORMATS
from .tiny_models import HIDDEN, WEIGHTS, Recipe, make_checkpoint

RECIPE = Recipe("qwen3_5_moe", "auto_round:auto_gptq", int4_attention=True)
EXTRA_WEIGHTS = "model_extra_tensors.safetensors"
LAYER = "mtp.layers.0"
BLOCKS = "model.language_model.layers"
BF16 = {"bits": 16, "data_type": "fp"}

# Root mean square of the embedding, in the target and after the norm in front of fc.
_EMBEDDING_SIZE = 4.0
_LAST_LAYER = re.compile(rf"{re.escape(BLOCKS)}\.1\.(.+)")


def make_mtp_checkpoint(parent: Path, int4_experts: bool = True, seed: int = 0) -> Path:
    """Make the checkpoint in ``parent`` and return its folder.

    int4_experts: else the whole MTP layer is bf16, and a recipe says so: ``.*mtp.*``.
    """
    kind = "mtp" if int4_experts else "mtp-bf16"
    folder = make_checkpoint(RECIPE, parent / kind, seed)
    if (folder / EXTRA_WEIGHTS).exists():
        return folder
    for weights in (folder / "dense" / WEIGHTS, folder / WEIGHTS):
        stored = load_file(weights)
        embedding = stored["model.language_model.embed_tokens.weight"]
        embedding *= _EMBEDDING_SIZE / embedding.float().square().mean().sqrt()
        save_file(stored, weights, {"format": "pt"})
    extra = _mtp_tensors(stored, int4_experts, np.random.default_rng([seed, 1]))
    save_file(extra, folder / EXTRA_WEIGHTS, {"format": "pt"})
    files = {name: WEIGHTS for name in stored} | {name: EXTRA_WEIGHTS for name in extra}
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    quantization = config["quantization_config"]
    quantization["block_name_to_quantize"] = [BLOCKS, "mtp.layers"]
    quantization["extra_config"] |= _recipes(extra, int4_experts)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _mtp_tensors(
    stored: dict[str, torch.Tensor], int4_experts: bool, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of the target's last layer, and fc."""
    extra: dict[str, torch.Tensor] = {}
    format = FORMATS[RECIPE.format]
    for name, tensor in sorted(stored.items()):
        found = _LAST_LAYER.fullmatch(name)
        if found is None:
            continue
        prefix, _, suffix = f"{LAYER}.{found[1]}".rpartition(".")
        if suffix == "qweight":
            k, n = 8 * tensor.shape[0], tensor.shape[1]
            scale = 1 / (4.6 * k**0.5)
            linear = format.random_linear(rng, n, k, RECIPE.group_size, True, scale)
            if int4_experts:
                for part, array in linear.items():
                    extra[f"{prefix}.{part}"] = torch.from_numpy(array)
            else:
                weight = torch.from_numpy(format.dequantize(linear))
                extra[f"{prefix}.weight"] = weight.to(torch.bfloat16)
        elif suffix not in ("qzeros", "scales"):
            noise = torch.from_numpy(rng.standard_normal(tensor.shape))
            random = tensor if "norm" in name else 0.1 * noise
            extra[f"{prefix}.{suffix}"] = random.to(tensor.dtype)
    through = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1)
    extra["mtp.fc.weight"] = (_EMBEDDING_SIZE * through).to(torch.bfloat16)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        # Qwen3.5's norms multiply by one plus their weight
        extra[f"mtp.{name}.weight"] = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    return extra


def _recipes(extra: dict[str, torch.Tensor], int4_experts: bool) -> dict[str, Any]:
    """What AutoRound writes of the linears that it leaves in bf16, one by one."""
    if not int4_experts:
        return {".*mtp.*": BF16}
    linears = (
        name.removesuffix(".weight")
        for name, tensor in extra.items()
        if name.endswith(".weight") and tensor.dim() == 2
    )
    return dict.fromkeys(linears, BF16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bf16", action="store_true", help="an MTP layer in bf16")
    options = parser.parse_args()
    print(make_mtp_checkpoint(options.folder, not options.bf16))


if __name__ == "__main__":
    main()
