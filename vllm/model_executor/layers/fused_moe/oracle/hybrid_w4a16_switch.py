# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The switches, which are among vLLM's environment variables.

``VLLM_HYBRID_W4A16_MOE`` is about everything:

=========== ==========================================================================
auto        default: on for ROCm gfx11/gfx12 and CPU, unless ``--moe-backend`` names one
1           on, also on CUDA; overrides ``--moe-backend``
0           off: vLLM behaves as if the package were not installed
require     like 1, but an int4 MoE layer that is declined is an error
(empty)     like auto
=========== ==========================================================================

``VLLM_HYBRID_W4A16_LINEAR`` is about the dense int4 linears beside the experts, where
the first one is not 0:

=========== ==========================================================================
auto        default: on for the CPU, except for bf16 with AMX; on CUDA where
            ``VLLM_HYBRID_W4A16_MOE`` is 1 or require; off on ROCm
1           on, also on ROCm and with AMX
0           off
(empty)     like auto
=========== ==========================================================================
"""

import functools
import os

from vllm import envs
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle

NAME = "VLLM_HYBRID_W4A16_MOE"
CHOICES = ["auto", "1", "0", "require"]
LINEAR_NAME = "VLLM_HYBRID_W4A16_LINEAR"
LINEAR_CHOICES = ["auto", "1", "0"]


def register() -> None:
    """Make the switches known to ``vllm.envs``, and let the decision read them.

    vLLM warns about unknown ``VLLM_*`` variables and rejects them under
    ``--fail-on-environ-validation``. Known ones are part of the key of its compile
    cache.
    """
    for name in (NAME, LINEAR_NAME):
        envs.environment_variables.setdefault(
            name, functools.partial(_from_environment, name)
        )
    oracle.mode = mode


def _from_environment(name: str) -> str:
    return os.getenv(name) or "auto"


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
    """Return the switch's value; raises ``ValueError`` if it is not a valid choice."""
    return _checked(NAME, CHOICES)


def linear_value() -> str:
    """Return the linears' switch; raises ``ValueError`` if it is not a valid choice."""
    return _checked(LINEAR_NAME, LINEAR_CHOICES)


def _checked(name: str, choices: list[str]) -> str:
    found = getattr(envs, name)
    if found not in choices:
        expected = ", ".join(choices)
        raise ValueError(f"invalid value {found!r} for {name}, expected: {expected}")
    return found
