"""A Trainer on the DeepSpeed engine of training, which prepares the model, and reads and writes the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from mm_moslora.adapters.folders.load_folder import restore_mixers
from mm_moslora.preferences.preference_setup import PreferenceRun
from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder, read_manifest
from mm_moslora.training.engine import LossModule, OptimizerSettings, ParameterShard, TrainingEngine, largest_adapter
from mm_moslora.training.engine.deepspeed_engine import DeepSpeedEngine
from mm_moslora.training.engine.deepspeed_patches import clear_gradients
from mm_moslora.training.engine.deepspeed_settings import deepspeed_config
from mm_moslora.training.engine.engine_base import MODEL
from mm_moslora.training.parameter_groups import ParameterGroup, parameter_groups
from mm_moslora.training.resume import load_optimizer
from mm_moslora.utils import distributed


def trained_groups(run: PreferenceRun) -> list[ParameterGroup]:
    """What trains, by the names that states of optimisers have in checkpoints."""
    return parameter_groups(nn.ModuleDict({MODEL.removesuffix("."): run.assembly.model}), run.recipe.optim)


def deepspeed_arguments(run: PreferenceRun) -> dict[str, Any]:
    """The arguments of a Trainer for `train.zero`; empty where adapters train data-parallel."""
    train = run.recipe.train
    if not run.sharded:
        return {}
    config = deepspeed_config(
        train, run.precision, run.recipe.optim.max_grad_norm, largest_adapter=largest_adapter(trained_groups(run))
    )
    return {"deepspeed": config | {"train_micro_batch_size_per_gpu": train.micro_batch}}


class _WholeState:
    """The state of an optimiser that steps the parameters themselves, whole on every rank, as an engine gives it."""

    replicated = True

    def __init__(self, groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer) -> None:
        self.groups, self.optimizer = groups, optimizer

    def shards(self) -> list[ParameterShard]:
        """See `TrainingEngine.shards`."""
        named = [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]
        return [ParameterShard.of(name, self.optimizer, parameter) for name, parameter in named]

    def scaler_state(self) -> dict[str, float]:
        """See `TrainingEngine.scaler_state`."""
        return {}

    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """See `TrainingEngine.refresh`; the masters are the parameters."""


class ZeroTrainer(Trainer):
    """A trainer with the project's optimiser and its state, on the stages of `train.zero` or data-parallel."""

    run: PreferenceRun
    engine: DeepSpeedEngine | None = None
    """Prepared by `train`."""
    schedule: Callable[[torch.optim.Optimizer], LambdaLR]
    stepping: torch.optim.Optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; it would warn that DeepSpeed has another accumulation, and take DeepSpeed's."""
        super().create_accelerator_and_postprocess()
        if self.run.sharded:
            self.accelerator.gradient_accumulation_steps = self.run.accumulation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the run, which DeepSpeed takes over."""
        self.optimizer = self.stepping
        return self.stepping

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the run."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self.schedule(self.stepping)
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The model and the batches, ready; and the state of a checkpoint in DeepSpeed's optimiser."""
        prepare = super()._prepare_for_training
        if not self.run.sharded:
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        prepared: list[Any] = []

        def initialise(optimizer: torch.optim.Optimizer) -> Any:
            self.stepping = optimizer
            prepared.extend(prepare(max_steps, train_dataloader, None))
            return self.model_wrapped

        settings = OptimizerSettings.of(self.run.recipe.optim)
        # The trainer takes the steps; those of `DeepSpeedEngine` would need a `LossModule`.
        module, config = cast(LossModule, self.run.peft_model), cast(dict[str, Any], self.args.deepspeed)
        self.engine = DeepSpeedEngine(module, trained_groups(self.run), settings, config, initialise=initialise)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return tuple(prepared)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The state of a checkpoint, which any number of ranks on any stage wrote."""
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, state: Path) -> None:
        checkpoint = state.parents[1]
        ranks = read_manifest(checkpoint, verify=False).world_size
        load_optimizer(self.holder, [rank_folder(checkpoint, rank) for rank in range(ranks)])
        restore_mixers(self.run.peft_model, checkpoint / "adapter")
        assert self.lr_scheduler is not None
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.stepping.param_groups, rates, strict=True):  # a schedule sets them when it steps
            group["lr"] = rate

    @property
    def holder(self) -> TrainingEngine:
        """What holds the optimiser's state."""
        return self.engine or cast(TrainingEngine, _WholeState(trained_groups(self.run), self.stepping))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step."""
        if self.engine is not None:
            clear_gradients(self.engine.engine, self.engine.stage)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """A context in which the model runs on every rank without the others."""
        vision = self.run.vision
        with (
            nullcontext() if self.engine is None else self.engine.gathered(),
            nullcontext() if vision is None else vision.apart(),
        ):
            yield

    def trained_state(self) -> dict[str, Tensor]:
        """Copies of what trains, in full, by their names in the model; all ranks take part, and rank 0 gets them."""
        if self.engine is not None:
            return self.engine.trainable_state(keep=distributed.is_main())
        device = "cpu" if distributed.is_main() else "meta"
        return {
            name: parameter.detach().to(device, copy=True)
            for name, parameter in self.run.assembly.model.named_parameters()
            if parameter.requires_grad
        }

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        if self.engine is not None:
            self.engine.close()
