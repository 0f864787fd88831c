"""The product ``C = s B M`` of an adapted layer, its chain rule, and one product for all micro-batches of a step.

Shapes: ``D_out`` width, ``R`` rank; M ``[R, R]`` (None: the identity), B ``[D_out, R]``, C ``[D_out, R]``; ``s`` is the
scaling.

To every kernel C is the B of a plain LoRA without scaling. B and M get their gradients from that of C::

    dB = s dC M^T     dM = s B^T dC

Where M is made of other tensors (`Mixing`), autograd leads its gradient to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_moslora.kernels.lora.lora_math import without_autocast
from mm_moslora.utils.errors import AdapterError


class Mixing(Protocol):
    """What M is made of; a mixer's module."""

    def matrix(self) -> Tensor:
        """M ``[R, R]``, with a graph to the tensors that it is made of."""

    def learning(self) -> list[Tensor]:
        """The tensors that it is made of and that train."""


def fold_right(B: Tensor, M: Tensor) -> Tensor:
    """``B M``: the B of a plain LoRA of the same rank with the same update.

    Args:
        B: ``[D_out, R]``, or ``[D_out, R, 1, 1]`` for a convolution; ``[D_out, R E]`` of E experts, the columns of
            one rank beside each other, as PEFT lays them.
        M: ``[R, R]``; ``[E, R, R]`` of experts.

    Returns:
        Same shape as B, in the wider dtype of the two and at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(B.dtype, M.dtype), torch.float32)
    if M.ndim == 3:
        columns = B.to(dtype).unflatten(1, (-1, len(M)))
        return torch.einsum("oie,eij->oje", columns, M.to(dtype)).reshape(B.shape)
    return (B.to(dtype).flatten(1) @ M.to(dtype)).view(B.shape)


def combine(B: Tensor, M: Tensor | None, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``C = s B M`` in the wider dtype of the two and at least float32, rounded once; on GPUs one kernel.

    Some CPUs take several times as long for so small a product in bfloat16, and so the value is that of `fold_right`.

    Args:
        B: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        dtype: of the result.
        scaling: s.
    """
    if M is None:
        return (B * scaling).to(dtype)
    if _multiplies_at_once(B, M, dtype):
        return _scaled_product(B, M, scaling)
    return fold_right(B, M).mul_(scaling).to(dtype)


def mixer_gradients(dC: Tensor, B: Tensor, M: Tensor | None, scaling: float) -> tuple[Tensor, Tensor | None]:
    """The gradients of B and M from that of ``C = s B M``, computed as `combine` is.

    Args:
        dC: ``[D_out, R]``.
        B: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        scaling: s.

    Returns:
        ``dB`` and ``dM`` (None without a mixer), each with its factor's shape and dtype.
    """
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
    """Whether to take `_scaled_product`: on a GPU, which adds up in float32 as it does for all other products.

    Where cuBLAS splits a long sum it may round the parts; a run switches that off (`training.precision`).
    """
    return a.device.type == "cuda" and a.dtype == b.dtype == dtype


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``s a b`` in one kernel, where converting, multiplying, scaling and rounding would take five."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


class StepWindow:
    """The products of one optimiser step, each computed once for all micro-batches."""

    def __init__(self) -> None:
        """Nothing is computed yet."""
        self._products: dict[tuple[object, ...], _Product] = {}
        self._last = False

    def last_micro_batch(self) -> None:
        """Call before the last forward pass: its backward pass gives B and M the gradients of all micro-batches."""
        self._last = True

    def product(self, B: Tensor, M: Tensor | Mixing | None, scaling: float, dtype: torch.dtype) -> Tensor:
        """``C = s B M``, ``[D_out, R]``; B and M get their gradients when the step has all of them.

        Args:
            B: ``[D_out, R]``, the same tensor in every micro-batch.
            M: ``[R, R]`` or what it is made of, the same object in every micro-batch; None is the identity.
            scaling: s.
            dtype: of the product.
        """
        key = (id(B), id(M), scaling, dtype)
        product = self._products.get(key)
        if product is None:
            with torch.inference_mode(mode=False), torch.no_grad(), without_autocast(B.device):
                value = combine(B, _matrix(M), dtype, scaling)
            gradient = _ProductGradient(B=B, M=M, scaling=scaling)
            product = self._products[key] = _Product(value=value, gradient=gradient)
        learning = [factor for factor in (B, M) if isinstance(factor, Tensor) and factor.requires_grad]
        learning += [] if M is None or isinstance(M, Tensor) else M.learning()
        if not learning:
            return product.value
        product.gradient.learning = learning
        # Autograd calls the hooks of all inputs, even without a gradient, so B and M are inputs of the last node alone.
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._last:
            with without_autocast(B.device):
                factors = B, _matrix(M)
        anchor = torch.zeros((), requires_grad=True)
        return _MixedProduct.apply(anchor, product, *factors)  # type: ignore[no-any-return]

    def settle(self) -> None:
        """End the step: give B and M the gradients that they have not got yet, through autograd and its hooks."""
        for product in self._products.values():
            product.gradient.settle()
        self._products.clear()

    def abandon(self) -> None:
        """End the step after an error: B and M get nothing, and a later backward pass through a product is refused."""
        for product in self._products.values():
            product.gradient.abandon()
        self._products.clear()


