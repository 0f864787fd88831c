"""The optimiser step that all engines share, and what each engine adds to it."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.batch import Batch
from mm_moslora.models.memory_efficient.row_share import WHOLE_ROW
from mm_moslora.models.vlm import LossModule
from mm_moslora.training.engine.optimizers import Norms, OptimizerKind, ParameterShard
from mm_moslora.training.engine.step_result import QueuedStep, StepResult, Update
from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed

MODEL = "model."
"""What the engine's module puts before the model's names; shards keep it, and so do checkpoints of the optimiser."""


class TrainingEngine(ABC):
    """Runs optimiser steps and keeps the optimiser's state."""

    replicated = False
    """Whether every rank holds all shards."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup], kind: OptimizerKind) -> None:
        self.module, self.kind = module, kind
        self.groups = list(groups)
        self.device = distributed.device()
        self.copies = getattr(module, "share", WHOLE_ROW).of
        """Ranks that get the same micro-batches, and compute their parts."""

    @property
    def late(self) -> bool:
        """Whether `queue` returns before the device has computed, so that the device goes on to the next step while the
        host reads this one's numbers."""
        return False

    def step(self, micro_batches: Sequence[Batch], lr_factor: float) -> StepResult:
        """One optimiser step over this rank's micro-batches, of which every rank passes the same number."""
        return self.queue(micro_batches, lambda: lr_factor).result()

    def queue(
        self, micro_batches: Sequence[Batch], lr_factor: Callable[[], float], *, norms: bool = False
    ) -> QueuedStep:
        """The same; its numbers can be read later, and `lr_factor` is asked once all passes are queued. `norms`: the
        result has the components' norms after the step."""
        # One collective before the passes: the loss of a token is divided by the weights of the supervised tokens of
        # all ranks and micro-batches, so that the gradient does not depend on how a step is split.
        started = time.monotonic()
        counts, weight, with_images = self._counts_of_all_ranks(micro_batches)
        wait_seconds = time.monotonic() - started
        self._begin_step(with_images)
        self.module.pictures.begin_step(micro_batches)
        # Backends average gradients over ranks, and the loss is a sum over all of them.
        scale = distributed.world_size() / weight
        # The sums stay on the device and are read after the last backward pass, so that the host waits once.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            loss = self._forward(batch.to(self.device), with_images[index] > 0, right, last=last)
            total += loss.detach()
            self._backward(loss * scale, last=last)
        sums = torch.stack((total, right.double()))
        distributed.add_up(sums)
        can_lower_scale = self.can_lower_scale  # asked before the update, which lowers it
        read = self._update(lr_factor(), sums)
        measured = self.component_norms() if norms else None

        def result() -> StepResult:
            update = read()
            return StepResult(
                loss=update.total / weight, grad_norm=update.grad_norm,
                applied=update.applied, right_tokens=int(update.right), wait_seconds=wait_seconds,
                own_loss_is_finite=update.applied or math.isfinite(float(total)),
                rescaling=math.isfinite(update.total) and not update.applied and can_lower_scale,
                norms={} if measured is None else measured.read(),
                **{name: int(count) for name, count in counts.items()},
            )  # fmt: skip

        return QueuedStep(counts=counts, result=result)

    def _counts_of_all_ranks(self, micro_batches: Sequence[Batch]) -> tuple[dict[str, float], float, list[float]]:
        """Counts of a step by their names in `StepResult`, the sum of the weights of its supervised tokens (1 where it
        has none), and the number of ranks with pictures by micro-batch."""
        filled = [batch for batch in micro_batches if batch.supervised_tokens]  # others keep ranks in step
        own = {
            "supervised_tokens": float(sum(batch.supervised_tokens for batch in filled)),
            "tokens": float(sum(batch.tokens for batch in filled)),
            "images": float(sum(batch.images for batch in filled)),
            "samples": float(sum(len(batch.ids) for batch in filled)),
        }
        weight = sum(batch.loss_weight for batch in filled)
        with_images = (float(batch.images > 0) for batch in micro_batches)
        sums = [*distributed.sum_over_ranks([*own.values(), weight, *with_images])]
        # Ranks that share a row count it once each.
        counts = {name: sums.pop(0) / self.copies for name in own}
        return counts, sums.pop(0) / self.copies or 1.0, sums

    def _begin_step(self, with_images: list[float]) -> None:  # noqa: B027  (most engines need nothing)
        """Prepare for a step; `with_images`, ranks with pictures by micro-batch, may be changed to have the vision path
        run there."""

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before the backward pass (fp16), else 1."""
        return 1.0

    @property
    def can_lower_scale(self) -> bool:
        """Whether a gradient that is not finite would have the loss scale lowered (fp16)."""
        return False

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Measure batches without a gradient: fp64 ``[4]`` on the CPU, over all ranks: weighted sum of the cross
        entropies, supervised tokens that had the highest probability, sum of the weights, supervised tokens."""
        counts, weight, with_images = self._counts_of_all_ranks(micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch, ranks in zip(micro_batches, with_images, strict=True):
            total += self._evaluate(batch.to(self.device), ranks > 0, right)
        sums = torch.stack((total, right.double()))
        distributed.add_up(sums)
        count = counts["supervised_tokens"]
        return torch.tensor([*sums.tolist(), weight if count else 0.0, count], dtype=torch.float64)

    @abstractmethod
    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor: ...

    @abstractmethod
    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor: ...

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def _update(self, lr_factor: float, sums: Tensor) -> Callable[[], Update]:
        """Clip, and step if everything is finite; returns what reads the outcome. `sums`: fp64 ``[2]`` on the device,
        over all ranks, of losses and right tokens."""

    def trainable_state(self, *, only: str = "", keep: bool = True) -> dict[str, Tensor]:
        """Full fp32 values of trainable parameters by their names in the model, on the CPU. All ranks take part. `only`
        is a part of the wanted names. A rank without `keep` gets tensors of their shapes on the meta device."""
        return {name.removeprefix(MODEL): value for name, value in self._trainable_state(only=only, keep=keep).items()}

    @abstractmethod
    def _trainable_state(self, *, only: str, keep: bool) -> dict[str, Tensor]:
        """The same by their names in the engine's module."""

    @abstractmethod
    def shards(self) -> list[ParameterShard]:
        """The optimiser state that this rank holds, as views."""

    @abstractmethod
    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """Take over masters that were just written into `shards`; `stored` gives a whole one, flat fp32, by its
        name."""

    def scaler_state(self) -> dict[str, float]:
        """State of the dynamic loss scale (fp16); empty without one."""
        return {}

    def component_norms(self) -> Norms:
        """Norms of the weights and of the momentum by component, now."""
        copies = distributed.world_size() if self.replicated else 1
        return Norms(self.shards(), self.groups, device=self.device, copies=copies)

    def gathered(self) -> AbstractContextManager[Any]:
        """A context in which every rank holds all weights whole, and its model runs without the other ranks."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027  (most engines hold nothing)
        """Free what the engine holds outside the module."""

    def _named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]
