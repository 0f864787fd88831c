"""MoSLoRA as functions of tensors: update, fold, and the adapted linear layer written out.

Shapes: ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W ``[D_out, D_in]``, A ``[R, D_in]``, M ``[R, R]``,
B ``[D_out, R]``; ``s`` is the scaling. `lora_linear` computes a layer, `mixed_product` the product ``s B M``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def is_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace, torch.func or forward_ad takes the operations."""
    # None of them can take a custom autograd node.
    # Dynamo takes the first to be true and never evaluates the others.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def fold(A: Tensor, M: Tensor | None) -> Tensor:
    """``M A``: the A of a plain LoRA of the same rank with the same update.

    Args:
        A: ``[R, D_in]``, or ``[R, ...]`` for a convolution.

    Returns:
        Same shape as A, in the wider dtype of the two and at least float32.
    """
    if M is None:
        return A
    dtype = torch.promote_types(torch.promote_types(A.dtype, M.dtype), torch.float32)
    return (M.to(dtype) @ A.to(dtype).flatten(1)).view(A.shape)


def delta_weight(A: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> Tensor:
    """``s B M A``, what merging adds to W.

    Args:
        A: ``[R, D_in]``, or ``[R, C, h, w]`` for a convolution.
        B: ``[D_out, R]``, or ``[D_out, R, 1, 1]``.

    Returns:
        ``[D_out, D_in]``, or ``[D_out, C, h, w]``; at least float32.
    """
    with without_autocast(B.device):
        folded = fold(A, M)
        dtype = torch.promote_types(torch.promote_types(folded.dtype, B.dtype), torch.float32)
        update = B.to(dtype).flatten(1) @ folded.to(dtype).flatten(1)
    return update.view(B.shape[0], *A.shape[1:]) * scaling


def reference_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, M: Tensor | None, B: Tensor, scaling: float
) -> Tensor:
    """The adapted linear layer written out, factor by factor; tests compare `fused_linear` with it."""
    z = F.linear(x, A)
    return F.linear(x, weight, bias) + F.linear(z if M is None else F.linear(z, M), B) * scaling


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device, on which costs are counted, has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off for a device within the block, where it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
