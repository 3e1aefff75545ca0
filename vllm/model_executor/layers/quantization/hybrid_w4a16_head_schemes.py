# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Names under which vLLM's users ask for a quantized lm_head.

``--quantization-config '{"targets": {"lm_head": "int4_rescored"}}'``, which composes
with any checkpoint whose head is in 16 bits. vLLM checks the names of ``targets`` when
it reads the command line, for ``LLM(...)`` before it loads plugins. There the variable
``VLLM_HYBRID_W4A16_LM_HEAD`` says the same.
"""

from dataclasses import dataclass

from vllm import envs
from vllm.config.quantization import _ONLINE_SHORTHANDS, QuantizationConfigArgs

ENV_NAME = "VLLM_HYBRID_W4A16_LM_HEAD"


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


def register() -> None:
    """Make the names known to vLLM, as values of ``targets`` and of the variable.

    A target that is no lm_head gets vLLM's own error: the names define neither a
    linear nor a MoE spec.
    """
    for name in SCHEMES:
        _ONLINE_SHORTHANDS.setdefault(name, QuantizationConfigArgs())
    envs.environment_variables.setdefault(
        ENV_NAME, envs.env_with_choices(ENV_NAME, None, list(SCHEMES))
    )
