"""What the project replaces and corrects in a live DeepSpeed engine, and why; no upstream issue is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.utils import distributed


def restore_linear() -> None:
    """Put back `torch.nn.functional.linear`, which ZeRO-3 replaces for the process: later runs had other digits."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Replacing

    nn.functional.linear = getattr(Replacing, "linear_bk", nn.functional.linear)


@contextmanager
def without_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep DeepSpeed's half-precision optimiser of stage 0 from stepping with zero gradients when it is made."""
    # Such a step decays the weights and leaves counts at one.
    own = vars(optimizer)
    before = own.get("step")  # of DeepSpeed's AdamW for main memory it was replaced already
    own["step"] = lambda *_, **__: None
    try:
        yield
    finally:
        if before is None:
            del own["step"]
        else:
            own["step"] = before


def cpu_adam(adamw: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's compiled AdamW for main memory, with the groups and settings of torch's."""
    # It counts steps in an int, for which the state of a checkpoint has a tensor. DeepSpeed asks for the class itself,
    # so the step of the instance is replaced.
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    settings = adamw.defaults
    made: Any = DeepSpeedCPUAdam(
        adamw.param_groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"], adamw_mode=True
    )
    counted = made.step

    def step(closure: Any = None) -> Any:
        tensors = {key: state["step"] for key, state in made.state.items() if isinstance(state.get("step"), Tensor)}
        for key, tensor in tensors.items():
            made.state[key]["step"] = int(tensor)
        result = counted(closure)
        for key, state in made.state.items():
            if "step" in state:
                state["step"] = tensors.get(key, torch.tensor(0.0)).fill_(state["step"])
        return result

    made.step = step
    return made  # type: ignore[no-any-return]


def skip_at_lowest_scale(scaler: Any) -> None:
    """Skip a step that overflows at the lowest scale, too; DeepSpeed's stages 1 to 3 would end the run at the first."""
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def read_norm_once(engine: Any, stage: int) -> None:
    """Stages 1 and 2: have the host wait for the device once in a step, for the norm of the gradients."""
    # DeepSpeed (0.19.8) reads a separate check for overflow, with a collective and two kernels for every gradient, and
    # then the norm again for every group. The norm is not finite where a gradient is not, which it also checks; earlier
    # releases do not.
    from deepspeed.runtime.zero import stage_1_and_2

    optimizer = engine.optimizer
    checks_norm = hasattr(stage_1_and_2, "is_invalid_grad_norm") and getattr(optimizer, "compute_grad_norm", True)
    if stage not in (1, 2) or offloads(engine, stage) or not checks_norm:
        return
    norm = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda **options: norm(**options).cpu()
    optimizer.check_overflow = lambda **_: None


def offloads(engine: Any, stage: int) -> bool:
    """Whether gradients go to main memory, parameter by parameter, in the last micro-batch."""
    optimizer = engine.optimizer
    return bool(optimizer.offload_optimizer if stage == 3 else stage > 0 and optimizer.cpu_offload)


@torch.no_grad()
def clear_gradients(engine: Any, stage: int) -> None:
    """Empty the buffers of gradients of stage 3 and of offloading before a step."""
    # DeepSpeed overwrites a parameter's buffer in the first micro-batch of a step, if that uses the parameter. One that
    # no micro-batch uses would be updated with an earlier step's gradient, and one that only a later one uses would add
    # to it (0.19).
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


@torch.no_grad()
def shard_from_main(module: nn.Module, config: dict[str, Any], *, device: torch.device) -> None:
    """Stage 3: cut rank 0's weights up over all ranks, one after the other; parameters stay the same objects."""
    # `deepspeed.initialize` would first move the whole model to each rank's device. The conversion of one weight sends
    # rank 0's values anyway, so the other ranks may have theirs on the meta device.
    from deepspeed.runtime.zero import Init
    from deepspeed.utils import groups

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((kind for name, kind in half.items() if config.get(name, {}).get("enabled")), None)
    buffers = list(module.buffers())
    values = distributed.from_main([buffer.cpu() for buffer in buffers] if distributed.is_main() else [])
    for buffer, value in zip(buffers, values, strict=True):
        allocate(buffer, device)
        buffer.data = value.to(device)

    def arriving() -> Iterator[nn.Parameter]:
        for parameter in module.parameters():
            allocate(parameter, device)
            if dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
            yield parameter

    parameters = arriving()
    first: Any = next(parameters)
    # The ranks of a host may share a group already, of the rehearsal's engine; DeepSpeed makes it once per process.
    group = groups._get_zero_param_intra_parallel_group()
    Init(module=nn.ParameterList([first]), config_dict_or_path=config, zero_param_parallel_group=group)
    first.convert_to_zero_parameters(parameters)  # takes one when the one before is cut up


def allocate(tensor: Tensor, device: torch.device) -> None:
    """Give a tensor of the meta device memory on a device; it stays the same object."""
    if tensor.is_meta:
        empty = torch.empty_like(tensor, device=device)
        empty = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        vars(empty).update(vars(tensor))
        torch.utils.swap_tensors(tensor, empty)


def fetch_whole_layers(module: nn.Module) -> None:
    """Have ZeRO-3 fetch the weights of a decoder or tower layer, or an adapted one, for the whole layer at once."""
    # By default each is fetched for its submodule: dozens of gathers a layer, and kernels over several submodules find
    # nothing. Leaf modules reduce gradients when that of their input is ready, which a layer behind frozen embeddings
    # never gets.
    from deepspeed.runtime.zero import register_external_parameter

    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer | FusedLinear):
            for parameter in layer.parameters():
                register_external_parameter(layer, parameter)


def gather_persistent_together(engine: Any) -> None:
    """Stage 3: after a step, bring the small parameters that stay whole together, not one by one."""
    # DeepSpeed sends one gather for each, 672 in a step for the adapters of a 7B model. With `zero_hpz_partition_size`
    # it gathers them from each host's copies of before the step, which it drops only afterwards.
    persistent = engine.optimizer.persistent_parameters
    if not persistent:
        return
    one_by_one = persistent[0].all_gather

    def together(param_list: Sequence[Any] | None = None, **options: Any) -> Any:
        if param_list is None or options:
            return one_by_one(param_list, **options)
        engine.optimizer.invalidate_secondary_tensor()
        absent = [parameter for parameter in param_list if parameter.ds_status.name == "NOT_AVAILABLE"]
        for copied in (False, True):  # one gather takes either shards or copies of the host
            some = [parameter for parameter in absent if (parameter.ds_secondary_tensor is not None) == copied]
            if some:
                some[0].all_gather_coalesced(some).wait()
        return None

    persistent[0].all_gather = together


@contextmanager
def whole(engine: Any, module: nn.Module) -> Iterator[None]:
    """Stage 3 with all weights gathered once, and without the hooks that would let them go after each layer."""
    # A forward pass in here, such as each token of an answer, moves no bytes between ranks and needs no other rank.
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
    persistent = engine.optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)


@torch.no_grad()
def reload_masters(engine: Any) -> None:
    """Stage 3: set the weights that the forward pass gathers to the masters, which have just been read."""
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    # Its own way of loading copies masters into the partitions that are gathered, wherever those live.
    optimizer._rigid_load_state_dict(optimizer._rigid_state_dict())
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
