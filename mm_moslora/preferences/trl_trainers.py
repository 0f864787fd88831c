"""TRL's trainers on a run; it imports TRL, so it is imported where the run is known to need it."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from mm_moslora.adapters import AdapterSnapshot, adapter_snapshot, load_adapter
from mm_moslora.preferences.class_logits import logits_of_class
from mm_moslora.preferences.pair_rows import ROW, gather_uneven, patch_packed_forward
from mm_moslora.preferences.preference_setup import IDS, REFERENCE, JudgedCollator, PairCollator, PreferenceRun, rows_of
from mm_moslora.preferences.zero_trainer import ZeroTrainer, deepspeed_arguments, trained_groups
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, rank_folder
from mm_moslora.training.checkpointing.run_saves import RunSaves
from mm_moslora.training.deepspeed_presets import stage_of
from mm_moslora.training.engine.optimizers import KINDS
from mm_moslora.training.parameter_groups import OptimizerSettings
from mm_moslora.training.run_driver import Session
from mm_moslora.training.snapshot import OptimizerState, write_model
from mm_moslora.training.supervision.run_faults import SkippedSteps, name_skipped
from mm_moslora.training.training_loop import lr_factor
from mm_moslora.utils import distributed
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)

_HELD_OUT = "eval_"
"""Prefix of the trainer's measures on held-out pairs; here it is `validation_`, as in other runs."""
PROGRESS = "trainer_state.json"
"""Name of the trainer's own file of its progress, which it asks for."""
_OF_SESSION = "train_"
"""Prefix of the trainer's totals of a session."""


@dataclass(frozen=True, kw_only=True)
class TakenPreferences:
    """A run's state at one step, in main memory."""

    run: PreferenceRun
    manifest: Manifest
    optimizer: OptimizerState
    """This rank's part."""
    adapter: AdapterSnapshot | None
    """On rank 0 only."""
    progress: TrainerState
    reference: AdapterSnapshot | None
    """See `REFERENCE`."""

    @property
    def size(self) -> int:
        """Estimate of the bytes that this rank will write: the adapter is as large as a part of the state."""
        return 2 * self.optimizer.bytes

    def write(self, folder: Path) -> None:
        """Write this rank's part into a checkpoint's folder; see `Saver.start`."""
        own = rank_folder(folder)
        self.optimizer.write(own)
        if not distributed.is_main():
            return
        write_model(self.run, folder, weights={}, adapter=self.adapter)
        self.progress.save_to_json(str(own / PROGRESS))
        if self.reference is not None:
            self.reference.write(own / REFERENCE)


PreferenceSaves = RunSaves[TakenPreferences]
TrlSession = Session[PreferenceRun, Any]


