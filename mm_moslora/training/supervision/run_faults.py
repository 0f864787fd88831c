"""Faults and measures of a run of any trainer: skipped steps, errors that end it, peak memory."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mm_moslora.launch import heartbeat
from mm_moslora.tracking import Trackers
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DivergedError

logger = logging.getLogger(__name__)

ALERT_LENGTH = 1000
"""Maximum characters of an alert."""


class SkippedSteps:
    """Counts the steps in a row that were skipped since a loss or a gradient is not finite; `advice` is sentences."""

    def __init__(self, limit: int, *, advice: str) -> None:
        self.limit, self.advice, self.in_a_row = limit, advice, 0

    def count(self, *, applied: bool) -> None:
        """Count a step."""
        self.in_a_row = 0 if applied else self.in_a_row + 1

    @property
    def too_many(self) -> bool:
        """Whether the run has diverged."""
        return self.in_a_row >= self.limit

    def give_up(self, step: int) -> None:
        """End a run that has diverged: DivergedError where there are too many."""
        if self.too_many:
            raise DivergedError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step {step}. "
                f"Earlier checkpoints are untouched. {self.advice}"
            )


def name_skipped(step: int, loss: float, *, own_loss_is_finite: bool, ids: Sequence[str]) -> None:
    """Warn of a skipped step, and name this rank's records where they may be the reason; `loss` is over all ranks."""
    if math.isfinite(loss) or not own_loss_is_finite:
        logger.warning(
            "Step %d skipped: the loss or a gradient is not finite (loss %s). %s", step, loss, records_of_rank(ids)
        )
    elif distributed.is_main():
        logger.warning("Step %d skipped: the loss of another rank is not finite.", step)


def records_of_rank(ids: Sequence[str]) -> str:
    """The first of this rank's records, for messages."""
    return f"Records of rank {distributed.rank()}: {', '.join(ids[:16])}"


@contextmanager
def telling_errors(trackers: Trackers, phase: Callable[[str], None], step: Callable[[], int]) -> Iterator[None]:
    """A run: its other ranks and whoever watches its trackers learn of an error that ends it."""
    try:
        yield
    except KeyboardInterrupt:
        phase(heartbeat.FAILING)
        raise
    except Exception as error:
        phase(heartbeat.FAILING)
        title = "Diverged" if isinstance(error, DivergedError) else "Run failed"
        trackers.alert(title, f"Step {step()}: {error}"[:ALERT_LENGTH])
        raise


@contextlib.contextmanager
def only_measuring(what: str) -> Iterator[None]:
    """A block without collectives that measures; its failure is logged and does not end the run."""
    try:
        yield
    except Exception as error:
        logger.exception("%s could not be measured (%s: %s). Training continues.", what, type(error).__name__, error)


def note_memory(counters: dict[str, float]) -> None:
    """Count the peak memory over all sessions of a run."""
    counters["memory_gib"] = max(counters.get("memory_gib", 0.0), peak_memory_gib())


def peak_memory_gib() -> float:
    """Peak memory of this process: device memory on an accelerator, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
