"""The optimiser state that a rank holds, as views into what the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class ParameterShard:
    """Consecutive elements of one parameter; this rank holds their optimiser state.

    All tensors are flat views of equal length into what the optimiser uses; writing to them changes it.
    """

    name: str
    """Parameter name in the engine's module."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 values."""
    moments: dict[str, Tensor]
    """Adam's `exp_avg` and `exp_avg_sq`."""
    step: Tensor
    """Adam's step count; shards of one flat group share it."""
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
    ) -> ParameterShard:
        """The state that an Adam keeps of a parameter, made as Adam makes it where there is none yet.

        Args:
            name: of the parameter.
            optimizer: torch's AdamW.
            master: what it steps: the parameter's master, or a flat tensor of several.
            start: first element in the parameter.
            offset: first element in `master`.
            length: elements; None: all.
        """
        state = optimizer.state[master]
        if "step" not in state:
            fused = optimizer.defaults.get("fused")
            state["step"] = torch.zeros((), device=master.device if fused else None)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format)
        length = master.numel() if length is None else length

        def part(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1).narrow(0, offset, length)

        moments = {kind: part(state[kind]) for kind in MOMENTS}
        gradient = None if master.grad is None else part(master.grad)
        return cls(
            name=name, start=start, master=part(master), moments=moments, step=state["step"], parameter=master,
            gradient=gradient,
        )  # fmt: skip


@torch.no_grad()
def component_norms(
    shards: Iterable[ParameterShard], groups: Sequence[ParameterGroup], *, device: torch.device, copies: int
) -> dict[str, float]:
    """`weight_norm/COMPONENT` and `momentum_norm/COMPONENT` over all ranks; every rank calls it.

    The momentum is Adam's mean of the last gradients, after clipping: the one trace of a component's gradients that
    every ZeRO stage keeps.

    Args:
        shards: of this rank.
        groups: of all parameters; the part of a group's name before the slash is its component.
        device: the one that communicates.
        copies: ranks that hold the same shards.
    """
    component = {name: group.name.partition("/")[0] for group in groups for name in group.names}
    kinds = {"weight_norm": lambda shard: shard.master, "momentum_norm": lambda shard: shard.moments["exp_avg"]}
    parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in kinds for name in component.values()}
    for shard in shards:
        for kind, values in kinds.items():
            parts[f"{kind}/{component[shard.name]}"].append(values(shard).float())
    norms = [nn.utils.get_total_norm(tensors).to(device) for tensors in parts.values()]
    squares = torch.stack(norms).double().square_()
    distributed.add_up(squares)
    return {name: math.sqrt(total / copies) for name, total in zip(parts, squares.tolist(), strict=True)}
