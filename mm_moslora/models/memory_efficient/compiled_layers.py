"""`torch.compile` of single decoder layers, or of their passes: short graphs, compiled once for all layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mm_moslora.kernels.attention.segment_attention import SEGMENTS, segment_attention
from mm_moslora.models.memory_efficient.decoder_layers import LeanLayer
from mm_moslora.models.transformers_patches import mix_in
from mm_moslora.utils.errors import ConfigError, suggestion


class CompiledLayer(nn.Module):
    """Mixed in before a layer's class; runs its forward pass compiled.

    Compiling around transformers' wrapper for gradient checkpointing (`layer.compile`) has no effect, since torch does
    not trace checkpoints. Here the compiled part is inside of it.
    """

    compiled_forward: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        return self.compiled_forward(hidden_states, *args, **kwargs)


def require_backend(backend: str) -> None:
    """Refuse a backend of torch.compile that cannot run here."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise ConfigError(
            f"train.compile is {backend!r}, expected a backend of torch.compile: {', '.join(backends)}."
            f"{suggestion(backend, backends)}"
        )
    on_cpu = backend == "inductor" and not torch.cuda.is_available()
    if on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ConfigError(
            "train.compile is 'inductor', which needs a C++ compiler on a CPU, and none is here. Install one (g++), or "
            "leave train.compile out."
        )


def compile_layers(model: PreTrainedModel, backend: str) -> int:
    """Compile the decoder layers in place, for rows of any length, and count them; weights and their names stay.

    In lean layers the passes between matrix products are compiled, which is faster than the whole stock layer and keeps
    as little as before. The loop over segments stays outside of the graphs: every batch would compile it again.
    """
    require_backend(backend)
    layers: Any = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ConfigError(
            f"train.compile is {backend!r}, but the layers of {type(model).__name__} are not known. Leave it out."
        )
    AttentionInterface.register(SEGMENTS, torch.compiler.disable(segment_attention))
    for layer in layers:
        if isinstance(layer, LeanLayer):
            layer.compile_passes(backend)
        else:
            layer.compiled_forward = torch.compile(layer.forward, backend=backend, dynamic=True)
            mix_in(layer, CompiledLayer)
    return len(layers)
