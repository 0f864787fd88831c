"""The training loop: fetch, step, log, save. Short enough to read in one sitting."""

from __future__ import annotations

import logging
import math
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_moslora.batch import Batch
from mm_moslora.config import Recipe
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.models.trainable_parts import component_table
from mm_moslora.tracking import Trackers, build_trackers
from mm_moslora.tracking.alerts import Alert
from mm_moslora.tracking.tracker import Ending
from mm_moslora.training import run_setup
from mm_moslora.training.checkpointing import checkpoint_folder as checkpoint
from mm_moslora.training.checkpointing.commit_checkpoint import Saver, amend
from mm_moslora.training.engine import StepResult
from mm_moslora.training.image_dependence import ImageCheck
from mm_moslora.training.metrics.mixer_metrics import adapter_metrics, mixer_matrices, write_mixers
from mm_moslora.training.metrics.throughput import Clock, RankFigures, Speedometer
from mm_moslora.training.parameter_groups import lr_factor
from mm_moslora.training.preflight import check_libraries, check_recipe
from mm_moslora.training.rehearsal import rehearse
from mm_moslora.training.resume import find_resume, restore
from mm_moslora.training.snapshot import snapshot
from mm_moslora.training.supervision.loss_spikes import SPIKE, SpikeScore
from mm_moslora.training.supervision.run_state import record_run_state
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.training.validation import Best, CutShortError, Measure, Validator
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import CheckpointError, DistributedError, DivergedError, MoSLoRAError, TrainingError
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.heartbeat import means_lost
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import checkpoints

