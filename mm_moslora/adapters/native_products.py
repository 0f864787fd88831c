"""Thin products of adapters as the kernels of `mm_moslora.native` compute them: in float32, of ranks that suit vectors.

In bfloat16 PyTorch's were as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moslora.native.tensors import call, fits

_VECTOR = 16
"""Of which ranks are to be multiples."""


def inner(x: Tensor, factor: Tensor, *, native: bool) -> Tensor:
    """``x f``.

    Args:
        x: ``[T, D]``.
        factor: ``[D, R]``, in any layout.
        native: whether a kernel of ours may compute it.

    Returns:
        ``[T, R]``.
    """
    rank = factor.shape[1]
    if not (native and _suits(x, factor) and rank % _VECTOR == 0):
        return x @ factor
    x = _rows(x)
    z = x.new_empty(x.shape[0], rank)
    call("inner", x, x.data_ptr(), x.stride(0), factor.data_ptr(), *factor.stride(), z.data_ptr(), *x.shape, rank)
    return z


def summed(u: Tensor, y: Tensor, *, native: bool) -> Tensor:
    """``u^T y``.

    Args:
        u: ``[T, R]``.
        y: ``[T, D]``.
        native: whether a kernel of ours may compute it.

    Returns:
        ``[R, D]``.
    """
    rank, columns = u.shape[1], y.shape[1]
    if not (native and _suits(u, y) and rank % _VECTOR == 0 and columns % _VECTOR == 0):
        return u.t() @ y
    u, y = _rows(u), _rows(y)
    g = y.new_empty(rank, columns)
    call("summed", y, u.data_ptr(), u.stride(0), y.data_ptr(), y.stride(0), g.data_ptr(), u.shape[0], rank, columns)
    return g


def _suits(*tensors: Tensor) -> bool:
    return tensors[0].dtype == torch.float32 and tensors[0].shape[0] > 0 and fits(*tensors)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
