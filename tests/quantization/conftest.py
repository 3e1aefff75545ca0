# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""These tests use layers as a vLLM process with the plugin builds them."""

import os

import pytest

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.plugins.hybrid_w4a16 import register

from ..support.moe_layers import become_the_only_rank, is_opt_in


@pytest.fixture(scope="session", autouse=True)
def hooks_applied():
    register()
    if is_opt_in():
        os.environ.setdefault(switch.NAME, "1")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    become_the_only_rank(tmp_path_factory.mktemp("distributed"))


@pytest.fixture
def linear_kernel_asked_for(monkeypatch):
    """On every device: the default depends on the processor."""
    monkeypatch.setenv(switch.LINEAR_NAME, "1")
