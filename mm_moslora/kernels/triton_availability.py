"""Whether Triton's kernels run on a device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OLDEST_CAPABILITY = (7, 0)
"""The lowest compute capability of a GPU that Triton compiles for."""


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot run on a device, as a clause; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    import torch

    if device.type != "cuda":
        return f"Triton does not run on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"Triton needs compute capability {_dotted(OLDEST_CAPABILITY)}, and the GPU has {_dotted(capability)}"
    return _why_it_fails(device.index or 0, dtype)


def interpreted() -> bool:
    """Whether Triton's kernels run in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def _why_it_fails(index: int, dtype: torch.dtype) -> str | None:
    """Tries every kernel: it is compiled, which needs a C compiler and a Triton that fits PyTorch and the driver."""
    import torch

    try:
        wrong = importlib.import_module("mm_moslora.kernels.triton_trial").wrong_kernels(
            torch.device("cuda", index), dtype
        )
    except Exception as error:  # it fails in many ways
        reason = " ".join(str(error).split())[:200]
        return f"Triton's kernels do not run here ({type(error).__name__}: {reason})"
    return f"Triton's kernels give wrong numbers on this GPU ({', '.join(wrong)})" if wrong else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
