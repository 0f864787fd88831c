"""The attention of a model in training: which one, by the recipe, the device and the model, and how it is set.

On CUDA it is the first of flash-attention 4, 3 and 2 that is installed and runs, else PyTorch's `varlen_attn`, else a
loop over segments. Softcapping, sinks and a position bias need transformers' `eager`: the others leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.kernels.attention.gpu_attention import FLASH, HeadShape, flash_fault, is_installed, pytorch_kernel
from mm_moslora.kernels.attention.segment_attention import PICTURES, SEGMENTS
from mm_moslora.utils.errors import ConfigError, suggestion


def require_attention(requested: str) -> None:
    """Refuse an attention that transformers does not know, or that needs a missing package."""
    names = ["auto", "eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name != PICTURES)]
    if requested not in names:
        raise ConfigError(
            f"model.attention is {requested!r}, expected one of {', '.join(names)}.{suggestion(requested, names)}"
        )
    if requested in FLASH and not is_installed(requested):
        package = "flash-attn" if requested == FLASH[-1] else f"flash-attn-{requested[-1]}"
        lacking = f"{package} is not installed" if torch.cuda.is_available() else "there is no GPU"
        raise ConfigError(
            f"model.attention is {requested!r}, which needs a GPU and {package}; {lacking} here. "
            "Set model.attention to auto, which takes the fastest that is there."
        )


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The attention of a language model in training."""

    name: str
    """Of transformers."""
    words: str = ""
    """What it runs on, for the log; empty for this project's own on a CPU, where `model.kernels` decides."""
    faults: tuple[str, ...] = ()
    """A sentence for every kernel that should run here and does not."""


def choose_attention(
    model: PreTrainedModel, requested: str = "auto", *, device: torch.device | None = None
) -> AttentionChoice:
    """The attention to train with on padding-free batches. On a GPU every kernel is tried first."""
    # A name of transformers is used unchanged (sdpa builds a dense mask).
    device, decoder = device or model.device, model.get_decoder()
    plain = getattr(decoder, "_supports_attention_backend", False) and getattr(decoder, "_supports_sdpa", False)
    if requested == "auto" and not plain:
        # A class without sdpa asks for softcapping, sinks or a position bias.
        name = "sdpa" if getattr(decoder, "_supports_sdpa", False) else "eager"
        return AttentionChoice(name=name, words=f"transformers' {name}, the one that {type(decoder).__name__} takes")
    if device.type != "cuda" or requested not in ("auto", SEGMENTS, *FLASH):
        name = SEGMENTS if requested == "auto" else requested
        return AttentionChoice(name=name, words="" if name == SEGMENTS else f"transformers' {name}")
    shape = head_shape(model, device)
    faults: list[str] = []
    packages = () if requested == SEGMENTS else FLASH if requested == "auto" else (requested,)
    if requested == "auto" and torch.are_deterministic_algorithms_enabled():
        packages = ()  # PyTorch's kernel keeps to its switch; the packages have their own, if any
    for name in packages if shape.dtype.itemsize == 2 and getattr(decoder, "_supports_flash_attn", False) else ():
        if requested == "auto" and not is_installed(name):
            continue
        if (fault := flash_fault(name, shape)) is None:
            return AttentionChoice(name=name, words=name, faults=tuple(faults))
        faults.append(f"{name} does not run here: {fault}")
    if requested in FLASH:
        reason = faults[0] if faults else f"{type(decoder).__name__} in {shape.dtype} does not take it"
        raise ConfigError(f"model.attention is {requested!r}, but {reason}. Set model.attention to auto.")
    tried = pytorch_kernel(shape)
    return AttentionChoice(name=SEGMENTS, words=tried.words, faults=(*faults, *tried.faults))


def head_shape(model: PreTrainedModel, device: torch.device) -> HeadShape:
    """The heads of a decoder, as far as a kernel depends on them."""
    config = model.get_decoder().config
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadShape(device=device, dtype=model.dtype, width=width, groups=groups)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model's attention, and that of a vision tower that runs transformers' default."""
    model.get_decoder().set_attn_implementation(name)
    tower = getattr(model.base_model, "vision_tower", None)
    if not isinstance(tower, PreTrainedModel) or not tower._supports_attention_backend:
        return
    if tower.config._attn_implementation == "sdpa":
        tower.set_attn_implementation(PICTURES)
