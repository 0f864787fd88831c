"""What happens around an optimiser step: one product B M for all its micro-batches.

Shapes: M ``[R, R]``, B ``[D_out, R]``, ``C = B M``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_moslora.kernels.lora.fused_lora_linear import Pending, SharedProducts
from mm_moslora.kernels.lora.lora_math import combine
from mm_moslora.kernels.lora.lora_matmul import LinearOperands, mixer_gradients


class StepWindow:
    """The micro-batches of one optimiser step."""

    def __init__(self) -> None:
        """Nothing is computed yet."""
        self._products: dict[tuple[object, ...], SharedProducts] = {}
        self._lent: dict[tuple[object, ...], _Lent] = {}
        self._last = False

    def last_micro_batch(self) -> None:
        """Call before the last forward pass: its backward pass gives B and M the gradients of all micro-batches."""
        self._last = True
        for products in self._products.values():
            products.last = True

    def products(self, layers: Sequence[LoraLayer]) -> SharedProducts:
        """What a node over these layers shares with those of the other micro-batches."""
        key = tuple(map(_identity, layers))
        return self._products.setdefault(key, SharedProducts(last=self._last))

    def product(self, layer: LoraLayer, operands: LinearOperands, dtype: torch.dtype) -> Tensor:
        """One layer's ``C = s B M`` for a kernel of somebody else's, ``[D_out, R]``, made once for all micro-batches.

        To that kernel it is the B of a plain LoRA without scaling; B and M get their gradients when the step has all.

        Args:
            layer: whose product it is.
            operands: its factors.
            dtype: of the product.
        """
        M, B, scaling = operands.M, operands.B, operands.scaling
        assert B is not None
        key = (*_identity(layer), dtype)
        lent = self._lent.get(key)
        if lent is None:
            with torch.no_grad():
                C = combine(B, M, dtype, scaling)
            lent = self._lent[key] = _Lent(C=C, pending=Pending(gradient=None, M=M, B=B, scaling=scaling))
        if not (B.requires_grad or (M is not None and M.requires_grad)):
            return lent.C
        anchor = torch.zeros((), requires_grad=True)
        return _Lend.apply(anchor, lent, *((M, B) if self._last else (None, None)))  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Give B and M the gradients that still wait, through autograd and its hooks."""
        waiting = [pending for products in self._products.values() for pending in products.pending.values()]
        for pending in (*waiting, *(lent.pending for lent in self._lent.values())):
            if pending.gradient is None:
                continue
            dM, dB = mixer_gradients(pending.gradient, pending.M, pending.B, pending.scaling)
            found = zip((pending.M, pending.B), (dM, dB), pending.learn, strict=True)
            pairs = [(tensor, grad) for tensor, grad, learns in found if learns and tensor is not None]
            with _learning([tensor for tensor, _ in pairs]):
                torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        self._lent.clear()
        for products in self._products.values():
            products.pending.clear()


@contextmanager
def _learning(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters that were frozen meanwhile take their gradients."""
    frozen = [leaf for leaf in map(_leaf, tensors) if not leaf.requires_grad]
    for leaf in frozen:
        leaf.requires_grad_(True)
    yield
    for leaf in frozen:
        leaf.requires_grad_(False)


def _leaf(tensor: Tensor) -> Tensor:
    """The parameter that a tensor is, or was made of (the matrix of a diagonal mixer)."""
    node: Any = tensor.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    leaf: Tensor = tensor if node is None else node.variable
    return leaf


def _identity(layer: LoraLayer) -> tuple[object, ...]:
    """Whose product it is: micro-batches with another adapter, scaling or dropout have another one."""
    names = layer.active_adapters
    return (id(layer), *names, *(layer.scaling.get(name) for name in names), cast(nn.Module, layer).training)


@dataclass(kw_only=True)
class _Lent:
    """A product that other kernels compute with."""

    C: Tensor
    """``s B M``, ``[D_out, R]``."""
    pending: Pending


class _Lend(torch.autograd.Function):
    """Hands out a product, and takes its gradient in: for later, or together with all others to M and B."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, lent: _Lent, M: Tensor | None, B: Tensor | None) -> Tensor:
        ctx.lent, ctx.last = lent, B is not None
        return lent.C.detach()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dC: Tensor) -> tuple[Tensor | None, ...]:
        pending: Pending = ctx.lent.pending
        alone = ctx.last and pending.gradient is None
        whole = dC if alone else dC.float() if pending.gradient is None else pending.gradient.add_(dC)
        pending.gradient = None if ctx.last else whole
        if not ctx.last:
            return None, None, None, None
        dM, dB = mixer_gradients(whole, pending.M, pending.B, pending.scaling)
        return None, None, dM if ctx.needs_input_grad[2] else None, dB if ctx.needs_input_grad[3] else None
