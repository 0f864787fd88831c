"""Engines: one optimiser step over a list of micro-batches, on DeepSpeed or on plain torch, behind one interface.

Both take the loss as a sum over supervised tokens divided by the global count of the step, so the same recipe gives the
same numbers on either, and for every split into ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora.config import TrainConfig
from mm_moslora.errors import ConfigError, MoSLoRAError
from mm_moslora.folders import shipped_folder
from mm_moslora.requirements import install_command
from mm_moslora.training.engine.base import Engine, LossModule, StepResult
from mm_moslora.training.engine.plain import TorchEngine
from mm_moslora.training.engine.settings import deepspeed_config, largest_adapter, prepare_deepspeed
from mm_moslora.training.engine.zero import DeepSpeedEngine
from mm_moslora.training.optim import OptimizerSettings, ParameterGroup

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "LossModule",
    "OptimizerSettings",
    "StepResult",
    "TorchEngine",
    "build_engine",
    "deepspeed_config",
    "largest_adapter",
    "prepare_deepspeed",
]


def build_engine(
    module: LossModule,
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    *,
    precision: str,
    optimizer: OptimizerSettings,
) -> Engine:
    """The engine that `train.zero` asks for.

    Args:
        module: on the CPU.
        groups: from `parameter_groups`.
        train: the recipe's `train`.
        precision: resolved.
        optimizer: AdamW's settings.
    """
    if train.zero == "none":
        if precision == "fp16":
            raise ConfigError(
                "train.precision is fp16, whose loss must be scaled; plain torch (train.zero none) does not do that. "
                "Choose bf16 or fp32, or zero0 to zero3."
            )
        return TorchEngine(module, groups, optimizer)
    try:
        prepare_deepspeed()
    except ImportError as error:
        raise ConfigError(
            f"train.zero is {train.zero!r}, but deepspeed does not import ({error}). Install it "
            f"({install_command('deepspeed')}), or run one process with train.zero none."
        ) from error
    config = deepspeed_config(train, precision, optimizer.max_grad_norm, largest_adapter=largest_adapter(groups))
    try:
        return DeepSpeedEngine(module, groups, optimizer, config)
    except Exception as error:
        lost = isinstance(error, MoSLoRAError | RuntimeError | OSError)  # ours, a rank's or the machine's
        if lost or not train.zero.endswith(".json"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"DeepSpeed refuses train.zero {train.zero}: {' '.join(line.strip() for line in lines[:3])}. "
            f"{shipped_folder('deepspeed_configs')} has files to begin with."
        ) from error
