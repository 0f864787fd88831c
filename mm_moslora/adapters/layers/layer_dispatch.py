"""The adapted layer for a module, by its type.

`create_layer` is the only entrance: PEFT's dispatch would silently put plain LoRA on a quantised layer, whose class
takes every variant that it does not know for plain LoRA.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.layers.base_weights import quantisation
from mm_moslora.adapters.layers.fused_linear import MoSLoRALinear
from mm_moslora.adapters.layers.other_layer_types import MoSLoRAConv2d, MoSLoRAEmbedding
from mm_moslora.kernels.lora.lora_linear import is_plain
from mm_moslora.utils.errors import AdapterError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def create_layer(target: nn.Module, adapter_name: str, *, config: AdapterOptions, **kwargs: Any) -> nn.Module:
    """The adapted layer around `target`; PEFT calls this for every module it replaces."""
    path = kwargs.get("target_name", "")
    kwargs.pop("parameter_name", None)
    if getattr(config, "target_modules_to_tie", None) and not config.is_plain(path):
        raise AdapterError(
            "ensure_weight_tying with the embedding among the targets: the tied head would need the embedding's mixer "
            "transposed, and stock PEFT could not read the folder. Leave the embedding out of the targets, or train it "
            "whole (modules_to_save)."
        )
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    reason = why_not_adaptable(base)
    if reason:
        raise AdapterError(f"{path or type(base).__name__} cannot carry MoSLoRA: {reason}")
    is_conv1d = isinstance(base, Conv1D)
    # Per layer, not in the user's configuration: one model may hold both layouts.
    own: Any = copy.copy(config)
    own.fan_in_fan_out, own.module_path = is_conv1d, path
    kind = quantisation(base)
    if kind is not None:
        from mm_moslora.adapters.layers import bitsandbytes_layers as layers

        layer = layers.MoSLoRALinear4bit if kind == "bitsandbytes 4-bit" else layers.MoSLoRALinear8bit
        return layer(target, adapter_name, config=own, **kwargs)
    if isinstance(base, nn.Embedding):
        return MoSLoRAEmbedding(target, adapter_name, config=own, **kwargs)
    if isinstance(base, nn.Conv2d):
        return MoSLoRAConv2d(target, adapter_name, config=own, **kwargs)
    return MoSLoRALinear(target, adapter_name, config=own, is_target_conv_1d_layer=is_conv1d, **kwargs)


def why_not_adaptable(base: nn.Module) -> str | None:
    """Why a module cannot be adapted, None if it can."""
    if hasattr(base, "_hf_hook") and any(parameter.is_meta for parameter in base.parameters()):
        return (
            "accelerate has offloaded its weights (they are on the meta device), and factors beside them would get no "
            "values. Add or load the adapter first, and offload the model with it (accelerate.dispatch_model)."
        )
    if quantisation(base):
        return None
    if isinstance(base, nn.Conv2d):
        return _why_not_convolution(base)
    if isinstance(base, nn.Embedding) and type(base).forward is not nn.Embedding.forward:
        return _why_not_embedding(base)
    if not isinstance(base, nn.Linear | Conv1D | nn.Embedding):
        return (
            f"it is {type(base).__module__}.{type(base).__name__}, expected Linear, Embedding or Conv2d of "
            "torch.nn, or transformers' Conv1D. Choose other targets; if it is quantised, load "
            "the base in 4 or 8 bits of bitsandbytes."
        )
    weight = base.weight
    if not is_plain(weight) or weight.dtype not in _FLOATS:
        return (
            f"its weight is quantised or sharded ({type(weight).__name__}, {weight.dtype}), and stock PEFT would "
            "silently put plain LoRA there. Load the base in float32, bfloat16 or float16, or in 4 or 8 bits of "
            "bitsandbytes."
        )
    return None


def factor_shapes(base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of A and B of one module to adapt, under their names behind the module's path."""
    if isinstance(base, nn.Embedding):
        return {"lora_embedding_A": (rank, base.num_embeddings), "lora_embedding_B": (base.embedding_dim, rank)}
    if isinstance(base, nn.Conv2d):
        shape_of_A = (rank, base.in_channels, *base.kernel_size)
        return {"lora_A.weight": shape_of_A, "lora_B.weight": (base.out_channels, rank, 1, 1)}
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        width_in, width_out = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    else:
        assert isinstance(base.weight, Tensor)
        width_in, width_out = map(int, getattr(base.weight, "ds_shape", base.weight.shape))  # of a Conv1D
    return {"lora_A.weight": (rank, width_in), "lora_B.weight": (width_out, rank)}


def _why_not_embedding(base: nn.Embedding) -> str | None:
    """PEFT knows scaled word embeddings (Gemma's). Others change the ids before the look-up, or the rows after it."""
    names = list(inspect.signature(type(base).forward).parameters)[1:]
    if hasattr(base, "embed_scale") and len(names) == 1:
        return None
    return (
        f"it is {type(base).__module__}.{type(base).__name__}, an embedding, and its forward pass ({', '.join(names)}) "
        "is not that of torch.nn.Embedding: an adapter would look up other rows, or be added in another place than the "
        "weight. Choose other targets, or train it whole (modules_to_save)."
    )


def _why_not_convolution(base: nn.Conv2d) -> str | None:
    # PEFT's A is a plain convolution with the base's kernel, stride and padding, without its other options.
    if base.groups != 1:
        return f"it has {base.groups} groups, and their update cannot be merged. Choose other targets."
    if base.dilation != (1, 1) or base.padding_mode != "zeros":
        return (
            f"it has dilation {base.dilation} and {base.padding_mode} padding; PEFT's LoRA convolution has neither and "
            "would be wrong. Choose other targets."
        )
    return None
