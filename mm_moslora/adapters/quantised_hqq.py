"""Adapted HQQ layers. Imported only when a model holds one: hqq is an optional dependency."""

from __future__ import annotations

from peft.tuners.lora.hqq import HqqLoraLinear

from mm_moslora.adapters.layer import FusedLinear
from mm_moslora.adapters.variants import DoraMixerVariant


class MoSLoRAHqqLinear(FusedLinear, HqqLoraLinear):
    """`hqq.core.quantize.HQQLinear` with LoRA and a mixer; merging quantises the weight anew."""

    dora_variant = DoraMixerVariant
