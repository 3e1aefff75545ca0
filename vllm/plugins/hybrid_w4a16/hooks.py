# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The hook table, and how it is applied at run time.

A hook is a prologue on a vLLM method factory. The handler is called with the factory's
arguments. If it returns a value other than ``None``, that is the result; otherwise the
factory's own body runs. With the switch off, handlers are not called. A new checkpoint
format adds one row.

A kernel row puts one of our classes at the head of a vLLM list of linear kernels. vLLM
takes the first kernel of the list that can implement a layer.
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
    """A prologue on a method factory of vLLM."""

    module: str
    owner: str
    """Class in ``module``."""
    factory: str
    """Method of ``owner``, static methods included."""
    parameters: tuple[str, ...]
    """Names of the factory's parameters, in order."""
    handler: str
    """``module:function`` with the same parameters in the same order."""
    why: str
    """Why the hook exists."""
    until: str = "vLLM selects HybridW4A16MoEExperts for such layers itself."
    """When the hook can be removed."""

    @property
    def target(self) -> str:
        return f"{self.module}.{self.owner}.{self.factory}"


@dataclass(frozen=True)
class KernelRow:
    """A kernel at the head of a platform's list."""

    platform: str
    """Name in ``PlatformEnum``."""
    kernel: str
    """``module:class``."""
    why: str
    until: str
    module: str = "vllm.model_executor.kernels.linear"
    table: str = "_POSSIBLE_KERNELS"
    """Dictionary in ``module``, from platform to list."""

    @property
    def target(self) -> str:
        return f"{self.module}.{self.table}[{self.platform}]"


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
            "compressed-tensors int4 MoE runs on the Triton WNA16 path on most RDNA "
            "GPUs and in int8 on the CPU. Removable together with the first hook."
        ),
    ),
    Hook(
        module=f"{_QUANTIZATION}.auto_gptq",
        owner="AutoGPTQConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_gptq:gptq_moe_method",
        why="The same for GPTQ. The factory serves all layers; only MoE layers change.",
    ),
    Hook(
        module=f"{_QUANTIZATION}.auto_awq",
        owner="AutoAWQConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_awq:awq_moe_method",
        why="The same for AWQ. The factory serves all layers; only MoE layers change.",
    ),
    Hook(
        module="vllm.model_executor.layers.fused_moe.runner.moe_runner",
        owner="MoERunner",
        factory="_select_forward",
        parameters=("self",),
        handler=(
            "vllm.model_executor.layers.fused_moe.hybrid_w4a16_runner:runner_built"
        ),
        why=(
            "Lets kernels compute the shared expert, and gate and top-k in one launch. "
            "It is a step of the runner's constructor, when its parts are known."
        ),
        until="vLLM asks the MoE method what it computes beside the routed experts.",
    ),
    Hook(
        module=f"{_QUANTIZATION}.online.base",
        owner="OnlineQuantizationConfig",
        factory="get_quant_method",
        parameters=("self", "layer", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head:lm_head_config_method",
        why="vLLM's online quantization rejects an lm_head in quantization_config.",
        until="vLLM's online quantization supports ParallelLMHead.",
    ),
    Hook(
        module="vllm.model_executor.layers.vocab_parallel_embedding",
        owner="VocabParallelEmbedding",
        factory="update_param_tp_status",
        parameters=("self",),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head:lm_head_built",
        why=(
            "Gives an lm_head its method, however the rest of the checkpoint is "
            "quantized. It is the last step of every constructor."
        ),
        until="vLLM's online quantization supports ParallelLMHead.",
    ),
    Hook(
        module="vllm.engine.arg_utils",
        owner="EngineArgs",
        factory="create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head_schemes:draft_head_config",
        why="draft_lm_head_quantization is new in vLLM 0.33, without int4 and int8.",
        until="vLLM's draft_lm_head_quantization has int4 and int8.",
    ),
    Hook(
        module="vllm.model_executor.model_loader.base_loader",
        owner="BaseModelLoader",
        factory="load_model",
        parameters=("self", "vllm_config", "model_config", "prefix"),
        handler=f"{_QUANTIZATION}.hybrid_w4a16_head:draft_model_loaded",
        why="Tells drafters apart: they share the head, but in another precision.",
        until="vLLM's draft_lm_head_quantization has int4 and int8.",
    ),
)

_LINEAR_KERNEL = (
    "vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16"
    ":HybridW4A16LinearKernel"
)

KERNEL_ROWS: tuple[KernelRow, ...] = (
    KernelRow(
        platform="CPU",
        kernel=_LINEAR_KERNEL,
        why="vLLM's int4 linear takes 1.3 to 7 times as long without AMX.",
        until="vLLM has the kernel in its list.",
    ),
    KernelRow(
        platform="CUDA",
        kernel=_LINEAR_KERNEL,
        why="Dense int4 linears of a few rows take 10 to 19 us there, 2 to 9 with it.",
        until="vLLM has the kernel in its list.",
    ),
    KernelRow(
        platform="ROCM",
        kernel=_LINEAR_KERNEL,
        why="On request, for comparison with vLLM's own RDNA kernel.",
        until="vLLM has the kernel in its list.",
    ),
)

_MARK = "_hybrid_w4a16_hook"


class HookError(RuntimeError):
    """A target in the hook table differs from what this vLLM provides."""


def apply_hooks(
    hooks: tuple[Hook, ...] = HOOKS, rows: tuple[KernelRow, ...] = KERNEL_ROWS
) -> None:
    """Wrap the factories of the table and add its kernels; what is there already stays.

    Applies all hooks or none: raises ``HookError`` that names every hook that does not
    fit, and leaves vLLM unchanged.
    """
    switch.register()  # the hooks ask it
    resolved, failures = [], []
    for hook in hooks:
        try:
            resolved.append((hook, *_resolve(hook)))
        except HookError as error:
            failures.append(f"{hook.target}: {error}")
    lists = []
    for row in rows:
        try:
            lists.append(_kernels_and_ours(row))
        except HookError as error:
            failures.append(f"{row.target}: {error}")
    if failures:
        raise HookError("; ".join(failures))
    for hook, owner, original in resolved:
        if not hasattr(inspect.unwrap(original, stop=_is_ours), _MARK):
            _install(hook, owner, original)
    for kernels, kernel in lists:
        if kernel not in kernels:
            kernels.insert(0, kernel)


def _kernels_and_ours(row: KernelRow) -> tuple[list[type], type]:
    """vLLM's list that the row is about, and the class that belongs into it."""
    from vllm.platforms import PlatformEnum  # not at the top: it takes seconds

    module, _, name = row.kernel.partition(":")
    try:
        table = getattr(importlib.import_module(row.module), row.table)
        kernels = table[PlatformEnum[row.platform]]
        return kernels, getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise HookError(f"{type(error).__name__}: {error}") from error


def _is_ours(function: Callable[..., Any]) -> bool:
    return hasattr(function, _MARK)


def _resolve(hook: Hook) -> tuple[type, Callable[..., Any]]:
    """Return the class to patch and its current function; checks the signature."""
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
    # On the first call, not when plugins load, because handlers import the MoE layers.
    module, _, name = handler.partition(":")
    return getattr(importlib.import_module(module), name)
