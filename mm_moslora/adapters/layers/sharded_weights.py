"""Sharded and offloaded weights: whether a module's weights are whole while it computes, and a tensor holds values.

DeepSpeed gathers a parameter when its module is called. A kernel that reads weights without calling their modules needs
them registered as external parameters.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def fetches_whole(module: nn.Module) -> bool:
    """Whether all weights below a module are whole, now and in the module's backward pass."""
    fetched = getattr(module, "_external_params", {})
    shards = (parameter for parameter in module.parameters() if hasattr(parameter, "ds_id"))
    return all(id(shard) in fetched and cast(Any, shard).ds_status.name == "AVAILABLE" for shard in shards)


def only_fetches(module: nn.Module) -> bool:
    """Whether every hook of a module is one of DeepSpeed's that gather weights; True without hooks."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    if hooks and not any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
        return False
    return all(str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks)


def why_not_whole(tensor: Tensor) -> str | None:
    """Why a tensor does not hold all its values here; None: it does."""
    if tensor.is_meta:
        return (
            "is on the meta device and holds no values. Load the model before saving or merging it; what accelerate "
            "has offloaded comes back with accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    if isinstance(tensor, DTensor):
        return (
            "is a shard (FSDP, tensor parallelism). Gather all on all ranks (get_model_state_dict of torch.distributed."
            "checkpoint.state_dict, with full_state_dict=True), and pass that as state to save_adapter (as "
            "state_dict to save_pretrained)."
        )
    return None
