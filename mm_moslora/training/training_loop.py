"""The training loop: fetch, step, log, validate, save."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mm_moslora.batch import Batch
from mm_moslora.config import OptimConfig, Recipe, require_sft
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.tracking import Trackers, build_trackers
from mm_moslora.tracking.alerts import Alert
from mm_moslora.tracking.tracker import Ending
from mm_moslora.training import run_setup
from mm_moslora.training.checkpointing.checkpoint_folder import Saver, amend, folder_name
from mm_moslora.training.checkpointing.run_checkpoints import Retention, Tidier, set_aside_newer
from mm_moslora.training.engine import StepResult
from mm_moslora.training.image_dependence import ImageCheck
from mm_moslora.training.preflight import check_libraries, check_recipe
from mm_moslora.training.rehearsal import rehearse
from mm_moslora.training.resume import continued, find_resume, restore
from mm_moslora.training.run_logging import RunLog, note_memory
from mm_moslora.training.snapshot import Snapshot, snapshot
from mm_moslora.training.supervision.rank_agreement import agree_on_data, agree_on_recipe
from mm_moslora.training.supervision.run_state import record_run_state
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.training.validation import Best, Measure, Validator
from mm_moslora.utils import distributed, files, heartbeat
from mm_moslora.utils.distributed import seed_everything
from mm_moslora.utils.errors import CheckpointError, DivergedError, TrainingError
from mm_moslora.utils.hardware import keep_freed_memory, spare_cores
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import checkpoints

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Consecutive failed saves before the run stops, since training without checkpoints risks the work."""

