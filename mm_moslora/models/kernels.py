"""Which kernels run between the matrix products of lean decoder layers: PyTorch's, or Liger's where they can run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mm_moslora.errors import ConfigError
from mm_moslora.liger import LIGER_RANGE, installed_liger, why_not_liger
from mm_moslora.models.elementwise import EAGER, Elementwise
from mm_moslora.models.lean import LeanLayer


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What `model.kernels` comes to on a device."""

    passes: Elementwise
    """What lean layers run between their products."""
    words: str
    """Whose they are, and why where that was not the recipe's word."""
    required: bool
    """Whether the recipe insists on Liger's."""


def choose_kernels(wanted: str, device: torch.device) -> Kernels:
    """Liger's kernels where they can run, else PyTorch's.

    Args:
        wanted: auto, torch or liger.
        device: that the model will be on.

    Raises:
        ConfigError: liger is asked for and cannot run.
    """
    reason = None if wanted == "torch" else why_not_liger(device)
    if wanted == "liger" and reason is not None:
        raise ConfigError(
            f"model.kernels is 'liger', but {reason}. They run on a GPU where liger-kernel is installed (pip install "
            f"'liger-kernel{LIGER_RANGE}'; Triton comes with PyTorch's CUDA builds). Or set model.kernels to auto."
        )
    if wanted == "torch" or reason is not None:
        return Kernels(passes=EAGER, words="PyTorch's" + (f" ({reason})" if reason else ""), required=False)
    from mm_moslora.models.liger_passes import LIGER

    return Kernels(passes=LIGER, words=f"Liger's (liger-kernel {installed_liger()})", required=wanted == "liger")


def use_kernels(model: PreTrainedModel, kernels: Kernels) -> int:
    """Have the lean layers of a model run on these kernels, in place.

    Args:
        model: that `mm_moslora.models.lean.use_lean_layers` has seen.
        kernels: from `choose_kernels`.

    Returns:
        How many layers are lean.

    Raises:
        ConfigError: none, and the recipe insists on Liger's kernels.
    """
    lean = [layer for layer in getattr(model.get_decoder(), "layers", ()) if isinstance(layer, LeanLayer)]
    for layer in lean:
        layer.passes = kernels.passes
    if kernels.required and not lean:
        raise ConfigError(
            f"model.kernels is 'liger', but {type(model).__name__} has no lean decoder layers, and Liger's kernels run "
            "in these alone (Llama, Mistral, Qwen2, Qwen3). Set model.kernels to auto."
        )
    return len(lean)
