"""Training a diffusion run: load, adapt, step, draw, save. Any start continues where the last checkpoint ended.

accelerate brings precision, several processes and DeepSpeed's ZeRO. A step draws all its random numbers from the seed,
its number and its rank, so a resumed run repeats the straight run bit for bit.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_moslora.diffusion.denoising_loss import DenoisingLoss
from mm_moslora.diffusion.diffusion_checkpoint import Checkpoints, find_resume
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
from mm_moslora.diffusion.diffusion_setup import (
    DiffusionRun,
    make_accelerator,
    make_optimizer,
    prepare,
)
from mm_moslora.diffusion.pipeline_families import need_diffusers
from mm_moslora.diffusion.subject_pictures import generator
from mm_moslora.diffusion.subject_scores import log_scores
from mm_moslora.models.precision import resolve_precision, run_arithmetic
from mm_moslora.tracking import Trackers, build_trackers
from mm_moslora.tracking.tracker import Ending
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, amend, folder_name
from mm_moslora.training.deepspeed_start import fresh_accelerate
from mm_moslora.training.metrics.mixer_metrics import keep_start, log_adapter
from mm_moslora.training.supervision.rank_agreement import agree_on_data, agree_on_recipe
from mm_moslora.training.supervision.run_faults import SkippedSteps
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.training.supervision.run_state import record_run_state
from mm_moslora.training.supervision.run_summary import peak_memory_gib, write_summary
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import install_command, is_installed
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DiffusionResult:
    """The outcome of a session."""

    checkpoint: Path
    step: int
    total_steps: int
    stopped_by: int
    """The signal that stopped it early, 0 for none."""


def train_diffusion(
    recipe: DiffusionRecipe, *, resume: str = "auto", stop_at: int | None = None, stop: StopRequest | None = None
) -> DiffusionResult:
    """Train a recipe, from the start or from a checkpoint.

    Args:
        recipe: resolved.
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as after a signal.
        stop: handles signals from the first step on.

    Raises:
        MoSLoRAError: the recipe, the pictures, the pipeline or the checkpoint is not acceptable, or training diverged.
    """
    need_diffusers()
    precision = resolve_precision(recipe.train.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision is fp16, which needs a GPU. Choose bf16 or fp32: --train.precision fp32.")
    if recipe.optim.optimizer == "adamw_8bit" and not is_installed("bitsandbytes"):
        raise ConfigError(f"optim.optimizer is adamw_8bit, which needs: {install_command('bitsandbytes')}")
    distributed.join()
    agree_on_recipe(recipe, resume=resume, stop_at=stop_at)
    folder = Path(recipe.train.output)
    with (
        run_arithmetic(deterministic=recipe.train.deterministic),
        exclusive(folder),
        record_run_state(folder) as ending,
        fresh_accelerate(),
    ):
        checkpoint = find_resume(recipe, folder, resume)
        run = prepare(recipe, folder, precision, base=checkpoint[1].base if checkpoint else {})
        agree_on_data({"the fingerprint of data.pictures": run.data[:12]})
        session = _Session(run, build_trackers(recipe.track), checkpoint, stop or StopRequest())
        ending.begun = True
        result = session.go(stop_at)
        ending.finished = result.step >= result.total_steps
    return result


class _Session:
    """The state of one training session."""

    def __init__(
        self, run: DiffusionRun, trackers: Trackers, checkpoint: tuple[Path, Manifest] | None, stop: StopRequest
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.run, self.recipe, self.trackers, self.stop = run, run.recipe, trackers, stop
        self.total = self.recipe.train.steps
        loss = DenoisingLoss(run.family)
        self.trainable = {name: p for name, p in loss.parts.named_parameters() if p.requires_grad}
        self.parts = loss.parts
        if distributed.is_main():
            keep_start(self.parts, {n: p.detach().to("cpu", copy=True).float() for n, p in self.trainable.items()})
        optimizer = make_optimizer(loss, self.recipe.optim)
        optim = self.recipe.optim
        self.schedule = get_scheduler(
            "constant_with_warmup" if optim.schedule == "constant" else optim.schedule, optimizer,
            num_warmup_steps=optim.warmup, num_training_steps=self.total,
        )  # fmt: skip
        self.accelerator = make_accelerator(run)
        self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.checkpoints = Checkpoints(run, self.trainable, self.optimizer, self.schedule, self.accelerator)
        self.stopped_by, self.fresh = 0, checkpoint is None
        self.skipped = SkippedSteps(self.recipe.train.max_skipped_steps, advice="Lower optim.lr, or use bf16 or fp32.")
        if checkpoint is not None:
            self.checkpoints.restore(*checkpoint)

    def go(self, stop_at: int | None) -> DiffusionResult:
        """Train until the last step, `stop_at`, or a signal."""
        run = self.run
        if run.step >= self.total and run.counters.get("finished"):
            logger.info("The run is finished at step %d. Nothing is left to train.", run.step)
            return self._result()
        if distributed.is_main():
            files.replace_text(run.folder / "config.yaml", self.recipe.to_yaml())
        write_summary(run, self.total, self._of_run)
        ending: Ending = "failed"
        self.trackers.start(self.recipe.to_dict(), run.folder, resume_step=None if self.fresh else run.step)
        try:
            distributed.barrier()
            with self.stop:
                self._train(stop_at)
                if run.step >= self.total and not self.stopped_by:
                    self._finish()
                if self.checkpoints.saved_at != run.step:
                    self.checkpoints.save()
                write_summary(run, self.total, self._of_run)
                self.checkpoints.tidier.wait()
            ending = "finished" if run.step >= self.total and not self.stopped_by else "stopped"
        except KeyboardInterrupt:
            ending = "stopped"
            raise
        finally:
            self.trackers.finish(ending=ending)
        return self._result()

    def _result(self) -> DiffusionResult:
        run = self.run
        return DiffusionResult(
            checkpoint=run.folder / folder_name(run.step), step=run.step, total_steps=self.total,
            stopped_by=self.stopped_by,
        )  # fmt: skip

    def _train(self, stop_at: int | None) -> None:
        run, train = self.run, self.recipe.train
        with Progress("train", self.total, initial=run.step) as progress:
            while run.step < self.total:
                loss = self._step()
                progress.update(run.step, f"loss {loss:.4f}")
                if run.validate_every and run.step % run.validate_every == 0 and run.step < self.total:
                    self._validate()
                saved = run.step < self.total and bool(train.save_every) and run.step % train.save_every == 0
                if saved:
                    self.checkpoints.save()
                every = self.recipe.track.mixers_every
                if saved or (run.step < self.total and every and run.step % every == 0):
                    self._log_adapter()
                (number,) = distributed.max_over_ranks([float(self.stop.received)])
                self.stopped_by = int(number)
                if number and distributed.is_main():
                    logger.info("%s: saving step %d.", signal.Signals(self.stopped_by).name, run.step)
                if number or run.step == stop_at:
                    return

    def _step(self) -> float:
        """One optimiser step; returns the mean loss over all ranks."""
        run, train, started = self.run, self.recipe.train, time.monotonic()
        self.loss.train()
        torch.manual_seed(generator(train.seed, "dropout", run.step, distributed.rank()).initial_seed())
        total, norm = 0.0, 0.0
        for micro in range(train.accumulation):
            batch = run.batches.batch(run.step, micro, self.accelerator.device)
            with self.accelerator.accumulate(self.loss):
                loss = self.loss(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    limit = self.recipe.optim.max_grad_norm or math.inf
                    clipped = self.accelerator.clip_grad_norm_(list(self.trainable.values()), limit)
                    # None: DeepSpeed clips in its own step.
                    norm = float((self.loss.get_global_grad_norm() or 0.0) if clipped is None else clipped)
                    if math.isfinite(norm) or self.accelerator.scaler is not None:
                        self.optimizer.step()
                applied = math.isfinite(norm) and not self.optimizer.step_was_skipped
                self.optimizer.zero_grad()
            total += float(loss.detach()) / train.accumulation
        rates = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        if applied:
            self.schedule.step()
        run.step += 1
        mean = distributed.sum_over_ranks([total])[0] / distributed.world_size()
        self._count(applied, time.monotonic() - started)
        if run.step % train.log_every == 0 or run.step == self.total:
            self._log(mean, norm, rates, time.monotonic() - started)
        return mean

    def _loss_scale(self) -> float:
        """fp16's factor on the loss, 1 in other precisions."""
        if self.accelerator.scaler is not None:
            return float(self.accelerator.scaler.get_scale())
        return float(self.optimizer.optimizer.loss_scale) if self.checkpoints.sharded else 1.0

    def _count(self, applied: bool, seconds: float) -> None:
        counters, run = self.run.counters, self.run
        added = {
            "steps": 1.0,
            "samples": float(run.batches.per_step),
            "seconds": seconds,
            "skipped": float(not applied),
        }
        for name, value in added.items():
            counters[name] = counters.get(name, 0.0) + value
        if applied or self._loss_scale() <= 1:  # fp16 skips steps until its loss scale fits
            self.skipped.count(applied=applied)
        self.skipped.give_up(run.step)

    def _log(self, loss: float, norm: float, rates: dict[str, float], seconds: float) -> None:
        run = self.run
        metrics = {"loss": loss, "grad_norm": norm, "epoch": run.step * run.batches.per_step / len(run.batches.sets[0])}
        metrics |= {"step_seconds": seconds, "pictures_per_second": run.batches.per_step / seconds} | rates
        metrics |= {"memory_gib": peak_memory_gib(), "skipped_steps": run.counters["skipped"]}
        if (scale := self._loss_scale()) != 1:
            metrics["loss_scale"] = scale
        self.trackers.log(metrics, run.step)

    def _validate(self) -> list[Path]:
        self.loss.eval()
        return self.run.pictures(self.run.step, self.trackers)

    def _log_adapter(self, file: Path | None = None) -> None:
        """What the adapters learned; all ranks take part."""
        log_adapter(self.parts, self.checkpoints.state(), self.trackers, self.run.step, file=file)

    def _finish(self) -> None:
        """Draw and score the end; the last checkpoint records that this is done."""
        run = self.run
        if self.checkpoints.saved_at != run.step:
            self.checkpoints.save()
        drawn = self._validate()
        self._log_adapter(run.folder / "mixers.json")
        if distributed.is_main():
            log_scores(run.family, run.batches.sets[0], drawn, run.pictures, self.trackers, run.step)
        run.counters["finished"] = 1.0
        if distributed.is_main():
            amend(run.folder / folder_name(run.step), run.counters)

    def _of_run(self) -> dict[str, Any]:
        """What the run's `summary.json` has beside the parts of all runs."""
        run, rows = self.run, []
        for name in run.family.adapted_names():
            parameters = list(getattr(run.family.pipeline, name).named_parameters())
            total = sum(p.numel() for key, p in parameters if "lora_" not in key)
            trainable = sum(p.numel() for _, p in parameters if p.requires_grad)
            rows.append({"name": name, "total": total, "trainable": trainable})
        data = {"pictures": len(run.batches.sets[0].pictures), "resolution": run.family.resolution}
        if len(run.batches.sets) > 1:
            data["class_pictures"] = len(run.batches.sets[1].pictures)
        return {"kind": "diffusion", "components": rows, "base": {"pipeline": self.recipe.model.base}, "data": data}
