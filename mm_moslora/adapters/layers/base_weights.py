"""Base weights: plain ones, and quantised ones that are dequantised for one product.

Shapes: x ``[..., D_in]``, W ``[D_out, D_in]``.

DeepSpeed gathers a parameter when its module is called. A kernel that reads weights without calling their modules needs
them registered as external parameters. A quantised weight is dequantised into the dtype that its library computes in,
once forward and once backward; no dense weight is kept in between.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_moslora.kernels.lora.lora_linear import Packed, is_plain
from mm_moslora.kernels.lora.lora_math import autocasts


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


Quantisation = Literal["bitsandbytes 4-bit", "bitsandbytes 8-bit"]

# By name: the libraries are imported only by models that use them.
_BNB: dict[str, Quantisation] = {"Linear4bit": "bitsandbytes 4-bit", "Linear8bitLt": "bitsandbytes 8-bit"}
_AUTOCASTS = (torch.float32, torch.bfloat16, torch.float16)


def quantisation(base: nn.Module) -> Quantisation | None:
    """The quantisation of a linear layer's weight; None: none, or one that is not supported."""
    for kind in type(base).__mro__:
        if kind.__module__.partition(".")[0] == "bitsandbytes" and kind.__name__ in _BNB:
            return _BNB[kind.__name__]
    return None


def weight_of(base: nn.Module, x: Tensor) -> Tensor | Packed | None:
    """The weight that a linear layer multiplies x with; None where the layer computes more."""
    # Hooks and replaced forward methods (offloading, tensor parallelism) run only when the base is called as a module.
    if "forward" in base.__dict__ or torch.compiler.is_compiling() or not only_fetches(base):
        return None
    weight = base.weight if type(base).forward is nn.Linear.forward else None
    if not is_plain(weight):
        return _packed_weight(base, x)
    assert isinstance(weight, Tensor)
    if autocasts(x.device):
        return weight if x.dtype in _AUTOCASTS and weight.dtype in _AUTOCASTS else None
    return weight if weight.dtype == x.dtype else None


def _packed_weight(base: nn.Module, x: Tensor) -> Packed | None:
    """The weight of a quantised layer that learns; None in evaluation, which the library's own kernels do faster."""
    # LLM.int8 rounds its input to 8 bits as well; a product with a dense weight does not.
    four_bit = quantisation(base) == "bitsandbytes 4-bit"
    return _four_bit(base, x) if four_bit and learns_through(base, x) else None


def learns_through(layer: nn.Module, x: Tensor) -> bool:
    """Whether a gradient may flow through a layer to x, now or in the second pass of gradient checkpointing."""
    return layer.training or (x.requires_grad and torch.is_grad_enabled())


def _dense_four_bit(weight: Any, dtype: torch.dtype) -> Tensor:
    """``[D_out, D_in]``, scaled in float32 and rounded once, as in bitsandbytes' forward pass."""
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    return dequantize_4bit(weight.detach().view(-1, 1), state)


def _four_bit(base: Any, x: Tensor) -> Packed | None:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    weight = base.weight
    if type(base).forward is not Linear4bit.forward or type(weight) is not Params4bit:
        return None
    state = weight.quant_state
    if weight.requires_grad or state is None or tuple(state.shape) != (base.out_features, base.in_features):
        return None
    if not base.compute_type_is_set:  # what the layer's first call does
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype = base.compute_dtype or x.dtype
    if autocasts(x.device):
        if dtype != torch.get_autocast_dtype(x.device.type) or x.dtype not in (dtype, torch.float32):
            return None
    elif x.dtype != dtype:
        return None
    unpack(weight)
    return partial(_dense_four_bit, weight)


def unpack(weight: Any) -> None:
    """Undo, in place, the layout that bitsandbytes gives a 4-bit weight at the first evaluation on a CPU."""
    # Its kernel has no gradient. PEFT reads it as the usual layout, which makes a merge wrong by 28 % of the output's
    # range. The scales stay rounded to bfloat16.
    state = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes import functional

        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)


def stop_repacking(model: nn.Module) -> None:
    """Keep the layout and the values of 4-bit weights in evaluations on a CPU, so that training can read them."""
    for module in model.modules():
        if quantisation(module) == "bitsandbytes 4-bit":
            unpack(module.weight)
            cast(Any, module).support_avx512bf16_for_cpu = False
