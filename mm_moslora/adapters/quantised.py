"""Adapters on quantised base layers: bitsandbytes in 4 and 8 bits, torchao's int8 weights, HQQ.

PEFT's quantised layers resolve only the variants they know and take every other configuration for plain LoRA, without
a word. Here a quantised layer gets a class of ours, or an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from mm_moslora.adapters.layer import MoSLoRALayer

if TYPE_CHECKING:
    from mm_moslora.adapters.config import MoSLoRAConfig

Quantisation = Literal["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8", "HQQ"]

# By name: none of the libraries is imported unless a model already uses it.
_BNB: dict[str, Quantisation] = {"Linear4bit": "bitsandbytes 4-bit", "Linear8bitLt": "bitsandbytes 8-bit"}


class MoSLoRATorchaoLinear(MoSLoRALayer, TorchaoLoraLinear):
    """A linear layer with torchao's int8 weight, LoRA and a mixer.

    Merging needs the base model to be loaded by transformers with a `TorchAoConfig`, as in PEFT.
    """


def quantisation(base: nn.Module) -> Quantisation | None:
    """How a linear layer's weight is quantised; None if it is not, or in a way that is not supported."""
    for kind in type(base).__mro__:
        if kind.__module__.partition(".")[0] == "bitsandbytes" and kind.__name__ in _BNB:
            return _BNB[kind.__name__]
        if kind.__module__.partition(".")[0] == "hqq" and kind.__name__ == "HQQLinear":
            return "HQQ"
    if not isinstance(base, nn.Linear):
        return None
    weight = type(base.weight)
    is_int8 = weight.__module__.partition(".")[0] == "torchao" and weight.__name__ == "Int8Tensor"
    return "torchao int8" if is_int8 else None


def create_quantised_layer(
    target: nn.Module, base: nn.Module, adapter_name: str, *, config: MoSLoRAConfig, **kwargs: Any
) -> nn.Module:
    """The adapted layer around a quantised one.

    Args:
        target: the layer to adapt, perhaps inside another adapter.
        base: the quantised layer itself.
        adapter_name: the adapter's name.
        config: the adapter's configuration.
        **kwargs: PEFT's own.
    """
    kind = quantisation(base)
    if kind == "torchao int8":
        return MoSLoRATorchaoLinear(target, adapter_name, config=config, **kwargs)
    if kind == "HQQ":
        from mm_moslora.adapters.quantised_hqq import MoSLoRAHqqLinear

        return MoSLoRAHqqLinear(base, adapter_name, config=config, **kwargs)
    from mm_moslora.adapters.quantised_bnb import MoSLoRALinear4bit, MoSLoRALinear8bit

    layer = MoSLoRALinear4bit if kind == "bitsandbytes 4-bit" else MoSLoRALinear8bit
    return layer(target, adapter_name, config=config, **kwargs)
