"""Whether Triton's kernels run on a device, and Liger's, which are optional and chosen by name only."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

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


LIGER_RANGE = ">=0.8.5,<0.9"
"""Versions of liger-kernel with the signatures that `liger_ops` calls; the range of the extra `liger`."""


def installed_liger() -> str | None:
    """The version of liger-kernel; None: it is not installed."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def fits(installed: str) -> bool:
    """Whether a version of liger-kernel is one of `LIGER_RANGE`."""
    return Version(installed) in SpecifierSet(LIGER_RANGE, prereleases=True)


def why_not_liger(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Liger's kernels cannot run, as a clause; None: they can."""
    installed = installed_liger()
    if installed is None:
        return "liger-kernel is not installed"
    if not fits(installed):
        return f"liger-kernel is {installed}, expected {LIGER_RANGE}"
    if (reason := why_not_triton(device, dtype)) is not None:
        return reason
    try:
        importlib.import_module("liger_kernel.ops")
    except Exception as error:  # a Triton that does not fit torch or the driver fails in many ways
        return f"liger-kernel {installed} does not import ({type(error).__name__}: {error})"
    return None
