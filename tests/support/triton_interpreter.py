"""What Triton's interpreter (TRITON_INTERPRET=1; 3.6 to 3.9) cannot do and compiled kernels can.

Numbers among a kernel's arguments stay Python's, so that they have no `.to`; and bfloat16 is multiplied as the integers
that hold it, and rounded towards zero instead of to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def complete_interpreter() -> None:
    """Close these gaps, for this process."""
    implicit, cast = interpreter._implicit_cvt, InterpreterBuilder.cast_impl
    multiply, dot = InterpreterBuilder.create_fmul, InterpreterBuilder.create_dot

    def with_numbers(argument: Any) -> Any:
        if not isinstance(argument, float):
            return implicit(argument)
        return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    def to_nearest(self: Any, source: TensorHandle, kind: Any) -> TensorHandle:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        values = torch.from_numpy(np.ascontiguousarray(source.data))
        return TensorHandle(values.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)

    def wide(self: Any, handle: TensorHandle) -> TensorHandle:
        return cast(self, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def product(self: Any, one: TensorHandle, other: TensorHandle) -> TensorHandle:
        if one.dtype.scalar != tl.bfloat16:
            return multiply(self, one, other)
        return to_nearest(self, multiply(self, wide(self, one), wide(self, other)), tl.bfloat16)

    def matrix_product(self: Any, one: TensorHandle, other: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, wide(self, one), wide(self, other), *rest)

    interpreter._implicit_cvt = with_numbers
    InterpreterBuilder.cast_impl = to_nearest
    InterpreterBuilder.create_fmul = product
    InterpreterBuilder.create_dot = matrix_product
