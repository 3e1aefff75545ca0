# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""int4 (W4A16) MoE layers on a hybrid path: skinny-GEMM decode, grouped-GEMM prefill.

vLLM's entry point group ``vllm.general_plugins`` calls ``register``.
"""

import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)
from vllm.model_executor.layers.quantization import hybrid_w4a16_head_schemes
from vllm.platforms import current_platform
from vllm.plugins.hybrid_w4a16 import hooks

logger = init_logger(__name__)


def register() -> None:
    """Register the switch and, unless it is off, apply the hooks.

    vLLM calls this in every process, possibly more than once. If a hook does not fit
    the installed vLLM, vLLM is left unchanged and the log names the hook; with
    ``VLLM_HYBRID_W4A16_MOE=require`` it raises ``HookError`` instead.
    """
    switch.register()
    if switch.value() == "0":
        if current_platform.is_cpu():
            logger.warning(
                "%s=0: vLLM itself cannot load AutoRound, GPTQ or AWQ checkpoints with "
                "int4 MoE layers on the CPU",
                switch.NAME,
            )
        return
    hybrid_w4a16_head_schemes.register()
    try:
        hooks.apply_hooks()
        _add_online_linears()
    except hooks.HookError as error:
        if switch.value() == "require":
            raise
        logger.warning(
            "HybridW4A16 MoE is off: its hooks do not fit vLLM %s: %s",
            vllm.__version__,
            error,
        )


def _add_online_linears() -> None:
    """Add our methods to vLLM's table of linears that are quantized at load.

    Where this vLLM has no such table, asking for one of them is vLLM's own error.
    """
    try:
        from vllm.model_executor.layers.quantization import hybrid_w4a16_online_linear
    except ImportError as error:
        logger.info("HybridW4A16: no linears in int8 or int4 at load: %s", error)
    else:
        hybrid_w4a16_online_linear.register()
