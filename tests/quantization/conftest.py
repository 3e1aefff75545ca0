# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""These tests use layers as a vLLM process with the plugin builds them."""

import os

import pytest

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.plugins.hybrid_w4a16 import register

from ..support.moe_layers import is_opt_in


@pytest.fixture(scope="session", autouse=True)
def hooks_applied():
    register()
    if is_opt_in():
        os.environ.setdefault(switch.NAME, "1")
