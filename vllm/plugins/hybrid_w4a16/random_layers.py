# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Random int4 experts and routings, for the commands that run the kernels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packing
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROUP_SIZES = packing.GROUP_SIZES


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of a layer on one rank."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int
    dtype: torch.dtype
    symmetric: bool = True

    def __str__(self) -> str:
        return (
            f"{self.experts} experts, top-{self.top_k}, {self.hidden} x "
            f"{self.intermediate}, g{self.group_size}, {dtype_name(self.dtype)}, "
            f"{'sym' if self.symmetric else 'asym'}"
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's int4 weights and 16-bit scales."""
        weights = 3 * self.hidden * self.intermediate
        return weights // 2 + 2 * weights // self.group_size


class Int4Matrix(NamedTuple):
    """One projection of all experts, in the layout of ``hybrid_w4a16_packing``."""

    words: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def to(self, device: str) -> "Int4Matrix":
        """Return a copy on ``device``."""
        zeros = self.zero_points
        return Int4Matrix(
            self.words.to(device),
            self.scales.to(device),
            None if zeros is None else zeros.to(device),
        )

    def dequantized(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [N, K] of one expert."""
        zeros = None if self.zero_points is None else self.zero_points[expert]
        return reference.dequantize_packed(
            self.words[expert], self.scales[expert], zeros, dtype
        )


class RandomLayer(NamedTuple):
    """w13 [E, 2*I, H//8], rows 0..I-1 gate, and w2 [E, H, I//8]."""

    w13: Int4Matrix
    w2: Int4Matrix

    def to(self, device: str) -> "RandomLayer":
        """Return a copy on ``device``."""
        return RandomLayer(self.w13.to(device), self.w2.to(device))


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``fp16`` or ``bf16``."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def random_layer(shape: LayerShape, generator: torch.Generator) -> RandomLayer:
    """Make a layer of uniformly random words, with activations near unit variance.

    It is on the generator's device.
    """
    hidden, inter = shape.hidden, shape.intermediate
    return RandomLayer(
        random_matrix(shape, 2 * inter, hidden, generator),
        random_matrix(shape, hidden, inter, generator),
    )


def random_matrix(
    shape: LayerShape, n: int, k: int, generator: torch.Generator
) -> Int4Matrix:
    """Make an [E, N, K] matrix with the shape's group size, dtype and symmetry."""
    groups = k // shape.group_size
    size = (shape.experts, n, groups)
    device = generator.device
    scales = torch.rand(size, generator=generator, device=device)
    signs = torch.randint(0, 2, size, generator=generator, device=device) * 2 - 1
    # the standard deviation is 4.6 for q - 8, 6.5 for q - zero
    deviation = 4.6 if shape.symmetric else 6.5
    scales = (scales + 0.5) * signs / (deviation * k**0.5)
    zeros = None
    if not shape.symmetric:
        zeros = random_words((shape.experts, n // 8, groups), generator)
    words = random_words((shape.experts, n, k // 8), generator)
    return Int4Matrix(words, scales.to(shape.dtype), zeros)


def random_words(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return uniformly random int32 of ``size``."""
    words = torch.empty(size, dtype=torch.int32, device=generator.device)
    return words.random_(-(2**31), 2**31, generator=generator)


def random_routing(
    tokens: int, shape: LayerShape, generator: torch.Generator, skewed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 ids and fp32 weights [M, top_k]; each token has distinct experts.

    They are on the CPU, like ``generator``. Uniform, or ``skewed``: the expert of rank
    r is drawn 1/r as often as the first (Zipf's law), so that tokens share experts.
    """
    if skewed:
        # log(p) plus Gumbel noise: its largest values are a draw without replacement
        rank = torch.randperm(shape.experts, generator=generator) + 1
        noise = torch.empty(tokens, shape.experts).exponential_(generator=generator)
        score = -noise.log() - rank.log()
    else:
        score = torch.rand(tokens, shape.experts, generator=generator)
    ids = score.topk(shape.top_k).indices.to(torch.int32)
    weights = torch.randn(tokens, shape.top_k, generator=generator).softmax(1)
    return ids.contiguous(), weights
