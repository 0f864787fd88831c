"""Adapted bitsandbytes layers. The module is imported when a model holds one: bitsandbytes is optional."""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.base_weights import learns_through, unpack
from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.utils.errors import AdapterError


class _DoraOnGpus(MoSLoRALayer):
    """Refuses DoRA on a CPU."""

    # PEFT's DoRA dequantises the weight at every step. On a CPU bitsandbytes 0.50 has repacked it (4-bit) or lost its
    # scales (8-bit) before: the result is wrong, or an error inside of bitsandbytes.

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The mixer's variant; see the base class."""
        weight = cast(Tensor, self.get_base_layer().weight)
        if config.use_dora and weight.device.type == "cpu":
            raise AdapterError(
                "use_dora on a bitsandbytes layer works on a GPU only: on a CPU PEFT cannot read the quantised weight "
                "back. Unset use_dora, or load the base unquantised."
            )
        return super().resolve_lora_variant(config=config, **kwargs)


class MoSLoRALinear4bit(_DoraOnGpus, FusedLinear, Linear4bit):
    """`bitsandbytes.nn.Linear4bit` with LoRA and a mixer (QMoSLoRA)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active adapters, ``[..., D_out]``, in the dtype of x even under autocast."""
        if learns_through(self, x):
            unpack(self.get_base_layer().weight)
        return super().forward(x, *args, **kwargs).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the weight, which is quantised again; see PEFT's layer."""
        unpack(self.get_base_layer().weight)
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Subtract the merged adapters, within the rounding of the quantisation."""
        unpack(self.get_base_layer().weight)
        super().unmerge()


class MoSLoRALinear8bit(_DoraOnGpus, Linear8bitLt):
    """`bitsandbytes.nn.Linear8bitLt` with LoRA and a mixer."""
