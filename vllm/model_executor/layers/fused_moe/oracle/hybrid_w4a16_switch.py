# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The switch ``VLLM_HYBRID_W4A16_MOE``, one of vLLM's environment variables.

=========== ==========================================================================
auto        default: on for ROCm gfx11/gfx12 and CPU, unless ``--moe-backend`` names one
1           on, also on CUDA, and against ``--moe-backend``
0           off: vLLM as if the package were not installed
require     like 1, and an int4 MoE layer that is declined is an error
(empty)     like auto
=========== ==========================================================================
"""

import os

from vllm import envs
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle

NAME = "VLLM_HYBRID_W4A16_MOE"
CHOICES = ["auto", "1", "0", "require"]


def register() -> None:
    """Make the switch known to ``vllm.envs``, and the decision ask it.

    vLLM warns about ``VLLM_*`` variables that it does not know, refuses them under
    ``--fail-on-environ-validation``, and makes the known ones part of the key of its
    compile cache.
    """
    envs.environment_variables.setdefault(NAME, lambda: os.getenv(NAME) or CHOICES[0])
    oracle.mode = mode


def mode() -> oracle.Mode:
    """What the switch's value means for the decision."""
    found = value()
    return oracle.Mode(
        found in ("1", "require"),
        found == "require",
        f"{NAME}={found}",
        f"{NAME}=0",
        f"{NAME}=1",
    )


def value() -> str:
    """The switch's value; ``ValueError`` naming the choices for any other."""
    found = getattr(envs, NAME)
    if found not in CHOICES:
        choices = ", ".join(CHOICES)
        raise ValueError(f"invalid value {found!r} for {NAME}, expected: {choices}")
    return found
