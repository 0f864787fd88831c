"""Autograd nodes that keep little: a norm with the linear layers that read it, a gated MLP, rotary embedding.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``R`` rank, ``H`` heads, ``E`` head width.

What a cheap elementwise pass can rebuild is not kept: the norm's output is rebuilt from its input, the product of the
gated MLP from its two factors. Per token and layer 6 D + 2 F values stay (stock modules with PEFT's adapters: about
twice that in fp32, three times in bf16). Base weights are frozen and get no gradient. The adapters' formulas are those
of `mm_moslora.adapters.functional`; siblings that read the same input share one product with their stacked A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.adapters.functional import combine


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer, with or without an adapter, as tensors."""

    weight: Tensor
    """``[D_out, D_in]``."""
    bias: Tensor | None = None
    """``[D_out]``."""
    A: Tensor | None = None
    """``[R, D_in]``; None: no adapter."""
    M: Tensor | None = None
    """``[R, R]``; None: the identity."""
    B: Tensor | None = None
    """``[D_out, R]``."""
    scaling: float = 1.0
    """s."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return self.weight, self.bias, self.A, self.M, self.B


_PARTS = 5


def normed_linears(x: Tensor, norm_weight: Tensor, eps: float, linears: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """RMS norm, then several linear layers that all read it; keeps x and the adapters' inner products.

    Args:
        x: ``[S, D]``.
        norm_weight: ``[D]``, frozen.
        eps: of the norm.
        linears: read the norm's output.

    Returns:
        ``[S, D_out]`` for each.
    """
    flat = [tensor for linear in linears for tensor in linear.tensors()]
    scalings = tuple(linear.scaling for linear in linears)
    return _NormedLinears.apply(x, norm_weight, eps, scalings, *flat)  # type: ignore[no-any-return]


def gated_mlp(
    x: Tensor, norm_weight: Tensor, eps: float, gate: AdaptedLinear, up: AdaptedLinear, down: AdaptedLinear
) -> Tensor:
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``; keeps x, the outputs of gate and up, and inner products.

    Args:
        x: ``[S, D]``.
        norm_weight: ``[D]``, frozen.
        eps: of the norm.
        gate: ``D -> F``.
        up: ``D -> F``.
        down: ``F -> D``.

    Returns:
        ``[S, D]``.
    """
    flat = [tensor for linear in (gate, up, down) for tensor in linear.tensors()]
    scalings = (gate.scaling, up.scaling, down.scaling)
    return _GatedMlp.apply(x, norm_weight, eps, scalings, *flat)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of whole heads, halves layout; keeps nothing of the size of x.

    Args:
        x: ``[S, H, E]``.
        cos: ``[S, E]``, both halves equal.
        sin: ``[S, E]``, both halves equal.
    """
    half = x.shape[-1] // 2
    return _Rotate.apply(x, cos[:, None, :half].to(x.dtype), sin[:, None, :half].to(x.dtype))  # type: ignore[no-any-return]


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm's output and ``1 / rms`` (fp32 ``[S, 1]``), as transformers computes them."""
    wide = x.float()
    inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
    return (wide * inverse).to(x.dtype) * weight, inverse


def _normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    direction = (x.float() * inverse) if x.dtype != torch.float32 else x * inverse
    pull = (grad * weight).float()
    mean = torch.linalg.vecdot(pull, direction).div_(x.shape[-1])[:, None]
    return pull.addcmul_(direction, mean, value=-1).mul_(inverse).to(x.dtype)


def _group(flat: Sequence[Tensor | None], scalings: Sequence[float]) -> list[AdaptedLinear]:
    grouped = []
    for index, scaling in enumerate(scalings):
        weight, bias, A, M, B = flat[index * _PARTS : (index + 1) * _PARTS]
        assert weight is not None
        grouped.append(AdaptedLinear(weight, bias, A, M, B, scaling))
    return grouped


def _stacked(linears: Sequence[AdaptedLinear], dtype: torch.dtype) -> Tensor | None:
    factors = [linear.A.to(dtype) for linear in linears if linear.A is not None]
    return (factors[0] if len(factors) == 1 else torch.cat(factors)) if factors else None


