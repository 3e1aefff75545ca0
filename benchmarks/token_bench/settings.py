# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The engines to compare."""

from dataclasses import dataclass, field
from typing import Any

from moe_bench.arguments import split_names
from serve_bench.cases import SWITCH

from token_bench.models import GDN_GATES

LM_HEAD = "VLLM_HYBRID_W4A16_LM_HEAD"


@dataclass(frozen=True)
class Setting:
    """How one engine runs: variables, arguments of ``vllm.LLM`` and its checkpoint.

    ``checkpoint`` and ``in_16_bit`` are arguments of ``models.write_config``.
    """

    name: str
    devices: tuple[str, ...]
    environment: dict[str, str]
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "auto-round"
    in_16_bit: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        """Whether this is stock vLLM."""
        return self.environment[SWITCH] == "0"


_GPU = ("cuda", "rocm")
_ALL = ("cpu", *_GPU)
SETTINGS = (
    Setting("hybrid", _ALL, {SWITCH: "require"}),
    Setting(
        "hybrid+int4_rescored", _ALL, {SWITCH: "require", LM_HEAD: "int4_rescored"}
    ),
    Setting(
        "marlin",
        ("cuda",),
        {SWITCH: "0"},
        {"moe_backend": "marlin", "linear_backend": "marlin"},
        # 64 rows take Marlin longer than a 16-bit GEMM
        in_16_bit=(GDN_GATES,),
    ),
    Setting(
        "triton",
        _GPU,
        {SWITCH: "0"},
        # moe_wna16 is vLLM's only way to its Triton kernel, and takes GPTQ alone
        {"moe_backend": "triton", "quantization": "moe_wna16"},
        checkpoint="gptq",
    ),
    Setting("stock", _GPU, {SWITCH: "0"}),
    # vLLM has no int4 experts for AutoRound on the CPU
    Setting("stock", ("cpu",), {SWITCH: "0"}, checkpoint="gptq"),
)
NAMES = tuple(dict.fromkeys(setting.name for setting in SETTINGS))
DEFAULTS = {
    "cpu": "hybrid,hybrid+int4_rescored,stock",
    "cuda": "hybrid,hybrid+int4_rescored,marlin,triton",
    "rocm": "hybrid,hybrid+int4_rescored,stock",
}


def parse_settings(text: str | None, device: str) -> list[Setting]:
    """Comma-separated names of settings; ``None``: the device's defaults.

    Raises ``ValueError`` for one that does not exist, does not run on ``device``, or is
    named twice.
    """
    here = {setting.name: setting for setting in SETTINGS if device in setting.devices}
    names = split_names("--settings", text or DEFAULTS[device], here)
    if len(set(names)) < len(names):
        raise ValueError(f"--settings: names repeat: {text}")
    return [here[name] for name in names]
