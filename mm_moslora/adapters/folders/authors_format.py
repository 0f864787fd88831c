"""Checkpoints of the MoSLoRA paper's authors (arXiv 2406.11909): the names of their tensors, and their settings.

::

    PEFT 0.10 fork   adapter_config.json (lora_use_mixer) + adapter_model; the mixer is lora_AB.weight [R, R]
    SDXL script      pytorch_lora_weights.safetensors of diffusers; diffusers renames lora_A to lora.down, and with it
                     lora_AB to lora.downB (lora_linear_layer.downB in text encoders). It has no alpha, which is R
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    MIXER,
    STOCK_CONFIG,
    USE_MIXER,
    USE_MIXER_PATTERN,
    adapted_path,
    mixers_in,
)
from mm_moslora.utils.errors import AdapterError

_MIXER_SIGNS = ("lora_AB", ".downB.")
_MIXERS = (".lora_AB.weight", ".lora.downB.weight", ".lora_linear_layer.downB.weight")
_OF_DIFFUSERS = {
    f".{part}.{theirs}.weight": f".{ours}.weight"
    for part in ("lora", "lora_linear_layer")
    for theirs, ours in (("down", "lora_A"), ("up", "lora_B"))
}
# In their older fork's configuration: how the layer computes, not what.
_WITHOUT_MEANING = {USE_MIXER, USE_MIXER_PATTERN, "merge_weights", "runtime_config", "peft_type"}


def holds_their_mixers(names: Mapping[str, Tensor]) -> bool:
    """Whether any tensor has a name of the authors' mixers."""
    return any(sign in name for name in names for sign in _MIXER_SIGNS)


def with_known_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the authors' fork, or of diffusers, under PEFT's names, the mixers as ``.lora_mixer.weight``."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ends = dict.fromkeys(_MIXERS, MIXER) | _OF_DIFFUSERS
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None and any(sign in name for sign in _MIXER_SIGNS):
            raise AdapterError(
                f"{name!r} is a part of a mixer that is not understood; {' or '.join(_MIXERS)} is expected at its end. "
                "Without it the adapter would compute other values."
            )
        if end in _MIXERS:
            _check_mixer(name, tensor)
        renamed[name if end is None else name.removesuffix(end) + ends[end]] = tensor
    return renamed


def _check_mixer(name: str, tensor: Tensor) -> None:
    square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    if not (square and tensor.is_floating_point() and torch.isfinite(tensor).all()):
        content = f"{list(tensor.shape)} of {tensor.dtype}"
        content = "NaN or infinity" if square and tensor.is_floating_point() else content
        raise AdapterError(f"{name} holds {content}, expected [R, R] of finite floats. Copy the file again.")


def mixer_settings(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The mixers' fields of a `MoSLoRAConfig` from the authors' options; modules without a mixer get `none`."""
    if config.get("use_dora"):
        raise AdapterError(
            f"{source} combines use_dora with lora_AB. The authors' code trains and merges that differently; it has no "
            "right reading."
        )
    mixers, without = mixers_in(tensors), []
    if not mixers:
        raise AdapterError(f"{source} announces mixers (lora_use_mixer) but holds no lora_AB. Copy the folder again.")
    pattern = config.get(USE_MIXER_PATTERN) or {}
    for name, tensor in tensors.items():
        path = adapted_path(name)
        if path is None or name.removesuffix(".lora_A.weight") in mixers:
            continue
        has_mixer = pattern.get(get_pattern_key(list(pattern), path), config.get(USE_MIXER))
        # Their embeddings and convolutions have no mixer, whatever the configuration says.
        if has_mixer and name.endswith(".lora_A.weight") and tensor.ndim == 2:
            raise AdapterError(
                f"{source} holds no lora_AB of {path!r}, though its configuration announces one. With another matrix "
                "in its place the adapter would be wrong. Copy the folder again."
            )
        without.append(path)
    return {"mixer_init": "kaiming", "mixer_trainable": True, "mixer_pattern": dict.fromkeys(sorted(without), "none")}


def check_options(config: Mapping[str, Any], understood: set[str], source: str) -> None:
    """Refuse options of a configuration with mixers that are not `understood` and change what the adapter computes."""
    unknown = sorted(key for key, value in config.items() if value and key not in understood | _WITHOUT_MEANING)
    if unknown:
        raise AdapterError(
            f"{source} sets {unknown[0]} to {config[unknown[0]]!r}, which is not understood. The adapter may compute "
            f"something else with it; remove it from {STOCK_CONFIG} if it has no effect."
        )