class RunTrainer(ZeroTrainer):
    """What TRL's trainers share here; the reference is TRL's frozen copy `ref` of the start's adapter."""

    _metrics: Any
    """TRL's: values of each measure since the last log, of `train` and `eval`."""

    def __init__(self, run: PreferenceRun, saves: PreferenceSaves, *, args: Any, **more: Any) -> None:
        self.run, self.saves = run, saves
        self.ids: list[str] = []
        """The records of this rank in the step at hand."""
        self.loss_before: Tensor | None = None
        """The trainer's sum of losses at the start of the step."""
        self.measured_before: dict[str, int] = {}
        """Values of each of TRL's measures since the last log, at the start of the step."""
        groups, optim = trained_groups(run), run.recipe.optim
        settings = OptimizerSettings.of(optim)
        # It follows the applied steps.
        self.schedule = partial(
            LambdaLR, lr_lambda=lambda _: lr_factor(int(run.counters.get("applied", 0)), run.total_steps, optim)
        )
        if not run.sharded:  # else DeepSpeed needs the weights first
            self.stepping = KINDS["adamw"].make(settings, groups, [group.parameters for group in groups], fused=False)
        starts = [(parameter, parameter.data) for group in groups for parameter in group.parameters]
        with logits_of_class(run.assembly.model):
            super().__init__(
                model=run.peft_model,
                args=args,
                train_dataset=rows_of(run, held_out=False),
                eval_dataset=None if run.held_out is None else rows_of(run, held_out=True),
                processing_class=run.assembly.processor or run.assembly.tokenizer,
                **more,
            )
        self.remove_callback(PrinterCallback)
        for parameter, value in starts:  # TRL casts adapters of a base in 4 or 8 bits to bf16
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        has_reference, self.reference = "ref" in run.peft_model.peft_config, None
        if has_reference:
            _complete_reference(run.peft_model)
        if has_reference and run.recipe.adapter.weights is not None and distributed.is_main():
            # It stays as it is, and later the model may hold shards of it.
            self.reference = adapter_snapshot(run.peft_model, adapter_name="ref", base=run.assembly.base)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows as they are: the collator tokenises."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, which begins here."""
        train = self.run.recipe.train
        # The first data wait for workers to start, and the first step compiles and tries kernels.
        limit = train.timeout_minutes if self.loss_before is None else train.step_timeout_minutes
        self.saves.phase("data", limit)
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.saves.phase("step", limit)
        self.ids, self.step_loss, self.loss_before = [], torch.zeros((), device=device), self._tr_loss.clone()
        self.measured_before = {name: len(values) for name, values in self._metrics["train"].items()}
        return batches

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch, whose loss and records are noted."""
        self.ids += inputs.pop(IDS, []) if isinstance(inputs, dict) else []
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients, before the step, which is skipped on all ranks if a value of one is not finite."""
        norm, loss = super()._get_grad_norm(model, grad_norm=grad_norm), float(self.step_loss)
        own = [not math.isfinite(loss), self.engine is None and not math.isfinite(float(norm))]
        bad_loss, bad_norm = distributed.max_over_ranks([float(bad) for bad in own])
        if self.engine is not None:
            applied = bool(self.engine.engine.was_step_applied())  # DeepSpeed has looked at the gradients of all ranks
        elif not (applied := not (bad_loss or bad_norm)):
            model.zero_grad()  # the optimiser leaves alone what has no gradient
        if (bad_loss or not applied) and self.loss_before is not None:
            self._tr_loss.copy_(self.loss_before)  # the means that are logged are of the other steps
            measures = self._metrics["train"]
            for name in list(measures):
                del measures[name][self.measured_before.get(name, 0) :]
                if not measures[name]:
                    del measures[name]
        if not applied:
            name_skipped(self.run.step + 1, math.nan if bad_loss else loss, own_loss_is_finite=not own[0], ids=self.ids)
        counters = self.run.counters
        for name, value in {"applied": applied, "skipped": not applied}.items():
            counters[name] = counters.get(name, 0.0) + value
        self.applied = applied
        return norm

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """The measures of the held-out records."""
        self.saves.phase("validation", self.run.recipe.train.timeout_minutes)
        return super().evaluate(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint of this project; all ranks take part."""
        self.saves.start()

    def taken(self) -> TakenPreferences:
        """A copy of the run's state."""
        run, trained = self.run, self.trained_state()
        adapter = (
            adapter_snapshot(run.peft_model, state=trained, base=run.assembly.base) if distributed.is_main() else None
        )
        return TakenPreferences(
            run=run, manifest=run.manifest(trained, run.records.fingerprint), adapter=adapter,
            optimizer=OptimizerState.copy_of(self.holder), progress=copy.deepcopy(self.state),
            reference=self.reference,
        )  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights come with the optimiser's state."""

    def load_factors(self, checkpoint: Path) -> None:
        """Put the trained factors of a checkpoint in the place of those of the start."""
        peft_model, folder = self.run.peft_model, checkpoint / "adapter"
        load_adapter(peft_model, folder, trainable=True)


def _complete_reference(model: nn.Module) -> None:
    """Copy frozen factors into the reference, too: they are buffers, and TRL copies parameters."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if ".default." in name:
                model.get_buffer(name.replace(".default.", ".ref.")).copy_(buffer)


class PairTrainer(RunTrainer, DPOTrainer):
    """TRL's DPOTrainer for one run, weighted so that the loss is the mean over the step, however it is split."""

    def __init__(self, run: PreferenceRun, saves: PreferenceSaves) -> None:
        preference = run.recipe.preference
        args = DPOConfig(
            **arguments_of(run),
            beta=preference.beta,
            loss_type=list(preference.loss_type),
            loss_weights=preference.loss_weights,
            label_smoothing=preference.label_smoothing,
            max_length=None,  # the encoder bounds it
            train_sampling_strategy="random" if run.rows is None else "sequential",
        )
        super().__init__(run, saves, args=args, data_collator=PairCollator(run=run))
        self.pictures = None
        if run.rows is not None:
            self.pictures = patch_packed_forward(run.assembly.model)
            gather = partial(gather_uneven, self.accelerator.gather)
            self.accelerator.gather = gather  # type: ignore[method-assign]  # of TRL's measures
        self.given_weights = list(self.loss_weights)
        self.mean_sizes = torch.zeros(2)
        """Mean of `_sizes` over the micro-batches of the step, those of all ranks."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, whose sizes are noted."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            sizes = torch.stack([_sizes(batch["completion_mask"]) for batch in batches])
            of_all = self.accelerator.gather(sizes.to(device))
            self.mean_sizes = of_all.mean(0)
            self.run.packed_pairs = int(of_all[:, 0].sum()) if self.run.rows is not None else 0
        return batches, items

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.pictures is not None:
            self.pictures.begin_step([inputs[ROW]] * 2)  # for the policy and for the reference
        if model.training:
            pairs, tokens = (_sizes(inputs["completion_mask"]) / self.mean_sizes).tolist()
            shares = [tokens if name == "sft" else pairs for name in self.loss_types]
            self.loss_weights = [share * weight for share, weight in zip(shares, self.given_weights, strict=True)]
        else:
            self.loss_weights = self.given_weights
        return super()._compute_loss(model, inputs, return_outputs)


def _sizes(completion_mask: Tensor) -> Tensor:
    """Pairs of a micro-batch, and tokens of its chosen answers, fp64 ``[2]``."""
    chosen = completion_mask.chunk(2)[0]
    return torch.stack([chosen.new_tensor(len(chosen)), chosen[:, 1:].sum()]).double()


class JudgedTrainer(RunTrainer, KTOTrainer):
    """TRL's KTOTrainer for one run; for the arguments see `RunTrainer`."""

    def __init__(self, run: PreferenceRun, saves: PreferenceSaves) -> None:
        kto = run.recipe.kto
        args = KTOConfig(
            **arguments_of(run),
            beta=kto.beta,
            loss_type=kto.loss_type,
            desirable_weight=kto.desirable_weight,
            undesirable_weight=kto.undesirable_weight,
            train_sampling_strategy="sequential",
            max_length=None,  # the encoder bounds it
        )
        super().__init__(run, saves, args=args, data_collator=JudgedCollator(run=run))


def arguments_of(run: PreferenceRun) -> dict[str, Any]:
    """The arguments of every trainer for a recipe; optimiser and schedule are given to it, trackers get its logs."""
    train, total = run.recipe.train, run.total_steps
    vision = run.recipe.model.vision
    return {
        "output_dir": str(run.folder),
        "max_steps": total,
        "per_device_train_batch_size": train.micro_batch,
        "per_device_eval_batch_size": train.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "max_grad_norm": run.recipe.optim.max_grad_norm,
        "gradient_checkpointing": bool(train.gradient_checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": stage_of(train.zero) == 3},  # TRL's rule for ZeRO-3
        "bf16": run.precision == "bf16",
        "use_cpu": distributed.device().type != "cuda",
        "dataloader_pin_memory": distributed.device().type == "cuda",
        "seed": train.seed,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,
        "router_aux_loss_coef": 0.0,  # routers are frozen
        "save_strategy": "steps",
        "save_steps": train.save_every or total,
        "eval_strategy": "no" if run.held_out is None else "steps",
        "eval_steps": train.validate_every or total,
        "dataloader_num_workers": run.recipe.data.workers or 0,
        "remove_unused_columns": False,  # collators read numbers, not inputs of the model
        # A batch without pictures leaves the adapters of a tower without gradients.
        "ddp_find_unused_parameters": vision is not None and vision.mode == "adapter",
        "ddp_timeout": int(train.timeout_minutes * 60),
        "report_to": "none",
        "disable_tqdm": True,
        **deepspeed_arguments(run),
    }


class RunCallback(TrainerCallback):
    """Counts steps, logs to the run's trackers, and has the trainer save and stop on a signal or after `stop_at`."""

    def __init__(self, trainer: RunTrainer, session: TrlSession, *, stop_at: int | None) -> None:
        self.trainer, self.session, self.stop_at = trainer, session, stop_at
        self.run = run = trainer.run
        self.skipped = SkippedSteps(
            run.recipe.train.max_skipped_steps,
            advice="Lower optim.lr, raise beta, look at the records named above, or use fp32.",
        )
        self.progress = Progress("train", run.total_steps, initial=run.step)
        self.last_loss = math.nan
        self._clock, self._logged = time.monotonic(), self._counts()

    def _counts(self) -> tuple[float, float]:
        """Steps so far, and those that were skipped."""
        return self.run.counters.get("steps", 0.0), self.run.counters.get("skipped", 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step; the ranks agree on a signal, and on the end of a save."""
        train = self.run.recipe.train
        self.session.phase("after the step", train.step_timeout_minutes)
        counters, now = self.run.counters, time.monotonic()
        counters["steps"] = float(state.global_step)
        counters["samples"] = counters.get("samples", 0.0) + (self.run.packed_pairs or train.global_batch)
        counters["seconds"] = counters.get("seconds", 0.0) + now - self._clock
        self._clock = now
        self.skipped.count(applied=self.trainer.applied)
        if self.session.agree(self.stop_at):
            control.should_training_stop = control.should_save = True
        if control.should_training_stop or self.skipped.too_many:
            control.should_log = True
        loss = "" if math.isnan(self.last_loss) else f"loss {self.last_loss:.4f}"  # the first log may be steps away
        self.progress.update(state.global_step, loss)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand the trainer's measures to the trackers; DivergedError where too many steps in a row were skipped."""
        logs: dict[str, Any] = kwargs["logs"]
        held_out = {f"validation_{name[len(_HELD_OUT) :]}": logs[name] for name in logs if name.startswith(_HELD_OUT)}
        own = {name: value for name, value in logs.items() if not name.startswith((_HELD_OUT, _OF_SESSION))}
        if "loss" in own:
            steps, skipped = (now - before for now, before in zip(self._counts(), self._logged, strict=True))
            self._logged = self._counts()
            # The trainer divides by all steps, and skipped ones have no part in the sum.
            own["loss"] *= steps / (steps - skipped) if skipped < steps else math.nan
            self.last_loss = float(own["loss"])
            own |= {"skipped_steps": self._logged[1]} | self.trainer.saves.extra
            self.trainer.saves.extra.clear()
        if measures := held_out or (own if "loss" in own else {}):
            known = {name: float(value) for name, value in measures.items() if value is not None}
            self.session.trackers.log(known, state.global_step)
        if "loss" in own:
            self.skipped.give_up(state.global_step)
