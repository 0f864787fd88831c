"""Adapter factors that an engine keeps orthonormal: gradients of the manifold, masters pulled back after every step.

The optimiser holds masters, under ZeRO in pieces on every rank. A step on the manifold needs whole matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_moslora.adapters.orthonormal_factors import OrthonormalFactor, orthonormal_factors, project_gradients
from mm_moslora.utils import distributed

Masters = Iterable[tuple[str, int, Tensor]]
"""Parts of masters that this rank holds: parameter name, first element, flat values (views)."""


class StiefelFactors:
    """The orthonormal factors among the trainable parameters; none in most models."""

    def __init__(self, module: nn.Module, named: Sequence[tuple[str, nn.Parameter]], device: torch.device) -> None:
        """Find them, and have their gradients become the manifold's from now on.

        Args:
            module: with adapters inside, not sharded.
            named: what trains, by name.
            device: where whole matrices are put together.
        """
        names = {id(parameter): name for name, parameter in named}
        self.factors: dict[str, OrthonormalFactor] = {
            names[id(factor.weight)]: factor for factor in orthonormal_factors(module) if id(factor.weight) in names
        }
        self._device = device
        for factor in self.factors.values():
            project_gradients(factor)

    def whole(self, masters: Masters, *, replicated: bool) -> dict[str, Tensor]:
        """The masters of all factors, put together from all ranks in one collective; every rank calls it.

        Args:
            masters: of this rank; those of other parameters are ignored.
            replicated: every rank holds all masters.
        """
        if not self.factors:
            return {}
        sizes = [factor.weight.numel() for factor in self.factors.values()]
        flat = torch.zeros(sum(sizes), device=self._device)
        parts = dict(zip(self.factors, flat.split(sizes), strict=True))
        for name, start, values in masters:
            if name in parts:
                parts[name][start : start + values.numel()] = values
        if not replicated:
            distributed.add_up(flat)
        return {name: part.view_as(self.factors[name].weight) for name, part in parts.items()}

    @torch.no_grad()
    def pull_back(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], masters: Masters) -> None:
        """End a step on the manifold: masters and weights.

        Args:
            before: `whole` before the step.
            after: `whole` after it.
            masters: of this rank; those of other parameters are ignored.
        """
        ends = {name: factor.end(before[name], after[name]) for name, factor in self.factors.items()}
        for name, start, values in masters:
            if name in ends:
                values.copy_(ends[name].reshape(-1)[start : start + values.numel()])
        for name, factor in self.factors.items():
            factor.weight.copy_(ends[name])
