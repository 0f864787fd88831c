"""The optimiser state that a rank holds, as views into what the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moslora.training.engine.optimizers import KINDS, OptimizerKind, State
from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed

_CONSTANT = "qmap"
"""In names of tables of the 256 values that 8 bits stand for, which every parameter has."""


@dataclass(frozen=True, kw_only=True)
class ParameterShard:
    """Consecutive elements of one parameter; this rank holds their optimiser state.

    All tensors are flat views into what the optimiser uses; writing to them changes it. AdamW's have equal lengths.
    """

    name: str
    """Parameter name in the engine's module."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 values."""
    moments: dict[str, Tensor]
    """The tensors of its state by kind: AdamW's `exp_avg` and `exp_avg_sq`."""
    counter: State
    """Holds the numbers of its state; shards that are counted together share it."""
    count_names: tuple[str, ...]
    """Their keys: AdamW's `step`."""
    momentum: Tensor
    """The mean of the last gradients, or what the optimiser keeps in its place."""
    parameter: Tensor
    """What the optimiser steps, which `master` is a part of."""
    gradient: Tensor | None = None
    """What the optimiser will read; None between steps."""

    @classmethod
    def of(
        cls,
        name: str,
        optimizer: torch.optim.Optimizer,
        master: Tensor,
        *,
        start: int = 0,
        offset: int = 0,
        length: int | None = None,
        kind: OptimizerKind = KINDS["adamw"],
    ) -> ParameterShard:
        """The state that an optimiser keeps of a parameter, made as the optimiser makes it where there is none yet.

        Args:
            name: of the parameter.
            optimizer: of this kind.
            master: what it steps: the parameter's master, or a flat tensor of several.
            start: first element in the parameter.
            offset: first element in `master`.
            length: elements, of each tensor; None: all.
            kind: of the optimiser.
        """
        state = optimizer.state[master]
        if not state:
            kind.begin(optimizer, master)

        def part(tensor: Tensor) -> Tensor:
            flat = tensor.detach().view(-1)
            return flat if length is None else flat.narrow(0, offset, length)

        momentum, counter = kind.momentum(state), kind.counter(optimizer, master)
        return cls(
            name=name, start=start, master=part(master),
            moments={key: part(tensor) for key, tensor in _tensors(state) if _CONSTANT not in key},
            counter=counter, count_names=tuple(key for key in kind.counts if key in counter), parameter=master,
            momentum=part(momentum),
            gradient=None if master.grad is None else part(master.grad),
        )  # fmt: skip

    @property
    def counts(self) -> dict[str, float]:
        """The numbers of the state."""
        return {name: float(self.counter[name]) for name in self.count_names}

    def set_count(self, name: str, value: float) -> None:
        """Set one of `counts`, which is a tensor in some optimisers and a number in others."""
        old = self.counter[name]
        if isinstance(old, Tensor):
            old.fill_(value)
        else:
            self.counter[name] = type(old)(value)


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a state by name; a tensor of a class that consists of others gives those."""
    for name, value in state.items():
        if isinstance(value, Tensor) and name != "step":
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
            yield from ((f"{name}_{part}", getattr(value, part)) for part in parts)
            if not parts:
                yield name, value


@torch.no_grad()
def component_norms(
    shards: Iterable[ParameterShard],
    groups: Sequence[ParameterGroup],
    *,
    device: torch.device,
    copies: int,
) -> dict[str, float]:
    """`weight_norm/COMPONENT` and `momentum_norm/COMPONENT` over all ranks; every rank calls it.

    The momentum is the mean of the last gradients, after clipping: the one trace of a component's gradients that every
    ZeRO stage keeps. Of schedule-free AdamW, which keeps none, it is the root of the mean square.

    Args:
        shards: of this rank.
        groups: of all parameters; the part of a group's name before the slash is its component.
        device: the one that communicates.
        copies: ranks that hold the same shards.
    """
    component = {name: group.name.partition("/")[0] for group in groups for name in group.names}
    kinds = {"weight_norm": lambda shard: shard.master, "momentum_norm": lambda shard: shard.momentum}
    parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in kinds for name in component.values()}
    for shard in shards:
        for kind, values in kinds.items():
            parts[f"{kind}/{component[shard.name]}"].append(values(shard).float())
    norms = [nn.utils.get_total_norm(tensors).to(device) for tensors in parts.values()]
    squares = torch.stack(norms).double().square_()
    distributed.add_up(squares)
    return {name: math.sqrt(total / copies) for name, total in zip(parts, squares.tolist(), strict=True)}
