"""One autograd node for all adapted linear layers that read the same input; the formulas are in `products`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.kernels.lora.lora_matmul import (
    TENSORS,
    LinearOperands,
    LinearRules,
    LoraMatmul,
    copies,
    mixer_gradients,
)
from mm_moslora.utils.errors import AdapterError


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
    learn: tuple[bool, bool] = field(init=False)
    """Whether M and B train. Switching adapters freezes them, perhaps before their gradients come."""

    def __post_init__(self) -> None:
        """Look at M and B now."""
        self.learn = (_requires_grad(self.M), _requires_grad(self.B))


@dataclass(kw_only=True)
class SharedProducts:
    """What the micro-batches of one optimiser step share in one node; see `one_product_per_step`."""

    key: object = None
    """Dtype and scalings that the copies were made for."""
    A: Tensor | None = None
    """All A on top of each other, in the compute dtype."""
    C: list[Tensor | None] = field(default_factory=list)
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
    layer = LinearOperands(weight=weight, bias=bias, A=A, M=M, B=B, scaling=scaling, dropout=dropout)
    return fused_linears(x, [layer])[0]


def fused_linears(
    x: Tensor, layers: Sequence[LinearOperands], shared: SharedProducts | None = None
) -> tuple[Tensor, ...]:
    """Several adapted linear layers on one input, in one autograd node; see `fused_linear`.

    Args:
        x: ``[..., D_in]``.
        layers: their operands; all of one D_in.
        shared: what the micro-batches of a step share; None: every call stands alone.

    Returns:
        One ``[..., D_out]`` per layer.
    """
    if shared is not None and not (x.requires_grad or any(_requires_grad(layer.A) for layer in layers)):
        shared = None  # Nothing would call the node's backward pass.
    plan = _Plan(
        rules=LinearRules.of(layers),
        shared=shared,
        last=shared is None or shared.last,
        owners=() if shared is None else tuple((layer.M, layer.B) for layer in layers),
    )
    tensors = [t for layer in layers for t in (*layer.tensors()[:3], *_mixed_by(layer, plan.last))]
    device = x.device.type
    if not autocasts(x.device):
        return _FusedLinears.apply(x, plan, *tensors)  # type: ignore[no-any-return]
    half = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _FusedLinears.apply(half, plan, *tensors)  # type: ignore[no-any-return]


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _mixed_by(layer: LinearOperands, last: bool) -> tuple[Tensor | None, Tensor | None]:
    """M and B, cut off from their parameters where these get their gradients later: no hook must fire for nothing."""
    if last:
        return layer.M, layer.B
    return (None if layer.M is None else layer.M.detach()), (None if layer.B is None else layer.B.detach())


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The node's arguments that are not tensors."""

    rules: LinearRules
    shared: SharedProducts | None
    last: bool
    """B and M get their gradients in this node's backward pass."""
    owners: tuple[tuple[Tensor | None, Tensor | None], ...]
    """M and B where products are shared; the saved ones may be copies (checkpointing), without a way back."""


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, As, Ms, Bs = (tensors[index::TENSORS] for index in range(TENSORS))
        A, Cs = _copies(plan, list(zip(weights, biases, As, Ms, Bs, strict=True)), x.dtype)
        results, z = LoraMatmul(weights, A, Cs, plan.rules).outputs(x, biases)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, A, *Cs, *weights, *As, *Ms, *Bs)
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
        self.x, self.z, A, *rest = ctx.saved_tensors
        count = len(grads)
        Cs, weights, self.As, self.Ms, self.Bs = (rest[start * count : (start + 1) * count] for start in range(5))
        self.plan: _Plan = ctx.plan
        self.products = LoraMatmul(weights, A, Cs, self.plan.rules)
        self.needs_x = ctx.needs_input_grad[0]
        self.needs = [ctx.needs_input_grad[2 + TENSORS * i : 2 + TENSORS * (i + 1)] for i in range(count)]
        self.grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of x, the plan (none), and W (none), bias, A, M, B of every layer."""
        dX: Tensor | None = None
        dA: dict[int, Tensor] = {}
        if self.needs_x or any(needs[2] for needs in self.needs):
            rows = self.x.reshape(-1, self.x.shape[-1])
            dX, dA = self.products.input_gradients(rows, self.grads, needs_x=self.needs_x)
        result: list[Tensor | None] = [None if dX is None else dX.view_as(self.x), None]
        for index, (grad, needs) in enumerate(zip(self.grads, self.needs, strict=True)):
            dM, dB = self._outputs(index)
            dbias = grad.sum(0) if grad is not None and needs[1] else None
            result += [None, dbias, dA[index].to(self.As[index].dtype) if needs[2] and index in dA else None, dM, dB]
        return tuple(result)

    def _outputs(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """``dM`` and ``dB`` of one layer."""
        _, _, _, needs_M, needs_B = self.needs[index]
        shared, grad = self.plan.shared, self.grads[index]
        if not (needs_M or needs_B or self._learns_later(index)):
            return None, None
        dC = None if grad is None else self.products.product_gradient(index, grad, self.z)
        if shared is not None:
            dC = self._add_to_pending(shared, index, dC)
        if dC is None:
            return None, None
        dM, dB = mixer_gradients(dC, self.Ms[index], self.Bs[index], self.plan.rules.scalings[index])
        return dM if needs_M else None, dB if needs_B else None

    def _learns_later(self, index: int) -> bool:
        return bool(self.plan.owners) and any(_requires_grad(tensor) for tensor in self.plan.owners[index])

    def _add_to_pending(self, shared: SharedProducts, index: int, dC: Tensor | None) -> Tensor | None:
        """Keep ``dC`` for later; in the last micro-batch give back the sum of all."""
        waiting = shared.pending.get(index)
        if waiting is None and self.plan.last:
            return dC
        if dC is not None and waiting is not None and waiting.gradient is not None:
            waiting.gradient.add_(dC)
        elif dC is not None:
            M, B = self.plan.owners[index]
            assert B is not None
            waiting = Pending(gradient=dC.float(), M=M, B=B, scaling=self.plan.rules.scalings[index])
            shared.pending[index] = waiting
        if waiting is None or not self.plan.last:
            return None
        return shared.pending.pop(index).gradient


def _copies(
    plan: _Plan, layers: Sequence[Sequence[Tensor | None]], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`copies`, made once per step where it is shared."""
    shared, scalings = plan.shared, plan.rules.scalings
    if shared is None:
        return copies(layers, scalings, dtype)
    if shared.A is None or shared.key != (dtype, scalings):
        shared.key = (dtype, scalings)
        shared.A, shared.C = copies(layers, scalings, dtype)
    return shared.A, shared.C
