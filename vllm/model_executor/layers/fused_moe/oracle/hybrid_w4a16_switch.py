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

    vLLM warns about ``VLLM_*`` variables that it does not know, refuses them under
    ``--fail-on-environ-validation``, and makes the known ones part of the key of its
    compile cache.
    """
    envs.environment_variables.setdefault(NAME, lambda: os.getenv(NAME) or CHOICES[0])


def unless_off(handler: Callable[P, T]) -> Callable[P, T | None]:
    """Decorator of a hook's handler: under 0 it is not called, the result is ``None``.

    In the fork the hooks are part of vLLM's factories whatever the switch says.
    """

    @functools.wraps(handler)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return None if value() == "0" else handler(*args, **kwargs)

    return wrapper


def value() -> str:
    """The switch's value; ``ValueError`` naming the choices for any other."""
    found = getattr(envs, NAME)
    if found not in CHOICES:
        choices = ", ".join(CHOICES)
        raise ValueError(f"invalid value {found!r} for {NAME}, expected: {choices}")
    return found
