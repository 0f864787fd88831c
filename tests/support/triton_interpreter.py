"""What Triton's interpreter (TRITON_INTERPRET=1; 3.7 to 3.9) cannot do and compiled kernels can: Liger's need it.

Numbers among a kernel's arguments stay Python's, so that they have no `.to`; functions of libdevice have no body; and
bfloat16 is multiplied as the integers that hold it, and rounded towards zero instead of to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def complete_interpreter() -> None:
    """Close these gaps, for this process."""
    implicit, cast, multiply = interpreter._implicit_cvt, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fmul

    def with_numbers(argument: Any) -> Any:
        if not isinstance(argument, float):
            return implicit(argument)
        return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    def to_nearest(self: Any, source: TensorHandle, kind: Any) -> TensorHandle:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        wide = torch.from_numpy(np.ascontiguousarray(source.data))
        return TensorHandle(wide.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)

    def in_fp32(self: Any, one: TensorHandle, other: TensorHandle) -> TensorHandle:
        if one.dtype.scalar != tl.bfloat16:
            return multiply(self, one, other)
        return to_nearest(self, multiply(self, *(cast(self, item, tl.float32) for item in (one, other))), tl.bfloat16)

    interpreter._implicit_cvt = with_numbers
    InterpreterBuilder.cast_impl = to_nearest
    InterpreterBuilder.create_fmul = in_fp32
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