def _forward(y: Tensor, linears: Sequence[AdaptedLinear]) -> tuple[list[Tensor], Tensor | None]:
    """Outputs of siblings that read y, and their stacked inner products ``z = y A^T``."""
    A = _stacked(linears, y.dtype)
    z = None if A is None else y @ A.t()
    outputs, start = [], 0
    for linear in linears:
        bias = None if linear.bias is None else linear.bias.to(y.dtype)
        output = F.linear(y, linear.weight.to(y.dtype), bias)
        if linear.A is not None and linear.B is not None and z is not None:
            rank = linear.A.shape[0]
            output.addmm_(z[:, start : start + rank], combine(linear.B, linear.M, y.dtype).t(), alpha=linear.scaling)
            start += rank
        outputs.append(output)
    return outputs, z


def _backward(
    y: Tensor, z: Tensor | None, grads: Sequence[Tensor], linears: Sequence[AdaptedLinear]
) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """Gradient of y, and gradients of (weight, bias, A, M, B) for each sibling."""
    dy: Tensor | None = None
    pulls, start = [], 0
    found: list[list[Tensor | None]] = []
    for grad, linear in zip(grads, linears, strict=True):
        dy = grad @ linear.weight.to(grad.dtype) if dy is None else dy.addmm_(grad, linear.weight.to(grad.dtype))
        own: list[Tensor | None] = [None] * _PARTS
        if linear.A is not None and linear.B is not None and z is not None:
            rank = linear.A.shape[0]
            pulls.append((grad @ combine(linear.B, linear.M, grad.dtype)).mul_(linear.scaling))
            dC = (grad.t() @ z[:, start : start + rank]).to(linear.B.dtype).mul_(linear.scaling)
            own[4] = dC if linear.M is None else dC @ linear.M.to(dC.dtype).t()
            own[3] = None if linear.M is None else (linear.B.t() @ dC).to(linear.M.dtype)
            start += rank
        found.append(own)
    assert dy is not None
    if pulls:
        u = pulls[0] if len(pulls) == 1 else torch.cat(pulls, dim=1)
        stacked = _stacked(linears, u.dtype)
        assert stacked is not None
        dy.addmm_(u, stacked)
        dA, start = u.t() @ y, 0
        for own, linear in zip(found, linears, strict=True):
            if linear.A is not None:
                own[2] = dA[start : start + linear.A.shape[0]].to(linear.A.dtype)
                start += linear.A.shape[0]
    return dy, [tuple(own) for own in found]


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, scalings: tuple[float, ...], *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, inverse = _normalise(x, weight, eps)
        outputs, z = _forward(y, _group(flat, scalings))
        ctx.scalings = scalings
        ctx.save_for_backward(x, weight, inverse, z, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, *flat = ctx.saved_tensors
        y = (x.float() * inverse).to(x.dtype) * weight
        dy, found = _backward(y, z, grads, _group(flat, ctx.scalings))
        dx = _normalise_backward(dy, x, weight, inverse) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *(tensor for own in found for tensor in own)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, scalings: tuple[float, ...], *flat: Tensor | None
    ) -> Tensor:
        gate, up, down = _group(flat, scalings)
        y, inverse = _normalise(x, weight, eps)
        (e, g), z = _forward(y, (gate, up))
        del y
        (output,), z_down = _forward(F.silu(e).mul_(g), (down,))
        ctx.scalings = scalings
        ctx.save_for_backward(x, weight, inverse, z, e, g, z_down, *flat)
        return output.add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, e, g, z_down, *flat = ctx.saved_tensors
        gate, up, down = _group(flat, ctx.scalings)
        activated = F.silu(e)
        dh, found_down = _backward(activated * g, z_down, (grad,), (down,))
        d_up = activated.mul_(dh)
        d_gate = torch.ops.aten.silu_backward(dh.mul_(g), e)
        y = (x.float() * inverse).to(x.dtype) * weight
        dy, found = _backward(y, z, (d_gate, d_up), (gate, up))
        dx = _normalise_backward(dy, x, weight, inverse).add_(grad) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *(tensor for own in (*found, *found_down) for tensor in own)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = output.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return output
