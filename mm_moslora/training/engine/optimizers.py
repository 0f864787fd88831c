"""The optimisers of `optim.optimizer`: how each is built, and the state that a rank holds, as views into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.training.engine.step_result import Arriving
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, reason_of

State = MutableMapping[str, Any]
Groups = Sequence[ParameterGroup]


class OptimizerKind:
    """Torch's AdamW, and what all kinds share."""

    def make(
        self, settings: OptimizerSettings, groups: Groups, parameters: Sequence[Sequence[nn.Parameter]], *, fused: bool
    ) -> torch.optim.Optimizer:
        """The optimiser, with one group for each of `groups`; `fused`: one kernel steps many parameters, on a GPU."""
        # On a CPU a fused kernel has another order of operations, and so other bits.
        return torch.optim.AdamW(
            _as_dicts(groups, parameters), betas=settings.betas, eps=settings.eps, fused=fused or None
        )

    def begin(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        """Make the state of a parameter as the optimiser's first step makes it."""
        state, fused = optimizer.state[parameter], optimizer.defaults.get("fused")
        state["step"] = torch.zeros((), device=parameter.device if fused else None)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def momentum(self, state: State) -> Tensor:
        """The mean of the last gradients, or what is kept in its place: 0 where there was no gradient."""
        return cast(Tensor, state["exp_avg"])


class _BitsAndBytes(OptimizerKind):
    """AdamW of bitsandbytes in 8 bits."""

    def make(
        self, settings: OptimizerSettings, groups: Groups, parameters: Any, *, fused: bool
    ) -> torch.optim.Optimizer:
        import bitsandbytes

        dicts = _as_dicts(groups, parameters)
        kind: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]
        return cast(torch.optim.Optimizer, kind(dicts, betas=settings.betas, eps=settings.eps))

    def begin(self, optimizer: Any, parameter: Tensor) -> None:
        optimizer.init_state(*_position_of(optimizer, parameter))

    def momentum(self, state: State) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        if state["state1"].dtype != torch.uint8:  # also of parameters with fewer than 4,096 values
            return cast(Tensor, state["state1"])
        return dequantize_blockwise(state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256)


class _MuonAndAdamW(torch.optim.Optimizer):
    """Torch's Muon for the groups of matrices, AdamW for the others; both have the groups and the state of this one."""

    def __init__(
        self, settings: OptimizerSettings, groups: Groups, dicts: list[dict[str, Any]], *, fused: bool
    ) -> None:
        matrices = [made for made, group in zip(dicts, groups, strict=True) if group.matrices]
        others = [made for made, group in zip(dicts, groups, strict=True) if not group.matrices]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            # With this factor on the rate a step has the length of AdamW's, so that its rates serve.
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=settings.betas, eps=settings.eps, fused=fused or None))
        super().__init__(dicts, {"fused": fused})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self.parts:
            part.step()


class _Muon(OptimizerKind):
    def make(
        self, settings: OptimizerSettings, groups: Groups, parameters: Any, *, fused: bool
    ) -> torch.optim.Optimizer:
        return _MuonAndAdamW(settings, groups, _as_dicts(groups, parameters), fused=fused)

    def begin(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        if "ns_steps" in _position_of(optimizer, parameter)[0]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        else:
            super().begin(optimizer, parameter)

    def momentum(self, state: State) -> Tensor:
        return cast(Tensor, state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"])


KINDS: dict[str, OptimizerKind] = {"adamw": OptimizerKind(), "adamw_8bit": _BitsAndBytes(), "muon": _Muon()}


def set_rates(optimizer: torch.optim.Optimizer, groups: Groups, factor: float) -> None:
    """Set every group's learning rate to its peak times a factor."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = group.peak_lr * factor


def require_optimizer(name: str, device: torch.device) -> None:
    """Try one step on a device; ConfigError where the optimiser's library cannot step there."""
    if name == "adamw":
        return
    # From 4,096 values on states have 8 bits.
    trial = nn.Parameter(torch.ones(64, 64, device=device))
    group = ParameterGroup(
        name="trial", peak_lr=0.5, weight_decay=0.0, names=("trial",), parameters=(trial,), matrices=True
    )
    settings = OptimizerSettings(name=name, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=0.0)
    try:
        optimizer = KINDS[name].make(settings, [group], [[trial]], fused=False)
        trial.grad = torch.ones_like(trial)
        optimizer.step()
        if not bool((trial < 1).all()):
            raise RuntimeError("a step left the weights as they were")
    except Exception as error:
        raise ConfigError(
            f"optim.optimizer is {name}, which does not step on this machine ({device.type}; {reason_of(error)}). "
            f"Choose another of {', '.join(OPTIMIZERS)}."
        ) from error


def _as_dicts(groups: Groups, parameters: Sequence[Sequence[nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups as optimisers take them. Weight decay is always passed, since its defaults differ between libraries."""
    return [
        {"params": list(members), "lr": group.peak_lr, "weight_decay": group.weight_decay}
        for group, members in zip(groups, parameters, strict=True)
    ]


def _position_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[dict[str, Any], Tensor, int, int]:
    """The group of a parameter, the parameter, and the numbers of both."""
    return next(
        (group, member, index, number)
        for index, group in enumerate(optimizer.param_groups)
        for number, member in enumerate(group["params"])
        if member is parameter
    )


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