logger = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Consecutive failed saves before the run stops, since training without checkpoints risks the work."""

MOST_TOLD = 1000
"""Maximum characters of an alert."""
FINISHED_AT = "finished_at"
"""Counter: the last step, once the run was over and had been measured."""
CUT_SHORT_AT = "cut_short_at"
"""Counter: the step of a validation that a signal interrupted, so that a resumed run repeats it."""


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
    distributed.join(timeout_minutes=recipe.train.timeout_minutes)
    if distributed.device().type == "cpu":
        keep_freed_memory()
    folder = Path(recipe.train.output)
    watchdog = Watchdog(folder)
    with blaming(watchdog):
        _agreed(lambda: _check(recipe, resume, measure))
    # Each waits for the other ranks, so each may find that one is gone; the end is recorded in the words of `blaming`.
    with (
        blaming(watchdog),
        run_setup.exclusive(folder),
        record_run_state(folder) as ending,
        blaming(watchdog),
        watchdog,
    ):
        run_setup.seed_everything(recipe.train.seed)
        found = find_resume(recipe, resume)
        _agreed(lambda: check_libraries(recipe, fresh=found is None))
        run = run_setup.prepare(recipe, checkpoint=found[0] if found else None)
        try:
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


def _check(recipe: Recipe, resume: str, measure: Measure | None) -> None:
    check_recipe(recipe, resume=resume)
    if recipe.validate.tasks and measure is None:
        raise TrainingError(
            f"validate.tasks is {recipe.validate.tasks}, but this program has no evaluation harness. Start the run "
            "with `mm-moslora train`, or pass `measure`."
        )


def _agreed(check: Callable[[], None]) -> None:
    """Check on every rank, and fail on all where one fails: hosts may have other files and other libraries."""
    failure: Exception | None = None
    try:
        check()
    except MoSLoRAError as error:
        failure = error
    distributed.agree(failure, what="Checking the recipe")


@contextmanager
def blaming(watchdog: Watchdog) -> Iterator[None]:
    """Turn the failure of a collective after the loss of a rank, or of a data worker, into an error that names it."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise TrainingError(
                f"A process that prepares examples died ({str(error).strip().splitlines()[0]}). The usual cause is "
                "too little memory or, in a container, /dev/shm. Give more, lower data.workers, or set it to 0 for a "
                "thread. The same command resumes from the last checkpoint."
            ) from error
        lost = isinstance(error, torch.distributed.DistError) or means_lost(str(error))
        if distributed.world_size() == 1 or isinstance(error, MoSLoRAError) or not lost:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        blame = watchdog.verdict()
        raise DistributedError(f"The other ranks cannot be reached. {blame} ({reason})", ranks=blame.ranks) from error


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
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            config=recipe.data,
            global_batch=recipe.train.global_batch,
            micro_batch=recipe.train.micro_batch,
            seed=recipe.train.seed,
            start_step=run.step,
            pin=run.engine.device.type == "cuda",
        )
        self.total = recipe.train.total_steps(self.loader.steps_per_epoch)
        self.trackers: Trackers = build_trackers(recipe.track)
        self.saver = Saver(run.folder)
        self.validator = Validator(run, measure, stop)
        self.best = Best.of(run.folder, recipe.validate, resume_step=run.step if resumed else -1)
        self.image_check = ImageCheck(run)
        self.spikes = SpikeScore()
        self.speedometer = Speedometer(run.assembly.model)
        self.clock = Clock(run.counters, run.step)
        self.skipped_in_a_row = self.failed_saves = 0
        here = resumed_from is not None and resumed_from.resolve().parent == run.folder.resolve()
        if here and distributed.is_main():
            checkpoint.set_aside_newer(run.folder, run.step)
        self.saved_at = run.step if here else -1
        self.extra: dict[str, float] = {}  # logged with the next step
        self.validated_at = -1
        self.stopped_by = 0

    def go(self, stop_at: int | None) -> TrainResult:
        """Train until the last step, `stop_at`, early stopping, or a signal."""
        run = self.run
        if self.saved_at == run.step == run.counters.get(FINISHED_AT) and self._over:
            # Its folder already holds the measurements of the whole run.
            logger.info("The run is finished: %s is its last step. Nothing is left to train.", self.resumed_from)
            return self._result(run.folder / checkpoint.folder_name(run.step))
        if self.resumed_from is not None:
            logger.info("Continuing from %s, step %d.", self.resumed_from.name, run.step)
        if distributed.is_main():
            files.replace_text(run.folder / "config.yaml", self.recipe.to_yaml())
        self._write_summary()
        ending: Ending = "failed"
        config = self.recipe.to_dict() | {"run": started_with(run, self.total)}
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
                self._write_summary()
                self.saver.rest()
            if self._over and not self._cut_short and distributed.is_main() and (folder / "adapter").is_dir():
                self.trackers.log_folder("adapter", folder / "adapter", aliases=("latest", f"step-{run.step}"))
            ending = "finished" if self._over and not self._cut_short else "stopped"
        except KeyboardInterrupt:
            ending = "stopped"
            raise
        except Exception as error:
            title = "Diverged" if isinstance(error, DivergedError) else "Run failed"
            self.trackers.alert(Alert(title=title, text=f"Step {run.step}: {error}"[:MOST_TOLD]))
            raise
        finally:
            self.trackers.finish(ending=ending)
        return self._result(folder)

    def _until_over(self, stop_at: int | None) -> None:
        """Take steps until the run is over or asked to stop."""
        run = self.run
        self.clock.begin(run.step)
        if self._cut_short and not self._over:
            if self._validate() and self.saved_at != run.step:
                self._start_save()
            self._tidy()
        with Progress("train", self.total, initial=run.step) as progress, self.loader:
            batches = iter(self.loader)
            while not (self._over or self._cut_short):
                self._step(batches, first=progress.done == progress.initial)
                progress.update(run.step, f"loss {self.last_loss:.4f}")
                self._periodically()
                # One collective per step shares signals and the state of the checkpoint being written.
                arrived = time.monotonic()
                number, writing = distributed.max_over_ranks([float(self.stop.received), float(self.saver.busy)])
                self.clock.waited(time.monotonic() - arrived)
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
            stopped_early=self.best.out_of_patience, measured=not self._cut_short,
        )  # fmt: skip

    @property
    def _cut_short(self) -> bool:
        """Whether a signal interrupted the validation of this step."""
        return self.run.counters.get(CUT_SHORT_AT) == self.run.step

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
        self._count(result, seconds, [i for b in micro_batches for i in b.ids])
        self._log(result, micro_batches, factor, seconds=seconds, data_seconds=data_seconds)
        self._give_up_if_diverged()
        if result.images and not self.image_check.done:
            self._phase("image check")
            self.image_check(micro_batches, result)

    def _count(self, result: StepResult, seconds: float, ids: list[str]) -> None:
        counters = self.run.counters
        added = {
            "steps": 1, "applied": float(result.applied), "tokens": result.tokens, "images": result.images,
            "samples": result.samples, "supervised_tokens": result.supervised_tokens, "seconds": seconds,
            "skipped": float(not result.applied),
        }  # fmt: skip
        for name, value in added.items():
            counters[name] = counters.get(name, 0) + value
        self.clock.count(result)
        self._note_memory()
        self.spike = self.spikes.update(result.loss)
        records = f"Records of rank {distributed.rank()}: {', '.join(ids[:16])}"
        if result.applied:
            self.skipped_in_a_row = 0
            if self.spike > SPIKE:
                logger.warning(
                    "Step %d: the loss %.4f is %.1f standard deviations above the last %d. %s",
                    self.run.step, result.loss, self.spike, self.spikes.count, records,
                )  # fmt: skip
            return
        if result.rescaling:
            logger.info("Step %d skipped: fp16's loss scale is now %g.", self.run.step, self.run.engine.loss_scale)
            return
        self.skipped_in_a_row += 1
        if math.isfinite(result.loss) or not result.own_loss_is_finite:
            what = "the loss or a gradient is not finite"
            logger.warning("Step %d skipped: %s (loss %s). %s", self.run.step, what, result.loss, records)
        elif distributed.is_main():
            logger.warning("Step %d skipped: the loss of another rank is not finite.", self.run.step)

    def _give_up_if_diverged(self) -> None:
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{self.run.step}. Earlier checkpoints are untouched. Lower optim.lr or optim.projector_lr, look at "
                "the records named above, or use bf16 instead of fp16."
            )

    def _log(
        self, result: StepResult, micro_batches: list[Batch], factor: float, *, seconds: float, data_seconds: float
    ) -> None:
        step = self.run.step
        if step % self.recipe.train.log_every and step != self.total:
            return
        metrics: dict[str, float] = {
            "loss": result.loss,
            "token_accuracy": result.right_tokens / max(1, result.supervised_tokens),
            "grad_norm": result.grad_norm,
            "loss_spike": self.spike,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "images": result.images,
            "epoch": step / self.loader.steps_per_epoch,
            "skipped_steps": self.run.counters["skipped"],
        }
        pace, work_seconds = self.clock.record(step, self.total)
        own = own_figures(seconds=seconds, data_seconds=data_seconds, work_seconds=work_seconds)
        metrics |= pace | self.speedometer.of(result, micro_batches, own)
        metrics |= self.run.engine.component_norms()
        metrics |= {f"lr/{group.name}": group.peak_lr * factor for group in self.run.engine.groups}
        if (store := self.run.engine.module.pictures.store) is not None:
            metrics["feature_cache_hits"] = store.counts.hit_share
        if self.run.engine.loss_scale != 1:
            metrics["loss_scale"] = self.run.engine.loss_scale
        self.trackers.log(metrics | self.extra, step)
        self.extra = {}

    def _periodically(self) -> None:
        train, step = self.recipe.train, self.run.step
        if self.recipe.track.mixers_every and step % self.recipe.track.mixers_every == 0:
            state = self.run.engine.trainable_state()
            if distributed.is_main():
                self.trackers.log(adapter_metrics(self.run.assembly.model, state), step)
        if step >= self.total:  # saved first and measured then, so that an error in measuring does not lose the run
            return
        better = bool(train.validate_every) and step % train.validate_every == 0 and self._validate()
        due = bool(train.save_every) and step % train.save_every == 0
        if (due or better) and not self._over:  # the last save comes after the loop
            self._start_save()

    def _start_save(self) -> None:
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
            return
        self.saved_at = self.run.step
        if not self.recipe.train.background_save:
            self._finish_save()
        self.extra["save_seconds"] = time.monotonic() - started

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
        best = None if kept is None else checkpoint.folder_name(kept)
        if self.best.step >= 0:
            self.best.write(folder, best)
        self.saver.tidy(checkpoint.Retention(last=train.keep_last, every=train.keep_every, best=best))

    def _save_failed(self, error: CheckpointError) -> None:
        self.failed_saves += 1
        self.extra["failed_saves"] = self.failed_saves
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
        folder = self.run.folder / checkpoint.folder_name(self.run.step)
        if self.saved_at != self.run.step:
            raise CheckpointError(f"The last checkpoint, {folder}, could not be written; the reason is above.")
        return folder

    def _validate(self) -> bool:
        """Validate; True when the model is the best so far."""
        self._phase("validation")
        started = time.monotonic()
        try:
            metrics, samples = self.validator()
        except CutShortError as cut:
            self.stopped_by, self.run.counters[CUT_SHORT_AT] = cut.number, self.run.step
            logger.info("Signal %d interrupted the validation of step %d; it is repeated.", cut.number, self.run.step)
            return False
        self.run.counters.pop(CUT_SHORT_AT, None)
        self.validated_at = self.run.step
        if metrics:
            self.trackers.log(metrics | {"validation_seconds": time.monotonic() - started}, self.run.step)
        if samples:
            self.trackers.log_samples("validation", samples, self.run.step)
        return bool(metrics) and self.best.update(metrics, self.run.step)

    def _finish(self, last: Path) -> None:
        """Measure the end once: the last checkpoint records it for a run started again."""
        if self.validated_at != self.run.step:
            self._validate()
            self._tidy()
        if self._cut_short:
            return
        final = mixer_matrices(self.run.engine.trainable_state())
        if distributed.is_main():
            mixers = write_mixers(self.run.folder / "mixers.json", before=self.run.first_mixers, after=final)
            self.trackers.log_mixers(mixers, self.run.step)
        self.run.counters[FINISHED_AT] = self.run.step
        self._note_memory()
        if distributed.is_main():
            amend(last, self.run.counters)

    def _note_memory(self) -> None:
        """The maximum over all sessions of the run."""
        counters = self.run.counters
        counters["memory_gib"] = max(counters.get("memory_gib", 0.0), peak_memory_gib())

    def _write_summary(self) -> None:
        self._note_memory()
        self.clock.tick()
        if distributed.is_main():
            files.replace_json(self.run.folder / "summary.json", summary(self.run, self.total))


