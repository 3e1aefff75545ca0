# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Skips the tests that run layers where vLLM has no int4 MoE ops for the device."""

import pytest

from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
    DeviceFamily,
    device_family,
)

RUN_NO_OP = ("test_oracle.py", "test_packing.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    family = device_family()
    if isinstance(family, DeviceFamily):
        return
    for item in items:
        if item.path.name not in RUN_NO_OP or "test_op_on_packed" in item.name:
            item.add_marker(pytest.mark.skip(reason=family))
