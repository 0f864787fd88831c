"""Which kernels run between the matrix products of lean decoder layers: PyTorch's, Liger's on a GPU, ours on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mm_moslora.errors import ConfigError
from mm_moslora.liger import LIGER_RANGE, installed_liger, why_not_liger
from mm_moslora.models.elementwise import EAGER, Elementwise
from mm_moslora.models.lean import LeanLayer
from mm_moslora.models.native_passes import NATIVE
from mm_moslora.native import NativeError, library


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What `model.kernels` comes to on a device."""

    passes: Elementwise
    """What lean layers run between their products."""
    words: str
    """Whose they are, and why where that was not the recipe's word."""
    required: str | None = None
    """What the recipe insists on."""


def choose_kernels(wanted: str, device: torch.device) -> Kernels:
    """Liger's kernels or ours where they can run, else PyTorch's. Ours are compiled to know it.

    Args:
        wanted: auto, torch, liger or native.
        device: that the model will be on.

    Raises:
        ConfigError: liger or native is asked for and cannot run.
    """
    if wanted == "torch":
        return Kernels(passes=EAGER, words="PyTorch's")
    required = wanted if wanted in _WHERE else None
    reason = why_not_liger(device)
    if wanted != "native" and reason is None:
        from mm_moslora.models.liger_passes import LIGER

        return Kernels(passes=LIGER, words=f"Liger's (liger-kernel {installed_liger()})", required=required)
    if wanted == "native" or (wanted == "auto" and device.type == "cpu"):
        try:
            return Kernels(passes=NATIVE, words=_ours(device), required=required)
        except NativeError as error:
            reason = str(error)
    if required is not None:
        raise ConfigError(
            f"model.kernels is {wanted!r}, but {reason}. {_WHERE[required]} Or set model.kernels to auto."
        )
    return Kernels(passes=EAGER, words=f"PyTorch's ({reason})")


_WHERE = {
    "liger": f"They run on a GPU where liger-kernel is installed (pip install 'liger-kernel{LIGER_RANGE}'; Triton "
    "comes with PyTorch's CUDA builds).",
    "native": "They run on a CPU, where a C++ compiler is.",
}
"""Kernels that a recipe may insist on."""


def _ours(device: torch.device) -> str:
    """Words for our kernels, once they are compiled.

    Raises:
        NativeError: they cannot run.
    """
    if device.type != "cpu":
        raise NativeError(f"kernels of ours are for CPUs, and the model runs on {device.type}")
    return f"ours for CPUs ({library().compiler})"


def use_kernels(model: PreTrainedModel, kernels: Kernels) -> int:
    """Have the lean layers of a model run on these kernels, in place.

    Args:
        model: that `mm_moslora.models.lean.use_lean_layers` has seen.
        kernels: from `choose_kernels`.

    Returns:
        How many layers are lean.

    Raises:
        ConfigError: none, and the recipe insists on such kernels.
    """
    lean = [layer for layer in getattr(model.get_decoder(), "layers", ()) if isinstance(layer, LeanLayer)]
    for layer in lean:
        layer.passes = kernels.passes
    if kernels.required and not lean:
        raise ConfigError(
            f"model.kernels is {kernels.required!r}, but {type(model).__name__} has no lean decoder layers, and such "
            "kernels run in these alone (Llama, Mistral, Qwen2, Qwen3). Set model.kernels to auto."
        )
    return len(lean)
