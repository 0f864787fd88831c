"""The training loop: fetch, step, log, validate, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mm_moslora.batch import Batch
from mm_moslora.config import OptimConfig, Recipe, require_sft
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.training import run_setup
from mm_moslora.training.checkpointing.run_checkpoints import Best, continued, find_resume
from mm_moslora.training.engine.step_result import QueuedStep
from mm_moslora.training.forgetting import Forgetting, Forgotten
from mm_moslora.training.image_dependence import ImageCheck
from mm_moslora.training.preflight import check_libraries, check_recipe
from mm_moslora.training.resume import rehearse, restore
from mm_moslora.training.run_driver import Session, TrainResult, supervised_run
from mm_moslora.training.run_logging import RunLog
from mm_moslora.training.snapshot import Snapshot, snapshot
from mm_moslora.training.supervision.rank_agreement import agree_on_data
from mm_moslora.training.supervision.run_faults import SkippedSteps
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.training.validation import Measure, Validator
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import TrainingError
from mm_moslora.utils.hardware import keep_freed_memory, spare_cores
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    stop_at: int | None = None,
    measure: Measure | None = None,
    forgotten: Forgotten | None = None,
    stop: StopRequest | None = None,
    checked: bool = False,
) -> TrainResult:
    """Train a recipe, from the start or from a checkpoint.

    Args:
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as after a signal; None: train to the end.
        measure: runs the harness tasks of `validate.tasks`; None: the recipe must have none.
        forgotten: compares the model before the first step and at the end; None: what was forgotten is not measured.
        stop: handles signals from the first step on; earlier signals count, too.
        checked: whether `check_recipe` has taken the recipe in this process.

    Raises:
        MoSLoRAError: the recipe, the data, the model or the checkpoint is not acceptable, or training diverged.
    """
    require_sft(recipe, "training_loop.train")
    if distributed.device().type == "cpu":
        keep_freed_memory()

    def check() -> None:
        if not checked:
            check_recipe(recipe, resume=resume)
        if recipe.validate.tasks and measure is None:
            raise TrainingError(
                f"validate.tasks is {recipe.validate.tasks}, but this program has no evaluation harness. Start the run "
                "with `mm-moslora train`, or pass `measure`."
            )

    with supervised_run(recipe, check, resume=resume, stop_at=stop_at) as (watchdog, ending):
        checkpoint, manifest = find_resume(recipe, resume) or (None, None)
        recipe = recipe.for_ranks(distributed.world_size()) if manifest is None else continued(recipe, manifest)
        with distributed.failing_together("Checking the recipe"):
            check_libraries(recipe, fresh=checkpoint is None)
        run = run_setup.prepare(recipe, checkpoint=checkpoint)
        try:
            agree_on_data(run.identity())
            if checkpoint is not None and manifest is not None:
                restore(run, checkpoint, manifest)
            loop = _Loop(run, watchdog, measure, forgotten, stop or StopRequest(), resumed_from=checkpoint)
            ending.begun = True
            result = loop.go(stop_at)
            ending.finished = result.finished
            return result
        finally:
            run.engine.close()


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Factor on every peak learning rate after `step` of `total` optimiser steps, 0 for the first: rises linearly over
    the warm-up to 1, then follows the schedule down to `min_lr_ratio`."""
    warmup = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


@dataclass(frozen=True, kw_only=True)
class _Queued:
    """A step whose numbers are not read yet, and what its record needs."""

    step: QueuedStep
    micro_batches: list[Batch]
    lr_factor: float
    began: float
    data_seconds: float


