"""The training loop: fetch, step, log, save. Short enough to read in one sitting."""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_moslora import distributed
from mm_moslora.config import Recipe
from mm_moslora.data.loader import BatchLoader
from mm_moslora.errors import DivergedError
from mm_moslora.models.trainable import component_table
from mm_moslora.tracking import Trackers, build_trackers
from mm_moslora.training import checkpoint
from mm_moslora.training import run as runs
from mm_moslora.training.engine import StepResult
from mm_moslora.training.mixers import mixer_matrices, write_mixers
from mm_moslora.training.optim import lr_factor
from mm_moslora.training.progress import Progress
from mm_moslora.training.signals import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    checkpoint: Path
    """The last committed checkpoint."""
    step: int
    """Optimiser steps done."""
    total_steps: int
    """Optimiser steps of the whole run."""
    stopped_by: int
    """The signal that stopped it early, 0 for none."""

    @property
    def finished(self) -> bool:
        """Whether every step was done."""
        return self.step >= self.total_steps


def train(recipe: Recipe, *, resume: str = "auto", stop_at: int | None = None) -> TrainResult:
    """Train a recipe, from the start or from where it stopped.

    Args:
        recipe: resolved.
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as if a signal had come; None: go to the end.

    Raises:
        MoSLoRAError: the recipe, the data, the model or the checkpoint is not acceptable, or training diverged.
    """
    distributed.join(timeout_minutes=recipe.train.timeout_minutes)
    with runs.exclusive(Path(recipe.train.output)):
        runs.seed_everything(recipe.train.seed)
        found = runs.find_resume(recipe, resume)
        run = runs.prepare(recipe)
        try:
            if found is not None:
                runs.restore(run, *found)
                logger.info("Continuing from %s, step %d.", found[0].name, run.step)
            return _Loop(run, resumed=found is not None).go(stop_at)
        finally:
            run.engine.close()


