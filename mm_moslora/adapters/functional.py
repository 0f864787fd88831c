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
        M: ``[R, R]``, or ``[R]`` for a diagonal; None is the identity.

    Returns:
        Same shape as A, in the wider dtype of the two and at least float32.
    """
    if M is None:
        return A
    dtype = torch.promote_types(torch.promote_types(A.dtype, M.dtype), torch.float32)
    matrix = M if M.ndim == 2 else torch.diag(M)
    return (matrix.to(dtype) @ A.to(dtype).flatten(1)).view(A.shape)


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


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor | None,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`reference_linear` in one autograd node; the base weight is frozen.

    The factors may be wider than x (float32 masters over a bfloat16 base): small copies are cast, x never is. Under
    autocast everything runs in autocast's dtype, as the modules would.

    Args:
        x: ``[..., D_in]``, in the dtype of `weight` outside autocast.
        weight: ``[D_out, D_in]``; gets no gradient.
        bias: ``[D_out]`` or None.
        A: ``[R, D_in]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.
        dropout: probability of dropping an entry of x before A. The mask is drawn twice from one saved seed (of torch's
            CPU generator, so that checkpointing repeats it) instead of being kept.

    Returns:
        ``[..., D_out]`` in the dtype of x, or of autocast. Differentiable once.
    """
    dropout = exact_rate(dropout)
    seed = _draw_seed() if dropout else 0
    device = x.device.type
    if not autocasts(x.device):
        return _FusedLinear.apply(x, weight, bias, A, M, B, scaling, dropout, seed)  # type: ignore[no-any-return]
    half = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _FusedLinear.apply(half, weight, bias, A, M, B, scaling, dropout, seed)  # type: ignore[no-any-return]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device, on which costs are counted, has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _draw_seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def seeded_dropout(x: Tensor, dropout: float) -> Tensor:
    """Dropout of x with the mask that `fused_linear` would draw, so that a layer drops the same entries on either path.

    Args:
        x: ``[..., D]``.
        dropout: probability of dropping an entry.
    """
    dropout = exact_rate(dropout)
    if not dropout:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return (rows * dropout_mask(rows, dropout, _draw_seed())).view_as(x) / (1.0 - dropout)


def dropout_mask(rows: Tensor, dropout: float, seed: int) -> Tensor:
    """Ones and zeros like `rows`, the same for the same seed.

    Sixteen random bits decide an entry, four entries to one drawn integer: on a CPU a fourth of `bernoulli_`'s time,
    which is that of a bfloat16 product with a 2048 x 2048 weight.

    Args:
        rows: gives shape, dtype and device.
        dropout: probability of a zero, a multiple of 2^-16 (`exact_rate`).
        seed: see `fused_linear`.
    """
    if rows.device.type == "meta":  # costs are counted there; nothing is drawn
        return torch.empty_like(rows)
    generator = torch.Generator(rows.device).manual_seed(seed)
    count = rows.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=rows.device)
    words.random_(-(2**63), None, generator=generator)
    threshold = round(dropout * 2**16) - 2**15
    return words.view(torch.int16)[:count].ge(threshold).view_as(rows).to(rows.dtype)


def exact_rate(dropout: float) -> float:
    """The dropout probability that `dropout_mask` can draw: rounded to a multiple of 2^-16."""
    return round(dropout * 2**16) / 2**16


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
        dropout: float,
        seed: int,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = dropout_mask(rows, dropout, seed).mul_(rows) if dropout else rows
        z = kept @ A.to(x.dtype).t()
        # Survivors are scaled up by 1 / (1 - dropout); as a part of s it costs nothing.
        scaling = scaling / (1.0 - dropout)
        # Shaped by F.linear, not by a view at the end: callers may change the result in place.
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(z, combine(B, M, x.dtype).t(), alpha=scaling)
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        ctx.save_for_backward(x, z, weight, A, M, B)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise AdapterError(
                "The fused kernel has no second derivative (the backward pass was asked for a graph: create_graph). "
                "Run the forward pass under mm_moslora.adapters.use_kernel('reference')."
            )
        with torch.autocast(grad.device.type, enabled=False):
            return _FusedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, A, M, B = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_M, needs_B, *_ = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dX = dA = dM = dB = None
        if needs_x or needs_A:
            u = (g @ combine(B, M, g.dtype)).mul_(ctx.scaling)
            mask = dropout_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
            if needs_x:
                dX = g @ weight.to(g.dtype)
                if mask is None:
                    dX.addmm_(u, A.to(u.dtype))
                else:
                    dX.addcmul_(u @ A.to(u.dtype), mask)
                dX = dX.view_as(x)
            if needs_A:
                dA = (u.t() @ (rows if mask is None else mask.mul_(rows))).to(A.dtype)
        if needs_B or needs_M:
            dC = (g.t() @ z).to(B.dtype).mul_(ctx.scaling)
            if needs_B:
                dB = dC if M is None else dC @ M.to(B.dtype).t()
            if needs_M:
                dM = (B.t() @ dC).to(M.dtype)
        return dX, None, g.sum(0) if needs_bias else None, dA, dM, dB, None, None, None


def combine(B: Tensor, M: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``C = B M`` in the precision of B, rounded once.

    Args:
        B: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        dtype: of the result.
    """
    return (B if M is None else B @ M.to(B.dtype)).to(dtype)
