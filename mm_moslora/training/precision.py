"""The number format of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from mm_moslora.config import Precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision) -> str:
    """Resolve `auto` to bf16 where the hardware multiplies it fast, else to fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "bf16" if "amx_bf16" in text or "avx512_bf16" in text else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Torch dtype of a resolved precision."""
    return _DTYPES[precision]
