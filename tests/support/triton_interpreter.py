# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""bf16 arithmetic for Triton's interpreter.

The interpreter (Triton 3.9) keeps bf16 as uint16, multiplies these bits as integers,
and truncates fp32 where a GPU rounds to nearest. This module widens such operands to
fp32 and rounds the results.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    if not _is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _round(data: np.ndarray):
    rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(data.shape), tl.bfloat16)


def support_bf16() -> None:
    """Patch the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    binary_op, create_dot = builder.binary_op, builder.create_dot
    cast = builder.cast_impl

    def patched_binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return binary_op(self, lhs, rhs, op)
        return _round(op(_widen(lhs).data, _widen(rhs).data))

    def patched_dot(self, a, b, d, *rest):
        return create_dot(self, _widen(a), _widen(b), d, *rest)

    def patched_cast(self, src, dst_type):
        to_bf16 = dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32
        return _round(src.data) if to_bf16 else cast(self, src, dst_type)

    builder.binary_op, builder.create_dot = patched_binary_op, patched_dot
    builder.cast_impl = patched_cast
