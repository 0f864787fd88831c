"""One driver of runs: folder, supervision, resume, trackers, saves and end mark, of whatever is learned."""

# `supervised_run` is around a whole run. An objective is a `Session` with its own steps: `training_loop` learns from
# answers, `preferences` with TRL's losses, `diffusion` to denoise.

from __future__ import annotations

import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mm_moslora.models.precision import run_arithmetic
from mm_moslora.tracking import build_trackers
from mm_moslora.tracking.tracker import Ending
from mm_moslora.training.checkpointing.checkpoint_folder import amend
from mm_moslora.training.checkpointing.run_checkpoints import Best, set_aside_newer
from mm_moslora.training.checkpointing.run_saves import RunInFolder, RunSaves, Taken
from mm_moslora.training.supervision.rank_agreement import agree_on_recipe
from mm_moslora.training.supervision.run_faults import note_memory, only_measuring, telling_errors
from mm_moslora.training.supervision.run_folder import RunEnding, exclusive, record_run_state
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.utils import distributed, files
from mm_moslora.utils.distributed import seed_everything

logger = logging.getLogger(__name__)

Ran = TypeVar("Ran", bound=RunInFolder)

FINISHED_AT = "finished_at"
"""Counter: the last step, once the run was over and had been measured."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a training session."""

    checkpoint: Path
    """The last committed checkpoint."""
    step: int
    """Optimiser steps done."""
    total_steps: int
    """Optimiser steps of the whole run."""
    stopped_by: int
    """The signal that stopped it early, 0 for none."""
    stopped_early: bool = False
    """Whether early stopping ended it."""
    measured: bool = True
    """Whether the end was measured after all steps; a signal may have prevented this."""

    @property
    def finished(self) -> bool:
        """Whether every step was done, or early stopping ended the run, and the end was measured."""
        return (self.step >= self.total_steps or self.stopped_early) and self.measured


@contextmanager
def supervised_run(
    recipe: Any, check: Callable[[], None], *, resume: str, stop_at: int | None
) -> Iterator[tuple[Watchdog, RunEnding]]:
    """The ranks of a run in its folder: agreed on the recipe, which `check` accepts, watched, their end recorded."""
    train = recipe.train
    distributed.join(timeout_minutes=train.timeout_minutes)
    folder = Path(train.output)
    watchdog = Watchdog(folder)
    # Hosts may have other recipes, other files and other libraries.
    with watchdog.blaming():
        agree_on_recipe(recipe, resume=resume, stop_at=stop_at)
    with watchdog.blaming(), distributed.failing_together("Checking the recipe"):
        check()
    # Each waits for the other ranks, so each may find that one is gone; the inner `blaming` words the recorded end.
    with (
        run_arithmetic(deterministic=train.deterministic),
        watchdog.blaming(),
        exclusive(folder),
        record_run_state(folder) as ending,
        watchdog.blaming(),
        watchdog,
    ):
        seed_everything(train.seed)
        yield watchdog, ending


