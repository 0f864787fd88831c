"""The fused forward and backward of adapted linear layers: one autograd node for all layers that read the same input.

Shapes: ``T`` tokens (all leading dimensions), ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W
``[D_out, D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; ``s`` is the scaling, ``C = s B M``.

Forward ``y = x W^T + (x A^T) C^T``. Backward with ``u = dY C`` and ``z = x A^T``::

    dX = dY W + u A     dA = u^T x     dC = dY^T z     dB = s dC M^T     dM = s B^T dC

No product of size T is spent on M, and nothing of size T is kept but x and z. Layers that read one x (query, key and
value; gate and up) have their A on top of each other: z, dA and the adapters' part of dX are one product each, and the
layers' own parts of dX are added up by the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.adapters.dropout import draw_seed, exact_rate, keep, keep_, kept_bits
from mm_moslora.adapters.functional import autocasts
from mm_moslora.errors import AdapterError

_TENSORS = 5
"""Tensors per layer among the node's inputs: W, bias, A, M, B."""


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What one adapted linear layer computes with."""

    weight: Tensor
    """``[D_out, D_in]``; gets no gradient."""
    bias: Tensor | None
    """``[D_out]``."""
    A: Tensor
    """``[R, D_in]``."""
    M: Tensor | None
    """``[R, R]``; None is the identity."""
    B: Tensor
    """``[D_out, R]``."""
    scaling: float
    """s."""
    dropout: float = 0.0
    """Probability of dropping an entry of x before A."""


@dataclass(kw_only=True)
class Pending:
    """A layer's gradient that waits for the chain rule."""

    gradient: Tensor | None
    """``dC``, ``[D_out, R]`` in float32, added up over the micro-batches; None before the first."""
    M: Tensor | None
    """``[R, R]``, with its way to the parameter."""
    B: Tensor
    """``[D_out, R]``, the parameter."""
    scaling: float
    """s."""


@dataclass(kw_only=True)
class StepProducts:
    """What the micro-batches of one optimiser step share in one node; see `one_product_per_step`."""

    key: object = None
    """Dtype and scalings that the copies were made for."""
    A: Tensor | None = None
    """All A on top of each other, in the compute dtype."""
    C: list[Tensor] = field(default_factory=list)
    """``s B M`` of every layer, in the compute dtype."""
    pending: dict[int, Pending] = field(default_factory=dict)
    """By the layer's place in the node."""
    last: bool = False
    """This is the step's last micro-batch: B and M get their gradients in its backward pass."""


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
    layer = Operands(weight=weight, bias=bias, A=A, M=M, B=B, scaling=scaling, dropout=dropout)
    return fused_linears(x, [layer])[0]


def fused_linears(x: Tensor, layers: Sequence[Operands], shared: StepProducts | None = None) -> tuple[Tensor, ...]:
    """Several adapted linear layers on one input, in one autograd node; see `fused_linear`.

    Args:
        x: ``[..., D_in]``.
        layers: their operands; all of one D_in.
        shared: what the micro-batches of a step share; None: every call stands alone.

    Returns:
        One ``[..., D_out]`` per layer.
    """
    if shared is not None and not (x.requires_grad or any(layer.A.requires_grad for layer in layers)):
        shared = None  # Nothing would call the node's backward pass.
    # Survivors of dropout are scaled up by 1 / (1 - dropout); as a part of s it costs nothing.
    rates = [exact_rate(layer.dropout) for layer in layers]
    plan = _Plan(
        scalings=tuple(layer.scaling / (1.0 - rate) for layer, rate in zip(layers, rates, strict=True)),
        masks=tuple((rate, draw_seed()) if rate else None for rate in rates),
        shared=shared,
        last=shared is None or shared.last,
        owners=() if shared is None else tuple((layer.M, layer.B) for layer in layers),
    )
    tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.A, *_mixed_by(layer, plan.last))]
    device = x.device.type
    if not autocasts(x.device):
        return _FusedLinears.apply(x, plan, *tensors)  # type: ignore[no-any-return]
    half = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _FusedLinears.apply(half, plan, *tensors)  # type: ignore[no-any-return]


