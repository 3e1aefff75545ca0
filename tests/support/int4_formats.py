# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The int4 checkpoint formats in numpy: how they store weights and what these mean.

An independent second implementation: it uses nothing of the project under test or of
vLLM. A linear is [N, K] with one scale (and zero point) per row and group of G adjacent
weights along K. Its weight is ``(q - zero) * scale``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Position in a word of eight: AWQ's nibble i holds weight AWQ_ORDER[i].
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words: np.ndarray, axis: int, order: list[int] | None = None) -> np.ndarray:
    """int32 words to nibbles 0..15, eight times as many along ``axis``."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    nibbles = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    if order is not None:
        nibbles = nibbles[..., np.argsort(order)]
    nibbles = nibbles.reshape(*words.shape[:-1], -1).astype(np.int64)
    return np.moveaxis(nibbles, -1, axis)


def pack(values: np.ndarray, axis: int, order: list[int] | None = None) -> np.ndarray:
    """The inverse of ``unpack``."""
    values = np.moveaxis(values.astype(np.uint32), axis, -1)
    values = values.reshape(*values.shape[:-1], -1, 8)
    if order is not None:
        values = values[..., order]
    words = (values << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


@dataclasses.dataclass(frozen=True)
class Int4Format:
    """How a format stores a linear."""

    name: str
    qweight: str = "qweight"
    scales: str = "scales"
    zeros: str = "qzeros"
    k_first: bool = True
    packed_along_k: bool = True
    order: list[int] | None = None
    zero_offset: int = 0  # zero point minus the stored value
    symmetric_zeros: bool = True  # whether symmetric checkpoints store zero points

    def store(
        self, q: np.ndarray, zero: np.ndarray, scales: np.ndarray, symmetric: bool
    ) -> dict[str, np.ndarray]:
        """Tensors by suffix of q [N, K] 0..15, zero [N, K/G] 0..15, scales [N, K/G]."""
        stored_zero = (zero - self.zero_offset) % 16
        if self.k_first:
            q, stored_zero, scales = q.T, stored_zero.T, scales.T
        tensors = {
            self.qweight: pack(q, self._axis(self.packed_along_k), self.order),
            self.scales: np.ascontiguousarray(scales),
        }
        if self.symmetric_zeros or not symmetric:
            tensors[self.zeros] = pack(stored_zero, self._axis(False), self.order)
        if self.name == "compressed-tensors":
            tensors["weight_shape"] = np.array(q.shape, np.int64)
        return tensors

    def load(self, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Return ``store``'s q, zero and scales; zero is 8 if none is stored."""
        q = unpack(tensors[self.qweight], self._axis(self.packed_along_k), self.order)
        scales = tensors[self.scales]
        if self.zeros in tensors:
            zero = unpack(tensors[self.zeros], self._axis(False), self.order)
        else:
            zero = np.full(scales.shape, 8 - self.zero_offset)
        if self.k_first:
            q, zero, scales = q.T, zero.T, scales.T
        return q, (zero + self.zero_offset) % 16, scales

    def dequantize(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the float64 [N, K] weight of a linear's tensors."""
        q, zero, scales = self.load(tensors)
        group = q.shape[1] // scales.shape[1]
        difference = q - zero.repeat(group, 1)
        return difference * scales.astype(np.float64).repeat(group, 1)

    def _axis(self, along_k: bool) -> int:
        return int(along_k != self.k_first)

    def random_linear(
        self,
        rng: np.random.Generator,
        n: int,
        k: int,
        group_size: int,
        symmetric: bool,
        scale: float = 1 / 64,
    ) -> dict[str, np.ndarray]:
        """Return random nibbles with fp16 scales of 0.5 to 1.5 times ``scale``."""
        shape = (n, k // group_size)
        q = rng.integers(0, 16, (n, k))
        zero = np.full(shape, 8) if symmetric else rng.integers(0, 16, shape)
        scales = (scale * rng.uniform(0.5, 1.5, shape)).astype(np.float16)
        return self.store(q, zero, scales, symmetric)

    def config(
        self, group_size: int, symmetric: bool, skipped: list[str], /, **overrides: Any
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of a config.json.

        skipped: parts of the names of linears that are not quantized.
        """
        family = self.name.partition(":")[0]
        if family == "auto_round":
            config: dict[str, Any] = {
                "quant_method": "auto-round",
                "packing_format": self.name,
                "bits": 4,
                "data_type": "int",
                "group_size": group_size,
                "sym": symmetric,
            }
            if skipped:
                config["extra_config"] = {
                    f".*{name}.*": {"bits": 16, "data_type": "fp"} for name in skipped
                }
        elif family in ("gptq", "gptq_v2"):
            config = {
                "quant_method": "gptq",
                "checkpoint_format": self.name,
                "bits": 4,
                "group_size": group_size,
                "sym": symmetric,
                "desc_act": False,
                "dynamic": {f"-:.*{name}.*": {} for name in skipped},
            }
        elif family == "awq":
            config = {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": group_size,
                "zero_point": not symmetric,
                "modules_to_not_convert": skipped,
            }
        else:
            weights = {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": group_size,
                "symmetric": symmetric,
            }
            group = {"targets": ["Linear"], "weights": weights}
            config = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": [f"re:.*{name}.*" for name in skipped],
            }
        return {**config, **overrides}


FORMATS = {
    format.name: format
    for format in (
        Int4Format("auto_round:auto_gptq", zero_offset=1),
        Int4Format("auto_round:auto_awq", packed_along_k=False, order=AWQ_ORDER),
        Int4Format("gptq", zero_offset=1),
        Int4Format("gptq_v2"),
        Int4Format("awq", packed_along_k=False, order=AWQ_ORDER),
        Int4Format(
            "compressed-tensors",
            qweight="weight_packed",
            scales="weight_scale",
            zeros="weight_zero_point",
            k_first=False,
            symmetric_zeros=False,
        ),
    )
}