class Session(ABC, Generic[Ran, Taken]):
    """One session of a run of `total` steps; all ranks call each method together. `best` chooses a kept checkpoint."""

    def __init__(
        self,
        run: Ran,
        watchdog: Watchdog,
        stop: StopRequest,
        *,
        resumed_from: Path | None,
        total: int,
        best: Best | None = None,
    ) -> None:
        self.run, self.stop, self.resumed_from, self.total = run, stop, resumed_from, total
        self.best = best or Best()
        self.trackers = build_trackers(run.recipe.track)
        is_own = resumed_from is not None and resumed_from.resolve().parent == run.folder.resolve()
        if is_own and distributed.is_main():
            set_aside_newer(run.folder, run.step)
        self.saves = RunSaves(
            run, watchdog, self.trackers, self._taken, best=self.best, saved_at=run.step if is_own else -1
        )
        self.stopped_by = 0

    @abstractmethod
    def _train(self, stop_at: int | None) -> None:
        """Take steps until the run is over, a signal comes, or step `stop_at` is done; `agree` tells."""

    @abstractmethod
    def _taken(self) -> Taken:
        """A copy of the run's state."""

    @abstractmethod
    def _measure_end(self) -> None:
        """Measure the run after its last step; the checkpoint is written already."""

    @abstractmethod
    def _of_run(self) -> dict[str, Any]:
        """What `summary.json` has beside the parts of all runs."""

    def _begin(self) -> None:
        """Make what training needs, before anything is tracked."""

    def _rehearse(self) -> None:
        """Try and measure what the first step needs, before signals are stored."""

    def _metadata(self) -> dict[str, Any]:
        """What trackers get beside the recipe."""
        return {}

    @property
    def measured(self) -> bool:
        """Whether nothing interrupted the measurement of this step."""
        return True

    @property
    def over(self) -> bool:
        """Whether every step was done, or early stopping ended the run."""
        return self.run.step >= self.total or self.best.out_of_patience

    def go(self, stop_at: int | None) -> TrainResult:
        """Train until the last step, `stop_at`, early stopping, or a signal; then save and measure."""
        run, again = self.run, self.resumed_from is not None
        if self.saves.saved_at == run.step == run.counters.get(FINISHED_AT) and self.over:
            # Its folder already holds the measurements of the whole run.
            logger.info("The run is finished: %s is its last step. Nothing is left to train.", self.resumed_from)
            return self._result()
        if self.resumed_from is not None:
            logger.info("Continuing from %s, step %d.", self.resumed_from.name, run.step)
        if distributed.is_main():
            files.replace_text(run.folder / "config.yaml", run.recipe.to_yaml())
        self._begin()
        self.summarise()
        ending: Ending = "failed"
        config = run.recipe.to_dict() | self._metadata()
        self.trackers.start(config, run.folder, resume_step=run.step if again else None)
        try:
            with telling_errors(self.trackers, self.phase, lambda: run.step):
                self._go(stop_at)
            ending = "finished" if self.over and self.measured else "stopped"
        except KeyboardInterrupt:
            ending = "stopped"
            raise
        finally:
            self.trackers.finish(ending=ending)
        return self._result()

    def _go(self, stop_at: int | None) -> None:
        """Train, save and measure the end."""
        run = self.run
        self._rehearse()
        # No rank stores signals while another rank can still be ended by them and would be waited for.
        distributed.barrier()
        with self.stop:  # until the last save, so that a signal does not lose trained steps
            self._train(stop_at)
            # Saved first and measured then, so that an error in measuring does not lose the run.
            folder = self.saves.finish_last()
            if self.over and run.counters.get(FINISHED_AT) != run.step:
                self.phase("measuring the end")
                self._measure_end()
                if self.measured:
                    self._mark_end(folder)
            self.summarise()
            self.saves.tidier.wait()
        if self.over and self.measured and distributed.is_main() and (folder / "adapter").is_dir():
            self.trackers.log_folder("adapter", folder / "adapter", aliases=("latest", f"step-{run.step}"))

    def _mark_end(self, folder: Path) -> None:
        """The last checkpoint records that the end is measured, for a run that is started again."""
        counters = self.run.counters
        counters[FINISHED_AT] = float(self.run.step)
        note_memory(counters)
        if distributed.is_main():
            amend(folder, counters)

    def agree(self, stop_at: int | None) -> bool:
        """After a step: commits a save that has ended, and tells whether all ranks stop now."""
        # Ranks that stopped or committed by themselves would leave the others waiting in their next collective.
        arrived = time.monotonic()
        number, writing = distributed.max_over_ranks([float(self.stop.received), float(self.saves.saver.busy)])
        self._waited(time.monotonic() - arrived)
        if not writing:
            self.saves.finish()
        self.stopped_by = int(number)
        if number and distributed.is_main():
            name = signal.Signals(self.stopped_by).name
            logger.info("%s: saving step %d. Ctrl-C three times in all ends without.", name, self.run.step)
        return bool(number) or self.run.step == stop_at

    def _waited(self, seconds: float) -> None:
        """Other ranks were waited for."""

    def phase(self, what: str, limit_minutes: float | None = None) -> None:
        """Set the next phase of the watchdog; None: the limit is `train.timeout_minutes`."""
        self.saves.phase(what, limit_minutes or self.run.recipe.train.timeout_minutes)

    def summarise(self) -> None:
        """Write `summary.json` into the run folder, for the report."""
        run = self.run
        note_memory(run.counters)
        if distributed.is_main():
            with only_measuring("The summary"):
                summary = {
                    "format": 1,  # of the run folder, see `mm_moslora.reporting.run_data`
                    "name": run.recipe.name, "steps": run.step, "total_steps": self.total, "counters": run.counters,
                    "precision": run.precision, "world_size": distributed.world_size(), "zero": run.recipe.train.zero,
                    "memory_gib": run.counters["memory_gib"], **self._of_run(),
                }  # fmt: skip
                files.replace_json(run.folder / "summary.json", summary)

    def _result(self) -> TrainResult:
        run = self.run
        return TrainResult(
            checkpoint=self.saves.folder, step=run.step, total_steps=self.total, stopped_by=self.stopped_by,
            stopped_early=self.best.out_of_patience, measured=self.measured,
        )  # fmt: skip
