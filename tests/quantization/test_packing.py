# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Converting a checkpoint's words to the packed layout."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
)
from hypothesis import given, settings, strategies

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packings
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.scalar_type import scalar_types

from ..support.int4_formats import FORMATS


def unpack_exllama(words: np.ndarray) -> np.ndarray:
    """int32 [N, K//8] in ExLlama order to 0..15 [N, K], by the layout's definition."""
    shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)
    nibbles = (words.view(np.uint32)[..., None] >> shifts) & 0xF
    return nibbles.reshape(*words.shape[:-1], -1)


def unpack_row_zeros(words: np.ndarray) -> np.ndarray:
    """int32 [N//8, K//G], row n at bits 4*(n%8), to [N, K//G]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words.view(np.uint32)[:, None, :] >> shifts[None, :, None]) & 0xF
    return nibbles.reshape(-1, words.shape[1])


PACKINGS = {
    "auto_round:auto_gptq": packings.GPTQ_V1,
    "auto_round:auto_awq": packings.AWQ,
    "gptq": packings.GPTQ_V1,
    "gptq_v2": packings.GPTQ_V2,
    "awq": packings.AWQ,
    "compressed-tensors": packings.PACK_QUANTIZED,
}

layouts = {
    "format": strategies.sampled_from(sorted(PACKINGS)),
    "rows": strategies.integers(1, 6).map(lambda n: 8 * n),
    "groups": strategies.integers(1, 4),
    "group_size": strategies.sampled_from([32, 64, 128]),
    "symmetric": strategies.booleans(),
    "seed": strategies.integers(0, 2**32),
}


def stored_linear(format, rows, groups, group_size, symmetric, seed):
    """Return a random linear as its format stores it, in numpy and in torch."""
    rng = np.random.default_rng(seed)
    k = groups * group_size
    stored = FORMATS[format].random_linear(rng, rows, k, group_size, symmetric)
    return stored, {name: torch.from_numpy(array) for name, array in stored.items()}


@settings(deadline=None)
@given(**layouts)
def test_packed_is_what_is_on_disk(format, rows, groups, group_size, symmetric, seed):
    stored, tensors = stored_linear(format, rows, groups, group_size, symmetric, seed)
    packing = PACKINGS[format]
    shapes = packing.shapes(rows, groups * group_size, group_size)
    q, zero, _ = FORMATS[format].load(stored)
    for suffix, shape in shapes.items():
        if suffix in stored:
            assert stored[suffix].shape == shape
    words = packing.to_exllama(tensors[packing.qweight])
    assert words.is_contiguous()
    assert words.data_ptr() != tensors[packing.qweight].data_ptr()
    np.testing.assert_array_equal(unpack_exllama(words.numpy()), q)
    if packing.zeros in stored:
        zeros = packing.to_row_zeros(tensors[packing.zeros])
        assert zeros.is_contiguous()
        np.testing.assert_array_equal(unpack_row_zeros(zeros.numpy()), zero)
        if symmetric:
            assert (tensors[packing.zeros] == packing.symmetric_word).all()


@pytest.mark.skipif(
    ops.load_error() is None and "cpu" not in ops.build_info(),
    reason="the op library has no CPU kernels",
)
@settings(max_examples=60, deadline=None)
@given(**layouts)
def test_op_on_packed_is_matmul_on_dequantized(
    format, rows, groups, group_size, symmetric, seed
):
    assert ops.load_error() is None
    stored, tensors = stored_linear(format, rows, groups, group_size, symmetric, seed)
    packing = PACKINGS[format]
    scales = tensors[packing.scales]
    zeros = None if symmetric else packing.to_row_zeros(tensors[packing.zeros])
    x = np.random.default_rng(seed + 1).standard_normal((3, groups * group_size))
    x = x.astype(np.float16)
    output = torch.full((3, rows), float("nan"), dtype=torch.float16)
    ops.fused_moe_wvSplitK_int4_gemm(
        torch.from_numpy(x),
        packing.to_exllama(tensors[packing.qweight])[None],
        (scales.t() if packing.k_first else scales).contiguous()[None],
        output,
        torch.zeros(1, dtype=torch.int32),
        3,
        1,
        group_size,
        None if zeros is None else zeros[None],
    )
    weight = FORMATS[format].dequantize(stored)
    expected = x.astype(np.float64) @ weight.T
    # The error of fp32 accumulation, of one rounding to fp16 and, if few rows are
    # multiplied as integers (AVX-512), of half a step of max|x| / 32639 for each of
    # them.
    size = np.abs(x).astype(float)
    limit = 1e-3 * np.abs(expected) + 1e-5 * (size @ np.abs(weight).T)
    limit += size.max(1, keepdims=True) / 65278 * np.abs(weight).sum(1)
    assert (np.abs(output.double().numpy() - expected) <= limit).all()


@settings(deadline=None)
@given(seed=layouts["seed"], rows=layouts["rows"], groups=layouts["groups"])
def test_gptq_agrees_with_vllms_pack_and_unpack(seed, rows, groups):
    q = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 16, (32 * groups, rows))
    )
    stored = quant_utils.gptq_pack(q.int(), 4, *q.shape)
    words = packings.GPTQ_V1.to_exllama(stored)
    np.testing.assert_array_equal(unpack_exllama(words.numpy()), q.t())
    unpacked = quant_utils.unpack_quantized_values_into_int32(
        stored, scalar_types.uint4, packed_dim=0
    )
    assert torch.equal(unpacked, q.int())


@settings(deadline=None)
@given(seed=layouts["seed"], rows=layouts["rows"], groups=layouts["groups"])
def test_awq_agrees_with_vllms_pack(seed, rows, groups):
    q = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 16, (32 * groups, rows))
    )
    stored = quant_utils.awq_pack(q.int(), 4, *q.shape)
    words = packings.AWQ.to_exllama(stored)
    np.testing.assert_array_equal(unpack_exllama(words.numpy()), q.t())
    zeros = packings.AWQ.to_row_zeros(stored)
    np.testing.assert_array_equal(unpack_row_zeros(zeros.numpy()), q.t())


@settings(deadline=None)
@given(seed=layouts["seed"], rows=layouts["rows"], groups=layouts["groups"])
def test_pack_quantized_agrees_with_compressed_tensors(seed, rows, groups):
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.integers(-8, 8, (rows, 32 * groups), dtype=np.int8))
    words = packings.PACK_QUANTIZED.to_exllama(pack_to_int32(q, 4))
    np.testing.assert_array_equal(unpack_exllama(words.numpy()), q.numpy() + 8)
    zero = torch.from_numpy(rng.integers(-8, 8, (rows, groups), dtype=np.int8))
    stored = pack_to_int32(zero, 4, packed_dim=0).contiguous()
    zeros = packings.PACK_QUANTIZED.to_row_zeros(stored)
    np.testing.assert_array_equal(unpack_row_zeros(zeros.numpy()), zero.numpy() + 8)


def test_gptq_v1_zero_points_are_stored_minus_one_modulo_16():
    stored = np.array([[0x76543210], [0x0EDCBA98 | 0xF << 28]], np.uint32)
    zeros = packings.gptq_v1_to_row_zeros(torch.from_numpy(stored.view(np.int32)))
    expected = [0x87654321, 0x0FEDCBA9]
    assert [word & 0xFFFFFFFF for word in zeros[0].tolist()] == expected


def test_shuffle_is_the_documented_order():
    v = np.arange(8, dtype=np.uint32)  # nibble i of the stored word holds i
    stored = (v << (4 * v)).sum(dtype=np.uint32)
    word = torch.from_numpy(np.array([stored], dtype=np.uint32).view(np.int32))
    shuffled = int(packings.shuffle_exllama_(word).item()) & 0xFFFFFFFF
    for i in range(4):
        pair = (shuffled >> (4 * i)) & 0x000F000F
        assert (pair & 0xFFFF, pair >> 16) == (2 * i, 2 * i + 1)


@pytest.mark.parametrize("words", [1, 7, 8, 9, 70_000])
def test_shuffle_of_any_length_works_in_place(words):
    rng = np.random.default_rng(words)
    stored = rng.integers(-(2**31), 2**31, words, dtype=np.int64).astype(np.int32)
    tensor = torch.from_numpy(stored.copy())
    address = tensor.data_ptr()
    assert packings.shuffle_exllama_(tensor).data_ptr() == address
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    expected = (stored.view(np.uint32)[:, None] >> shifts) & 0xF
    np.testing.assert_array_equal(
        unpack_exllama(tensor.numpy()[:, None]).reshape(words, 8), expected
    )


def flags_of_the_memory_at(address: int) -> list[str]:
    """Return Linux's flags of the mapping that holds ``address`` (proc(5), VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match("([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"no mapping at {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="needs a Linux kernel with transparent huge pages",
)
def test_experts_are_advised_to_lie_on_huge_pages():
    experts = packings.empty_experts(8, (1024, 256), 1024, 2048, 0)
    middle = experts.data_ptr() + experts.nbytes // 2
    assert "hg" in flags_of_the_memory_at(middle)
    assert experts.count_nonzero() == 0


def test_advice_on_huge_pages_leaves_what_is_small_or_elsewhere_alone():
    small, elsewhere = torch.arange(4), torch.empty(1 << 20, device="meta")
    assert packings.advise_huge_pages(small) is small
    assert small.tolist() == [0, 1, 2, 3]
    assert packings.advise_huge_pages(elsewhere) is elsewhere
