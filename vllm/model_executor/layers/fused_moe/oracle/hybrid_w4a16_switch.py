# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The switches, which are among vLLM's environment variables.

``VLLM_HYBRID_W4A16_MOE`` is about everything:

=========== ==========================================================================
auto        default: on for ROCm gfx11/gfx12 and CPU, unless ``--moe-backend`` names one
1           on, also on CUDA, and against ``--moe-backend``
0           off: vLLM as if the package were not installed
require     like 1, and an int4 MoE layer that is declined is an error
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
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm import envs

P = ParamSpec("P")
T = TypeVar("T")

NAME = "VLLM_HYBRID_W4A16_MOE"
CHOICES = ["auto", "1", "0", "require"]
LINEAR_NAME = "VLLM_HYBRID_W4A16_LINEAR"
LINEAR_CHOICES = ["auto", "1", "0"]


def register() -> None:
    """Make the switches known to ``vllm.envs``.

    vLLM warns about ``VLLM_*`` variables that it does not know, refuses them under
    ``--fail-on-environ-validation``, and makes the known ones part of the key of its
    compile cache.
    """
    for name in (NAME, LINEAR_NAME):
        envs.environment_variables.setdefault(
            name, functools.partial(_from_environment, name)
        )


def _from_environment(name: str) -> str:
    return os.getenv(name) or "auto"


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
    return _checked(NAME, CHOICES)


def linear_value() -> str:
    """The value of the linears' switch; ``ValueError`` as ``value``."""
    return _checked(LINEAR_NAME, LINEAR_CHOICES)


def _checked(name: str, choices: list[str]) -> str:
    found = getattr(envs, name)
    if found not in choices:
        expected = ", ".join(choices)
        raise ValueError(f"invalid value {found!r} for {name}, expected: {expected}")
    return found
