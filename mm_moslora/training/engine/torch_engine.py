"""The engine on plain torch: one process, no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_moslora.batch import Batch
from mm_moslora.training.engine.engine_base import Engine, LossModule, Piece, Update
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError


class TorchEngine(Engine):
    """One process, no DeepSpeed: AdamW on fp32 masters, gradients accumulated in fp32."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup], optimizer: OptimizerSettings) -> None:
        super().__init__(module, groups)
        if distributed.world_size() > 1:
            raise ConfigError(
                f"train.zero is none on {distributed.world_size()} ranks; plain torch runs one process. "
                "Choose zero0 to zero3, or start a single process."
            )
        self.module.to(self.device)
        self.settings = optimizer
        self.masters = [
            [nn.Parameter(parameter.detach().float().clone()) for parameter in group.parameters] for group in groups
        ]
        self.optimizer = optimizer.adamw(groups, self.masters)

    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor:
        return self.module(batch, needs_vision, right)

    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor:
        return self.module(batch, needs_vision, right)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for master, parameter in self._pairs():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def _update(self, lr_factor: float, sums: Tensor) -> Update:
        masters = [master for group in self.masters for master in group]
        for master in masters:
            if master.grad is None:  # as with ZeRO, a projector without pictures still moves by its momentum
                master.grad = torch.zeros_like(master)
        clipped = nn.utils.clip_grad_norm_(masters, self.settings.max_grad_norm or math.inf)
        loss, right, norm = torch.cat((sums, clipped.double()[None])).tolist()
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
                settings["lr"] = group.peak_lr * lr_factor
            self.optimizer.step()
            with torch.no_grad():
                for master, parameter in self._pairs():
                    parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(total=loss, right=right, grad_norm=norm, applied=applied)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [
            pair
            for masters, group in zip(self.masters, self.groups, strict=True)
            for pair in zip(masters, group.parameters, strict=True)
        ]

    def trainable_state(self, *, only: str = "", keep: bool = True) -> dict[str, Tensor]:
        """See `Engine.trainable_state`."""
        masters = [master for group in self.masters for master in group]
        named = zip(self._named_trainable(), masters, strict=True)
        device = "cpu" if keep else "meta"
        return {name: master.detach().to(device, copy=True) for (name, _), master in named if only in name}

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        masters = [master for group in self.masters for master in group]
        named = zip(self._named_trainable(), masters, strict=True)
        return [Piece.of(name, self.optimizer, master) for (name, _), master in named]

    @torch.no_grad()
    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """See `Engine.refresh`."""
        for master, parameter in self._pairs():
            parameter.copy_(master)
