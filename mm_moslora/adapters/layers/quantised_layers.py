"""Adapters on quantised base layers: bitsandbytes in 4 and 8 bits, torchao's int8 weights.

PEFT's quantised layers resolve the variants that they know and silently take every other configuration for plain LoRA.
Here a quantised layer gets a class of this package, or an error.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from mm_moslora.adapters.layers.base_weights import Quantisation
from mm_moslora.adapters.layers.fused_linear import FusedLinear


class MoSLoRATorchaoLinear(FusedLinear, TorchaoLoraLinear):
    """A linear layer with torchao's int8 weight, LoRA and a mixer.

    Merging needs the base model to be loaded by transformers with a `TorchAoConfig`, as in PEFT.
    """


def create_quantised_layer(
    target: nn.Module, adapter_name: str, *, kind: Quantisation, config: LoraConfig, **kwargs: Any
) -> nn.Module:
    """The adapted layer around a quantised one.

    Args:
        target: the layer to adapt, or an adapted layer.
        adapter_name: the adapter's name.
        kind: of its quantisation.
        config: the adapter's configuration.
        **kwargs: of PEFT.
    """
    if kind == "torchao int8":
        return MoSLoRATorchaoLinear(target, adapter_name, config=config, **kwargs)
    from mm_moslora.adapters.layers.bitsandbytes_layers import MoSLoRALinear4bit, MoSLoRALinear8bit

    layer = MoSLoRALinear4bit if kind == "bitsandbytes 4-bit" else MoSLoRALinear8bit
    return layer(target, adapter_name, config=config, **kwargs)