MOST_TOLD = 1000
"""Maximum characters of an alert."""
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


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    stop_at: int | None = None,
    measure: Measure | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train a recipe, from the start or from a checkpoint.

    Args:
        recipe: resolved.
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as after a signal; None: train to the end.
        measure: runs the harness tasks of `validate.tasks`; None: the recipe must have none.
        stop: handles signals from the first step on; earlier signals count, too.

    Raises:
        MoSLoRAError: the recipe, the data, the model or the checkpoint is not acceptable, or training diverged.
    """
    require_sft(recipe, "training_loop.train")
    distributed.join(timeout_minutes=recipe.train.timeout_minutes)
    if distributed.device().type == "cpu":
        keep_freed_memory()
    folder = Path(recipe.train.output)
    watchdog = Watchdog(folder)
    # Hosts may have other recipes, other files and other libraries.
    with watchdog.blaming():
        agree_on_recipe(recipe, resume=resume, stop_at=stop_at)
    with watchdog.blaming(), distributed.failing_together("Checking the recipe"):
        check_recipe(recipe, resume=resume)
        if recipe.validate.tasks and measure is None:
            raise TrainingError(
                f"validate.tasks is {recipe.validate.tasks}, but this program has no evaluation harness. Start the run "
                "with `mm-moslora train`, or pass `measure`."
            )
    # Each waits for the other ranks, so each may find that one is gone; the inner `blaming` words the recorded end.
    with (
        run_arithmetic(deterministic=recipe.train.deterministic),
        watchdog.blaming(),
        run_setup.exclusive(folder),
        record_run_state(folder) as ending,
        watchdog.blaming(),
        watchdog,
    ):
        seed_everything(recipe.train.seed)
        found = find_resume(recipe, resume)
        recipe = recipe.for_ranks(distributed.world_size()) if found is None else continued(recipe, found[1])
        with distributed.failing_together("Checking the recipe"):
            check_libraries(recipe, fresh=found is None)
        run = run_setup.prepare(recipe, checkpoint=found[0] if found else None)
        try:
            agree_on_data(run.identity())
            if found is not None:
                restore(run, *found)
            loop = _Loop(
                run, watchdog, measure, stop or StopRequest(), resumed_from=None if found is None else found[0]
            )
            ending.begun = True
            result = loop.go(stop_at)
            ending.finished = result.finished
            return result
        finally:
            run.engine.close()


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Factor on every peak learning rate.

    Args:
        step: optimiser steps applied so far, 0 for the first.
        total: optimiser steps of the run.
        config: the recipe's `optim`.

    Returns:
        Rises linearly over the warm-up to 1, then follows the schedule down to `min_lr_ratio`.
    """
    warmup = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class _Loop:
    """The state of one training session."""

    def __init__(
        self,
        run: run_setup.Run,
        watchdog: Watchdog,
        measure: Measure | None,
        stop: StopRequest,
        *,
        resumed_from: Path | None,
    ) -> None:
        recipe, resumed = run.recipe, resumed_from is not None
        self.resumed_from = resumed_from
        self.run, self.recipe, self.watchdog, self.stop, self.fresh = run, recipe, watchdog, stop, not resumed
        self.loader = BatchLoader(
            run.training_set,
            rank=distributed.rank() // run.engine.copies,
            world_size=distributed.world_size() // run.engine.copies,
            config=replace(recipe.data, workers=self._workers()),
            global_batch=recipe.train.global_batch,
            limit=run.limit,
            seed=recipe.train.seed,
            start_step=run.step,
            pin=run.engine.device.type == "cuda",
        )
        self.total = recipe.train.total_steps(self.loader.steps_per_epoch)
        self.trackers: Trackers = build_trackers(recipe.track)
        self.saver, self.tidier = Saver(run.folder), Tidier(run.folder)
        self.best = Best.of(run.folder, recipe.validate, resume_step=run.step if resumed else -1)
        self.validator = Validator(run, measure, stop, trackers=self.trackers, best=self.best)
        self.image_check = ImageCheck(run)
        self.log = RunLog(run, self.trackers, total_steps=self.total, steps_per_epoch=self.loader.steps_per_epoch)
        self.skipped_in_a_row = self.failed_saves = 0
        self.last_loss = math.nan
        here = resumed_from is not None and resumed_from.resolve().parent == run.folder.resolve()
        if here and distributed.is_main():
            set_aside_newer(run.folder, run.step)
        self.saved_at = run.step if here else -1
        self.stopped_by = 0

    def _workers(self) -> int:
        """Processes that prepare examples; `data.workers`, or as many as this rank has cores for beside a GPU."""
        if self.recipe.data.workers is not None:
            return self.recipe.data.workers
        if self.run.engine.device.type != "cuda":
            return 0
        return spare_cores(min(distributed.world_size(), torch.cuda.device_count()))

    def go(self, stop_at: int | None) -> TrainResult:
        """Train until the last step, `stop_at`, early stopping, or a signal."""
        run = self.run
        if self.saved_at == run.step == run.counters.get(FINISHED_AT) and self._over:
            # Its folder already holds the measurements of the whole run.
            logger.info("The run is finished: %s is its last step. Nothing is left to train.", self.resumed_from)
            return self._result(run.folder / folder_name(run.step))
        if self.resumed_from is not None:
            logger.info("Continuing from %s, step %d.", self.resumed_from.name, run.step)
        if distributed.is_main():
            files.replace_text(run.folder / "config.yaml", self.recipe.to_yaml())
        self.log.write_summary()
        ending: Ending = "failed"
        config = self.recipe.to_dict() | {"run": self.log.metadata()}
        self.trackers.start(config, run.folder, resume_step=None if self.fresh else run.step)
        try:
            self._phase("rehearsal")
            if self.fresh and self.recipe.train.rehearsal:
                rehearse(run, self.saver)
            # No rank stores signals while another rank can still be ended by them and would be waited for.
            distributed.barrier()
            with self.stop:  # until the last save, so that a signal does not lose trained steps
                self._until_over(stop_at)
                folder = self._last_save()
                if self._over and run.counters.get(FINISHED_AT) != run.step:
                    self._finish(folder)
                self.log.write_summary()
                self.tidier.wait()
            if self._over and not self.validator.cut_short and distributed.is_main() and (folder / "adapter").is_dir():
                self.trackers.log_folder("adapter", folder / "adapter", aliases=("latest", f"step-{run.step}"))
            ending = "finished" if self._over and not self.validator.cut_short else "stopped"
        except KeyboardInterrupt:
            self._phase(heartbeat.FAILING)
            ending = "stopped"
            raise
        except Exception as error:
            self._phase(heartbeat.FAILING)
            title = "Diverged" if isinstance(error, DivergedError) else "Run failed"
            self.trackers.alert(Alert(title=title, text=f"Step {run.step}: {error}"[:MOST_TOLD]))
            raise
        finally:
            self.trackers.finish(ending=ending)
        return self._result(folder)

    def _until_over(self, stop_at: int | None) -> None:
        """Take steps until the run is over or asked to stop."""
        run = self.run
        self.log.clock.begin(run.step)
        if self.validator.cut_short and not self._over:
            if self._validate() and self.saved_at != run.step:
                self._start_save()
            self._tidy()
        with Progress("train", self.total, initial=run.step) as progress, self.loader:
            batches = iter(self.loader)
            while not (self._over or self.validator.cut_short):
                self._step(batches, first=progress.done == progress.initial)
                progress.update(run.step, f"loss {self.last_loss:.4f}")
                self._periodically()
                # One collective per step shares signals and the state of the checkpoint being written.
                arrived = time.monotonic()
                number, writing = distributed.max_over_ranks([float(self.stop.received), float(self.saver.busy)])
                self.log.clock.waited(time.monotonic() - arrived)
                if self.saver.pending is not None and not writing:
                    self._finish_save()
                self.stopped_by = int(number)
                if number and distributed.is_main():
                    name = signal.Signals(self.stopped_by).name
                    logger.info("%s: saving step %d. Ctrl-C three times in all ends without.", name, self.run.step)
                if number or run.step == stop_at:
                    return
        if self.best.out_of_patience:
            logger.info("Early stopping: no better %s for %d validations.", self.best.config.best, self.best.since)

    def _result(self, folder: Path) -> TrainResult:
        return TrainResult(
            checkpoint=folder, step=self.run.step, total_steps=self.total, stopped_by=self.stopped_by,
            stopped_early=self.best.out_of_patience, measured=not self.validator.cut_short,
        )  # fmt: skip

    @property
    def _over(self) -> bool:
        """Whether every step was done, or early stopping ended the run."""
        return self.run.step >= self.total or self.best.out_of_patience

    def _phase(self, what: str, *, limit_minutes: float | None = None) -> None:
        minutes = limit_minutes or self.recipe.train.timeout_minutes
        self.watchdog.phase(what, self.run.step, minutes * 60)

    def _save_phase(self) -> None:
        """Time limit of a save: a background save blocks no longer than a step; waiting for a disk may take longer."""
        train = self.recipe.train
        brief = train.background_save and not self.saver.busy
        self._phase("save", limit_minutes=train.step_timeout_minutes if brief else None)

    def _step(self, batches: Iterator[list[Batch]], *, first: bool) -> None:
        run, recipe = self.run, self.recipe
        self._phase("data", limit_minutes=None if first else recipe.train.step_timeout_minutes)
        waited = time.monotonic()
        micro_batches = next(batches)
        data_seconds = time.monotonic() - waited
        factor = lr_factor(int(run.counters.get("applied", 0)), self.total, recipe.optim)
        self._phase("step", limit_minutes=None if first else recipe.train.step_timeout_minutes)
        result = run.engine.step(micro_batches, factor)
        self._phase("after the step", limit_minutes=recipe.train.step_timeout_minutes)
        seconds = time.monotonic() - waited
        self.last_loss = result.loss
        self._count(result, seconds)
        self.log.step(result, micro_batches, lr_factor=factor, seconds=seconds, data_seconds=data_seconds)
        self._give_up_if_diverged()
        if result.images and not self.image_check.done:
            self._phase("image check")
            self.image_check(micro_batches, result)

    def _count(self, result: StepResult, seconds: float) -> None:
        added = {
            "steps": 1, "applied": float(result.applied), "tokens": result.tokens, "images": result.images,
            "samples": result.samples, "supervised_tokens": result.supervised_tokens, "seconds": seconds,
            "skipped": float(not result.applied),
        }  # fmt: skip
        counters = self.run.counters
        for name, value in added.items():
            counters[name] = counters.get(name, 0) + value
        if result.applied:
            self.skipped_in_a_row = 0
        elif not result.rescaling:
            self.skipped_in_a_row += 1

    def _give_up_if_diverged(self) -> None:
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{self.run.step}. Earlier checkpoints are untouched. Lower optim.lr or optim.projector_lr, look at "
                "the records named above, or use bf16 instead of fp16."
            )

    def _periodically(self) -> None:
        train, step = self.recipe.train, self.run.step
        if step >= self.total:  # saved first and measured then, so that an error in measuring does not lose the run
            return
        better = bool(train.validate_every) and step % train.validate_every == 0 and self._validate()
        due = bool(train.save_every) and step % train.save_every == 0
        if (due or better) and not self._over:  # the last save comes after the loop
            taken = self._start_save()
            if due:  # a run has regular saves however often it is stopped
                self.log.mixers(taken.weights)

    def _start_save(self) -> Snapshot:
        """Copy the state and start to write it; a failure is counted and does not stop the run at once."""
        self._save_phase()
        if self.saver.pending is not None:
            self._finish_save()
        started = time.monotonic()
        taken = snapshot(self.run)
        try:
            self.saver.start(taken.manifest, taken.write, size=taken.size)
        except CheckpointError as error:
            self._save_failed(error)
            return taken
        self.saved_at = self.run.step
        if not self.recipe.train.background_save:
            self._finish_save()
        self.log.extra["save_seconds"] = time.monotonic() - started
        return taken

    def _finish_save(self) -> None:
        self._save_phase()
        try:
            folder = self.saver.finish()
        except CheckpointError as error:
            self.saved_at = -1
            self._save_failed(error)
            return
        self.failed_saves = 0
        self._tidy()
        logger.debug("Saved %s.", folder)

    def _tidy(self) -> None:
        """Record the best checkpoint, and apply the retention policy."""
        if not distributed.is_main():
            return
        train, folder = self.recipe.train, self.run.folder
        there = [step for step, _ in checkpoints(folder)]
        kept = self.best.among(there)
        best = None if kept is None else folder_name(kept)
        if self.best.step >= 0:
            self.best.write(folder, best)
        self.tidier.start(Retention(last=train.keep_last, every=train.keep_every, best=best))

    def _save_failed(self, error: CheckpointError) -> None:
        self.failed_saves += 1
        self.log.extra["failed_saves"] = self.failed_saves
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise CheckpointError(f"{error} The last {self.failed_saves} saves failed; stopped.")
        if distributed.is_main():
            logger.error("%s Training continues.", error)
        self.trackers.alert(Alert(title="Save failed", text=f"Step {self.run.step}: {error}"[:MOST_TOLD]))

    def _last_save(self) -> Path:
        """The checkpoint of the last step; a failure to write this one is an error."""
        if self.saver.pending is not None:
            self._finish_save()
        if self.saved_at != self.run.step:
            self._start_save()
            if self.saver.pending is not None:
                self._finish_save()
        folder = self.run.folder / folder_name(self.run.step)
        if self.saved_at != self.run.step:
            raise CheckpointError(f"The last checkpoint, {folder}, could not be written; the reason is above.")
        return folder

    def _validate(self) -> bool:
        """Validate; True when the model is the best so far."""
        self._phase("validation")
        better = self.validator()
        if self.validator.cut_short:
            self.stopped_by = self.validator.interrupted_by
        return better

    def _finish(self, last: Path) -> None:
        """Measure the end once: the last checkpoint records it for a run started again."""
        if self.validator.validated_at != self.run.step:
            self._validate()
            self._tidy()
        if self.validator.cut_short:
            return
        self.log.final_mixers()
        self.run.counters[FINISHED_AT] = self.run.step
        note_memory(self.run.counters)
        if distributed.is_main():
            amend(last, self.run.counters)
