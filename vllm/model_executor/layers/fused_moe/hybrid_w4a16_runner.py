# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the int4 kernels take over from vLLM's MoE runner beside the routed experts."""

from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe import (
    hybrid_w4a16_router,
    hybrid_w4a16_shared_expert,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def runner_built(runner: "MoERunner") -> None:
    """Let kernels compute `runner`'s shared expert and router where they can.

    A step of the runner's constructor: all parts exist, but have no weights yet.
    """
    hybrid_w4a16_shared_expert.runner_built(runner)
    hybrid_w4a16_router.runner_built(runner)
