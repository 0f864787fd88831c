"""The checkpoints that a run writes while it trains: their start and end, failures, and which ones stay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mm_moslora.tracking import Trackers
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, Saver, folder_name
from mm_moslora.training.checkpointing.run_checkpoints import Best, Retention, Tidier
from mm_moslora.training.supervision.run_faults import ALERT_LENGTH
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.run_paths import checkpoints

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Consecutive failed saves before the run stops, since training without checkpoints risks the work."""


class RunInFolder(Protocol):
    """What saves need of a run, of whatever trainer."""

    counters: dict[str, float]
    precision: str
    folder: Path
    recipe: Any
    """Resolved; its `train` has what `TrainConfig` says of saves and time limits."""

    @property
    def step(self) -> int:
        """Optimiser steps so far."""


class TakenState(Protocol):
    """A copy of a run's state in main memory, which later steps do not change."""

    @property
    def manifest(self) -> Manifest:
        """See `Saver.start`."""

    @property
    def size(self) -> int:
        """See `Saver.start`."""

    def write(self, folder: Path) -> None:
        """See `Saver.start`."""


Taken = TypeVar("Taken", bound=TakenState)


class RunSaves(Generic[Taken]):
    """Writes the checkpoints of one session; all ranks call each method together. `take` copies the run's state."""

    def __init__(
        self,
        run: RunInFolder,
        watchdog: Watchdog,
        trackers: Trackers,
        take: Callable[[], Taken],
        *,
        best: Best,
        saved_at: int,
    ) -> None:
        self.run, self.best, self.saved_at = run, best, saved_at
        self.extra: dict[str, float] = {}
        """What is logged with the next step."""
        self.saver, self.tidier = Saver(run.folder), Tidier(run.folder)
        self._watchdog, self._trackers, self._take, self._failed_in_a_row = watchdog, trackers, take, 0

    @property
    def folder(self) -> Path:
        """The checkpoint of this step, once it is committed."""
        return self.run.folder / folder_name(self.run.step)

    def start(self) -> Taken:
        """Copy the state and start to write it; a failure is counted and does not stop the run at once."""
        self._phase()
        self.finish()
        started = time.monotonic()
        taken = self._take()
        try:
            self.saver.start(taken.manifest, taken.write, size=taken.size)
        except CheckpointError as error:
            self._count_failure(error)
            return taken
        self.saved_at = self.run.step
        if not self.run.recipe.train.background_save:
            self.finish()
        self.extra["save_seconds"] = time.monotonic() - started
        return taken

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and commit it."""
        if self.saver.pending is None:
            return
        self._phase()
        try:
            folder = self.saver.finish()
        except CheckpointError as error:
            self.saved_at = -1
            self._count_failure(error)
            return
        self._failed_in_a_row = 0
        self.tidy()
        logger.debug("Saved %s.", folder)

    def finish_last(self) -> Path:
        """The checkpoint of this step, committed; CheckpointError where the last one cannot be written."""
        self.finish()
        if self.saved_at != self.run.step:
            self.start()
            self.finish()
        if self.saved_at != self.run.step:
            raise CheckpointError(f"The last checkpoint, {self.folder}, could not be written; the reason is above.")
        return self.folder

    def tidy(self) -> None:
        """Record the best checkpoint, and apply the retention policy."""
        if not distributed.is_main():
            return
        train, folder = self.run.recipe.train, self.run.folder
        best_step = self.best.among([step for step, _ in checkpoints(folder)])
        best = None if best_step is None else folder_name(best_step)
        if self.best.step >= 0:
            self.best.write(folder, best)
        self.tidier.start(Retention(last=train.keep_last, every=train.keep_every, best=best))

    def phase(self, what: str, limit_minutes: float) -> None:
        """Set the next phase of the watchdog; see `Watchdog.phase`."""
        self._watchdog.phase(what, self.run.step, limit_minutes * 60)

    def _phase(self) -> None:
        """Time limit of a save: a background save blocks no longer than a step; waiting for a disk may take longer."""
        train = self.run.recipe.train
        brief = train.background_save and not self.saver.busy
        self.phase("save", train.step_timeout_minutes if brief else train.timeout_minutes)

    def _count_failure(self, error: CheckpointError) -> None:
        self._failed_in_a_row += 1
        self.extra["failed_saves"] = self._failed_in_a_row
        if self._failed_in_a_row >= MAX_FAILED_SAVES:
            raise CheckpointError(f"{error} The last {self._failed_in_a_row} saves failed; stopped.")
        if distributed.is_main():
            logger.error("%s Training continues.", error)
        self._trackers.alert("Save failed", f"Step {self.run.step}: {error}"[:ALERT_LENGTH])
