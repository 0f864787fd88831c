"""Layers that are not called, because the module around them reads their weight; an adapter there has no effect."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

SOMETIMES_CALLED: Mapping[str, tuple[str, ...]] = {
    "MambaMixer": ("x_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(("Mamba2Mixer", "NemotronHMamba2Mixer", "BambaMixer", "FalconH1Mixer"), ("out_proj",)),
    **dict.fromkeys(("Zamba2MambaMixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
    **dict.fromkeys(("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), ("lm_head",)),
    "DiffusionGemmaDecoderModel": ("embed_tokens",),
}
"""Children that one code path calls, while another passes their weight to a function (mostly a fused kernel)."""


def why_not_called(parent: nn.Module | None, name: str) -> str | None:
    """Why an adapter on a child of a module would have no effect on all or some code paths; None if it has."""
    if parent is None:
        return None
    kind: Any = type(parent)
    if _is_only_read(kind, name):
        does = "reads this layer's weight and never calls it"
    elif any(name in SOMETIMES_CALLED.get(base.__name__, ()) for base in kind.__mro__):
        does = "hands this layer's weight to a function where it can, and does not call the layer then"
    else:
        return None
    return (
        f"{kind.__module__}.{kind.__name__} {does}, so an adapter here would do nothing in training and change the "
        "model when it is merged. Choose other targets, or leave it out (exclude_modules)."
    )


@functools.cache
def _is_only_read(kind: type[nn.Module], name: str) -> bool:
    """Whether a class reads `self.NAME.weight`, and has `self.NAME` nowhere else but where it is made."""
    # Of transformers and torch alone: diffusers' processors call layers from outside the module that holds them.
    bases = [base for base in kind.__mro__ if base.__module__.startswith(("transformers.models.", "torch.nn.modules."))]
    code = "".join(map(_code_of, bases[: bases.index(nn.Module)] if nn.Module in bases else bases))
    layer = rf"(?<!isinstance\()(?<!hasattr\()(?<!`)\bself\.{re.escape(name)}\b"
    return bool(re.search(rf"{layer}\.weight\b", code)) and not re.search(rf"{layer}(?!\s*[.:=][^=])", code)


@functools.cache
def _code_of(kind: type) -> str:
    """The source of a class at the top of its module."""
    module = inspect.getsource(sys.modules[kind.__module__])
    match = re.search(rf"^class {kind.__name__}\b.*?(?=^[^\s#)]|\Z)", module, re.MULTILINE | re.DOTALL)
    return match[0] if match else ""
