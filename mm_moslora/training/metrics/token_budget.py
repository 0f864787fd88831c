"""The token budget of a run's micro-batches: `train.micro_tokens`, or on a GPU the tokens that surely fit."""

from __future__ import annotations

import logging
from dataclasses import fields

import torch

from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.models.precision import dtype_of
from mm_moslora.training.deepspeed_presets import stage_of
from mm_moslora.training.metrics.activation_memory import activation_memory
from mm_moslora.training.metrics.gpu_memory import FREE_SHARE, GIB, StepMemory
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import TrainingError, reason_of

logger = logging.getLogger(__name__)


def token_budget(recipe: Recipe, model: ModelConfig, *, precision: str) -> int | None:
    """Most tokens of a micro-batch of one rank; all ranks call it before the model is loaded, and get the same.

    Returns:
        None: any number, on a CPU and for models that cannot be built on the meta device.

    Raises:
        TrainingError: the longest example, or a validation that generates, does not fit on the smallest GPU of the run.
        DistributedError: the same on another rank.
    """
    device = distributed.device()
    generates = bool(recipe.validate.samples or recipe.validate.tasks) and stage_of(recipe.train.zero) == 3
    if device.type != "cuda" or (recipe.train.micro_tokens is not None and not generates):
        return recipe.train.micro_tokens
    # The total, not what is free: a resumed run must cut its steps as before.
    (smallest,) = distributed.max_over_ranks([-float(torch.cuda.get_device_properties(device).total_memory)])
    budget = None
    with distributed.failing_together("Estimating the memory of a step"):
        if distributed.is_main():
            budget = _that_fits(recipe, model, precision, capacity=-smallest, generates=generates)
    return distributed.from_main(budget)


def _that_fits(recipe: Recipe, model: ModelConfig, precision: str, *, capacity: float, generates: bool) -> int | None:
    train, longest = recipe.train, recipe.data.longest
    try:
        with torch.random.fork_rng(devices=[]):
            size = activation_memory(
                model, recipe.adapter, vision_checkpointing=train.vision_gradient_checkpointing,
                dtype=dtype_of(precision),
            )  # fmt: skip
    except Exception as error:  # loading says what is wrong with the model, if anything is
        logger.warning(
            "The memory of a step cannot be estimated (%s), so micro-batches have any number of tokens. Set "
            "train.micro_tokens.",
            reason_of(error),
        )
        return train.micro_tokens
    step = StepMemory(
        size=size, zero=train.zero, world=distributed.world_size(), on_host=distributed.ranks_of_host(),
        checkpointing=train.gradient_checkpointing, offload=train.activation_offload, together=train.sequence_parallel,
        optimizer=recipe.optim.optimizer,
    )  # fmt: skip
    if generates and (reason := step.cannot_generate(capacity)):
        raise TrainingError(reason)
    budget = train.micro_tokens or step.token_budget(capacity, longest=longest)
    if not budget:
        needed = step.worst(longest)
        parts = {item.name: getattr(needed, item.name) / GIB for item in fields(needed)}
        table = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= 0.05)
        raise TrainingError(
            f"{recipe.data.longest_key} is {longest}, and one forward and backward pass of so many tokens takes about "
            f"{needed.total / GIB:.1f} GiB ({table}); the smallest GPU of this run has {capacity / GIB:.1f} GiB, of "
            f"which {FREE_SHARE:.0%} can be used. To make it fit, "
            f"{step.remedies(capacity, longest=longest, key=recipe.data.longest_key)}. train.micro_tokens {longest} "
            "leaves this check out."
        )
    logger.info(
        "A micro-batch has at most %d tokens: with them a step takes about %.1f of %.1f GiB (train.micro_tokens).",
        budget, step.worst(budget).total / GIB, capacity / GIB,
    )  # fmt: skip
    return budget
