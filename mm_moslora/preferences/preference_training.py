"""Training with a trainer of TRL: load, train, save. Any start continues where the last checkpoint ended."""

from __future__ import annotations

import logging
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm_moslora.config import Recipe
from mm_moslora.models.precision import resolve_precision, run_arithmetic
from mm_moslora.models.trainable_parts import component_table
from mm_moslora.preferences.preference_setup import PreferenceRun, is_sharded, prepare
from mm_moslora.tracking import build_trackers
from mm_moslora.tracking.tracker import Ending
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, amend, folder_name, rank_folder
from mm_moslora.training.checkpointing.resume_choice import find_resume
from mm_moslora.training.checkpointing.run_checkpoints import set_aside_newer
from mm_moslora.training.deepspeed_start import fresh_accelerate, prepare_deepspeed
from mm_moslora.training.engine import check_engine
from mm_moslora.training.metrics.mixer_metrics import ADAPTERS, keep_start, log_adapter
from mm_moslora.training.preflight import check_recipe
from mm_moslora.training.run_saves import RunSaves
from mm_moslora.training.run_setup import trainable_table
from mm_moslora.training.snapshot import OPTIMIZER
from mm_moslora.training.supervision.rank_agreement import agree_on_data, agree_on_recipe
from mm_moslora.training.supervision.run_faults import telling_errors
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.training.supervision.run_state import record_run_state
from mm_moslora.training.supervision.run_summary import write_summary
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.training.training_loop import FINISHED_AT, TrainResult
from mm_moslora.training.validation import Best
from mm_moslora.utils import distributed, files
from mm_moslora.utils.distributed import seed_everything
from mm_moslora.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mm_moslora.config import Objective
    from mm_moslora.preferences.reward_trainer import RewardTrainer
    from mm_moslora.preferences.trl_trainers import JudgedTrainer, PairTrainer, PreferenceSaves, RunTrainer

logger = logging.getLogger(__name__)


def train_preferences(
    recipe: Recipe, *, resume: str = "auto", stop_at: int | None = None, stop: StopRequest | None = None
) -> TrainResult:
    """Train a recipe with `objective: dpo`, `kto` or `grpo`, from the start or from a checkpoint.

    Args:
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as after a signal; None: train to the end.
        stop: handles signals from the first step on; earlier signals count, too.

    Raises:
        MoSLoRAError: the recipe, the data, the model or the checkpoint is not acceptable, or training diverged.
    """
    if recipe.objective == "sft":
        raise ConfigError("objective is sft, which is no learning from preferences. Set it to dpo, kto or grpo.")
    distributed.join(timeout_minutes=recipe.train.timeout_minutes)
    folder = Path(recipe.train.output)
    watchdog = Watchdog(folder)
    # Hosts may have other recipes, other files and other libraries.
    with watchdog.blaming():
        agree_on_recipe(recipe, resume=resume, stop_at=stop_at)
    with watchdog.blaming(), distributed.failing_together("Checking the recipe"):
        check_recipe(recipe, resume=resume)
        if is_sharded(recipe):
            precision = resolve_precision(recipe.train.precision)
            check_engine(recipe.train, precision=precision, max_grad_norm=recipe.optim.max_grad_norm)
    # Each waits for the other ranks, so each may find that one is gone; the inner `blaming` words the recorded end.
    with (
        run_arithmetic(deterministic=recipe.train.deterministic),
        watchdog.blaming(),
        exclusive(folder),
        record_run_state(folder) as ending,
        watchdog.blaming(),
        watchdog,
        fresh_accelerate(),
    ):
        if is_sharded(recipe):
            prepare_deepspeed(recipe.train.zero)
        seed_everything(recipe.train.seed)
        checkpoint = find_resume(recipe, resume)
        run = prepare(recipe, checkpoint=None if checkpoint is None else checkpoint[0])
        agree_on_data(run.identity())
        ending.begun = True
        result = _Session(run, checkpoint, stop or StopRequest(), watchdog).go(stop_at)
        ending.finished = result.finished
    return result


