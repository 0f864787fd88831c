"""Adapted linear layers that read the same input, forward and backward, as products of tensors without autograd.

Shapes: ``T`` tokens (all leading dimensions), ``D_in``, ``D_out`` widths, ``R`` rank; x ``[..., D_in]``, W
``[D_out, D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``; ``s`` is the scaling, ``C = s B M``.

Forward ``y = x W^T + (x A^T) C^T``. Backward with ``u = dY C`` and ``z = x A^T``::

    dX = dY W + u A     dA = u^T x     dC = dY^T z     dB = s dC M^T     dM = s B^T dC

No product of size T is spent on M, and nothing of size T is kept but x and z. Layers that read one x (query, key and
value; gate and up) have their A on top of each other: z, dA and the adapters' part of dX are one product each, and the
layers' own parts of dX are added up by the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.kernels.lora.lora_math import combine, multiplies_at_once, scaled_product
from mm_moslora.kernels.lora.seeded_dropout import Mask, draw_seed, exact_rate, kept_blocks

PLAIN_TYPES: tuple[type, ...] = (Tensor, nn.Parameter)
"""Of weights that are the numbers they show; other types (quantised ones, say) compute in ways of their own."""


class Packed(Protocol):
    """A base weight that its layer keeps quantised."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[D_out, D_in]``, made for one product.

        Args:
            dtype: the compute dtype.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LinearOperands:
    """What one linear layer computes with, adapted or not."""

    weight: Tensor | Packed
    """``[D_out, D_in]``; gets no gradient."""
    bias: Tensor | None
    """``[D_out]``."""
    A: Tensor | None
    """``[R, D_in]``; None: no adapter."""
    M: Tensor | None
    """``[R, R]``; None is the identity."""
    B: Tensor | None
    """``[D_out, R]``; None: no adapter."""
    scaling: float = 1.0
    """s."""
    dropout: float = 0.0
    """Probability of dropping an entry of x before A."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """W (None: packed, see `LinearRules`), bias, A, M and B."""
        weight = self.weight if isinstance(self.weight, Tensor) else None
        return weight, self.bias, self.A, self.M, self.B


TENSORS = 5
"""How many `LinearOperands.tensors` gives."""


@dataclass(frozen=True, kw_only=True)
class LinearRules:
    """What siblings compute with beside tensors, an entry per layer."""

    scalings: tuple[float, ...]
    """Of the products ``C``."""
    masks: tuple[Mask | None, ...]
    """Dropout of x before A."""
    packed: tuple[Packed | None, ...]
    """The weights that are not tensors."""

    @classmethod
    def of(cls, layers: Sequence[LinearOperands]) -> LinearRules:
        """Draws seeds; survivors of dropout are scaled up by ``1 / (1 - dropout)``, free as a part of s."""
        rates = [exact_rate(layer.dropout) for layer in layers]
        return cls(
            scalings=tuple(layer.scaling / (1.0 - rate) for layer, rate in zip(layers, rates, strict=True)),
            masks=tuple(
                Mask(rate=rate, seed=draw_seed()) if rate else None for layer, rate in zip(layers, rates, strict=True)
            ),
            packed=tuple(None if isinstance(layer.weight, Tensor) else layer.weight for layer in layers),
        )


class LoraMatmul:
    """Siblings with their tensors in the compute dtype."""

    def __init__(
        self, weights: Sequence[Tensor | None], A: Tensor | None, C: Sequence[Tensor | None], rules: LinearRules
    ) -> None:
        """See `copies` for A and C.

        Args:
            weights: ``[D_out, D_in]`` each; None: packed.
            A: ``[sum of R, D_in]``; None: no layer has an adapter.
            C: ``[D_out, R]`` each; None: no adapter.
            rules: of the same layers.
        """
        self.weights, self.packed, self.A, self.C, self.masks = weights, rules.packed, A, C, rules.masks
        self.ranks = [0 if c is None else c.shape[1] for c in C]

    def outputs(self, x: Tensor, biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
        """Every ``y``, and ``z`` side by side (None without adapters).

        Args:
            x: ``[..., D_in]``.
            biases: ``[D_out]`` each.
        """
        z = None if self.A is None else self._inner(x.reshape(-1, x.shape[-1]), self.A)
        results = []
        for index, (bias, C) in enumerate(zip(biases, self.C, strict=True)):
            # Shaped by F.linear, not by a view at the end: callers may change the result in place.
            y = F.linear(x, self._weight(index, x.dtype), None if bias is None else bias.to(x.dtype))
            if C is not None and z is not None:
                y.view(-1, y.shape[-1]).addmm_(self._part(z, index, 1), C.t())
            results.append(y)
        return results, z

    def _inner(self, rows: Tensor, A: Tensor) -> Tensor:
        if not any(self.masks):
            return rows @ A.t()
        z = rows.new_empty(rows.shape[0], A.shape[0])
        adapted = {index: mask for index, mask in enumerate(self.masks) if self.ranks[index]}
        for index, block, kept in kept_blocks(rows, adapted):
            self._part(z, index, 1)[block] = kept.keep(rows[block]) @ self._factor(index).t()
        return z

    def input_gradients(
        self, x: Tensor, grads: Sequence[Tensor | None], *, needs_x: bool = True
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """``dX`` (None if it is not needed) and every ``dA``, by the layer's place.

        Args:
            x: ``[T, D_in]``.
            grads: every ``dY`` ``[T, D_out]``; None: nobody used that layer's output.
            needs_x: whether ``dX`` is needed.
        """
        us = {
            i: grad @ C
            for i, (grad, C) in enumerate(zip(grads, self.C, strict=True))
            if not (grad is None or C is None)
        }
        if any(self.masks[index] for index in us):
            dX, gradients = self._masked_gradients(x, us, needs_x=needs_x)
            return self._through_weights(x, grads, dX) if needs_x else None, gradients
        dX = self._through_weights(x, grads, None) if needs_x else None
        if not us:
            return dX, {}
        u, A = _joined(list(us.values()), 1), _joined([self._factor(index) for index in us], 0)
        if dX is not None:
            dX.addmm_(u, A)
        return dX, dict(zip(us, (u.t() @ x).split([part.shape[1] for part in us.values()]), strict=True))

    def _through_weights(self, x: Tensor, grads: Sequence[Tensor | None], dX: Tensor | None) -> Tensor | None:
        """``dX`` and the base weights' part of it, added up by the products."""
        for index, grad in enumerate(grads):
            if grad is not None:
                weight = self._weight(index, x.dtype)
                dX = grad @ weight if dX is None else dX.addmm_(grad, weight)
                del weight  # before the next one is made dense
        return dX

    def _weight(self, index: int, dtype: torch.dtype) -> Tensor:
        weight, packed = self.weights[index], self.packed[index]
        if weight is not None:
            return weight.to(dtype)
        assert packed is not None
        return packed.dense(dtype)

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
                kept.add(dX[block], u @ A)
            gradients[index].add_(u.t() @ kept.keep(x[block]))
        return dX, gradients

    def product_gradient(self, index: int, grad: Tensor, z: Tensor) -> Tensor:
        """``dC`` of one layer.

        Args:
            index: the layer's place.
            grad: its ``dY``, ``[T, D_out]``.
            z: from `outputs`.
        """
        # z^T dY is faster than dY^T z where D_out is large.
        return (self._part(z, index, 1).t() @ grad).t()

    def _factor(self, index: int) -> Tensor:
        assert self.A is not None
        return self._part(self.A, index, 0)

    def _part(self, whole: Tensor, index: int, dim: int) -> Tensor:
        """One layer's rows or columns of what all layers have on top of or beside each other."""
        return whole.narrow(dim, sum(self.ranks[:index]), self.ranks[index])


