"""Adapter factors that an engine keeps orthonormal: gradients projected, masters pulled back after every step.

The optimiser holds masters, and under ZeRO pieces of them on every rank; the manifold is a matter of whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_moslora.adapters.orthonormal_factors import OrthonormalFactor, orthonormal_factors, project_gradients
from mm_moslora.training.engine.optimizer_state import Piece
from mm_moslora.utils import distributed


class StiefelFactors:
    """The orthonormal factors among the trainable parameters; none in most models."""

    def __init__(self, module: nn.Module, named: Sequence[tuple[str, nn.Parameter]], device: torch.device) -> None:
        """Find them, and have their gradients projected from now on.

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

    def whole(self, pieces: Sequence[Piece], *, replicated: bool) -> dict[str, Tensor]:
        """The masters of all factors, put together from all ranks in one collective; every rank calls it.

        Args:
            pieces: of this rank.
            replicated: every rank has all pieces.
        """
        if not self.factors:
            return {}
        sizes = [factor.weight.numel() for factor in self.factors.values()]
        flat = torch.zeros(sum(sizes), device=self._device)
        parts = dict(zip(self.factors, flat.split(sizes), strict=True))
        for piece in self._own(pieces):
            parts[piece.name][piece.start : piece.start + piece.master.numel()] = piece.master
        if not replicated:
            distributed.add_up(flat)
        return {name: part.view_as(self.factors[name].weight) for name, part in parts.items()}

    @torch.no_grad()
    def pull_back(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], pieces: Sequence[Piece]) -> None:
        """End a step on the manifold: masters and weights.

        Args:
            before: `whole` before the step.
            after: `whole` after it.
            pieces: of this rank.
        """
        ends = {name: factor.end(before[name], after[name]) for name, factor in self.factors.items()}
        for piece in self._own(pieces):
            piece.master.copy_(ends[piece.name].reshape(-1)[piece.start : piece.start + piece.master.numel()])
        for name, factor in self.factors.items():
            factor.weight.copy_(ends[name])

    def _own(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [piece for piece in pieces if piece.name in self.factors]