class _Loop:
    """The state of one stretch of training."""

    def __init__(self, run: runs.Run, *, resumed: bool) -> None:
        recipe = run.recipe
        self.run, self.recipe = run, recipe
        self.loader = BatchLoader(
            run.training_set,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            config=recipe.data,
            global_batch=recipe.train.global_batch,
            micro_batch=recipe.train.micro_batch,
            seed=recipe.train.seed,
            start_step=run.step,
        )
        self.total = recipe.train.steps or max(1, math.ceil(self.loader.steps_per_epoch * recipe.train.epochs))
        self.trackers: Trackers = build_trackers(recipe.track)
        self.trackers.start(recipe.to_dict(), run.folder, resume_step=run.step if resumed else None)
        self.skipped_in_a_row = 0
        self.saved_at = run.step if resumed else -1
        self.first_mixers = mixer_matrices(run.engine.trainable_state()) if run.step == 0 else {}

    def go(self, stop_at: int | None) -> TrainResult:
        """Train until the last step, `stop_at`, or a signal."""
        run, recipe = self.run, self.recipe
        signal_number, ok = 0, False
        started = time.monotonic()
        try:
            with StopRequest() as stop, Progress("train", self.total, initial=run.step) as progress, self.loader:
                batches = iter(self.loader)
                while run.step < self.total:
                    waited = time.monotonic()
                    micro_batches = next(batches)
                    data_seconds = time.monotonic() - waited
                    factor = lr_factor(int(run.counters.get("applied", 0)), self.total, recipe.optim)
                    result = run.engine.step(micro_batches, factor)
                    seconds = time.monotonic() - waited
                    self._count(result, seconds, [i for b in micro_batches for i in b.ids])
                    self._log(result, factor, seconds=seconds, data_seconds=data_seconds)
                    progress.update(run.step, f"loss {result.loss:.4f}")
                    self._periodically()
                    signal_number = stop.agreed()
                    if signal_number or run.step == stop_at:
                        break
            folder = self._save() if self.saved_at != run.step else run.folder / checkpoint.folder_name(run.step)
            if run.step >= self.total:
                self._finish()
            ok = True
        finally:
            run.counters["session_seconds"] = time.monotonic() - started
            self.trackers.finish(ok=ok)
        return TrainResult(checkpoint=folder, step=run.step, total_steps=self.total, stopped_by=signal_number)

    def _count(self, result: StepResult, seconds: float, ids: list[str]) -> None:
        counters = self.run.counters
        added = {
            "steps": 1, "applied": float(result.applied), "tokens": result.tokens, "images": result.images,
            "supervised_tokens": result.supervised_tokens, "seconds": seconds, "skipped": float(not result.applied),
        }  # fmt: skip
        for name, value in added.items():
            counters[name] = counters.get(name, 0) + value
        if result.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        logger.warning(
            "Step %d skipped: the loss or a gradient is not finite (loss %s). Records of rank %d: %s",
            self.run.step, result.loss, distributed.rank(), ", ".join(ids[:16]),
        )  # fmt: skip
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; stopped at step "
                f"{self.run.step}. Earlier checkpoints are untouched. Lower optim.lr or optim.projector_lr, look at "
                "the records named above, or use bf16 instead of fp16."
            )

    def _log(self, result: StepResult, factor: float, *, seconds: float, data_seconds: float) -> None:
        step = self.run.step
        if step % self.recipe.train.log_every and step != self.total:
            return
        metrics: dict[str, float] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "images": result.images,
            "tokens_per_second": result.tokens / max(seconds, 1e-9),
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "epoch": step / self.loader.steps_per_epoch,
            "skipped_steps": self.run.counters["skipped"],
            "memory_gib": peak_memory_gib(),
        }
        metrics |= {f"lr/{group.name}": group.peak_lr * factor for group in self.run.engine.groups}
        self.trackers.log(metrics, step)

    def _periodically(self) -> None:
        train, step = self.recipe.train, self.run.step
        if train.validate_every and step % train.validate_every == 0:
            self._validate()
        if train.save_every and step % train.save_every == 0 and step < self.total:
            self._save()

    def _save(self) -> Path:
        folder = runs.save(self.run)
        self.saved_at = self.run.step
        return folder

    def _validate(self) -> None:
        """Held-out loss; touches neither the random state nor the order of the training data."""
        held_out, recipe = self.run.validation_set, self.recipe
        if held_out is None:
            return
        state = torch.get_rng_state()
        self.run.engine.module.eval()
        loss = count = 0.0
        loader = BatchLoader(
            held_out, rank=distributed.rank(), world_size=distributed.world_size(), config=recipe.data,
            global_batch=recipe.train.global_batch, micro_batch=recipe.train.micro_batch, seed=0,
        )  # fmt: skip
        with loader:
            batches = iter(loader)
            for _ in range(loader.steps_per_epoch):
                part, tokens = self.run.engine.evaluate(next(batches))
                loss, count = loss + part, count + tokens
        self.run.engine.module.train()
        torch.set_rng_state(state)
        self.trackers.log({"validation_loss": loss / max(1.0, count)}, self.run.step)

    def _finish(self) -> None:
        if not (self.recipe.train.validate_every and self.run.step % self.recipe.train.validate_every == 0):
            self._validate()
        final = mixer_matrices(self.run.engine.trainable_state())
        if distributed.is_main():
            write_mixers(self.run.folder / "mixers.json", before=self.first_mixers, after=final)
            checkpoint.write_json(self.run.folder / "summary.json", summary(self.run, self.total))


def peak_memory_gib() -> float:
    """Largest memory this process has used: device memory on an accelerator, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def summary(run: runs.Run, total: int) -> dict[str, Any]:
    """What a run was and did, for the report."""
    return {
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
        "memory_gib": peak_memory_gib(),
        "data": {"examples": len(run.training_set)},
    }
