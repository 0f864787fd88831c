"""For Hugging Face's `Trainer` and TRL's: mixers outside of weight decay, and a callback that logs their figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from mm_moslora.adapters.adapter_inspection import inspect_model, summary
from mm_moslora.adapters.folder_format import MIXER_PART
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError

if TYPE_CHECKING:  # the trainer brings datasets and pandas: a second
    from transformers import Trainer, TrainingArguments


def spare_mixers_from_decay(trainer: Trainer) -> None:
    """Leave mixers out of a trainer's weight decay, as `mm-moslora train` does. Call it before `train`, also to resume.

    Decay shrinks a mixer from a start that is not zero. The trainer decays every parameter but biases and norms, which
    it knows by name and type; its `get_decay_parameter_names` is replaced on this one trainer.

    Args:
        trainer: before its optimiser exists.

    Raises:
        AdapterError: it has an optimiser, whose groups are fixed.
    """
    if trainer.optimizer is not None:
        raise AdapterError(
            "The trainer has its optimiser already, and with it the parameters that decay. Call "
            "spare_mixers_from_decay before train; in an optimiser of your own give the parameters with lora_mixer in "
            "their names a weight_decay of 0."
        )
    decayed = trainer.get_decay_parameter_names
    trainer.get_decay_parameter_names = lambda model: [  # type: ignore[method-assign]
        name for name in decayed(model) if MIXER_PART not in f".{name}"
    ]


class MixerCallback(TrainerCallback):
    """Log means over the adapted modules (`mixer/...`, see `adapter_inspection.summary`) during training.

    ::

        trainer = Trainer(model=add_moslora(model, config), ...)
        trainer.add_callback(MixerCallback(trainer, every=50))

    The statistics go through `trainer.log`: into `state.log_history`, and to every tracker in `report_to`. Under ZeRO-3
    the factors are gathered first; a model sharded by FSDP is refused when training begins.
    """

    def __init__(self, trainer: Trainer, *, every: int | None = None, adapter_name: str = "default") -> None:
        """Log at an interval of optimiser steps, and after the last one.

        Args:
            trainer: the trainer it is added to (TRL's are trainers, too).
            every: optimiser steps from one log to the next; None takes the trainer's `logging_steps`.

        Raises:
            AdapterError: `every` below 1.
        """
        if every is not None and every < 1:
            raise AdapterError(f"every is {every}, expected at least 1 optimiser step between two logs.")
        self.trainer = trainer
        self.every = every
        self.adapter_name = adapter_name
        self._logged = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model without mixers before training starts."""
        model: nn.Module = kwargs["model"]
        layers = [layer for _, layer in named_adapter_layers(model) if layer.holds(self.adapter_name)]
        if not layers:
            raise AdapterError(f"The model has no adapter {self.adapter_name!r} with mixers to log.")
        if any(type(factor).__name__ == "DTensor" for layer in layers for factor in layer.parameters()):
            raise AdapterError(
                "The model is sharded by FSDP, and the mixers' figures need whole factors. Use DeepSpeed."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log where it is due."""
        # A `logging_steps` below 1 is a share of the whole; the trainer has made it steps by now.
        every = self.every or max(1, state.logging_steps)
        if state.global_step % every == 0:
            self._log(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the end."""
        if self._logged != state.global_step:
            self._log(kwargs["model"], state.global_step)

    def _log(self, model: nn.Module, step: int) -> None:
        # Under ZeRO-3 every rank must take part; without it nothing happens.
        layers = [cast(nn.Module, layer) for _, layer in named_adapter_layers(model)]
        factors = [p for layer in layers for name, p in layer.named_parameters() if "lora_" in name]
        with gather_params_ctx(factors, modifier_rank=None):
            figures = summary(inspect_model(model, adapter_name=self.adapter_name))
        # A singular mixer has no condition number, and trackers take no infinity.
        self.trainer.log({name: value for name, value in figures.items() if math.isfinite(value)})
        self._logged = step