def _mixed_by(layer: Operands, last: bool) -> tuple[Tensor | None, Tensor]:
    """M and B, cut off from their parameters where these get their gradients later: no hook must fire for nothing."""
    if last:
        return layer.M, layer.B
    return None if layer.M is None else layer.M.detach(), layer.B.detach()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The node's arguments that are not tensors, one entry per layer."""

    scalings: tuple[float, ...]
    masks: tuple[tuple[float, int] | None, ...]
    """Dropout probability and seed."""
    shared: StepProducts | None
    last: bool
    """B and M get their gradients in this node's backward pass."""
    owners: tuple[tuple[Tensor | None, Tensor], ...]
    """M and B where products are shared; the saved ones may be copies (checkpointing), without a way back."""


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = [tensors[start : start + _TENSORS] for start in range(0, len(tensors), _TENSORS)]
        rows = x.reshape(-1, x.shape[-1])
        A, Cs = _copies(plan, layers, x.dtype)
        ranks = [C.shape[1] for C in Cs]
        if any(plan.masks):
            pairs = zip(_parts(A, ranks, 0), plan.masks, strict=True)
            z = torch.cat([_inner(rows, a, mask) for a, mask in pairs], 1)
        else:
            z = rows @ A.t()
        results = []
        for (weight, bias, *_), C, own in zip(layers, Cs, _parts(z, ranks, 1), strict=True):
            assert weight is not None
            # Shaped by F.linear, not by a view at the end: callers may change the result in place.
            y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            y.view(-1, y.shape[-1]).addmm_(own, C.t())
            results.append(y)
        ctx.plan, ctx.ranks = plan, ranks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, A, *Cs, *(t for layer in layers for t in (layer[0], layer[2], layer[3], layer[4])))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise AdapterError(
                "The fused kernel has no second derivative (the backward pass was asked for a graph: create_graph). "
                "Run the forward pass under mm_moslora.adapters.use_kernel('reference')."
            )
        devices = {grad.device.type for grad in grads if grad is not None}
        if not devices:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(devices.pop(), enabled=False):
            return _Backward(ctx, grads).gradients()


