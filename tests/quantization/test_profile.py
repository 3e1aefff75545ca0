# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A profile of an MoE layer shows the ops by name."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ..support.moe_layers import (
    DEVICE,
    Checkpoint,
    Shape,
    inc_config,
    make_layer,
    random_routing,
    run_layer,
)


@pytest.mark.parametrize("tokens", [1, 64], ids=["decode", "prefill"])
def test_torch_profiler_shows_the_ops_by_name(tokens):
    if tokens > 1 and DEVICE != "cpu":
        pytest.skip("Triton's kernels take many tokens on a GPU")
    shape = Shape()
    layer = make_layer(shape, inc_config(shape.group_size))
    Checkpoint(shape).load_into(layer)
    x = torch.randn(tokens, shape.hidden).bfloat16()
    weights, ids = random_routing(tokens, shape)
    run_layer(layer, x, weights, ids)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_layer(layer, x, weights, ids)
    calls = {event.key: event.count for event in profiler.key_averages()}
    ours = {name: count for name, count in calls.items() if "int4" in name}
    assert ours == {
        "_rocm_C::fused_moe_wvSplitK_int4_gate_up": 1,
        "_rocm_C::fused_moe_wvSplitK_int4_down": 1,
    }
