# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Names under which vLLM's users ask for a quantized lm_head, or linear.

``--quantization-config '{"targets": {"lm_head": "int4_rescored"}}'``, which composes
with any checkpoint whose head is in 16 bits.
"""

# fork: begin overlay
# vLLM checks the names of ``targets`` when it reads the command line, for ``LLM(...)``
# before it loads plugins. There the variable VLLM_HYBRID_W4A16_LM_HEAD says the same.
#
# What drafters (MTP, EAGLE) that share the head compute their logits from is named
# apart: ``--speculative-config '{..., "draft_lm_head_quantization": "int4"}'``, which
# vLLM has since 0.33 for other formats, or the target ``draft_lm_head``.
# fork: end

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm import envs
from vllm.config.quantization import (
    _ONLINE_SHORTHANDS,
    QuantizationConfigArgs,
    QuantSpec,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    ScaleDesc,
)
from vllm.scalar_type import scalar_types

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

# fork: begin overlay
ENV_NAME = "VLLM_HYBRID_W4A16_LM_HEAD"
# fork: end


@dataclass(frozen=True)
class HeadScheme:
    """How the rows of an lm_head are kept."""

    bits: int
    group_size: int
    rescored: bool = False
    """The 16-bit weights stay beside the quantized ones and correct their logits."""

    def bytes_per_weight(self) -> float:
        """Of one pass over the quantized weights and their 16-bit scales."""
        return self.bits / 8 + 2 / self.group_size

    def kept_bytes_per_weight(self) -> float:
        """In memory, without what a tied embedding keeps anyway."""
        return self.bytes_per_weight() + (2 if self.rescored else 0)


SCHEMES = {
    "int8_g32": HeadScheme(8, 32),
    "int4_g32": HeadScheme(4, 32),
    "int4_g128": HeadScheme(4, 128),
    "int4_rescored": HeadScheme(4, 128, rescored=True),
}


# fork: begin overlay
def linear_key(scheme: HeadScheme) -> QuantKey:
    """What vLLM's table of linear methods knows a scheme by.

    Scales are in the activation dtype; bf16 tells the key from vLLM's own of int4.
    """
    dtype = scalar_types.uint4b8 if scheme.bits == 4 else scalar_types.uint8b128
    return QuantKey(
        dtype, ScaleDesc(torch.bfloat16, True, GroupShape(1, scheme.group_size))
    )


DRAFT_OPTION = "draft_lm_head_quantization"
"""Key of ``--speculative-config``."""
DRAFT_ATTRIBUTE = "hybrid_w4a16_draft_lm_head"
"""Attribute of a ``SpeculativeConfig``: the scheme that ``DRAFT_OPTION`` asked for."""
DRAFT_TARGET = "draft_lm_head"
"""Key of ``targets`` that says the same."""
DRAFT_SCHEMES = {"int4": "int4_g128", "int8": "int8_g32"}
"""Values of ``DRAFT_OPTION``, beside the names of schemes, which both keys take."""


def draft_scheme(value: object) -> str | None:
    """The scheme that a drafter's option names, ``None`` if it names none of ours.

    Rescored schemes are not among them: drafts are verified anyway.
    """
    name = DRAFT_SCHEMES.get(str(value), str(value))
    return name if name in SCHEMES and not SCHEMES[name].rescored else None


def register() -> None:
    """Make the names known to vLLM, as values of ``targets`` and of the variable.

    Experts get vLLM's own error, and so does a linear that is to be rescored: the names
    define no spec for them.
    """
    for name, scheme in SCHEMES.items():
        linear = None if scheme.rescored else QuantSpec(weight=linear_key(scheme))
        _ONLINE_SHORTHANDS.setdefault(name, QuantizationConfigArgs(linear=linear))
    envs.environment_variables.setdefault(
        ENV_NAME, envs.env_with_choices(ENV_NAME, None, list(SCHEMES))
    )


# Drafters whose head can be the target's, by the names that vLLM gives the methods.
_SHARING_METHODS = ("eagle", "eagle3", "mtp")


def draft_head_config(
    self: "EngineArgs",
    target_model_config: "ModelConfig",
    target_parallel_config: "ParallelConfig",
) -> "SpeculativeConfig | None":
    """Hook of ``EngineArgs.create_speculative_config``: takes ``DRAFT_OPTION`` out of
    ``--speculative-config`` where it names a scheme of ours, and remembers it.

    Raises ``ValueError`` for a drafter that has no head to share.
    """
    options = self.speculative_config or {}
    keys = [key for key in options if key.replace("-", "_") == DRAFT_OPTION]
    if not keys or (name := draft_scheme(options[keys[0]])) is None:
        return None
    self.speculative_config = {k: v for k, v in options.items() if k not in keys}
    try:
        config = self.create_speculative_config(
            target_model_config, target_parallel_config
        )
    finally:
        self.speculative_config = options
    assert config is not None
    if config.method not in _SHARING_METHODS:
        raise ValueError(
            f"speculative_config.{DRAFT_OPTION}={options[keys[0]]}: expected a method "
            f"of {', '.join(_SHARING_METHODS)}, got {config.method}"
        )
    object.__setattr__(config, DRAFT_ATTRIBUTE, name)
    return config


# fork: end
