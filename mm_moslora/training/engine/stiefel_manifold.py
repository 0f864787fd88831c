"""Adapter factors that an engine keeps orthonormal: gradients of the manifold, masters pulled back after every step.

The optimiser holds masters, under ZeRO in shards on every rank. A step on the manifold needs whole matrices. Gradients
are converted right before the optimiser reads them: as in StelLA's published code, they are clipped by the norm of the
loss's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mm_moslora.adapters.orthonormal_factors import OrthonormalFactor, orthonormal_factors
from mm_moslora.training.engine.parameter_shards import ParameterShard
from mm_moslora.utils import distributed


class StiefelFactors:
    """The orthonormal factors among the trainable parameters; none in most models, and then no method does anything.

    Every rank calls each method at the same point.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Sequence[tuple[str, nn.Parameter]],
        device: torch.device,
        *,
        shards: Callable[[], list[ParameterShard]],
    ) -> None:
        """Find them.

        Args:
            module: with adapters inside, not sharded.
            named: what trains, by name.
            device: where whole matrices are put together.
            shards: gives the optimiser state of this rank.
        """
        names = {id(parameter): name for name, parameter in named}
        self.factors: dict[str, OrthonormalFactor] = {
            names[id(factor.weight)]: factor for factor in orthonormal_factors(module) if id(factor.weight) in names
        }
        self._device, self._shards, self._replicated = device, shards, False
        self._points: dict[str, Tensor] = {}
        """The masters before an update, whole."""

    def convert_before(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimiser read gradients of the manifold; it may step by group, on every rank in one order."""
        if self.factors:
            optimizer.register_step_pre_hook(lambda stepping, *_: self._convert(stepping))

    def begin_update(self, *, replicated: bool) -> None:
        """Keep the points from which the optimiser steps.

        Args:
            replicated: every rank holds all masters.
        """
        if self.factors:  # else no shard is collected
            self._replicated = replicated
            self._points = self._whole([(shard, shard.master) for shard in self._own_shards()])

    @torch.no_grad()
    def end_update(self) -> None:
        """Pull masters and weights back to the manifold."""
        if not self.factors:
            return
        shards = self._own_shards()
        moved = self._whole([(shard, shard.master) for shard in shards])
        ends = {name: factor.end(self._points[name], moved[name]) for name, factor in self.factors.items()}
        for shard in shards:
            _write(ends[shard.name], shard, shard.master)
        for name, factor in self.factors.items():
            factor.weight.copy_(ends[name])

    @torch.no_grad()
    def _convert(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients of the loss those of the manifold, in place."""
        # With offloading all groups have gradients while one steps, and each is converted once.
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = [
            (shard, shard.gradient)
            for shard in self._own_shards()
            if shard.gradient is not None and id(shard.parameter) in stepped
        ]
        whole = self._whole(gradients)
        converted = {
            name: self.factors[name].gradient(self._points[name], whole[name])
            for name in {shard.name for shard, _ in gradients}
        }
        for shard, gradient in gradients:
            _write(converted[shard.name], shard, gradient)

    def _own_shards(self) -> list[ParameterShard]:
        return [shard for shard in self._shards() if shard.name in self.factors]

    def _whole(self, parts: Sequence[tuple[ParameterShard, Tensor]]) -> dict[str, Tensor]:
        """Matrices of all factors, put together from the shards of all ranks in one collective."""
        sizes = [factor.weight.numel() for factor in self.factors.values()]
        flat = torch.zeros(sum(sizes), device=self._device)
        matrices = dict(zip(self.factors, flat.split(sizes), strict=True))
        for shard, values in parts:
            matrices[shard.name][shard.start : shard.start + values.numel()] = values
        if not self._replicated:
            distributed.add_up(flat)
        return {name: matrix.view_as(self.factors[name].weight) for name, matrix in matrices.items()}


def _write(matrix: Tensor, shard: ParameterShard, values: Tensor) -> None:
    """Write a shard's part of a whole matrix into the tensor that the optimiser uses."""
    values.copy_(matrix.reshape(-1)[shard.start : shard.start + values.numel()])
