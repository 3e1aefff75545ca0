# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The hook table, and its application at run time.

A hook is a prologue on a vLLM method factory: the handler is called with the factory's
own arguments. Its result, unless ``None``, is the factory's; otherwise the factory's
own body runs. With the switch off, handlers are not called. A further checkpoint format
is one more row.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.fused_moe.oracle import (
    hybrid_w4a16_switch as switch,
)


@dataclass(frozen=True)
class Hook:
    """A prologue on one method factory of vLLM."""

    module: str
    owner: str
    """Class in ``module``."""
    factory: str
    """Method of ``owner``, static methods included."""
    parameters: tuple[str, ...]
    """Names that the factory's parameters must have, in order."""
    handler: str
    """``module:function`` with the same parameters in the same order."""
    why: str
    """Why the hook exists."""
    until: str = "vLLM selects HybridW4A16MoEExperts for such layers itself."
    """When it can go."""

    @property
    def target(self) -> str:
        return f"{self.module}.{self.owner}.{self.factory}"


_QUANTIZATION = "vllm.model_executor.layers.quantization"

HOOKS: tuple[Hook, ...] = (
    Hook(
        module=f"{_QUANTIZATION}.inc.schemes.inc_wna16_scheme",
        owner="INCWna16Scheme",
        factory="get_moe_method",
        parameters=("self", "config", "layer", "prefix", "layer_config"),
        handler=f"{_QUANTIZATION}.inc_moe:inc_moe_method",
        why=(
            "AutoRound int4 MoE runs on the Triton WNA16 path on ROCm and does not "
            "load on the CPU."
        ),
    ),
    Hook(
        module=f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe",
        owner="CompressedTensorsMoEMethod",
        factory="get_moe_method",
        parameters=("quant_config", "layer", "layer_name"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_compressed_tensors:compressed_tensors_moe_method",
        why=(
            "compressed-tensors int4 MoE runs on the Triton WNA16 path on most of RDNA "
            "and in int8 on the CPU. Can go with the first hook."
        ),
    ),
    Hook(
        module=f"{_QUANTIZATION}.auto_gptq",
        owner="AutoGPTQConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_gptq:gptq_moe_method",
        why="The same for GPTQ. The factory is for every layer; others fall through.",
    ),
    Hook(
        module=f"{_QUANTIZATION}.auto_awq",
        owner="AutoAWQConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_awq:awq_moe_method",
        why="The same for AWQ. The factory is for every layer; others fall through.",
    ),
    Hook(
        module=f"{_QUANTIZATION}.online.base",
        owner="OnlineQuantizationConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head:lm_head_config_method",
        why="Quantizing at load refuses an lm_head that quantization_config names.",
        until="vLLM's quantizing at load takes ParallelLMHead.",
    ),
    Hook(
        module="vllm.model_executor.layers.vocab_parallel_embedding",
        owner="VocabParallelEmbedding",
        factory="update_param_tp_status",
        parameters=("self",),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head:lm_head_built",
        why=(
            "Gives an lm_head its method, whatever quantizes the rest of the "
            "checkpoint: the last step of every constructor."
        ),
        until="vLLM's quantizing at load takes ParallelLMHead.",
    ),
)

_MARK = "_hybrid_w4a16_hook"


class HookError(RuntimeError):
    """Targets of the hook table that this vLLM does not offer as expected."""


def apply_hooks(hooks: tuple[Hook, ...] = HOOKS) -> None:
    """Wrap the factories of the table; those that are wrapped already stay as they are.

    All or nothing: raises ``HookError`` naming every hook that does not fit, with vLLM
    left as it was.
    """
    resolved, failures = [], []
    for hook in hooks:
        try:
            resolved.append((hook, *_resolve(hook)))
        except HookError as error:
            failures.append(f"{hook.target}: {error}")
    if failures:
        raise HookError("; ".join(failures))
    for hook, owner, original in resolved:
        if not hasattr(inspect.unwrap(original, stop=_is_ours), _MARK):
            _install(hook, owner, original)


def _is_ours(function: Callable[..., Any]) -> bool:
    return hasattr(function, _MARK)


def _resolve(hook: Hook) -> tuple[type, Callable[..., Any]]:
    """The class to patch and the function that is there, signature checked."""
    try:
        owner = getattr(importlib.import_module(hook.module), hook.owner)
    except (ImportError, AttributeError) as error:
        raise HookError(str(error)) from error
    attribute = vars(owner).get(hook.factory)
    if attribute is None:
        raise HookError(f"{hook.owner} has no {hook.factory}")
    original = attribute.__func__ if _is_static(attribute) else attribute
    found = tuple(inspect.signature(original).parameters)
    if found != hook.parameters:
        raise HookError(f"parameters are {found}, expected {hook.parameters}")
    return owner, original


def _is_static(attribute: object) -> bool:
    return isinstance(attribute, staticmethod)


def _install(hook: Hook, owner: type, original: Callable[..., Any]) -> None:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        result = None
        if switch.value() != "0":
            result = _load_handler(hook.handler)(*args, **kwargs)
        return original(*args, **kwargs) if result is None else result

    setattr(factory, _MARK, hook)
    static = _is_static(vars(owner)[hook.factory])
    setattr(owner, hook.factory, staticmethod(factory) if static else factory)


@functools.cache
def _load_handler(handler: str) -> Callable[..., Any]:
    # at the first call, not when plugins load: handlers import the MoE layers
    module, _, name = handler.partition(":")
    return getattr(importlib.import_module(module), name)
