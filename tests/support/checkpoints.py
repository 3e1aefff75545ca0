# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Variants of an ``auto_round:auto_gptq`` checkpoint folder, for tests."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .reference_model import dequantize

WEIGHTS = "model.safetensors"
# Zero point 8 in all eight nibbles, stored minus one.
SYMMETRIC_ZEROS = 0x77777777


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Make a writable copy of a checkpoint folder at ``target``; return ``target``."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the folder's weights file."""
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def quantize(w: np.ndarray, group_size: int) -> tuple[np.ndarray, ...]:
    """Quantize to symmetric int4 by rounding to nearest.

    Returns the arguments of ``dequantize``.

    Args:
        w: float32 [N, K].
        group_size: divides K.
    """
    n, k = w.shape
    groups = w.reshape(n, -1, group_size)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    scales = np.maximum(largest / 7, 1e-6).astype(np.float16)
    q = np.clip(np.rint(groups / scales.astype(np.float32)) + 8, 0, 15)
    nibbles = q.reshape(n, k).T.astype(np.uint32).reshape(k // 8, 8, n)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    qweight = np.bitwise_or.reduce(nibbles << shifts, axis=1).view(np.int32)
    qzeros = np.full((k // group_size, n // 8), SYMMETRIC_ZEROS, np.int32)
    return qweight, qzeros, np.ascontiguousarray(scales[:, :, 0].T)


def requantize(source: Path, target: Path, group_size: int) -> Path:
    """Write the checkpoint of ``source`` with another group size to ``target``."""
    copy_checkpoint(source, target)
    tensors = load_file(target / WEIGHTS)
    parts = ("qweight", "qzeros", "scales")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        names = [name.replace("qweight", part) for part in parts]
        w = dequantize(*(tensors[name].numpy() for name in names))
        for name, array in zip(names, quantize(w, group_size), strict=True):
            tensors[name] = torch.from_numpy(array)
    save_weights(tensors, target)
    for file in (target / "config.json", target / "quantization_config.json"):
        config = json.loads(file.read_text())
        config.get("quantization_config", config)["group_size"] = group_size
        file.write_text(json.dumps(config, indent=2))
    return target
