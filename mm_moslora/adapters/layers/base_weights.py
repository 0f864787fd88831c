"""Base weights: plain ones, and quantised ones that are made dense for the length of one product.

Shapes: x ``[..., D_in]``, W ``[D_out, D_in]``.

`weight_of` gives what a linear layer multiplies with, or None where the product is not all that the layer would
compute. A quantised weight is read with its library's own function, into the dtype that the library computes in, once
forward and once backward; nothing dense is kept in between.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mm_moslora.adapters.layers.sharded_weights import only_fetches
from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.kernels.lora.lora_matmul import Packed, is_plain

Quantisation = Literal["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"]

# By name: none of the libraries is imported unless a model already uses it.
_BNB: dict[str, Quantisation] = {"Linear4bit": "bitsandbytes 4-bit", "Linear8bitLt": "bitsandbytes 8-bit"}
_AUTOCASTS = (torch.float32, torch.bfloat16, torch.float16)


def quantisation(base: nn.Module) -> Quantisation | None:
    """How a linear layer's weight is quantised; None if it is not, or in a way that is not supported."""
    for kind in type(base).__mro__:
        if kind.__module__.partition(".")[0] == "bitsandbytes" and kind.__name__ in _BNB:
            return _BNB[kind.__name__]
    if not isinstance(base, nn.Linear):
        return None
    weight = type(base.weight)
    is_int8 = weight.__module__.partition(".")[0] == "torchao" and weight.__name__ == "Int8Tensor"
    return "torchao int8" if is_int8 else None


def weight_of(base: nn.Module, x: Tensor) -> Tensor | Packed | None:
    """What a linear layer multiplies x with; None where that product is not all that the layer would compute.

    Args:
        base: the layer, without adapters. Weights that train are not for the fused kernel.
        x: its input, ``[..., D_in]``.
    """
    # Hooks and replaced forwards (offloading, tensor parallelism) only run when the base is called as a module.
    if "forward" in base.__dict__ or torch.compiler.is_compiling() or not only_fetches(base):
        return None
    weight = base.weight if type(base).forward is nn.Linear.forward else None
    if not is_plain(weight):
        return _packed_weight(base, x)
    assert isinstance(weight, Tensor)
    if weight.requires_grad:
        return None
    if autocasts(x.device):
        return weight if x.dtype in _AUTOCASTS and weight.dtype in _AUTOCASTS else None
    return weight if weight.dtype == x.dtype else None


def _packed_weight(base: nn.Module, x: Tensor) -> Packed | None:
    """The library's own layer computes evaluation: it has kernels for single tokens."""
    kind = quantisation(base)
    if kind is None or not learns_through(base, x):
        return None
    if kind == "bitsandbytes 4-bit":
        return _four_bit(base, x)
    # LLM.int8 rounds its input to 8 bits, too; no product with a dense weight is that.
    return _int8(base, x) if kind == "torchao int8" else None


def learns_through(layer: nn.Module, x: Tensor) -> bool:
    """Whether a gradient may go through a layer to x, or a pass is the first of two of gradient checkpointing."""
    return layer.training or (x.requires_grad and torch.is_grad_enabled())


@dataclass(frozen=True, slots=True)
class _FourBit:
    """The weight of a `bitsandbytes.nn.Linear4bit`."""

    weight: Any

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[D_out, D_in]``, scaled in float32 and rounded once, as in bitsandbytes' forward pass."""
        from bitsandbytes.functional import dequantize_4bit

        state = self.weight.quant_state
        if state.dtype != dtype:
            state = copy.copy(state)
            state.dtype = dtype
        return dequantize_4bit(self.weight.detach().view(-1, 1), state)


def _four_bit(base: Any, x: Tensor) -> _FourBit | None:
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
    return _FourBit(weight)


def unpack(weight: Any) -> None:
    """Undo the layout that bitsandbytes gives a 4-bit weight at the first evaluation on a CPU.

    Its kernel for that layout has no gradient, so that nothing would learn through the layer, and PEFT reads it as the
    usual layout: a merge was off by 28 % of the output's range, without a word. Its scales stay rounded to bfloat16.

    Args:
        weight: `Params4bit`; changed in place.
    """
    state = getattr(weight, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes import functional

        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)


def stop_repacking(model: nn.Module) -> None:
    """Have evaluations on a CPU leave 4-bit weights in the layout, and with the values, that training reads.

    Args:
        model: that is going to train; changed in place.
    """
    for module in model.modules():
        if quantisation(module) == "bitsandbytes 4-bit":
            unpack(module.weight)
            cast(Any, module).support_avx512bf16_for_cpu = False


@dataclass(frozen=True, slots=True)
class _Int8:
    """torchao's `Int8Tensor`."""

    weight: Any

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[D_out, D_in]``, scaled in float32; torchao scales the product, and keeps a dense copy for its backward."""
        return cast(Tensor, self.weight.dequantize(dtype))


def _int8(base: Any, x: Tensor) -> _Int8 | None:
    weight = base.weight
    only_weight = weight.act_quant_kwargs is None and weight.act_pre_scale is None
    if type(base).forward is not nn.Linear.forward or not only_weight or weight.requires_grad or autocasts(x.device):
        return None
    return _Int8(weight) if x.dtype == weight.dtype else None
