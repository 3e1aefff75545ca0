# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The weight layout of the int4 MoE ops, and how checkpoints store the same weights.

E experts of this rank, K the reduction size, N output rows, G the group size. Every op
and kernel reads::

    w            int32 [E, N, K//8], ExLlama-shuffled: bits of a word are
                 v0 | v2<<4 | v4<<8 | v6<<12 | v1<<16 | v3<<20 | v5<<24 | v7<<28;
                 strides (any, multiple of 4 words >= K//8, 1), 16-byte aligned
    scales       activation dtype [E, N, K//G], innermost stride 1
    zero_points  int32 [E, N//8, K//G], row n at word n//8, bits 4*(n%8), innermost
                 stride 1; ``None``: symmetric, zero point 8
    dequantized  w[n, k] = (q[n, k] - zp[n, k//G]) * scales[n, k//G], q in 0..15

A ``CheckpointPacking`` describes one checkpoint format and converts it, one expert at a
time. This module imports nothing of this project.
"""

import ctypes
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEQuantConfig,
    )

# The bit shuffle works on chunks, so that its temporaries stay small beside an expert:
# at least this many, of at most about this many words.
_SHUFFLE_CHUNKS = 8
_SHUFFLE_CHUNK_WORDS = 1 << 16
# Of x86-64 and, with pages of 4 KiB, of AArch64; smaller tensors cannot hold one.
_HUGE_PAGE = 2 << 20
# Weights along K per scale that the kernels read.
GROUP_SIZES = (32, 64, 128)
# Which row of eight an AWQ word's nibble i belongs to.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class CheckpointPacking:
    """How a checkpoint format stores one expert's [N, K] linear.

    Its tensors are named ``<projection>.<suffix>`` on disk, the layer's parameters
    ``w13_<suffix>`` and ``w2_<suffix>``.
    """

    name: str
    """What error messages call the format."""
    qweight: str
    """Suffix of the weights, eight nibbles to an int32 word."""
    scales: str
    """Suffix of the scales, one per row and group of K."""
    zeros: str
    """Suffix of the zero points, eight rows to an int32 word, one word per group."""
    weight_shape: str | None
    """Suffix of a record of [N, K] that goes with the weights, if there is one."""
    k_first: bool
    """K (or groups of K) is the first dimension of each tensor, else N is."""
    words_along_k: bool
    """A word of weights holds neighbours along K, else along N."""
    symmetric_zeros: bool
    """A symmetric checkpoint stores zero points all the same."""
    zero_offset: int
    """Zero point minus the stored nibble: 1 in the GPTQ v1 convention, else 0."""
    to_exllama: Callable[[torch.Tensor], torch.Tensor]
    """One expert's stored weights to a new int32 [N, K//8], ExLlama order."""
    to_row_zeros: Callable[[torch.Tensor], torch.Tensor]
    """One expert's stored zero points to a new int32 [N//8, K//G]."""

    def shapes(self, n: int, k: int, group_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one expert's stored tensors, by suffix."""
        words = (n, k // 8) if self.words_along_k else (n // 8, k)
        groups = k // group_size
        by_row: dict[str, tuple[int, ...]] = {
            self.qweight: words,
            self.scales: (n, groups),
            self.zeros: (n // 8, groups),
        }
        if not self.k_first:
            return by_row
        return {suffix: shape[::-1] for suffix, shape in by_row.items()}

    @property
    def symmetric_word(self) -> int:
        """The int32 word that stands for eight zero points of 8."""
        nibble = 8 - self.zero_offset
        return int.from_bytes(bytes([nibble * 0x11] * 4), "little", signed=True)


class Int4MoEMethod(Protocol):
    """What the set-up needs to know of a layer's method."""

    packing: CheckpointPacking
    """How the checkpoint stores the experts."""
    symmetric: bool
    """Whether every zero point is 8."""
    moe: "FusedMoEConfig"

    def get_fused_moe_quant_config(
        self, layer: "RoutedExperts"
    ) -> "FusedMoEQuantConfig | None": ...


def shard_group_size(group_size: int, k: int) -> int:
    """Group size of a rank's shard of ``k`` weights along K.

    Where a shard boundary cuts a group of the checkpoint, the shard is stored with
    smaller groups, each with a copy of the scale and zero point of the group that it is
    a part of. The dequantized weights are the same. The result may be one that is not
    in ``GROUP_SIZES``.
    """
    return math.gcd(group_size, k)


def empty_experts(
    num_experts: int, shape: tuple[int, ...], n: int, k: int, padding: int
) -> torch.Tensor:
    """Zeroed int32 [num_experts, *shape] for stored weights of [N, K] linears.

    With ``padding``, words per packed row, experts lie further apart: each has the room
    that its N padded rows need later, so that padding costs no second buffer.
    """
    slots = advise_huge_pages(
        torch.zeros(num_experts, n * (k // 8 + padding), dtype=torch.int32)
    )
    return slots[:, : n * k // 8].view(num_experts, *shape)


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask Linux for huge pages under a CPU tensor that has not been written yet.

    Decode reads each expert's weights once, a few MiB here and there: with pages of
    4 KiB a part of that time goes into looking up where they are. Advice: where the
    kernel does not take it, or off Linux, nothing changes. Returns ``tensor``.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type != "cpu" or advice is None:
        return tensor
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.untyped_storage().nbytes() - begin
    if size >= _HUGE_PAGE:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(advice)
        )
    return tensor


def shuffle_exllama_(words: torch.Tensor) -> torch.Tensor:
    """Reorder the nibbles of contiguous int32 words in place.

    From v0..v7 at bits 0, 4, .., 28 to the ExLlama order of the module:
    even nibbles in the low half of the word, odd ones in the high half.
    """
    flat = words.view(-1)
    for chunk in flat.chunk(max(_SHUFFLE_CHUNKS, flat.numel() // _SHUFFLE_CHUNK_WORDS)):
        for shift, mask in ((4, 0x00F000F0), (8, 0x0000FF00)):
            # swaps the bits under mask with those that lie shift higher
            swap = (chunk >> shift).bitwise_xor_(chunk).bitwise_and_(mask)
            chunk ^= swap
            chunk ^= swap.bitwise_left_shift_(shift)
    return words


def transposed_copy(matrix: torch.Tensor) -> torch.Tensor:
    # a copy also where the transpose of a single row or column would be a mere view
    return matrix.t().clone(memory_format=torch.contiguous_format)


def gptq_to_exllama(qweight: torch.Tensor) -> torch.Tensor:
    """GPTQ words int32 [K//8, N], nibble i is k = 8*k8+i, to ExLlama [N, K//8]."""
    return shuffle_exllama_(transposed_copy(qweight))


def gptq_v1_to_row_zeros(qzeros: torch.Tensor) -> torch.Tensor:
    """GPTQ v1 zero points int32 [K//G, N//8], stored minus one, to [N//8, K//G]."""
    # adds 1 to every nibble, modulo 16, without carries between nibbles
    plus_one = ((qzeros & 0x77777777) + 0x11111111) ^ (qzeros & ~0x77777777)
    return transposed_copy(plus_one)


def awq_to_exllama(qweight: torch.Tensor) -> torch.Tensor:
    """AWQ words int32 [K, N//8], nibble i is n = 8*n8+[0,2,4,6,1,3,5,7][i], to ExLlama
    [N, K//8]. Needs three eighths of the result on top.

    ExLlama's order along K is AWQ's along N: even ones first. So rows of eight are put
    into that order, the 8x8 nibbles transposed, and words come out in that order.
    """
    k8, n8 = qweight.shape[0] // 8, qweight.shape[1]
    packed = qweight.new_empty(n8, 4, 2, k8)
    for rows, words in zip(
        qweight.view(k8, 4, 2, n8).chunk(4), packed.chunk(4, dim=3), strict=True
    ):
        block = rows.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        _transpose_nibbles_(block.view(-1, 8, n8))
        words.copy_(block.permute(3, 2, 1, 0))
    return packed.view(8 * n8, k8)


def _transpose_nibbles_(words: torch.Tensor) -> None:
    """Swap nibble i of word j with nibble j of word i, in int32 [B, 8, W], in place."""
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = words.view(len(words), -1, 2, distance, words.shape[2])
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        swap = (low >> (4 * distance)).bitwise_xor_(high).bitwise_and_(mask)
        high ^= swap
        low ^= swap.bitwise_left_shift_(4 * distance)


def awq_to_row_zeros(qzeros: torch.Tensor) -> torch.Tensor:
    """AWQ zero points int32 [K//G, N//8], in AWQ's order, to [N//8, K//G]."""
    ordered = torch.zeros_like(qzeros)
    for nibble, row in enumerate(_AWQ_ORDER):
        ordered |= ((qzeros >> (4 * nibble)) & 0xF) << (4 * row)
    return transposed_copy(ordered)


def rows_to_exllama(weight_packed: torch.Tensor) -> torch.Tensor:
    """compressed-tensors words int32 [N, K//8], nibble i is k = 8*k8+i, to ExLlama."""
    return shuffle_exllama_(weight_packed.clone())


GPTQ_V1 = CheckpointPacking(
    name="GPTQ",
    qweight="qweight",
    scales="scales",
    zeros="qzeros",
    weight_shape=None,
    k_first=True,
    words_along_k=True,
    symmetric_zeros=True,
    zero_offset=1,
    to_exllama=gptq_to_exllama,
    to_row_zeros=gptq_v1_to_row_zeros,
)
GPTQ_V2 = replace(GPTQ_V1, name="GPTQ v2", zero_offset=0, to_row_zeros=transposed_copy)
AWQ = replace(
    GPTQ_V2,
    name="AWQ",
    words_along_k=False,
    to_exllama=awq_to_exllama,
    to_row_zeros=awq_to_row_zeros,
)
PACK_QUANTIZED = CheckpointPacking(
    name="compressed-tensors pack-quantized",
    qweight="weight_packed",
    scales="weight_scale",
    zeros="weight_zero_point",
    weight_shape="weight_shape",
    k_first=False,
    words_along_k=True,
    symmetric_zeros=False,
    zero_offset=0,
    to_exllama=rows_to_exllama,
    to_row_zeros=torch.clone,
)