class _Session:
    """The state of one training session."""

    trainer: RunTrainer
    """Made by `go`."""

    def __init__(
        self, run: PreferenceRun, checkpoint: tuple[Path, Manifest] | None, stop: StopRequest, watchdog: Watchdog
    ) -> None:
        self.run, self.stop, self.checkpoint, self.watchdog = run, stop, checkpoint, watchdog
        self.trackers = build_trackers(run.recipe.track)
        self.components = [vars(row) for row in component_table(run.assembly)]  # before TRL adds the reference
        if distributed.is_main():
            for line in trainable_table(run.assembly):
                logger.info("%s", line)
            keep_start(run.assembly.model, _factors(run))
        if checkpoint is not None:
            self._restore(*checkpoint)

    def _restore(self, folder: Path, manifest: Manifest) -> None:
        if manifest.data != self.run.records.fingerprint:
            raise CheckpointError(
                f"The records differ from those of {folder}: records were added, removed, changed in length or became "
                "unusable. Restore the data, or start another run from the checkpoint's weights (adapter.weights)."
            )
        divided = (rank_folder(folder, 0) / OPTIMIZER).is_file()
        if divided != self.run.sharded:
            zero = manifest.recipe.get("train", {}).get("zero", "auto")
            raise CheckpointError(
                f"{folder} has the optimiser's state of train.zero {zero}, and train.zero is "
                f"{self.run.recipe.train.zero}: a state {'in shards' if divided else 'without shards'} does not fit. "
                f"Set train.zero to {zero}, or start another run from the checkpoint's weights (adapter.weights)."
            )
        self.run.counters.update(manifest.counters)
        if distributed.is_main() and folder.resolve().parent == self.run.folder.resolve():
            set_aside_newer(self.run.folder, self.run.step)

    def go(self, stop_at: int | None) -> TrainResult:
        """Train until the last step, `stop_at`, or a signal."""
        with warnings.catch_warnings():
            return self._go(stop_at)

    def _go(self, stop_at: int | None) -> TrainResult:
        from mm_moslora.preferences.trl_trainers import RunCallback

        run = self.run
        if run.step >= run.total_steps and run.counters.get(FINISHED_AT) == run.step:
            logger.info("The run is finished at step %d. Nothing is left to train.", run.step)
            return self._result(0)
        if distributed.is_main():
            files.replace_text(run.folder / "config.yaml", run.recipe.to_yaml())
        warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's uses of names that transformers renames
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        resumed = None if self.checkpoint is None else self.checkpoint[0]
        saves = self._saves(resumed)
        trainer = self.trainer = _trainer(run.recipe.objective)(run, saves)
        write_summary(run, run.total_steps, self._of_run)
        callback = RunCallback(trainer, self.trackers, self.stop, stop_at=stop_at)
        trainer.add_callback(callback)
        ending: Ending = "failed"
        limit = run.recipe.train.timeout_minutes
        self.trackers.start(run.recipe.to_dict(), run.folder, resume_step=None if resumed is None else run.step)
        try:
            with telling_errors(self.trackers, lambda what: saves.phase(what, limit), lambda: run.step):
                distributed.barrier()
                with self.stop, closing(trainer):
                    if run.step < run.total_steps:
                        trainer.train(resume_from_checkpoint=None if resumed is None else str(rank_folder(resumed, 0)))
                        saves.finish_last()
                    elif resumed is not None and distributed.is_main():  # it ended before it was measured
                        trainer.load_factors(resumed)
                    saves.phase("measuring the end", limit)
                    if run.step >= run.total_steps:
                        self._finish(trainer.trained_state())
                    write_summary(run, run.total_steps, self._of_run)
                    saves.tidier.wait()
            ending = "stopped" if run.step < run.total_steps else "finished"
        except KeyboardInterrupt:
            ending = "stopped"
            raise
        finally:
            self.trackers.finish(ending=ending)
        return self._result(callback.stopped_by)

    def _saves(self, resumed: Path | None) -> PreferenceSaves:
        run = self.run
        is_own = resumed is not None and resumed.resolve().parent == run.folder.resolve()
        return RunSaves(
            run, self.watchdog, self.trackers, lambda: self.trainer.taken(), best=Best(config=run.recipe.validate),
            saved_at=run.step if is_own else -1, extra={},
        )  # fmt: skip

    def _finish(self, trained: dict[str, torch.Tensor]) -> None:
        """Measure the adapter at the end; the last checkpoint records that this is done."""
        run = self.run
        run.counters[FINISHED_AT] = float(run.step)
        log_adapter(
            run.assembly.model, trained, self.trackers, run.step, file=run.folder / "mixers.json", metrics=False
        )
        if distributed.is_main():
            amend(run.folder / folder_name(run.step), run.counters)

    def _result(self, stopped_by: int) -> TrainResult:
        run = self.run
        return TrainResult(
            checkpoint=run.folder / folder_name(run.step), step=run.step, total_steps=run.total_steps,
            stopped_by=stopped_by,
        )  # fmt: skip

    def _of_run(self) -> dict[str, Any]:
        """What the run's `summary.json` has beside the parts of all runs."""
        run, data = self.run, dict(self.run.records.statistics())
        if run.held_out is not None:
            data["validation_records"] = float(len(run.held_out.usable))
        return {
            "components": self.components, "tokens_per_image": run.assembly.tokens_per_image,
            "base": run.assembly.base, "data": data,
        }  # fmt: skip


def _trainer(objective: Objective) -> type[PairTrainer] | type[JudgedTrainer] | type[RewardTrainer]:
    """The trainer of an objective; it imports TRL."""
    if objective == "grpo":
        from mm_moslora.preferences.reward_trainer import RewardTrainer

        return RewardTrainer
    from mm_moslora.preferences.trl_trainers import JudgedTrainer, PairTrainer

    return PairTrainer if objective == "dpo" else JudgedTrainer


def _factors(run: PreferenceRun) -> dict[str, torch.Tensor]:
    """The adapter's factors in fp32 in main memory."""
    return {
        name: parameter.detach().to("cpu", copy=True).float()
        for name, parameter in run.assembly.model.named_parameters()
        if ADAPTERS in name
    }
