"""The engine on plain torch: one process, no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mm_moslora.batch import Batch
from mm_moslora.models.vlm import LossModule
from mm_moslora.training.engine.engine_base import TrainingEngine
from mm_moslora.training.engine.optimizers import KINDS, ParameterShard, set_rates
from mm_moslora.training.engine.step_result import Arriving, Update
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup


class TorchEngine(TrainingEngine):
    """One process, no DeepSpeed: the optimiser on fp32 masters, gradients accumulated in fp32."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup], optimizer: OptimizerSettings) -> None:
        super().__init__(module, groups, KINDS[optimizer.name])
        self.module.to(self.device)
        self.settings = optimizer
        self.masters = [
            [nn.Parameter(parameter.detach().float().clone()) for parameter in group.parameters] for group in groups
        ]
        self.optimizer = self.kind.make(optimizer, groups, self.masters, fused=self.device.type == "cuda")
        self.pairs = [
            pair
            for masters, group in zip(self.masters, groups, strict=True)
            for pair in zip(masters, group.parameters, strict=True)
        ]
        """Masters and the parameters of the model."""

    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor:
        return self.module(batch, needs_vision, right)

    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor:
        return self.module(batch, needs_vision, right)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        with_gradient = [pair for pair in self.pairs if pair[1].grad is not None]
        gradients = _in_fp32([cast(Tensor, parameter.grad) for _, parameter in with_gradient])
        sums: list[tuple[Tensor, Tensor]] = []
        for (master, parameter), gradient in zip(with_gradient, gradients, strict=True):
            parameter.grad = None
            if master.grad is None:
                master.grad = gradient
            else:
                sums.append((master.grad, gradient))
        if sums:
            torch._foreach_add_(*map(list, zip(*sums, strict=True)))

    @property
    def late(self) -> bool:
        """See `TrainingEngine.late`: where the optimiser is one kernel, it skips a step by itself."""
        return type(self.optimizer) is torch.optim.AdamW and bool(self.optimizer.defaults["fused"])

    def _update(self, lr_factor: float, sums: Tensor) -> Callable[[], Update]:
        masters = [master for group in self.masters for master in group]
        for master in masters:
            if master.grad is None:  # as with ZeRO, a projector without pictures still moves by its momentum
                master.grad = torch.zeros_like(master)
        clipped = nn.utils.clip_grad_norm_(masters, self.settings.max_grad_norm or math.inf)
        numbers = torch.cat((sums, clipped.double()[None]))
        arriving = Arriving(numbers)

        def update() -> Update:
            loss, right, norm = arriving.tolist()
            applied = math.isfinite(loss) and math.isfinite(norm)
            return Update(total=loss, right=right, grad_norm=norm, applied=applied)

        read = None if self.late else update()
        if read is None:
            self.optimizer.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[attr-defined]
        if read is None or read.applied:
            set_rates(self.optimizer, self.groups, lr_factor)
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad(set_to_none=True)
        return update if read is None else lambda: read

    @torch.no_grad()
    def _copy_masters(self) -> None:
        torch._foreach_copy_([parameter for _, parameter in self.pairs], [master for master, _ in self.pairs])

    def _trainable_state(self, *, only: str, keep: bool) -> dict[str, Tensor]:
        """See `TrainingEngine.trainable_state`."""
        masters = [master for group in self.masters for master in group]
        named = zip(self._named_trainable(), masters, strict=True)
        device = "cpu" if keep else "meta"
        return {name: master.detach().to(device, copy=True) for (name, _), master in named if only in name}

    def shards(self) -> list[ParameterShard]:
        """See `TrainingEngine.shards`."""
        masters = [master for group in self.masters for master in group]
        named = zip(self._named_trainable(), masters, strict=True)
        return [ParameterShard.of(name, self.optimizer, master, kind=self.kind) for (name, _), master in named]

    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """See `TrainingEngine.refresh`."""
        self._copy_masters()


def _in_fp32(gradients: list[Tensor]) -> list[Tensor]:
    """The same numbers in fp32; gradients that are fp32 already stay themselves."""
    narrow = [gradient for gradient in gradients if gradient.dtype != torch.float32]
    wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in narrow]
    if narrow:
        torch._foreach_copy_(wide, narrow)
    converted = iter(wide)
    return [gradient if gradient.dtype == torch.float32 else next(converted) for gradient in gradients]
