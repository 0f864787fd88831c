"""Engines: one optimiser step over a list of micro-batches, on DeepSpeed or on plain torch, behind one interface.

Both take the loss as a sum over supervised tokens divided by the global count of the step, so the same recipe gives the
same numbers on either, and for every split into ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_moslora.config import TrainConfig
from mm_moslora.models.vlm import LossModule
from mm_moslora.training.deepspeed_presets import stage_of
from mm_moslora.training.engine.deepspeed_engine import DeepSpeedEngine
from mm_moslora.training.engine.deepspeed_settings import (
    check_operators,
    check_settings,
    deepspeed_config,
    deepspeed_refuses,
    import_deepspeed,
    largest_adapter,
    prepare_deepspeed,
)
from mm_moslora.training.engine.engine_base import TrainingEngine
from mm_moslora.training.engine.optimizers import ParameterShard
from mm_moslora.training.engine.step_result import StepResult
from mm_moslora.training.engine.torch_engine import TorchEngine
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, MoSLoRAError

__all__ = [
    "LossModule", "OptimizerSettings", "ParameterShard", "StepResult", "TorchEngine", "TrainingEngine",
    "largest_adapter",
]  # fmt: skip


def check_engine(train: TrainConfig, *, precision: str, max_grad_norm: float) -> None:
    """Check the settings of the engine that `train.zero` names, before a model is loaded.

    Raises:
        ConfigError: DeepSpeed is missing, or it refuses the settings or the precision, or the ranks cannot be grouped.
    """
    refuse_ranks(train, distributed.world_size())
    if train.zero == "none":
        return
    config = check_file(train, precision=precision, max_grad_norm=max_grad_norm)
    import_deepspeed(train.zero)
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    able = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in able and not able[precision]():
        raise ConfigError(
            f"train.precision is {train.precision} ({precision}), which DeepSpeed does not compute in on this machine "
            f"({accelerator.device_name()}). Choose another, or auto."
        )
    check_operators(config, train.zero)


def check_file(train: TrainConfig, *, precision: str, max_grad_norm: float, trains_here: bool = True) -> dict[str, Any]:
    """Check and return DeepSpeed's settings that `train.zero` names, as far as they do not depend on the machine.

    Raises:
        ConfigError: DeepSpeed refuses a file, or it is missing.
    """
    config = deepspeed_config(train, precision, max_grad_norm, trains_here=trains_here)
    if train.zero.endswith(".json"):
        import_deepspeed(train.zero)
        check_settings(config, train.zero)
    return config


def refuse_ranks(train: TrainConfig, world: int) -> None:
    """Refuse a number of ranks on which an engine does not run: plain torch on several, or a number that
    `train.sequence_parallel` does not divide. `train.zero` is the preset that `auto` chooses."""
    if train.zero == "none" and world > 1:
        raise ConfigError(
            f"train.zero is none on {world} ranks; plain torch runs one process. Leave train.zero out, choose zero0 to "
            "zero3, or start a single process."
        )
    if world % train.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel is {train.sequence_parallel}, which does not divide the {world} ranks of this "
            "run. Choose a divisor of their number."
        )


def weights_device(train: TrainConfig, *, quantised: bool) -> torch.device | None:
    """Where this rank reads frozen and initial weights to; None: main memory.

    Below ZeRO-3 that is the device that trains. Under ZeRO-3 rank 0 reads them into main memory, and the engine sends
    every rank its shard, so the other ranks read none; a `quantised` base every rank packs by itself while it is read.
    """
    device = distributed.device()
    if stage_of(train.zero) < 3 or quantised:
        return None if device.type == "cpu" else device
    return None if distributed.is_main() else torch.device("meta")


def build_engine(
    module: LossModule,
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    *,
    precision: str,
    optimizer: OptimizerSettings,
) -> TrainingEngine:
    """The engine that `train.zero` names; the module is on the CPU or the device that trains, see `weights_device` for
    ZeRO-3."""
    if train.zero == "none":
        return TorchEngine(module, groups, optimizer)
    prepare_deepspeed(train.zero)
    config = deepspeed_config(train, precision, optimizer.max_grad_norm, largest_adapter=largest_adapter(groups))
    try:
        return DeepSpeedEngine(module, groups, optimizer, config)
    except Exception as error:
        lost = isinstance(error, MoSLoRAError | RuntimeError | OSError)  # of this project, of a rank or of the machine
        if lost or not train.zero.endswith(".json"):
            raise
        raise deepspeed_refuses(train.zero, error) from error