def mixed_product(B: Tensor, M: Tensor | Mixing | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """``C = s B M`` outside of a `StepWindow`: the step has one micro-batch.

    Args:
        B: ``[D_out, R]``.
        M: ``[R, R]``; None is the identity.
        scaling: s.
        dtype: of the product.
    """
    window = StepWindow()
    window.last_micro_batch()
    return window.product(B, M, scaling, dtype)


@dataclass(kw_only=True)
class _ProductGradient:
    """The gradient of a product, and the factors that it belongs to."""

    B: Tensor
    M: Tensor | Mixing | None
    scaling: float
    learning: Sequence[Tensor] = ()
    """What trained in the forward pass. Switching adapters may freeze it before the step ends."""
    total: Tensor | None = None
    """``dC``, ``[D_out, R]`` in at least float32, summed over the micro-batches; None before the first."""
    settled: bool = False
    """Whether the step has ended."""

    def add(self, dC: Tensor) -> None:
        """Add the gradient of one micro-batch.

        Raises:
            AdapterError: the step has ended.
        """
        if self.settled:
            raise AdapterError(
                "A backward pass ran after the block of one_product_per_step that had its forward pass: B and M would "
                "get no gradient. Put forward and backward passes into the block."
            )
        if self.total is None:
            self.total = dC.to(torch.promote_types(dC.dtype, torch.float32), copy=True)
        else:
            self.total.add_(dC)

    def take(self, dC: Tensor | None = None) -> Tensor | None:
        """The sum, with the gradient of the last micro-batch; None: nothing used the layer's output."""
        if self.total is None:
            return dC
        if dC is not None:
            self.total.add_(dC)
        total, self.total = self.total, None
        return total

    def abandon(self) -> None:
        """Drop the sum."""
        self.total, self.settled = None, True

    def settle(self) -> None:
        """Add the gradients from the sum to B and M by a backward pass of their own, so that hooks on them run."""
        total, self.settled = self.take(), True
        if total is None:
            return
        with _learning(self.learning), torch.enable_grad(), without_autocast(total.device):
            M = _matrix(self.M)
            with torch.no_grad():
                grads = mixer_gradients(total, self.B, M, self.scaling)
            learns_B = any(factor is self.B for factor in self.learning)
            candidates = zip((self.B, M), grads, (learns_B, len(self.learning) > learns_B), strict=True)
            pairs = [(factor, grad) for factor, grad, learns in candidates if learns and factor is not None]
            torch.autograd.backward([factor for factor, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True, kw_only=True)
class _Product:
    value: Tensor
    """``s B M``, ``[D_out, R]``."""
    gradient: _ProductGradient


class _MixedProduct(torch.autograd.Function):
    """The product in one micro-batch: adds its gradient to the step's; the last one sends the sum to B and M."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, product: _Product, B: Tensor | None, M: Tensor | None) -> Tensor:
        ctx.gradient = product.gradient  # not the product: with gradient checkpointing the node outlives it
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(B, M)
        return product.value.detach()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dC: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient: _ProductGradient = ctx.gradient
        B, M = ctx.saved_tensors
        total = None
        if B is not None:
            total = gradient.take(dC)
        elif dC is not None:
            gradient.add(dC)
        if total is None:
            return None, None, None, None
        with without_autocast(total.device):
            dB, dM = mixer_gradients(total, B, M, gradient.scaling)
        return None, None, dB if ctx.needs_input_grad[2] else None, dM if ctx.needs_input_grad[3] else None


def _matrix(M: Tensor | Mixing | None) -> Tensor | None:
    return M if M is None or isinstance(M, Tensor) else M.matrix()


@contextmanager
def _learning(factors: Sequence[Tensor]) -> Iterator[None]:
    """Let factors that were frozen meanwhile take their gradients."""
    frozen = [factor for factor in factors if not factor.requires_grad]
    for factor in frozen:
        factor.requires_grad_(True)
    yield
    for factor in frozen:
        factor.requires_grad_(False)
