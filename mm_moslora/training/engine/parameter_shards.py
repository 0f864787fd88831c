"""The optimiser state that a rank holds, as views into what the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moslora.training.engine.optimizers import KINDS, OptimizerKind, State
from mm_moslora.training.engine.step_result import Arriving
from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed

_TABLES = "qmap"
"""In names of tables of the 256 values that 8 bits stand for, which every parameter has."""


@dataclass(frozen=True, kw_only=True)
class ParameterShard:
    """Consecutive elements of one parameter; this rank holds their optimiser state. All tensors are flat views into
    what the optimiser uses; writing to them changes it. AdamW's have equal lengths."""

    name: str
    """Parameter name in the engine's module."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 values."""
    moments: dict[str, Tensor]
    """The tensors of its state by kind: AdamW's `exp_avg` and `exp_avg_sq`."""
    state: State
    """The optimiser's state of `parameter`; shards of one flat parameter share it."""
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
            master: what it steps: the parameter's master, or a flat tensor of several.
            start: first element in the parameter.
            offset: first element in `master`.
        """
        state = optimizer.state[master]
        if not state:
            kind.begin(optimizer, master)

        def part(tensor: Tensor) -> Tensor:
            flat = tensor.detach().view(-1)
            return flat if length is None else flat.narrow(0, offset, length)

        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
        return cls(
            name=name, start=start, master=part(master),
            moments={key: part(tensor) for key, tensor in tensors.items() if _TABLES not in key},
            state=state, parameter=master, momentum=part(kind.momentum(state)),
            gradient=None if master.grad is None else part(master.grad),
        )  # fmt: skip

    @property
    def step(self) -> float | None:
        """The number of its steps; None: the optimiser counts none."""
        return float(self.state["step"]) if "step" in self.state else None

    def set_step(self, value: float) -> None:
        """Set `step`, which is a tensor in some optimisers and a number in others."""
        if isinstance(self.state["step"], Tensor):
            self.state["step"].fill_(value)
        else:
            self.state["step"] = int(value)


class Norms:
    """`weight_norm/COMPONENT` and `momentum_norm/COMPONENT` over all ranks, computed when it is made, by every rank."""

    # The momentum is the one trace of a component's gradients that every ZeRO stage keeps.

    @torch.no_grad()
    def __init__(
        self, shards: Iterable[ParameterShard], groups: Sequence[ParameterGroup], *, device: torch.device, copies: int
    ) -> None:
        component = {name: group.name.partition("/")[0] for group in groups for name in group.names}
        kinds = {"weight_norm": lambda shard: shard.master, "momentum_norm": lambda shard: shard.momentum}
        parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in kinds for name in component.values()}
        for shard in shards:
            for kind, values in kinds.items():
                parts[f"{kind}/{component[shard.name]}"].append(values(shard).float())
        norms = [nn.utils.get_total_norm(tensors).to(device) for tensors in parts.values()]
        squares = torch.stack(norms).double().square_()
        distributed.add_up(squares)
        self._names, self._copies, self._squares = list(parts), copies, Arriving(squares)

    def read(self) -> dict[str, float]:
        """The norms by name."""
        totals = zip(self._names, self._squares.tolist(), strict=True)
        return {name: math.sqrt(total / self._copies) for name, total in totals}
