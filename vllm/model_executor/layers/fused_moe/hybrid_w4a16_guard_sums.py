# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Checksums of an expert's tensors, as the checkpoint stores them and converted.

The guard keeps sums rather than copies because the conversion may itself need room for
a whole expert.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import CheckpointPacking

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import Int4MoEMethod

# Number of weights to compare per matrix and expert; of larger matrices only some rows
# are compared (all of Mixtral's 58 million would take a second on a CPU).
_MAX_WEIGHTS = 2 << 20
# Maximum number of weights to unpack at a time.
_CHUNK_WEIGHTS = 1 << 18


class Sums(NamedTuple):
    """Checksums of one matrix of one expert."""

    rows: torch.Tensor
    """int32 [N]: one sum over a row's weights, scales and zero points."""
    totals: dict[str, int]
    """One sum over all rows for each of the three."""


def stored(
    method: "Int4MoEMethod", layer: "RoutedExperts", expert: int
) -> dict[str, Sums]:
    """Checksums of a local expert's tensors before the conversion: "w13" and "w2"."""
    packing = method.packing
    found = {}
    for name in ("w13", "w2"):
        words = getattr(layer, f"{name}_{packing.qweight}").data[expert]
        scales = reference.stored_scales(
            packing, getattr(layer, f"{name}_{packing.scales}").data[expert]
        )
        zeros = None
        if not method.symmetric:
            zeros = getattr(layer, f"{name}_{packing.zeros}").data[expert]

        def parts(rows, words=words, scales=scales, zeros=zeros):
            yield (
                "weights",
                reference.stored_weights(
                    packing, _row_words(packing, words, rows, packing.words_along_k)
                ),
            )
            yield "scales", scales[rows].view(torch.int16)
            if zeros is not None:
                yield (
                    "zero points",
                    reference.stored_zero_points(
                        packing, _row_words(packing, zeros, rows, False)
                    ),
                )

        found[name] = _checksums(scales, _reduction(packing, words), parts)
    return found


def conversion_problem(
    method: "Int4MoEMethod",
    layer: "RoutedExperts",
    expert: int,
    kept: dict[str, Sums],
) -> str | None:
    """How the converted expert differs from the checkpoint; ``None`` if it does not."""
    packing = method.packing
    for name in ("w13", "w2"):
        words = getattr(layer, f"{name}_{packing.qweight}")[expert]
        scales = getattr(layer, f"{name}_{packing.scales}")[expert]
        zeros = None
        if not method.symmetric:
            zeros = getattr(layer, f"{name}_{packing.zeros}")[expert]

        def parts(rows, words=words, scales=scales, zeros=zeros):
            yield "weights", reference.packed_weights(words[rows])
            yield "scales", scales[rows].view(torch.int16)
            if zeros is not None:
                yield (
                    "zero points",
                    reference.packed_zero_points(zeros[rows[::8] // 8]),
                )

        now, before = _checksums(scales, words.shape[1] * 8, parts), kept[name]
        wrong = [what for what in now.totals if now.totals[what] != before.totals[what]]
        if wrong or not torch.equal(now.rows, before.rows):
            rows = (now.rows != before.rows).nonzero()[:, 0].tolist()
            return (
                f"the conversion of the {' and '.join(wrong or ['tensors'])} of {name} "
                f"from {packing.name} is wrong: local expert {expert}, "
                f"{len(rows)} of {len(now.rows)} rows, row {rows[0]} first"
            )
    return None


def _sampled_rows(rows: int, share: int, device: torch.device) -> torch.Tensor:
    """About ``rows / share`` rows in blocks of 8, at all positions within a tile."""
    blocks = rows // 8
    wanted = max(1, blocks // share)
    # an odd stride, so that all remainders modulo the size of a tile occur
    stride = max(1, blocks // wanted) | 1
    picked = (torch.arange(wanted, device=device) * stride) % blocks
    picked = picked.unique()
    return (picked[:, None] * 8 + torch.arange(8, device=device)).flatten()


def some_rows(rows: int, k: int, device: torch.device) -> torch.Tensor:
    """All rows, or as many as hold about ``_MAX_WEIGHTS`` weights."""
    share = -(-rows * k // _MAX_WEIGHTS)
    if share <= 1:
        return torch.arange(rows, device=device)
    return _sampled_rows(rows, share, device)


def _row_words(
    packing: CheckpointPacking, words: torch.Tensor, rows: torch.Tensor, along_k: bool
) -> torch.Tensor:
    """The stored words of ``rows``, in whole blocks of 8; ``along_k``: one row each."""
    index = rows if along_k else rows[::8] // 8
    return words[:, index] if packing.k_first else words[index]


def _reduction(packing: CheckpointPacking, words: torch.Tensor) -> int:
    """K, from the shape of the stored words."""
    stored = words.shape[0 if packing.k_first else 1]
    return 8 * stored if packing.words_along_k else stored


def _checksums(
    scales: torch.Tensor,
    k: int,
    parts: Callable[[torch.Tensor], Iterable[tuple[str, torch.Tensor]]],
) -> Sums:
    """Sums of integers times factors that depend on their position in the row; 0 for
    rows that are left out.

    ``parts(rows)`` yields names and values [len(rows), any].
    """
    count, device = scales.shape[0], scales.device
    sums = torch.zeros(count, dtype=torch.int32, device=device)
    parts_of: dict[str, list[torch.Tensor]] = {}
    step = max(8, _CHUNK_WEIGHTS // k // 8 * 8)
    # the share of an expert allowed for temporaries, 12 bytes per weight
    step = min(step, max(8, count // 24 // 8 * 8))
    place = torch.arange(k, dtype=torch.int32, device=device)
    # different within 32768 columns, whose product with a 16-bit value fits in an int32
    factors = ((place * 40503) & 0x7FFF) + 1
    for rows in some_rows(count, k, device).split(step):
        for what, values in parts(rows):
            part = (values * factors[: values.shape[1]]).sum(1, dtype=torch.int64)
            part = (part & 0x7FFFFFFF).to(torch.int32)
            parts_of.setdefault(what, []).append(part)
        sums[rows] = functools.reduce(
            torch.bitwise_xor, (found[-1] for found in parts_of.values())
        )
    # read once, so that the device does not wait for the host after each chunk
    totals = {what: int(torch.cat(found).sum()) for what, found in parts_of.items()}
    return Sums(sums, totals)
