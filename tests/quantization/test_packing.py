# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""From a checkpoint's words to the packed layout."""

import numpy as np
import pytest
import torch
from moe_layers import GptqLinear, random_gptq_linear

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_moe_helper as helper


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 32, 32), (24, 384, 128)])
def test_gptq_to_packed_and_back(n, k, group_size, symmetric):
    rng = np.random.default_rng(n)
    linear: GptqLinear = random_gptq_linear(rng, n, k, group_size, symmetric)
    words = helper.gptq_to_exllama(torch.from_numpy(linear.qweight)).numpy()
    zeros = helper.gptq_v1_to_row_zeros(torch.from_numpy(linear.qzeros)).numpy()
    assert words.shape == (n, k // 8) and zeros.shape == (n // 8, k // group_size)
    group = np.arange(k) // group_size
    scales = linear.scales.T.astype(np.float64)[:, group]
    zero_points = unpack_row_zeros(zeros).astype(np.float64)[:, group]
    weight = (unpack_exllama(words) - zero_points) * scales
    np.testing.assert_allclose(weight, linear.weight, atol=1e-3 * abs(weight).max())


def test_shuffle_is_the_documented_order():
    v = np.arange(8, dtype=np.uint32)  # nibble i of the stored word holds i
    stored = (v << (4 * v)).sum(dtype=np.uint32)
    word = torch.from_numpy(np.array([stored], dtype=np.uint32).view(np.int32))
    shuffled = int(helper.shuffle_exllama_(word).item()) & 0xFFFFFFFF
    for i in range(4):
        pair = (shuffled >> (4 * i)) & 0x000F000F
        assert (pair & 0xFFFF, pair >> 16) == (2 * i, 2 * i + 1)


@pytest.mark.parametrize("words", [1, 7, 8, 9, 70_000])
def test_shuffle_of_any_length_works_in_place(words):
    rng = np.random.default_rng(words)
    stored = rng.integers(-(2**31), 2**31, words, dtype=np.int64).astype(np.int32)
    tensor = torch.from_numpy(stored.copy())
    address = tensor.data_ptr()
    assert helper.shuffle_exllama_(tensor).data_ptr() == address
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    expected = (stored.view(np.uint32)[:, None] >> shifts) & 0xF
    np.testing.assert_array_equal(
        unpack_exllama(tensor.numpy()[:, None]).reshape(words, 8), expected
    )