def copies(
    layers: Sequence[Sequence[Tensor | None]], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor | None]]:
    """All A on top of each other, and every ``C = s B M``, in the compute dtype.

    Args:
        layers: the `LinearOperands.tensors` of each.
        scalings: s of each.
        dtype: the compute dtype.
    """
    factors = [A.to(dtype) for _, _, A, _, _ in layers if A is not None]
    products = [
        None if B is None else combine(B, M, dtype, scaling)
        for (_, _, _, M, B), scaling in zip(layers, scalings, strict=True)
    ]
    return (_joined(factors, 0) if factors else None), products


def mixer_gradients(dC: Tensor, M: Tensor | None, B: Tensor, scaling: float) -> tuple[Tensor | None, Tensor]:
    """The gradients of M and B from that of ``C = s B M``, computed as `combine` is.

    Args:
        dC: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        B: ``[D_out, R]``.
        scaling: s.

    Returns:
        ``dM`` (None without a mixer) and ``dB``, each in its factor's dtype.
    """
    if M is not None and M.dtype == B.dtype and multiplies_at_once(B, dC, B.dtype):
        return scaled_product(B.t(), dC, scaling), scaled_product(dC, M.t(), scaling)
    wide = torch.promote_types(torch.promote_types(B.dtype, dC.dtype), torch.float32)
    dC = dC.to(wide)
    if M is None:
        return None, (dC * scaling).to(B.dtype)
    dM, dB = B.to(wide).t() @ dC, dC @ M.to(wide).t()
    return dM.mul_(scaling).to(M.dtype), dB.mul_(scaling).to(B.dtype)


def is_plain(weight: object) -> bool:
    """Whether a product with a weight is the product of its numbers."""
    return type(weight) in PLAIN_TYPES


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
