# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Int4 experts in plain torch, written from the layout's definition.

The kernels are compared with it when a model's first layer is loaded
(``hybrid_w4a16_guard``) and by the commands ``selftest`` and ``tune``. It shares no
code with the conversion (``hybrid_w4a16_packing``) or the kernels.
"""

import math

import torch

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import CheckpointPacking

# Bit positions of v0..v7 in a word: in our layout, in plain order, and in AWQ's.
_EXLLAMA = (0, 16, 4, 20, 8, 24, 12, 28)
_PLAIN = (0, 4, 8, 12, 16, 20, 24, 28)
_AWQ = (0, 16, 4, 20, 8, 24, 12, 28)
# Largest error of an op's output against exact arithmetic, relative to its Frobenius
# norm: the rounding of 16-bit operands and results. The tests of the ops use the same
# values.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def _nibbles(words: torch.Tensor, shifts: tuple[int, ...], dim: int) -> torch.Tensor:
    """Unpack words to int32 0..15; ``dim`` becomes eight times as long."""
    shift = torch.tensor(shifts, dtype=torch.int32, device=words.device)
    # In place, so that 4 bytes per nibble are enough.
    nibbles = (words.movedim(dim, -1).unsqueeze(-1) >> shift).bitwise_and_(15)
    return nibbles.flatten(-2).movedim(-1, dim)


def packed_weights(words: torch.Tensor) -> torch.Tensor:
    """Unpack words int32 [..., N, K//8] in the ops' layout to q int32 [..., N, K]."""
    return _nibbles(words, _EXLLAMA, -1)


def packed_zero_points(zero_points: torch.Tensor) -> torch.Tensor:
    """Unpack zero points int32 [..., N//8, K//G] to int32 [..., N, K//G]."""
    return _nibbles(zero_points, _PLAIN, -2)


def stored_weights(packing: CheckpointPacking, words: torch.Tensor) -> torch.Tensor:
    """Return q int32 [N, K] of one linear's words in the checkpoint's format."""
    rows = words.t() if packing.k_first else words
    if packing.words_along_k:
        return _nibbles(rows, _PLAIN, 1)
    return _nibbles(rows, _AWQ, 0)


def stored_zero_points(packing: CheckpointPacking, zeros: torch.Tensor) -> torch.Tensor:
    """Return zero points int32 [N, K//G] of one linear in the checkpoint's format."""
    rows = zeros.t() if packing.k_first else zeros
    stored = _nibbles(rows, _PLAIN if packing.words_along_k else _AWQ, 0)
    return (stored + packing.zero_offset) & 15


def stored_scales(packing: CheckpointPacking, scales: torch.Tensor) -> torch.Tensor:
    """Return scales [N, K//G] of one linear in the checkpoint's format."""
    return scales.t() if packing.k_first else scales


def dequantize(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return weights [..., N, K] in ``dtype``: ``(q - zero) * scale``.

    Args:
        q: 0..15, [..., N, K].
        scales: [..., N, K//G].
        zero_points: 0..15, [..., N, K//G]; ``None``: 8.
        dtype: float32 or float64; the product is exact for 16-bit scales.
    """
    groups = scales.shape[-1]
    blocks = q.unflatten(-1, (groups, q.shape[-1] // groups))
    zero = 8 if zero_points is None else zero_points.unsqueeze(-1)
    weights = blocks.to(dtype).sub_(zero)
    return weights.mul_(scales.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize_packed(
    words: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Like ``dequantize``, for weights [..., N, K] in the ops' layout."""
    zeros = None if zero_points is None else packed_zero_points(zero_points)
    return dequantize(packed_weights(words), scales, zeros, dtype)


def activate(
    gate: torch.Tensor,
    up: torch.Tensor,
    name: str,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
) -> torch.Tensor:
    """The ops' activation formula, see ``fused_moe_wvSplitK_int4_gate_up``."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name in ("silu", "swigluoai"):
        gate = gate * torch.sigmoid(alpha * gate)
    else:
        approximate = "tanh" if name == "gelu_tanh" else "none"
        gate = torch.nn.functional.gelu(gate, approximate=approximate)
    return gate * (up + beta)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; 0 if both are 0."""
    difference = float((got.double() - expected.double()).norm())
    norm = float(expected.double().norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf
