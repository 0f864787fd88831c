"""Adapted HQQ layers. Imported only when a model holds one: hqq is an optional dependency."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.hqq import HqqLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from mm_moslora.adapters.layer import FusedLinear
from mm_moslora.adapters.variants import DoraMixerVariant


class MoSLoRAHqqLinear(FusedLinear, HqqLoraLinear):
    """`hqq.core.quantize.HQQLinear` with LoRA and a mixer; merging quantises the weight anew."""

    dora_variant = DoraMixerVariant

    def _mixed_batch_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """That of all other layers: PEFT's own for HQQ looks past variants, which would drop the mixer."""
        mixed: Tensor = LoraLayer._mixed_batch_forward(self, x, *args, **kwargs)
        return mixed
