# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The switch ``VLLM_HYBRID_W4A16_MOE``, one of vLLM's environment variables.

=========== ==========================================================================
auto        default: on for ROCm gfx11/gfx12 and CPU, unless ``--moe-backend`` names one
1           on, also on CUDA; overrides ``--moe-backend``
0           off: vLLM behaves as if the package were not installed
require     like 1, but an int4 MoE layer that is declined is an error
(empty)     like auto
=========== ==========================================================================
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm import envs

P = ParamSpec("P")
T = TypeVar("T")

NAME = "VLLM_HYBRID_W4A16_MOE"
CHOICES = ["auto", "1", "0", "require"]


def register() -> None:
    """Make the switch known to ``vllm.envs``.

    vLLM warns about unknown ``VLLM_*`` variables and rejects them under
    ``--fail-on-environ-validation``. Known ones are part of the key of its compile
    cache.
    """
    envs.environment_variables.setdefault(NAME, lambda: os.getenv(NAME) or CHOICES[0])


def unless_off(handler: Callable[P, T]) -> Callable[P, T | None]:
    """Decorate a hook's handler: with the switch at 0 it returns ``None`` at once.

    In the fork the hooks are part of vLLM's factories, whatever the switch is.
    """

    @functools.wraps(handler)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return None if value() == "0" else handler(*args, **kwargs)

    return wrapper


def value() -> str:
    """Return the switch's value; raises ``ValueError`` if it is not a valid choice."""
    found = getattr(envs, NAME)
    if found not in CHOICES:
        choices = ", ".join(CHOICES)
        raise ValueError(f"invalid value {found!r} for {NAME}, expected: {choices}")
    return found
