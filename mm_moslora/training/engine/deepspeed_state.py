"""Where DeepSpeed keeps masters and moments, stage by stage, as `Piece`s; and how to make it notice new masters.

It is read from attributes that DeepSpeed does not document; what is replaced in it stands in `deepspeed_patches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.training.engine.optimizer_state import MASTER, MOMENTS, Piece, StoredState, adam_state

Named = Sequence[tuple[str, nn.Parameter]]
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def zero_pieces(engine: Any, stage: int, named: Named) -> list[Piece]:
    """The pieces that this rank holds. At stage 0 every rank holds all parameters whole.

    Args:
        engine: the DeepSpeed engine, built with torch's AdamW.
        stage: of ZeRO.
        named: trainable parameters of the engine's module.
    """
    if stage == 0:
        return list(_replicated(engine.optimizer, named))
    return list(_flat(engine.optimizer, named) if stage < 3 else _partitioned(engine.optimizer, named))


def _replicated(optimizer: Any, named: Named) -> Iterator[Piece]:
    inner, masters = optimizer, {id(parameter): parameter for _, parameter in named}
    if hasattr(optimizer, "fp32_groups"):  # half precision
        inner = optimizer.optimizer
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): master for parameter, master in zip(low, high, strict=True)}
    for name, parameter in named:
        master = masters[id(parameter)]
        state = adam_state(inner, master)
        yield Piece(
            name=name, start=0, master=master.detach().view(-1),
            moments={kind: state[kind].view(-1) for kind in MOMENTS}, step=state["step"],
        )  # fmt: skip


def _flat(optimizer: Any, named: Named) -> Iterator[Piece]:
    group_of = {id(parameter): index for index, group in enumerate(optimizer.bit16_groups) for parameter in group}
    for name, parameter in named:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # another rank's
            continue
        flat = optimizer.single_partition_of_fp32_groups[group_of[id(parameter)]]
        state, address = adam_state(optimizer.optimizer, flat), mapping.hp_fragment_address
        yield Piece(
            name=name, start=mapping.lp_fragment_address.start,
            master=flat.detach().narrow(0, address.start, address.numel),
            moments={kind: state[kind].narrow(0, address.start, address.numel) for kind in MOMENTS},
            step=state["step"],
        )  # fmt: skip


def _partitioned(optimizer: Any, named: Named) -> Iterator[Piece]:
    for name, parameter in named:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = length * optimizer._get_param_partition_rank(parameter)
        length = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the rest is padding
        if length <= 0:
            continue
        flat = optimizer.fp32_partitioned_groups_flat[group]
        state = adam_state(optimizer.optimizer, flat)
        yield Piece(
            name=name, start=start, master=flat.detach().narrow(0, offset, length),
            moments={kind: state[kind].narrow(0, offset, length) for kind in MOMENTS}, step=state["step"],
        )  # fmt: skip


@torch.no_grad()
def refresh_weights(engine: Any, stage: int, named: Named, stored: StoredState) -> None:
    """Set the weights that the forward pass uses to the masters that were just read."""
    if stage < 3:
        for name, parameter in named:
            parameter.copy_(stored.whole(MASTER, name).view_as(parameter))
        return
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    # Its own way of loading copies masters into the partitions that are gathered, wherever those live.
    optimizer._rigid_load_state_dict(optimizer._rigid_state_dict())
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


@torch.no_grad()
def clear_gradients(engine: Any, stage: int) -> None:
    """Empty the buffers that gradients are collected in, before a step.

    DeepSpeed overwrites a parameter's buffer in the first micro-batch of a step, if that uses the parameter. One that a
    step does not use at all (the projector, when no rank has a picture) would be updated with the gradient of an
    earlier step, and one that only a later micro-batch uses would add to it. Seen with 0.19 at stage 3.
    """
    optimizer = engine.optimizer
    buffers: list[Tensor | None] = []
    if stage == 3:
        buffers += [optimizer.grad_partitions_flat_buffer]
        if optimizer.offload_optimizer and not optimizer.swap_optimizer:
            buffers += [group.grad for group in optimizer.fp32_partitioned_groups_flat]
    elif stage > 0 and optimizer.cpu_offload:
        buffers += [group.grad for group in optimizer.single_partition_of_fp32_groups]
        buffers += list(getattr(optimizer, "accumulated_grads_in_cpu", {}).values())
    for buffer in buffers:
        if buffer is not None:
            buffer.zero_()


def offloads(engine: Any, stage: int) -> bool:
    """Whether gradients go to main memory, parameter by parameter, in the last micro-batch."""
    optimizer = engine.optimizer
    return bool(optimizer.offload_optimizer if stage == 3 else stage > 0 and optimizer.cpu_offload)


def scaler_of(engine: Any) -> Any:
    """DeepSpeed's loss scaler; None without scaling."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def read_scaler(engine: Any) -> dict[str, float]:
    """The state of dynamic loss scaling; empty where there is none."""
    scaler = scaler_of(engine)
    dynamic = getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))
    return {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)} if dynamic else {}


def write_scaler(engine: Any, values: dict[str, float]) -> None:
    """Set what `read_scaler` read."""
    scaler = scaler_of(engine)
    for key, value in values.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def scale_of(engine: Any) -> float:
    """The present loss scale, 1 without scaling."""
    return float(getattr(scaler_of(engine), "cur_scale", 1.0) or 1.0)


def can_lower_scale(engine: Any) -> bool:
    """Whether an overflow would lower the loss scale: it is dynamic and not yet at its minimum."""
    scaler = scaler_of(engine)
    least = getattr(scaler, "min_scale", getattr(scaler, "min_loss_scale", None))
    return bool(read_scaler(engine)) and scale_of(engine) > float(least or 1.0)


def whole_master(engine: Any, stage: int, parameter: nn.Parameter) -> Tensor | None:
    """The full fp32 master of one parameter, gathered from all ranks; None: the parameter is its own master."""
    from deepspeed.utils import safe_get_full_fp32_param

    if stage == 0 and hasattr(engine.optimizer, "fp32_groups"):
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for candidate, master in zip(low, high, strict=True):
                if candidate is parameter:
                    return master
    return safe_get_full_fp32_param(parameter)
