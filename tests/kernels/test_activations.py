# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The activations' formulas have the same numbers in C++, Triton and Python."""

import re
from pathlib import Path

import pytest

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

HEADER = Path(__file__).resolve().parents[2] / "csrc/moe_int4_args.h"
FORMULAS = {name: formula for name, formula in ops.ACTIVATIONS.values()}


def own_formulas() -> dict[str, int]:
    """Only one name per formula; others have the same formula with other parameters."""
    return {name: number for name, number in FORMULAS.items() if name != "swigluoai"}


def test_the_cpp_enum_has_the_same_numbers():
    (body,) = re.findall(r"enum class Activation[^{]*\{([^}]*)\}", HEADER.read_text())
    enum = dict(re.findall(r"k(\w+)\s*=\s*(\d+)", body))
    camel = {name.title().replace("_", ""): n for name, n in own_formulas().items()}
    assert {name: int(number) for name, number in enum.items()} == camel
    assert FORMULAS["swigluoai"] == FORMULAS["silu"]


def test_the_triton_constants_have_the_same_numbers():
    prefill = pytest.importorskip(
        "vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_triton"
    )
    for name, number in own_formulas().items():
        assert getattr(prefill, name.upper()).value == number
