"""The product ``C = s B M`` of an adapted layer, and its chain rule.

Shapes: ``D_out`` width, ``R`` rank; M ``[R, R]`` (None: the identity), B ``[D_out, R]``, C ``[D_out, R]``; ``s`` is the
scaling.

To every kernel C is the B of a plain LoRA without scaling. B and M get their gradients from that of C::

    dB = s dC M^T     dM = s B^T dC
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_moslora.kernels.lora.lora_math import without_autocast


def fold_right(B: Tensor, M: Tensor) -> Tensor:
    """``B M``: the B of a plain LoRA of the same rank with the same update, at least float32."""
    dtype = torch.promote_types(torch.promote_types(B.dtype, M.dtype), torch.float32)
    return (B.to(dtype).flatten(1) @ M.to(dtype)).view(B.shape)


def combine(B: Tensor, M: Tensor | None, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``C = s B M`` in the wider dtype of the two and at least float32, rounded once; on GPUs one kernel."""
    # Some CPUs take several times as long for so small a product in bfloat16; so the value is that of `fold_right`.
    if M is None:
        return (B * scaling).to(dtype)
    if _multiplies_at_once(B, M, dtype):
        return _scaled_product(B, M, scaling)
    return fold_right(B, M).mul_(scaling).to(dtype)


def mixer_gradients(dC: Tensor, B: Tensor, M: Tensor | None, scaling: float) -> tuple[Tensor, Tensor | None]:
    """The gradients of B and M from that of ``C = s B M``, computed as `combine` is."""
    wide = torch.promote_types(torch.promote_types(B.dtype, dC.dtype), torch.float32)
    if M is None:
        return (dC.to(wide) * scaling).to(B.dtype), None
    if M.dtype == B.dtype and _multiplies_at_once(B, dC, B.dtype):
        dB, dM = _scaled_product(dC, M.t(), scaling), _scaled_product(B.t(), dC, scaling)
    else:
        dC = dC.to(wide)
        dB = (dC @ M.to(wide).t()).mul_(scaling).to(B.dtype)
        dM = (B.to(wide).t() @ dC).mul_(scaling).to(M.dtype)
    return dB, dM


def _multiplies_at_once(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether to take `_scaled_product`: on a GPU, which adds up in float32 as it does for all other products."""
    # Where cuBLAS splits a long sum it may round the parts; a run switches that off (`training.precision`).
    return a.device.type == "cuda" and a.dtype == b.dtype == dtype


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``s a b`` in one kernel, where converting, multiplying, scaling and rounding would take five."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def mixed_product(B: Tensor, M: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """``C = s B M``, ``[D_out, R]``, in one autograd node."""
    with without_autocast(B.device):
        return _MixedProduct.apply(B, M, scaling, dtype)  # type: ignore[no-any-return]


class _MixedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, B: Tensor, M: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(B, M)
        return combine(B, M, dtype, scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dC: Tensor | None) -> tuple[Tensor | None, ...]:
        if dC is None:
            return None, None, None, None
        B, M = ctx.saved_tensors
        with without_autocast(dC.device):
            dB, dM = mixer_gradients(dC, B, M, ctx.scaling)
        return dB if ctx.needs_input_grad[0] else None, dM if ctx.needs_input_grad[1] else None, None, None
