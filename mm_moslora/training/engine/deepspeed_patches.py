"""What the project replaces in a live DeepSpeed engine, and why; `deepspeed_state` reads what it keeps.

No upstream issue is known for any of it. The tests (`tests/training/test_deepspeed_patches.py`) fail when an installed
release changes what a patch stands on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm_moslora.training.engine.deepspeed_state import scaler_of


def skip_shared_memory_operator() -> None:
    """On CPUs: leave out an operator that only inference uses; it builds for minutes, and not at all without ninja."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@torch.no_grad()
def undo_warm_up_step(engine: Any) -> None:
    """DeepSpeed's half-precision optimiser of stage 0 takes one AdamW step with zero gradients when it is made.

    That step decays the weights and leaves Adam's step count at one; without it, stage 0 gives the numbers of the
    other stages.
    """
    wrapper = engine.optimizer
    for masters, weights in zip(getattr(wrapper, "fp32_groups", ()), getattr(wrapper, "fp16_groups", ()), strict=True):
        wrapper.optimizer.state.clear()
        for master, weight in zip(masters, weights, strict=True):
            master.copy_(weight)


def leave_lowest_scale_to_us(engine: Any) -> None:
    """Skip a step that overflows at the lowest scale, too; DeepSpeed's stages 1 to 3 would end the run at the first."""
    scaler = scaler_of(engine)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def gather_persistent_together(engine: Any) -> None:
    """Stage 3: after a step, bring the small parameters that stay whole together, not one by one.

    DeepSpeed sends one gather for each, 672 in a step for the adapters of a 7B model.
    """
    kept = engine.optimizer.persistent_parameters
    if not kept:
        return
    one_by_one = kept[0].all_gather

    def together(param_list: Sequence[Any] | None = None, **options: Any) -> Any:
        if param_list is None or options:
            return one_by_one(param_list, **options)
        absent = [parameter for parameter in param_list if parameter.ds_status.name == "NOT_AVAILABLE"]
        if absent:
            absent[0].all_gather_coalesced(absent).wait()
        return None

    kept[0].all_gather = together


@contextmanager
def whole(engine: Any, module: nn.Module) -> Iterator[None]:
    """Stage 3 with all weights gathered once, and with the hooks taken off that would let them go after each layer.

    A forward pass in here, such as each token of an answer, moves no bytes between ranks and needs no other rank. The
    small weights that stay whole during training are whole again afterwards.
    """
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    tables = {id(table): table for handle in handles if (table := handle.hooks_dict_ref()) is not None}
    before = [(table, dict(table)) for table in tables.values()]
    with GatheredParameters(list(module.parameters())):
        for handle in handles:
            (handle.hooks_dict_ref() or {}).pop(handle.id, None)
        try:
            yield
        finally:
            for table, hooks in before:  # in the order in which they were
                table.clear()
                table.update(hooks)
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)
