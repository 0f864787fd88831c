"""MoSLoRA as functions of tensors: update, fold, and the adapted linear layer written out.

Shapes: ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W ``[D_out, D_in]``, A ``[R, D_in]``, M ``[R, R]``,
B ``[D_out, R]``; ``s`` is the scaling. The fused forward and backward are in `kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.utils.errors import AdapterError, suggestion

Kernel = Literal["auto", "reference", "fused"]

_kernel: ContextVar[Kernel] = ContextVar("mm_moslora_kernel", default="auto")


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Choose how adapted layers compute, within the block.

    Args:
        kernel: `auto` (fused where it applies, and PEFT's own path for plain LoRA outside of lean layers), `reference`
            (always the plain three-factor chain) or `fused` (plain LoRA too).

    Raises:
        AdapterError: another name.
    """
    known = get_args(Kernel)
    if kernel not in known:
        raise AdapterError(f"The kernel is {kernel!r}, expected one of {', '.join(known)}.{suggestion(kernel, known)}")
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def is_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or a transform of torch.func looks at the operations.

    They cannot look into a custom autograd node.
    """
    # Dynamo, which knows the first to be true, never sees the others.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def current_kernel() -> Kernel:
    """The kernel of the innermost `use_kernel`, `auto` outside."""
    return _kernel.get()


def fold(A: Tensor, M: Tensor | None) -> Tensor:
    """``M A``: the A of a plain LoRA of the same rank with the same update.

    Args:
        A: ``[R, D_in]``, or ``[R, ...]`` for a convolution.
        M: ``[R, R]``, or ``[R]`` for a diagonal; None is the identity.

    Returns:
        Same shape as A, in the wider dtype of the two and at least float32.
    """
    if M is None:
        return A
    dtype = torch.promote_types(torch.promote_types(A.dtype, M.dtype), torch.float32)
    matrix = M if M.ndim == 2 else torch.diag(M)
    return (matrix.to(dtype) @ A.to(dtype).flatten(1)).view(A.shape)


def fold_right(B: Tensor, M: Tensor) -> Tensor:
    """``B M``: the B of a plain LoRA of the same rank with the same update.

    Args:
        B: ``[D_out, R]``, or ``[D_out, R, 1, 1]`` for a convolution.
        M: ``[R, R]``, or ``[R]`` for a diagonal.

    Returns:
        Same shape as B, in the wider dtype of the two and at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(B.dtype, M.dtype), torch.float32)
    matrix = M if M.ndim == 2 else torch.diag(M)
    return (B.to(dtype).flatten(1) @ matrix.to(dtype)).view(B.shape)


def delta_weight(A: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> Tensor:
    """``s B M A``, what merging adds to W.

    Args:
        A: ``[R, D_in]``, or ``[R, C, h, w]`` for a convolution.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``, or ``[D_out, R, 1, 1]``.
        scaling: s.

    Returns:
        ``[D_out, D_in]``, or ``[D_out, C, h, w]``; at least float32.
    """
    folded = fold(A, M)
    dtype = torch.promote_types(torch.promote_types(folded.dtype, B.dtype), torch.float32)
    update = B.to(dtype).flatten(1) @ folded.to(dtype).flatten(1)
    return update.view(B.shape[0], *A.shape[1:]) * scaling


def reference_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, M: Tensor | None, B: Tensor, scaling: float
) -> Tensor:
    """The adapted linear layer written out, factor by factor; the yardstick of `fused_linear`.

    Args:
        x: ``[..., D_in]``.
        weight: ``[D_out, D_in]``.
        bias: ``[D_out]`` or None.
        A: ``[R, D_in]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.
    """
    z = F.linear(x, A)
    return F.linear(x, weight, bias) + F.linear(z if M is None else F.linear(z, M), B) * scaling


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device, on which costs are counted, has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def combine(B: Tensor, M: Tensor | None, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``C = s B M`` in the wider dtype of the two and at least float32, rounded once; on GPUs `scaled_product`.

    Some CPUs take several times as long for so small a product in bfloat16, and so the value is that of `fold_right`.

    Args:
        B: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        dtype: of the result.
        scaling: s.
    """
    if M is None:
        return (B * scaling).to(dtype)
    if multiplies_at_once(B, M, dtype):
        return scaled_product(B, M, scaling)
    return fold_right(B, M).mul_(scaling).to(dtype)


def multiplies_at_once(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether to take `scaled_product`: on a GPU, which adds up in float32 as it does for all other products.

    Where cuBLAS splits a long sum it may round the parts (torch.backends.cuda.matmul has switches against that).
    """
    return a.device.type == "cuda" and a.dtype == b.dtype == dtype and b.ndim == 2


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``s a b`` in one kernel, where converting, multiplying, scaling and rounding would take five."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
