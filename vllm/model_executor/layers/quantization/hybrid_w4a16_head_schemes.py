# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Names that select a quantized lm_head or linear in vLLM's options.

``--quantization-config '{"targets": {"lm_head": "int4_rescored"}}'`` works with any
checkpoint whose head is in 16 bits.
"""

# fork: begin overlay
# vLLM checks the names in ``targets`` when it reads the command line; for ``LLM(...)``
# that is before it loads plugins. There the variable VLLM_HYBRID_W4A16_LM_HEAD sets the
# scheme instead.
#
# The scheme for drafters (MTP, EAGLE) that share the head is set separately, by the
# target ``draft_lm_head`` or by ``--speculative-config
# '{..., "draft_lm_head_quantization": "int4"}'``, an option that vLLM has since 0.33
# for other formats.
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
    """The format of an lm_head's weights."""

    bits: int
    group_size: int
    rescored: bool = False
    """Whether the 16-bit weights are kept to correct the quantized logits."""

    def bytes_per_weight(self) -> float:
        """Bytes to read per weight: the quantized weights and their 16-bit scales."""
        return self.bits / 8 + 2 / self.group_size

    def kept_bytes_per_weight(self) -> float:
        """Bytes in memory per weight, without those that a tied embedding keeps."""
        return self.bytes_per_weight() + (2 if self.rescored else 0)


SCHEMES = {
    "int8_g32": HeadScheme(8, 32),
    "int4_g32": HeadScheme(4, 32),
    "int4_g128": HeadScheme(4, 128),
    "int4_rescored": HeadScheme(4, 128, rescored=True),
}


# fork: begin overlay
def linear_key(scheme: HeadScheme) -> QuantKey:
    """The key of a scheme in vLLM's table of linear methods.

    Scales are in the activation dtype; bf16 here distinguishes the key from vLLM's own
    key for int4.
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
"""Key of ``targets`` that does the same."""
DRAFT_SCHEMES = {"int4": "int4_g128", "int8": "int8_g32"}
"""Values of ``DRAFT_OPTION``; the names of schemes are valid for both keys."""


def draft_scheme(value: object) -> str | None:
    """The scheme named by a drafter's option; ``None`` if it is not one of ours.

    Rescored schemes are excluded because drafts are verified anyway.
    """
    name = DRAFT_SCHEMES.get(str(value), str(value))
    return name if name in SCHEMES and not SCHEMES[name].rescored else None


def register() -> None:
    """Register the names with vLLM, as values of ``targets`` and of the variable.

    The names define no spec for experts, nor for a linear with rescoring, so those get
    vLLM's own error.
    """
    for name, scheme in SCHEMES.items():
        linear = None if scheme.rescored else QuantSpec(weight=linear_key(scheme))
        _ONLINE_SHORTHANDS.setdefault(name, QuantizationConfigArgs(linear=linear))
    envs.environment_variables.setdefault(
        ENV_NAME, envs.env_with_choices(ENV_NAME, None, list(SCHEMES))
    )


# Drafters that can share the target's head, by vLLM's names of the methods.
_SHARING_METHODS = ("eagle", "eagle3", "mtp")


def draft_head_config(
    self: "EngineArgs",
    target_model_config: "ModelConfig",
    target_parallel_config: "ParallelConfig",
) -> "SpeculativeConfig | None":
    """Hook of ``EngineArgs.create_speculative_config``: removes ``DRAFT_OPTION`` from
    ``--speculative-config`` if it names one of our schemes, and stores the scheme.

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
