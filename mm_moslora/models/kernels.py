"""Which kernels run: PyTorch's, Liger's between the matrix products of lean decoder layers on a GPU, ours on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mm_moslora.adapters import use_native_kernels
from mm_moslora.errors import ConfigError
from mm_moslora.liger import LIGER_RANGE, installed_liger, why_not_liger
from mm_moslora.models.elementwise import EAGER, Elementwise
from mm_moslora.models.lean import LeanLayer
from mm_moslora.models.native_attention import use_native_attention
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
    native: bool = False
    """Whether attention and adapters, too, are to run on ours."""


def choose_kernels(wanted: str, device: torch.device, *, lean: bool = True) -> Kernels:
    """Liger's kernels or ours where they can run, else PyTorch's. Ours are compiled to know it.

    Args:
        wanted: auto, torch, liger or native.
        device: that the model will be on.
        lean: whether lean layers will run them; otherwise there are attention and adapters alone.

    Raises:
        ConfigError: liger or native is asked for and cannot run.
    """
    if wanted == "torch":
        return Kernels(passes=EAGER, words="PyTorch's")
    required = wanted if wanted in _WHERE else None
    reason = why_not_liger(device)
    if lean and wanted != "native" and reason is None:
        from mm_moslora.models.liger_passes import LIGER

        return Kernels(passes=LIGER, words=f"Liger's (liger-kernel {installed_liger()})", required=required)
    if wanted == "native" or (wanted == "auto" and device.type == "cpu"):
        try:
            words = _ours(device)
            return Kernels(passes=NATIVE if lean else EAGER, words=words, required=required, native=True)
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


def use_kernels(model: PreTrainedModel, kernels: Kernels, *, lean: bool = True) -> str:
    """Have a model run on these kernels, in place: its lean layers, where it has any, attention and adapters.

    Args:
        model: that `mm_moslora.models.lean.use_lean_layers` has seen.
        kernels: from `choose_kernels`.
        lean: as for `choose_kernels`.

    Returns:
        What runs on them, in words; nothing where nothing does.

    Raises:
        ConfigError: nothing does, and the recipe insists on such kernels.
    """
    use_native_attention(model, on=kernels.native)
    use_native_kernels(model, kernels.native)
    changed = [layer for layer in getattr(model.get_decoder(), "layers", ()) if lean and isinstance(layer, LeanLayer)]
    for layer in changed:
        layer.passes = kernels.passes
    if kernels.required and not changed and not kernels.native:
        raise ConfigError(
            f"model.kernels is {kernels.required!r}, but {type(model).__name__} has no lean decoder layers, and such "
            "kernels run in these alone (Llama, Mistral, Qwen2, Qwen3). Set model.kernels to auto."
        )
    places = ["of attention and adapters"] if kernels.native else []
    if changed:
        places.insert(0, f"between the products of {len(changed)} lean decoder layers")
    return f"The kernels {' and '.join(places)} are {kernels.words}." if places else ""
