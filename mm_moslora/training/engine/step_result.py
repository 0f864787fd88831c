"""The results of an optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimiser step."""

    loss: float
    """Mean cross entropy per supervised token, weighted where records have weights, over all ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False when the step was skipped because a loss or gradient was not finite."""
    supervised_tokens: int
    """Over all ranks."""
    tokens: int
    """Over all ranks, visual tokens included."""
    images: int
    """Over all ranks."""
    samples: int = 0
    """Over all ranks."""
    right_tokens: int = 0
    """Supervised tokens that had the highest probability, over all ranks."""
    wait_seconds: float = field(default=0.0, compare=False)
    """Seconds that this rank waited for the others at the start of the step."""
    own_loss_is_finite: bool = True
    """Whether this rank's part of the loss is finite; checked only for skipped steps."""
    rescaling: bool = False
    """Whether the step was skipped because the loss scale of fp16 was too large; it has been lowered."""
    norms: dict[str, float] = field(default_factory=dict)
    """See `optimizers.Norms`, after the step; empty where they were not asked for."""


@dataclass(frozen=True, kw_only=True)
class QueuedStep:
    """A step that the host has queued. On an engine that is `late` its numbers are still on their way."""

    counts: dict[str, float]
    """Those of `StepResult` that the host knows, by name."""
    result: Callable[[], StepResult]
    """Waits for the numbers; called once."""


class Arriving:
    """A tensor on its way to the host, which does other work meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> list[float]:
        """Wait for the values."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._copy.tolist()
        return values


@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of the optimiser's part of a step."""

    total: float
    """Weighted sum of all token losses."""
    right: float
    """See `StepResult.right_tokens`."""
    grad_norm: float
    """See `StepResult.grad_norm`."""
    applied: bool
    """See `StepResult.applied`."""
