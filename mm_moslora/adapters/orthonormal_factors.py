"""Factors that stay orthonormal while they train (StelLA, arXiv 2510.01938), for any optimiser and for engines.

Shapes: A ``[R, D_in]`` has orthonormal rows, B ``[D_out, R]`` orthonormal columns. Both are points of a Stiefel
manifold. A step has four parts: the gradient is projected onto the tangent space, the optimiser steps, its step is
projected, and its end is pulled back to the manifold (polar decomposition).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class OrthonormalFactor:
    """One factor that stays on its manifold."""

    weight: nn.Parameter
    """A or B."""
    rows: bool
    """Whether its rows are orthonormal (A), or its columns (B)."""

    def tangent(self, point: Tensor, direction: Tensor) -> Tensor:
        """A direction projected onto the tangent space at a point, in fp32; all shaped like the factor."""
        point, direction = self._tall(_wide(point)), self._tall(_wide(direction))
        product = point.T @ direction
        return self._tall(direction - point @ ((product + product.T) / 2))

    def end(self, start: Tensor, moved: Tensor) -> Tensor:
        """The end of an optimiser's step, pulled back to the manifold.

        Args:
            start: before the step.
            moved: after it, anywhere.
        """
        start, moved = _wide(start), _wide(moved)
        U, _, Vh = torch.linalg.svd(start + self.tangent(start, moved - start), full_matrices=False)
        return U @ Vh

    def error(self, point: Tensor) -> float:
        """Distance of a point from the manifold: the largest entry of ``|Q^T Q - I|``."""
        tall = self._tall(_wide(point.detach()))
        return float((tall.T @ tall - torch.eye(tall.shape[1], device=tall.device, dtype=tall.dtype)).abs().max())

    def _tall(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.rows else matrix


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def orthonormal_factors(model: nn.Module) -> list[OrthonormalFactor]:
    """A and B of every adapter with ``factor_form="orthonormal"`` in a model.

    Args:
        model: PEFT model, or any model with adapters inside.
    """
    return [
        factor
        for _, layer in named_adapter_layers(model)
        for name in layer.adapter_names()
        if layer.factor_form.get(name) == "orthonormal"
        for factor in _pair(layer.factors(name))
    ]


def _pair(factors: Any) -> tuple[OrthonormalFactor, OrthonormalFactor]:
    return OrthonormalFactor(weight=factors.A, rows=True), OrthonormalFactor(weight=factors.B, rows=False)


def project_gradients(factor: OrthonormalFactor) -> None:
    """Project every gradient of a factor onto the tangent space, by a hook of autograd.

    The projection is linear, so it may come before gradients are added up over micro-batches and ranks.
    """

    @torch.no_grad()
    def project(gradient: Tensor) -> Tensor:
        return factor.tangent(factor.weight, gradient).to(gradient.dtype)

    factor.weight.register_hook(project)


def keep_orthonormal(model: nn.Module, optimizer: torch.optim.Optimizer, *, adapter_name: str = "default") -> None:
    """Keep A's rows and B's columns orthonormal while an optimiser trains them (StelLA, arXiv 2510.01938).

    Before a step the gradients are projected onto the tangent space of the Stiefel manifold; afterwards the step the
    optimiser made is projected too, and its end is pulled back to the manifold (polar decomposition). The
    training loop of this project does so itself, also for masters.

    Args:
        model: holds an adapter with ``factor_form="orthonormal"``.
        optimizer: any torch optimiser that holds its factors themselves, or a wrapper such as accelerate's around one;
            gets two hooks.
        adapter_name: the adapter.

    Raises:
        AdapterError: no such adapter, one with other than orthonormal factors, or an optimiser that does not hold them;
            the latter at a step, too, where another (DeepSpeed's) has put copies in their places since.
    """
    kept: list[OrthonormalFactor] = []
    for path, layer in named_adapter_layers(model):
        if layer.holds(adapter_name):
            kept += _pair(layer.factors(adapter_name))
            error = max(factor.error(factor.weight) for factor in kept[-2:])
            if error > 1e-2:
                raise AdapterError(
                    f"The factors of {path} are not orthonormal (error {error:.2g}). Make the adapter with "
                    "factor_form='orthonormal'."
                )
    if not kept:
        raise AdapterError(f"The model has no adapter {adapter_name!r} to keep orthonormal.")
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    _check_held(kept, optimizer)
    before: list[Tensor] = []

    @torch.no_grad()
    def project(*_: Any) -> None:
        _check_held(kept, optimizer)
        before[:] = [factor.weight.clone() for factor in kept]
        for factor in kept:
            if factor.weight.grad is not None:
                factor.weight.grad.copy_(factor.tangent(factor.weight, factor.weight.grad))

    @torch.no_grad()
    def retract(*_: Any) -> None:
        for factor, start in zip(kept, before, strict=True):
            factor.weight.copy_(factor.end(start, factor.weight))

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(retract)


def _check_held(kept: list[OrthonormalFactor], optimizer: torch.optim.Optimizer) -> None:
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    lost = sum(id(factor.weight) not in held for factor in kept)
    if lost:
        raise AdapterError(
            f"{lost} of {len(kept)} factors to keep orthonormal are not in the optimiser: it trains others, or copies "
            "of them (DeepSpeed's masters, say), which a hook on it cannot keep so. Give it the model's own "
            "parameters, or train with mm-moslora train (adapter.factor_form: orthonormal), which does it on ZeRO-0 to "
            "2."
        )
