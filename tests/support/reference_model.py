# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The expected results of a Qwen3-MoE AutoRound checkpoint: an independent reference.

It runs transformers in float32 on weights that the few lines of numpy below dequantize
from the file on disk. It uses nothing of the project under test or of vLLM.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeForCausalLM
from transformers.initialization import no_init_weights

_NUMPY_OF = {
    "I64": np.int64,
    "I32": np.int32,
    "F16": np.float16,
    "F32": np.float32,
    "BF16": np.uint16,
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file; bf16 is widened to float32.

    The format is 8 bytes of little-endian header length, a JSON header with dtype,
    shape and byte range of each tensor, then the bytes.
    """
    blob = path.read_bytes()
    (header_size,) = struct.unpack("<Q", blob[:8])
    body = 8 + header_size
    tensors = {}
    for name, entry in json.loads(blob[8:body]).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        data = np.frombuffer(blob[body + start : body + end], _NUMPY_OF[entry["dtype"]])
        if entry["dtype"] == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def dequantize(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """Return the float32 [N, K] weight of a linear in GPTQ v1 storage (``auto_gptq``).

    qweight int32 [K/8, N], nibble i of a word is row 8*k8 + i; qzeros int32
    [K/G, N/8], nibble j is column 8*n8 + j, stored minus 1; scales fp16 [K/G, N].
    """
    nibbles = np.arange(0, 32, 4)
    q = (qweight[:, None, :] >> nibbles[:, None]) & 15  # [K/8, 8, N]
    zp = ((qzeros[:, :, None] >> nibbles) & 15) + 1  # [K/G, N/8, 8]
    q = q.reshape(-1, qweight.shape[1])
    zp = zp.reshape(scales.shape)
    group = q.shape[0] // scales.shape[0]
    w = (q - zp.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    return w.T.astype(np.float32)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's dequantized weights in float32, named as in the files."""
    dense = {}
    for file in sorted(folder.glob("*.safetensors")):
        dense.update(_dense(read_safetensors(file)))
    return {name: torch.from_numpy(w) for name, w in dense.items()}


def _dense(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    dense = {}
    for name, tensor in stored.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = (stored[f"{layer}.{part}"] for part in ("qzeros", "scales"))
            dense[f"{layer}.weight"] = dequantize(tensor, *parts)
        elif kind not in ("qzeros", "scales"):
            dense[name] = np.array(tensor, np.float32)
    return dense


def _fuse_experts(
    weights: dict[str, torch.Tensor], num_layers: int, num_experts: int
) -> None:
    """Replace per-expert weights by the stacks that transformers 5 uses."""
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack(
                [weights.pop(f"{prefix}.{e}.{p}.weight") for e in range(num_experts)]
            )
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        weights[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[f"{prefix}.down_proj"] = down


class ReferenceModel:
    """float32 results of an ``auto_round:auto_gptq`` Qwen3-MoE checkpoint.

    Args:
        folder: has config.json, tokenizer.json and ``*.safetensors``; all tensors of a
            linear must be in one file.
    """

    def __init__(self, folder: Path):
        config = AutoConfig.from_pretrained(folder, dtype=torch.float32)
        del config.quantization_config
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        weights = _weights(folder)
        _fuse_experts(weights, config.num_hidden_layers, config.num_experts)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        with no_init_weights():  # initializing a large model takes long
            self.model = Qwen3MoeForCausalLM(config).eval()
        self.model.load_state_dict(weights, assign=True)

    @torch.inference_mode()
    def logprobs_of(self, sequences: Sequence[list[int]]) -> list[torch.Tensor]:
        """Per sequence float32 [T, vocabulary]: row t is the log-distribution of token
        t + 1.

        One forward pass for all takes a sixth of the time of separate ones. The padding
        is after a sequence's tokens, so causal attention never sees it.
        """
        longest = max(map(len, sequences))
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in sequences]
        logits = self.model(torch.tensor(padded), use_cache=False).logits
        return [
            torch.log_softmax(rows[: len(tokens)].float(), dim=-1)
            for rows, tokens in zip(logits, sequences, strict=True)
        ]

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """``logprobs_of`` a single sequence."""
        return self.logprobs_of([tokens])[0]

    def text_logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Return float32 [T - 1]: the log-probability of every token but the first."""
        following = torch.tensor(tokens[1:])
        return self.logprobs(tokens)[:-1].gather(1, following[:, None])[:, 0]
