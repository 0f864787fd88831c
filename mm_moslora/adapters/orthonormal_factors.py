"""Factors that stay orthonormal while they train (StelLA, arXiv 2510.01938), for any optimiser and for engines.

Shapes: A ``[R, D_in]`` has orthonormal rows, B ``[D_out, R]`` orthonormal columns. Both are points of a Stiefel
manifold. A step has four parts: the gradient of the loss, clipped already, becomes one of the manifold, the optimiser
steps, its step is projected onto the tangent space, and its end is pulled back to the manifold (polar decomposition).

`factor_form="stella"` is StelLA: the gradient g at x is that of the canonical metric, ``g - x g^T x``, and steps are
scaled by ``sqrt(d / m)``, d the width of the model and m the longer side of x. With `orthonormal` the gradient is
projected onto the tangent space, and steps keep their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mm_moslora.adapters.tree import base_model, named_adapter_layers
from mm_moslora.utils.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class OrthonormalFactor:
    """One factor that stays on its manifold."""

    weight: nn.Parameter
    """A or B."""
    rows: bool
    """Whether its rows are orthonormal (A), or its columns (B)."""
    canonical: bool = False
    """Whether its gradient is that of the canonical metric; if not, it is projected onto the tangent space."""
    step_scale: float = 1.0
    """Of the optimiser's steps."""

    def gradient(self, point: Tensor, gradient: Tensor) -> Tensor:
        """The manifold's gradient from that of the loss, in fp32; all shaped like the factor."""
        if not self.canonical:
            return self.tangent(point, gradient)
        point, gradient = self._tall(_wide(point)), self._tall(_wide(gradient))
        return self._tall(gradient - point @ (gradient.T @ point))

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
        step = self.tangent(start, (moved - start) * self.step_scale)
        U, _, Vh = torch.linalg.svd(start + step, full_matrices=False)
        return U @ Vh

    def error(self, point: Tensor) -> float:
        """Distance of a point from the manifold: the largest entry of ``|Q^T Q - I|``."""
        tall = self._tall(_wide(point.detach()))
        return float((tall.T @ tall - torch.eye(tall.shape[1], device=tall.device, dtype=tall.dtype)).abs().max())

    def _tall(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.rows else matrix


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def orthonormal_factors(
    model: nn.Module, *, adapter_name: str | None = None, width: int | None = None
) -> list[OrthonormalFactor]:
    """A and B of the adapters with ``factor_form="stella"`` or ``"orthonormal"`` in a model.

    Args:
        model: PEFT model, or any model with adapters inside.
        adapter_name: one adapter; None takes all.
        width: d of StelLA's steps; None takes `config.hidden_size` of the model around a layer.

    Raises:
        AdapterError: no such configuration.
    """
    factors: list[OrthonormalFactor] = []
    for path, layer in named_adapter_layers(model):
        for name in layer.adapter_names() if adapter_name is None else [adapter_name]:
            form = layer.factor_form.get(name)
            if form not in ("stella", "orthonormal"):
                continue
            d = (width or _width_around(model, path)) if form == "stella" else None
            for weight, rows in zip(layer.outer_factors(name), (True, False), strict=True):
                scale = 1.0 if d is None else math.sqrt(d / max(weight.shape))
                factors.append(
                    OrthonormalFactor(
                        weight=cast(nn.Parameter, weight), rows=rows, canonical=d is not None, step_scale=scale
                    )
                )
    return factors


def _width_around(model: nn.Module, path: str) -> int:
    base, parts = base_model(model), path.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(base.get_submodule(".".join(parts[:end])), "config", None)
        if isinstance(width := getattr(config, "hidden_size", None), int):
            return width
    raise AdapterError(
        f"StelLA scales steps by the model's width, and no module around {path} has a config.hidden_size. Pass width "
        "to keep_orthonormal."
    )


def keep_orthonormal(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, adapter_name: str = "default", width: int | None = None
) -> None:
    """Keep A's rows and B's columns orthonormal while an optimiser trains them (StelLA, arXiv 2510.01938).

    Before a step gradients become those of the Stiefel manifold; afterwards the step the optimiser made is projected
    onto the tangent space, and its end is pulled back to the manifold (polar decomposition). The training loop of this
    project does so itself, also for masters.

    Args:
        model: holds an adapter with ``factor_form="stella"`` or ``"orthonormal"``.
        optimizer: any torch optimiser that holds its factors themselves, or a wrapper such as accelerate's around one;
            gets two hooks.
        adapter_name: the adapter.
        width: see `orthonormal_factors`.

    Raises:
        AdapterError: no such adapter, one with other than orthonormal factors, or an optimiser that does not hold them;
            the latter at a step, too, where another (DeepSpeed's) has put copies in their places since.
    """
    if not any(layer.holds(adapter_name) for _, layer in named_adapter_layers(model)):
        raise AdapterError(f"The model has no adapter {adapter_name!r} to keep orthonormal.")
    factors = orthonormal_factors(model, adapter_name=adapter_name, width=width)
    error = max((factor.error(factor.weight) for factor in factors), default=math.inf)
    if error > 1e-2:
        raise AdapterError(
            f"The factors of adapter {adapter_name!r} are not orthonormal (error {error:.2g}). Make it with "
            "factor_form='stella' or 'orthonormal'."
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    _check_trained(factors, optimizer)
    before: list[Tensor] = []

    @torch.no_grad()
    def project(*_: Any) -> None:
        _check_trained(factors, optimizer)
        before[:] = [factor.weight.clone() for factor in factors]
        for factor in factors:
            if factor.weight.grad is not None:
                factor.weight.grad.copy_(factor.gradient(factor.weight, factor.weight.grad))

    @torch.no_grad()
    def retract(*_: Any) -> None:
        for factor, start in zip(factors, before, strict=True):
            factor.weight.copy_(factor.end(start, factor.weight))

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(retract)


def _check_trained(factors: list[OrthonormalFactor], optimizer: torch.optim.Optimizer) -> None:
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    lost = sum(id(factor.weight) not in trained for factor in factors)
    if lost:
        raise AdapterError(
            f"{lost} of {len(factors)} factors to keep orthonormal are not in the optimiser: it trains others, or "
            "copies of them (DeepSpeed's masters, say), which a hook on it cannot keep so. Give it the model's own "
            "parameters, or train with mm-moslora train (adapter.factor_form: stella), which does it on ZeRO-0 to 2."
        )
