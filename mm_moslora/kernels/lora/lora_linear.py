"""Linear layers with LoRA that read the same input: their products, forward and backward, and their autograd node.

Shapes: ``T`` tokens (all leading dimensions), ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W
``[D_out, D_in]``, A ``[R, D_in]``, C ``[D_out, R]``. C is ``s B M`` (`mixed_product`), so every layer is a plain LoRA.

Forward ``y = x W^T + (x A^T) C^T``. Backward with ``u = dY C`` and ``z = x A^T``::

    dX = dY W + u A     dA = u^T x     dC = dY^T z     dW = dY^T x (where W trains)

No product of size T is spent on M, and nothing of size T is kept but x and z. Layers that read one x (query, key and
value; gate and up) have their A on top of each other: z, dA and the adapters' part of dX are one product each, and the
layers' own parts of dX are added up by the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.kernels.lora.lora_math import autocasts, without_autocast
from mm_moslora.kernels.lora.mixed_product import mixed_product
from mm_moslora.kernels.lora.seeded_dropout import (
    Mask,
    draw_seed,
    exact_rate,
    kept_blocks,
    kept_rows,
    kernel_masks,
    triton_kernels,
)
from mm_moslora.utils.errors import AdapterError

PLAIN_TYPES: tuple[type, ...] = (Tensor, nn.Parameter)
"""Types of weights that are the numbers they show; other types (quantised ones) have products of their own."""


Packed = Callable[[torch.dtype], Tensor]
"""A base weight that its layer keeps quantised: makes it dense, ``[D_out, D_in]``, for one product in a dtype."""


@dataclass(frozen=True, kw_only=True)
class LinearOperands:
    """What one linear layer computes with, adapted or not."""

    weight: Tensor | Packed
    """``[D_out, D_in]``."""
    bias: Tensor | None
    """``[D_out]``."""
    A: Tensor | None = None
    """``[R, D_in]``; None: no adapter."""
    C: Tensor | None = None
    """``s B M / (1 - dropout)``, ``[D_out, R]`` in the compute dtype; None: no adapter."""
    dropout: float = 0.0
    """Probability of dropping an entry of x before A, from `exact_rate`."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """W (None: packed, see `LinearRules`), bias, A and C."""
        weight = self.weight if isinstance(self.weight, Tensor) else None
        return weight, self.bias, self.A, self.C


TENSORS = 4
"""How many `LinearOperands.tensors` gives."""


@dataclass(frozen=True, kw_only=True)
class LinearRules:
    """What siblings compute with beside tensors, an entry per layer."""

    masks: tuple[Mask | None, ...]
    """Dropout of x before A."""
    packed: tuple[Packed | None, ...]
    """The weights that are not tensors."""

    @classmethod
    def of(cls, layers: Sequence[LinearOperands]) -> LinearRules:
        """Draws the seeds of the masks."""
        return cls(
            masks=tuple(Mask(rate=layer.dropout, seed=draw_seed()) if layer.dropout else None for layer in layers),
            packed=tuple(None if isinstance(layer.weight, Tensor) else layer.weight for layer in layers),
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies in: that of x, or of autocast."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype


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
    """`reference_linear` in one autograd node.

    The factors may be wider than x (float32 masters over a bfloat16 base): small copies are cast, x never is. Under
    autocast everything runs in autocast's dtype, as the modules would.

    Args:
        dropout: probability of dropping an entry of x before A. The mask is drawn twice from one saved seed (of torch's
            CPU generator, so that checkpointing repeats it) instead of being kept.

    Returns:
        ``[..., D_out]`` in the dtype of x, or of autocast. Differentiable once.
    """
    rate = exact_rate(dropout)
    C = mixed_product(B, M, scaling / (1.0 - rate), compute_dtype(x))
    return fused_linears(x, [LinearOperands(weight=weight, bias=bias, A=A, C=C, dropout=rate)])[0]


def fused_linears(x: Tensor, layers: Sequence[LinearOperands]) -> tuple[Tensor, ...]:
    """Several linear layers on one input, in one autograd node; see `fused_linear`."""
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    x = x.to(compute_dtype(x))
    with without_autocast(x.device):
        return _FusedLinears.apply(x, LinearRules.of(layers), *tensors)  # type: ignore[no-any-return]


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rules: LinearRules, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, z = LoraMatmul(tensors, rules, x.dtype).outputs(x)
        ctx.rules, ctx.shape, ctx.dtype = rules, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        learns_weight = any(ctx.needs_input_grad[2::TENSORS])
        ctx.save_for_backward(x if learns_weight or z is not None else None, z, *tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, z, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dX, gradients = LoraMatmul(tensors, ctx.rules, ctx.dtype).gradients(rows, z, flat, needs, needs_x=needs_x)
        return None if dX is None else dX.view(ctx.shape), None, *gradients


class LoraMatmul:
    """The products of siblings, forward and backward, inside of an autograd node."""

    def __init__(self, tensors: Sequence[Tensor | None], rules: LinearRules, dtype: torch.dtype) -> None:
        """Lay the A on top of each other."""
        self.weights, self.biases, self.As, self.Cs = (tensors[start::TENSORS] for start in range(TENSORS))
        self.packed, self.masks, self.dtype = rules.packed, rules.masks, dtype
        self.ranks = [0 if C is None else C.shape[1] for C in self.Cs]
        factors = [A.to(dtype) for A in self.As if A is not None]
        self.A = _joined(factors, 0) if factors else None

    def outputs(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Every ``y``, and ``z`` side by side (None without adapters)."""
        z = None if self.A is None else self._inner(x.reshape(-1, x.shape[-1]), self.A)
        results = []
        for index, (bias, C) in enumerate(zip(self.biases, self.Cs, strict=True)):
            # Shaped by F.linear, not by a view at the end: callers may change the result in place.
            y = F.linear(x, self._weight(index), None if bias is None else bias.to(x.dtype))
            if C is not None and z is not None:
                y.view(-1, y.shape[-1]).addmm_(self._part(z, index, 1), C.t())
            results.append(y)
        return results, z

    def _inner(self, rows: Tensor, A: Tensor) -> Tensor:
        if not any(self.masks):
            return rows @ A.t()
        z = rows.new_empty(rows.shape[0], A.shape[0])
        adapted = {index: mask for index, mask in enumerate(self.masks) if self.ranks[index]}
        for index, block, kept in kept_rows(rows, adapted):
            self._part(z, index, 1)[block] = kept @ self._factor(index).t()
        return z

    def gradients(
        self,
        x: Tensor | None,
        z: Tensor | None,
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, and those of every layer's tensors; None where it is not needed."""
        # A missing x: no layer has an adapter or a weight that trains. A missing dY: nothing reads that layer's output.
        if torch.is_grad_enabled():
            raise AdapterError(
                "The fused kernel has no second derivative (the backward pass was asked for a graph: create_graph). "
                "Run the forward pass under mm_moslora.adapters.use_kernel(model, 'reference')."
            )
        dX: Tensor | None = None
        dAs: dict[int, Tensor] = {}
        gradients: list[Tensor | None] = []
        used = next((grad for grad in grads if grad is not None), None)
        if used is None:
            return None, [None] * len(needs)
        with without_autocast(used.device):
            if needs_x or any(needs[2::TENSORS]):
                dX, dAs = self._input_gradients(x, grads, needs_x=needs_x)
            for index, grad in enumerate(grads):
                needs_W, needs_bias, needs_A, needs_C = needs[TENSORS * index : TENSORS * (index + 1)]
                A, dA = self.As[index], dAs.get(index)
                W, dW, dbias, dC = self.weights[index], None, None, None
                if needs_W and grad is not None and W is not None and x is not None:
                    dW = (grad.t() @ x).to(W.dtype)
                if needs_bias and grad is not None:
                    dbias = grad.sum(0)
                if needs_C and grad is not None and z is not None:
                    # z^T dY is faster than dY^T z where D_out is large.
                    dC = (self._part(z, index, 1).t() @ grad).t()
                gradients += [dW, dbias, dA.to(A.dtype) if needs_A and A is not None and dA is not None else None, dC]
        return dX, gradients

    def _input_gradients(
        self, x: Tensor | None, grads: Sequence[Tensor | None], *, needs_x: bool
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """``dX`` (None if it is not needed) and every ``dA``, by the layer's index."""
        us = {
            i: grad @ C
            for i, (grad, C) in enumerate(zip(grads, self.Cs, strict=True))
            if not (grad is None or C is None)
        }
        if not us:
            return self._through_weights(grads, None) if needs_x else None, {}
        assert x is not None
        masked = any(self.masks[index] for index in us)
        kernels = triton_kernels(x) if masked else None
        if masked and kernels is None:
            dX, gradients = self._masked_gradients(x, us, needs_x=needs_x)
            return self._through_weights(grads, dX) if needs_x else None, gradients
        dX = self._through_weights(grads, None) if needs_x else None
        if kernels is not None:
            masks = {index: self.masks[index] for index in us}
            if dX is not None:
                factors = [self._factor(index) for index in us]
                kernels.add_kept_products(dX, list(us.values()), factors, kernel_masks(masks))
            return dX, {index: us[index].t() @ kept for index, _, kept in kept_rows(x, masks)}
        u, A = _joined(list(us.values()), 1), _joined([self._factor(index) for index in us], 0)
        if dX is not None:
            dX.addmm_(u, A)
        return dX, dict(zip(us, (u.t() @ x).split([part.shape[1] for part in us.values()]), strict=True))

    def _through_weights(self, grads: Sequence[Tensor | None], dX: Tensor | None) -> Tensor | None:
        """``dX`` and the base weights' part of it, added up by the products."""
        for index, grad in enumerate(grads):
            if grad is not None:
                weight = self._weight(index)
                dX = grad @ weight if dX is None else dX.addmm_(grad, weight)
                del weight  # before the next one is made dense
        return dX

    def _weight(self, index: int) -> Tensor:
        weight, packed = self.weights[index], self.packed[index]
        if weight is not None:
            return weight.to(self.dtype)
        assert packed is not None
        return packed(self.dtype)

    def _masked_gradients(
        self, x: Tensor, us: dict[int, Tensor], *, needs_x: bool
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The adapters' part of ``dX``, and every ``dA``, where an adapter has dropout."""
        dX = x.new_empty(x.shape) if needs_x else None
        wide = torch.promote_types(x.dtype, torch.float32)
        gradients = {index: torch.zeros_like(self._factor(index), dtype=wide) for index in us}
        first = next(iter(us))
        for index, block, kept in kept_blocks(x, {index: self.masks[index] for index in us}):
            u, A = us[index][block], self._factor(index)
            if dX is not None and index == first:
                kept.keep_(torch.mm(u, A, out=dX[block]))
            elif dX is not None:
                dX[block].add_(kept.keep_(u @ A))
            gradients[index].add_(u.t() @ kept.keep(x[block]))
        return dX, gradients

    def _factor(self, index: int) -> Tensor:
        assert self.A is not None
        return self._part(self.A, index, 0)

    def _part(self, whole: Tensor, index: int, dim: int) -> Tensor:
        """The rows (0) or columns (1) of one layer in a matrix that stacks those of all layers."""
        return whole.narrow(dim, sum(self.ranks[:index]), self.ranks[index])


def is_plain(weight: object) -> bool:
    """Whether a product with a weight is the product of its numbers."""
    return type(weight) in PLAIN_TYPES


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
