"""Training with a trainer of TRL: load, train, save. Any start continues where the last checkpoint ended."""

from __future__ import annotations

import logging
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm_moslora.config import Recipe
from mm_moslora.models.precision import resolve_precision
from mm_moslora.models.trainable_parts import component_table
from mm_moslora.preferences.preference_setup import PreferenceRun, is_sharded, prepare
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, rank_folder, reading_state
from mm_moslora.training.checkpointing.run_checkpoints import find_resume
from mm_moslora.training.engine import check_engine
from mm_moslora.training.engine.deepspeed_settings import fresh_accelerate, prepare_deepspeed
from mm_moslora.training.metrics.mixer_metrics import ADAPTERS, keep_initial_mixers, log_adapter
from mm_moslora.training.preflight import check_recipe
from mm_moslora.training.run_driver import Session, TrainResult, supervised_run
from mm_moslora.training.run_setup import trainable_table
from mm_moslora.training.supervision.rank_agreement import agree_on_data
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.supervision.watchdog import Watchdog
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mm_moslora.config import Objective
    from mm_moslora.preferences.reward_trainer import RewardTrainer
    from mm_moslora.preferences.trl_trainers import JudgedTrainer, PairTrainer, RunTrainer

logger = logging.getLogger(__name__)


def train_preferences(
    recipe: Recipe,
    *,
    resume: str = "auto",
    stop_at: int | None = None,
    stop: StopRequest | None = None,
    checked: bool = False,
) -> TrainResult:
    """Train a recipe with `objective: dpo`, `kto` or `grpo`, from the start or from a checkpoint.

    Args:
        resume: `auto`, `required`, `never`, or a checkpoint folder.
        stop_at: save and return after this optimiser step, as after a signal; None: train to the end.
        stop: handles signals from the first step on; earlier signals count, too.
        checked: see `mm_moslora.training.training_loop.train`.

    Raises:
        MoSLoRAError: the recipe, the data, the model or the checkpoint is not acceptable, or training diverged.
    """
    if recipe.objective == "sft":
        raise ConfigError("objective is sft, which is no learning from preferences. Set it to dpo, kto or grpo.")

    def check() -> None:
        if not checked:
            check_recipe(recipe, resume=resume)
        if is_sharded(recipe):
            precision = resolve_precision(recipe.train.precision)
            check_engine(recipe.train, precision=precision, max_grad_norm=recipe.optim.max_grad_norm)

    with supervised_run(recipe, check, resume=resume, stop_at=stop_at) as (watchdog, ending), fresh_accelerate():
        if is_sharded(recipe):
            prepare_deepspeed(recipe.train.zero)
        checkpoint, manifest = find_resume(recipe, resume) or (None, None)
        run = prepare(recipe, checkpoint=checkpoint)
        agree_on_data(run.identity())
        if checkpoint is not None and manifest is not None:
            _restore(run, checkpoint, manifest)
        with closing(_Session(run, watchdog, stop or StopRequest(), checkpoint)) as session, warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's uses of names that transformers renames
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            ending.begun = True
            result = session.go(stop_at)
        ending.finished = result.finished
    return result


def _restore(run: PreferenceRun, folder: Path, manifest: Manifest) -> None:
    """Take the counters of a checkpoint, whose state the trainer reads when it trains; refuse what cannot go on."""
    if manifest.data != run.records.fingerprint:
        raise CheckpointError(
            f"The records differ from those of {folder}: records were added, removed, changed in length or became "
            "unusable. Restore the data, or start another run from the checkpoint's weights (adapter.weights)."
        )
    run.counters.update(manifest.counters)
    if run.step >= run.total_steps and folder.resolve().parent != run.folder.resolve():
        raise CheckpointError(
            f"{folder} is of the last step of another run folder, so nothing is left to train. To start from its "
            f"weights: --adapter.weights {folder}."
        )


class _Session(Session[PreferenceRun, Any]):
    """One session with a trainer of TRL."""

    trainer: RunTrainer | None = None
    """Made by `begin`."""

    def __init__(self, run: PreferenceRun, watchdog: Watchdog, stop: StopRequest, resumed_from: Path | None) -> None:
        super().__init__(run, watchdog, stop, resumed_from=resumed_from, total=run.total_steps)
        self.components = [vars(row) for row in component_table(run.assembly)]  # before TRL adds the reference
        if distributed.is_main():
            for line in trainable_table(run.assembly):
                logger.info("%s", line)
            keep_initial_mixers(run.assembly.model, _factors(run))

    def _begin(self) -> None:
        self.trainer = _trainer(self.run.recipe.objective)(self.run, self.saves)

    def close(self) -> None:
        """Free what the trainer holds."""
        if self.trainer is not None:
            self.trainer.close()

    def _train(self, stop_at: int | None) -> None:
        """The loop is TRL's; a run that ended before it was measured takes its factors."""
        from transformers import TrainerState

        from mm_moslora.preferences.trl_trainers import PROGRESS, RunCallback

        trainer, resumed = self._made(), self.resumed_from
        if self.run.step < self.total:
            trainer.add_callback(RunCallback(trainer, self, stop_at=stop_at))
            state = None if resumed is None else rank_folder(resumed, 0)
            if state is not None:
                with reading_state(state):
                    if (found := TrainerState.load_from_json(str(state / PROGRESS)).global_step) != self.run.step:
                        raise ValueError(f"{PROGRESS} is of step {found}, the manifest of step {self.run.step}")
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
        elif resumed is not None and distributed.is_main():  # it ended before it was measured
            trainer.load_factors(resumed)

    def _taken(self) -> Any:
        return self._made().taken()

    def _measure_end(self) -> None:
        run, trained = self.run, self._made().trained_state()
        log_adapter(
            run.assembly.model, trained, self.trackers, run.step, file=run.folder / "mixers.json", metrics=False
        )

    def _made(self) -> RunTrainer:
        assert self.trainer is not None
        return self.trainer

    def _of_run(self) -> dict[str, Any]:
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