class _Backward:
    """One backward pass of the node; layers whose output nobody used have no part in it."""

    def __init__(self, ctx: Any, grads: Sequence[Tensor | None]) -> None:
        x, z, A, *rest = ctx.saved_tensors
        count = len(grads)
        self.plan: _Plan = ctx.plan
        self.needs_x = ctx.needs_input_grad[0]
        self.needs = [ctx.needs_input_grad[2 + _TENSORS * i : 2 + _TENSORS * (i + 1)] for i in range(count)]
        self.x, self.rows = x, x.reshape(-1, x.shape[-1])
        self.used = [index for index in range(count) if grads[index] is not None]
        self.grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        self.C, self.A, self.z = rest[:count], _parts(A, ctx.ranks, 0), _parts(z, ctx.ranks, 1)
        self.whole_A = A
        self.weights, self.As, self.Ms, self.Bs = (rest[count + index :: 4] for index in range(4))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of x, the plan (none), and W (none), bias, A, M, B of every layer."""
        dX, dA = self._inputs()
        result: list[Tensor | None] = [dX, None]
        for index, grad in enumerate(self.grads):
            dM, dB = self._outputs(index)
            dbias = grad.sum(0) if grad is not None and self.needs[index][1] else None
            result += [None, dbias, dA.get(index), dM, dB]
        return tuple(result)

    def _inputs(self) -> tuple[Tensor | None, dict[int, Tensor]]:
        """``dX`` and every ``dA``."""
        if not (self.needs_x or any(needs[2] for needs in self.needs)):
            return None, {}
        us = [self.grads[index] @ self.C[index] for index in self.used]
        if any(self.plan.masks):
            dX, dA = self._masked_inputs(us)
        else:
            u = us[0] if len(us) == 1 else torch.cat(us, 1)
            A = self.whole_A if len(us) == len(self.A) else torch.cat([self.A[index] for index in self.used])
            dX = self._through_weights(None)
            if dX is not None:
                dX.addmm_(u, A)
            dA = _parts(u.t() @ self.rows, [part.shape[1] for part in us], 0)
        gradients = {
            index: gradient.to(self.As[index].dtype)
            for index, gradient in zip(self.used, dA, strict=True)
            if self.needs[index][2]
        }
        return None if dX is None else dX.view_as(self.x), gradients

    def _through_weights(self, dX: Tensor | None) -> Tensor | None:
        """``dX`` and the base weights' part of it, added up by the products."""
        if not self.needs_x:
            return None
        for index in self.used:
            grad, weight = self.grads[index], self.weights[index].to(self.x.dtype)
            assert grad is not None
            dX = grad @ weight if dX is None else dX.addmm_(grad, weight)
        return dX

    def _masked_inputs(self, us: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """``dX`` and every ``dA`` where an adapter has dropout."""
        dX, gradients = torch.empty_like(self.rows) if self.needs_x else None, []
        for place, (index, u) in enumerate(zip(self.used, us, strict=True)):
            A, mask = self.A[index], self.plan.masks[index]
            dA = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32))
            for block, bits in _blocks(self.rows, mask):
                if dX is not None and place == 0:
                    keep_(torch.mm(u[block], A, out=dX[block]), bits)
                elif dX is not None:
                    dX[block].add_(keep_(u[block] @ A, bits))
                dA.add_(u[block].t() @ keep(self.rows[block], bits))
            gradients.append(dA)
        return self._through_weights(dX), gradients

    def _outputs(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """``dM`` and ``dB`` of one layer."""
        _, _, _, needs_M, needs_B = self.needs[index]
        shared, grad = self.plan.shared, self.grads[index]
        if not (needs_M or needs_B or self._learns_later(index)):
            return None, None
        # z^T dY is faster than dY^T z where D_out is large.
        dC = None if grad is None else (self.z[index].t() @ grad).t()
        if shared is not None:
            dC = self._add_to_pending(shared, index, dC)
        if dC is None:
            return None, None
        dM, dB = chain_rule(dC, self.Ms[index], self.Bs[index], self.plan.scalings[index])
        return dM if needs_M else None, dB if needs_B else None

    def _learns_later(self, index: int) -> bool:
        return bool(self.plan.owners) and any(t is not None and t.requires_grad for t in self.plan.owners[index])

    def _add_to_pending(self, shared: StepProducts, index: int, dC: Tensor | None) -> Tensor | None:
        """Keep ``dC`` for later; in the last micro-batch give back the sum of all."""
        waiting = shared.pending.get(index)
        if dC is not None and waiting is not None and waiting.gradient is not None:
            waiting.gradient.add_(dC)
        elif dC is not None:
            M, B = self.plan.owners[index]
            waiting = Pending(gradient=dC.float(), M=M, B=B, scaling=self.plan.scalings[index])
            shared.pending[index] = waiting
        if waiting is None or not self.plan.last:
            return None
        return shared.pending.pop(index).gradient


def chain_rule(dC: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> tuple[Tensor | None, Tensor]:
    """The gradients of M and B from that of ``C = s B M``, in the precision of B.

    Args:
        dC: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.

    Returns:
        ``dM`` (None without a mixer) and ``dB``, each in its factor's dtype.
    """
    dC = dC.to(B.dtype)
    if M is None:
        return None, dC * scaling
    return (B.t() @ dC).mul_(scaling).to(M.dtype), dC @ (M.to(B.dtype) * scaling).t()


def _copies(plan: _Plan, layers: Sequence[Sequence[Tensor | None]], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A on top of each other, and every ``s B M``, in the compute dtype; made once per step where it is shared."""
    shared, key = plan.shared, (dtype, plan.scalings)
    if shared is not None and shared.A is not None and shared.key == key:
        return shared.A, shared.C
    As, Cs = [], []
    for (_, _, A, M, B), scaling in zip(layers, plan.scalings, strict=True):
        assert A is not None
        assert B is not None
        As.append(A)
        Cs.append((B * scaling if M is None else B @ (M.to(B.dtype) * scaling)).to(dtype))
    A = (As[0] if len(As) == 1 else torch.cat(As)).to(dtype)
    if shared is not None:
        shared.key, shared.A, shared.C = key, A, Cs
    return A, Cs


def _parts(whole: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    return (whole,) if len(sizes) == 1 else whole.split_with_sizes(sizes, dim)


def _inner(rows: Tensor, A: Tensor, mask: tuple[float, int] | None) -> Tensor:
    """``z = dropout(x) A^T``."""
    z = rows.new_empty(rows.shape[0], A.shape[0])
    for block, bits in _blocks(rows, mask):
        torch.mm(keep(rows[block], bits), A.t(), out=z[block])
    return z


def _blocks(rows: Tensor, mask: tuple[float, int] | None) -> Iterable[tuple[slice, Tensor | None]]:
    """The rows in blocks with their masks, in one without."""
    return [(slice(None), None)] if mask is None else kept_bits(rows, *mask)
