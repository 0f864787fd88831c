"""Adapter factors that an engine keeps orthonormal: gradients of the manifold, masters pulled back after every step.

The optimiser holds masters, under ZeRO in pieces on every rank. A step on the manifold needs whole matrices. Gradients
are converted right before the optimiser reads them: as in StelLA's published code, they are clipped by the norm of the
loss's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_moslora.adapters.orthonormal_factors import OrthonormalFactor, orthonormal_factors
from mm_moslora.utils import distributed

Masters = Iterable[tuple[str, int, Tensor]]
"""Parts of masters that this rank holds: parameter name, first element, flat values (views)."""


class StiefelFactors:
    """The orthonormal factors among the trainable parameters; none in most models."""

    def __init__(self, module: nn.Module, named: Sequence[tuple[str, nn.Parameter]], device: torch.device) -> None:
        """Find them.

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
    def convert(self, points: Mapping[str, Tensor], gradients: Masters, *, replicated: bool) -> None:
        """Make gradients of the loss those of the manifold, in place; every rank calls it.

        Args:
            points: `whole` of the masters.
            gradients: of this rank, in the places of masters; those of other parameters stay as they are.
            replicated: every rank holds all of them.
        """
        given = [entry for entry in gradients if entry[0] in self.factors]
        whole = self.whole(given, replicated=replicated)
        ends = {name: self.factors[name].gradient(points[name], whole[name]) for name in {entry[0] for entry in given}}
        for name, start, values in given:
            values.copy_(ends[name].reshape(-1)[start : start + values.numel()])

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