class _Loop(Session[run_setup.Run, Snapshot]):
    """One training session: its parts, and the counts that end it early."""

    def __init__(
        self,
        run: run_setup.Run,
        watchdog: Watchdog,
        measure: Measure | None,
        forgotten: Forgotten | None,
        stop: StopRequest,
        *,
        resumed_from: Path | None,
    ) -> None:
        recipe = run.recipe
        self.loader = BatchLoader(
            run.training_set,
            rank=distributed.rank() // run.engine.copies,
            world_size=distributed.world_size() // run.engine.copies,
            config=replace(recipe.data, workers=_workers(run)),
            global_batch=recipe.train.global_batch,
            limit=run.limit,
            seed=recipe.train.seed,
            start_step=run.step,
            pin=run.engine.device.type == "cuda",
        )
        total = recipe.train.total_steps(self.loader.steps_per_epoch)
        best = Best.of(run.folder, recipe.validate, resume_step=-1 if resumed_from is None else run.step)
        super().__init__(run, watchdog, stop, resumed_from=resumed_from, total=total, best=best)
        self.validator = Validator(run, measure, stop, trackers=self.trackers, best=best)
        self.forgetting = Forgetting(run, measure, forgotten, stop)
        self.image_check = ImageCheck(run)
        # A stream has no epochs; the whole run is one.
        per_epoch = self.loader.steps_per_epoch if self.loader.stream is None else total
        self.log = RunLog(run, self.trackers, self.saves.extra, total_steps=total, steps_per_epoch=per_epoch)
        self.skipped = SkippedSteps(
            recipe.train.max_skipped_steps,
            advice="Lower optim.lr or optim.projector_lr, look at the records named above, or use bf16 instead of "
            "fp16.",
        )
        self.queued: _Queued | None = None
        self.loss, self.read_at, self.lr_factor = math.nan, 0.0, 1.0

    def _metadata(self) -> dict[str, Any]:
        return {"run": self.log.metadata()}

    def _of_run(self) -> dict[str, Any]:
        return self.log.of_run()

    def _taken(self) -> Snapshot:
        return snapshot(self.run)

    @property
    def measured(self) -> bool:
        """See `Session.measured`."""
        return not self.validator.cut_short

    def _waited(self, seconds: float) -> None:
        self.log.clock.waited(seconds)

    def _rehearse(self) -> None:
        """A resumed run has been rehearsed."""
        self.phase("rehearsal")
        if self.resumed_from is None and self.run.recipe.train.rehearsal:
            rehearse(self.run, self.saves.saver)
        if self.resumed_from is None:
            self.phase("measuring the model before the first step")
            self.forgetting.measure_start(tokens=self.loader.tokens_per_step * self.total)

    def _train(self, stop_at: int | None) -> None:
        run = self.run
        self.log.clock.begin(run.step)
        if not (self.measured or self.over):  # a signal interrupted the validation of this step
            if self._validate() and self.saves.saved_at != run.step:
                self.saves.start()
            self.saves.tidy()
        with Progress("train", self.total, initial=run.step) as progress, self.loader:
            batches = iter(self.loader)
            while not self.over and self.measured:
                try:
                    self._step(batches, first=progress.done == progress.initial)
                except Exception:
                    with contextlib.suppress(Exception):  # the step before has its record, if its numbers can be read
                        self._read()
                    raise
                progress.update(run.step, "" if math.isnan(self.loss) else f"loss {self.loss:.4f}")
                self._periodically()
                if self.agree(stop_at):
                    break
            self._read()
        if self.best.out_of_patience:
            logger.info("Early stopping: no better %s for %d validations.", self.best.config.best, self.best.since)

    def _step(self, batches: Iterator[list[Batch]], *, first: bool) -> None:
        """One optimiser step; its numbers are read at once, or in the middle of the next (`TrainingEngine.late`)."""
        run, train = self.run, self.run.recipe.train
        # The first data wait for workers to start, and the first step compiles and tries kernels.
        limit = train.timeout_minutes if first else train.step_timeout_minutes
        self.phase("data", limit)
        began = time.monotonic()
        micro_batches = next(batches)
        data_seconds = time.monotonic() - began
        self.phase("step", limit)
        queued = run.engine.queue(micro_batches, self._lr_factor, norms=self.log.is_due(run.step + 1))
        self.phase("after the step", train.step_timeout_minutes)
        self._count({"steps": 1} | {name: int(count) for name, count in queued.counts.items()})
        self.queued = _Queued(
            step=queued, micro_batches=micro_batches, lr_factor=self.lr_factor, began=began, data_seconds=data_seconds
        )
        if not run.engine.late or (queued.counts["images"] and not self.image_check.done):
            self._read()

    def _lr_factor(self) -> float:
        """The factor of the step at hand, once that before it is read: the schedule follows the applied steps."""
        self._read()
        self.lr_factor = lr_factor(int(self.run.counters.get("applied", 0)), self.total, self.run.recipe.optim)
        return self.lr_factor

    def _read(self) -> None:
        """Read the numbers of the last step, and act on them; nothing where that is done."""
        if self.queued is None:
            return
        run, queued, self.queued = self.run, self.queued, None
        result = queued.step.result()
        # The one before may have been read in the middle of this step.
        seconds = time.monotonic() - max(queued.began, self.read_at)
        self.loss, self.read_at = result.loss, time.monotonic()
        # Counted first, since the log reads the counters; logged before a diverged run ends, since its last record
        # tells why; the images checked before anything can be saved.
        self._count({"applied": float(result.applied), "skipped": float(not result.applied), "seconds": seconds})
        if not result.rescaling:
            self.skipped.count(applied=result.applied)
        self.log.step(
            result, queued.micro_batches, lr_factor=queued.lr_factor, seconds=seconds, data_seconds=queued.data_seconds
        )
        self.skipped.give_up(run.step)
        if result.images and not self.image_check.done:
            self.phase("image check")
            self.image_check(queued.micro_batches, result)

    def _count(self, added: Mapping[str, float]) -> None:
        counters = self.run.counters
        for name, value in added.items():
            counters[name] = counters.get(name, 0) + value

    def _periodically(self) -> None:
        """Validate and save where they are due; the last step is saved and measured after the loop."""
        train, step = self.run.recipe.train, self.run.step
        if step >= self.total:
            return
        due, validates = (every and step % every == 0 for every in (train.save_every, train.validate_every))
        if due or validates:
            self._read()
        # Validated first: a step that is the best so far is saved, and its checkpoint stays.
        better = validates and self._validate()
        if (due or better) and not self.over:  # early stopping may have ended the run
            taken = self.saves.start()
            if due:  # a run has regular saves however often it is stopped
                self.log.mixers(taken.weights)

    def _validate(self) -> bool:
        """Validate; True when the model is the best so far."""
        self.phase("validation")
        better = self.validator()
        if self.validator.cut_short:
            self.stopped_by = self.validator.interrupted_by
        return better

    def _measure_end(self) -> None:
        """A signal may interrupt it."""
        run = self.run
        if self.validator.validated_at != run.step:
            self._validate()
            self.saves.tidy()
        if not self.measured:
            return
        self.phase("measuring what was forgotten")
        if lost := self.forgetting.measure_end(validated=self.validator.validated_at == run.step):
            self.trackers.log(lost, run.step)
        self.log.final_mixers()


def _workers(run: run_setup.Run) -> int:
    """Processes that prepare examples; `data.workers`, or as many as this rank has cores for beside a GPU."""
    if run.recipe.data.workers is not None:
        return run.recipe.data.workers
    if run.engine.device.type != "cuda":
        return 0
    return spare_cores(min(distributed.world_size(), torch.cuda.device_count()))
