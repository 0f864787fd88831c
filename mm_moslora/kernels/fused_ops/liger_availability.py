"""Whether Liger's Triton kernels can run here. They are optional, and chosen by name only."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mm_moslora.kernels.triton_availability import why_not_triton

if TYPE_CHECKING:
    import torch

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
