# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Launches compiled Triton kernels without Triton's search for the variant.

Triton derives the compiled variant from all arguments in each call, which takes 14 to
23 us. ``launch`` finds it by what can change between calls, and calls it directly.
"""

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Compiled kernels by what the choice of the variant depends on.
Variants = dict[tuple[Any, ...], CompiledKernel]
# Whether compiled kernels can be called: releases of Triton whose launch is known.
_DIRECT = not knobs.runtime.interpret and (
    (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
)
_ALIGNMENT = 16  # bytes; for a pointer that is not aligned Triton compiles a variant
_SMALL = 2**31 - 1  # bytes; for a larger storage as well, on AMD


def can_launch(
    large: tuple[torch.Tensor, ...], small: tuple[torch.Tensor, ...]
) -> bool:
    """Whether ``launch`` may be used: Triton has one variant for all such tensors.

    large, small: the tensors that may be others in the next call, of the same dtypes;
    small ones have a number per pair or less.
    """
    if not _DIRECT:
        return False
    address = size = 0
    for tensor in large:
        address |= tensor.data_ptr()
        size |= tensor.untyped_storage().nbytes()
    for tensor in small:
        address |= tensor.data_ptr()
    return address % _ALIGNMENT == 0 and size <= _SMALL


def _callbacks(kernel: Any) -> bool:
    """Whether anything is to be called around a launch, such as a profiler."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
    )


def launch(
    kernel: Any,
    variants: Variants,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    key: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Launch a kernel like ``kernel[grid](...)``; faster from the second call on.

    Only if ``can_launch``. Launches with callbacks are left to Triton.

    Args:
        variants: of this kernel, and of this layer if ``arguments`` hold its weights.
        arguments: all of the kernel's but the constants.
        key: the dtypes of the tensors that may be others in the next call, and all
            other arguments that Triton specializes on. Numbers that it does not
            specialize on are below 2^31.
        constants: the ``tl.constexpr`` arguments, the kernel's last ones, in its order.
        options: ``num_warps`` and perhaps ``num_stages``.
    """
    active = driver.active
    device = active.get_current_device()
    values = constants.values()
    key = (device, *key, *values, *options.values())
    compiled = variants.get(key)
    if compiled is None or _callbacks(kernel):
        compiled = kernel[grid](*arguments, **constants, **options)
        if isinstance(compiled, CompiledKernel):
            variants[key] = compiled
        return
    compiled.run(
        *grid,
        active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,  # what callbacks are told, and the callbacks
        None,
        None,
        *arguments,
        *values,
    )