def peak_memory_gib() -> float:
    """Peak memory of this process: device memory on an accelerator, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def started_with(run: run_setup.Run, total: int) -> dict[str, Any]:
    """Metadata of a run for trackers, besides its recipe; every rank calls it."""
    hosts = set(distributed.gather_objects(socket.gethostname()))
    rows = component_table(run.assembly)
    return {
        "world_size": distributed.world_size(), "nodes": len(hosts), "precision": run.precision, "total_steps": total,
        "parameters": sum(row.total for row in rows), "trainable_parameters": sum(row.trainable for row in rows),
        "components": {row.name: {"parameters": row.total, "trainable": row.trainable} for row in rows},
        "base": run.assembly.base,
    }  # fmt: skip


def own_figures(*, seconds: float, data_seconds: float, work_seconds: float) -> RankFigures:
    """Metadata of this rank for the others."""
    reserved = retries = 0.0
    if torch.cuda.is_available():
        reserved = torch.cuda.max_memory_reserved() / 2**30
        retries = float(torch.cuda.memory_stats().get("num_alloc_retries", 0))
    return RankFigures(
        step_seconds=seconds, data_seconds=data_seconds, work_seconds=work_seconds, memory_gib=peak_memory_gib(),
        memory_reserved_gib=reserved, allocator_retries=retries,
    )  # fmt: skip


def summary(run: run_setup.Run, total: int) -> dict[str, Any]:
    """Summary of a run for the report."""
    return {
        "format": 1,  # of the run folder, see report.schema
        "name": run.recipe.name,
        "steps": run.step,
        "total_steps": total,
        "counters": run.counters,
        "precision": run.precision,
        "world_size": distributed.world_size(),
        "zero": run.recipe.train.zero,
        "components": [vars(row) for row in component_table(run.assembly)],
        "tokens_per_image": run.assembly.tokens_per_image,
        "base": run.assembly.base,
        "memory_gib": run.counters["memory_gib"],
        "data": _data_facts(run),
    }


def _data_facts(run: run_setup.Run) -> dict[str, Any]:
    facts: dict[str, Any] = dict(run.training_set.statistics())
    if run.counters.get("tokens"):
        facts["supervised_share"] = run.counters["supervised_tokens"] / run.counters["tokens"]
    if run.validation_set is not None:
        facts["validation_records"] = len(run.validation_set)
    return facts
