"""MoSLoRA as functions of tensors: update, fold, and the fused forward and backward of an adapted linear layer.

Shapes: ``T`` tokens (all leading dimensions), ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W
``[D_out, D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; ``s`` is the scaling, ``C = B M``.

Forward ``y = x W^T + s (x A^T) C^T``. Backward with ``u = s dY C`` and ``z = x A^T``::

    dX = dY W + u A     dA = u^T x     dC = s dY^T z     dB = dC M^T     dM = B^T dC

No product of size T is spent on M, and nothing of size T is kept but x (which the layers that read x share) and z.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.errors import AdapterError

Kernel = Literal["auto", "reference", "fused"]

_kernel: ContextVar[Kernel] = ContextVar("mm_moslora_kernel", default="auto")


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Choose how adapted layers compute, within the block.

    Args:
        kernel: `auto` (fused where it applies, and PEFT's own path for plain LoRA), `reference` (always the plain
            three-factor chain) or `fused` (plain LoRA too).
    """
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def current_kernel() -> Kernel:
    """The kernel of the innermost `use_kernel`, `auto` outside."""
    return _kernel.get()


def fold(A: Tensor, M: Tensor | None) -> Tensor:
    """``M A``: the A of a plain LoRA of the same rank with the same update.

    Args:
        A: ``[R, D_in]``, or ``[R, ...]`` for a convolution.
        M: ``[R, R]``; None is the identity.

    Returns:
        Same shape as A, in the wider dtype of the two and at least float32.
    """
    if M is None:
        return A
    dtype = torch.promote_types(torch.promote_types(A.dtype, M.dtype), torch.float32)
    return (M.to(dtype) @ A.to(dtype).flatten(1)).view_as(A)


def delta_weight(A: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> Tensor:
    """``s B M A``, what merging adds to W.

    Args:
        A: ``[R, D_in]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.

    Returns:
        ``[D_out, D_in]``, at least float32.
    """
    folded = fold(A, M)
    dtype = torch.promote_types(torch.promote_types(folded.dtype, B.dtype), torch.float32)
    return (B.to(dtype) @ folded.to(dtype)) * scaling


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


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, M: Tensor | None, B: Tensor, scaling: float
) -> Tensor:
    """`reference_linear` in one autograd node; the base weight is frozen.

    The factors may be wider than x (float32 masters over a bfloat16 base): small copies are cast, x never is.

    Args:
        x: ``[..., D_in]``, in the dtype of `weight`.
        weight: ``[D_out, D_in]``; gets no gradient.
        bias: ``[D_out]`` or None.
        A: ``[R, D_in]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.

    Returns:
        ``[..., D_out]`` in the dtype of x. Differentiable once.
    """
    result: Tensor = _FusedLinear.apply(x, weight, bias, A, M, B, scaling)
    return result


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor | None,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        z = rows @ A.to(x.dtype).t()
        C = _combine(B, M, x.dtype)
        # Shaped by F.linear, not by a view at the end: callers may change the result in place.
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(z, C.t(), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, z, weight, A, M, B)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise AdapterError(
                "The fused kernel has no second derivative (the backward pass was asked for a graph: create_graph). "
                "Run the forward pass under mm_moslora.adapters.use_kernel('reference')."
            )
        x, z, weight, A, M, B = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_M, needs_B, _ = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dX = dA = dM = dB = None
        if needs_x or needs_A:
            u = (g @ _combine(B, M, g.dtype)).mul_(ctx.scaling)
            if needs_x:
                dX = (g @ weight).addmm_(u, A.to(u.dtype)).view_as(x)
            if needs_A:
                dA = (u.t() @ rows).to(A.dtype)
        if needs_B or needs_M:
            dC = (g.t() @ z).to(B.dtype).mul_(ctx.scaling)
            if needs_B:
                dB = dC if M is None else dC @ M.to(B.dtype).t()
            if needs_M:
                dM = (B.t() @ dC).to(M.dtype)
        return dX, None, g.sum(0) if needs_bias else None, dA, dM, dB, None


def _combine(B: Tensor, M: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``C = B M`` in the factors' precision, rounded once."""
    return (B if M is None else B @ M.to(B.dtype)).to(dtype)
