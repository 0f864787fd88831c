"""Makes decoder layers and the loss head lean, chooses the kernels of lean layers, and compiles single layers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mm_moslora.kernels.attention.segment_attention import SEGMENTS, segment_attention
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS, FusedOps
from mm_moslora.kernels.lora.seeded_dropout import set_dropout_kernels
from mm_moslora.kernels.triton_availability import LIGER_RANGE, installed_liger, why_not_liger, why_not_triton
from mm_moslora.models.families import LEAN_LAYERS
from mm_moslora.models.memory_efficient.decoder_layers import LeanLayer
from mm_moslora.models.memory_efficient.loss_head import LossHead, head_form
from mm_moslora.models.transformers_patches import mix_in
from mm_moslora.utils.errors import ConfigError, suggestion

logger = logging.getLogger(__name__)


def use_lean_layers(model: PreTrainedModel, *, depth: int | None = None) -> int:
    """Make the decoder layers that are known lean, in place, and count them; `depth`: layers of the whole model."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        return 0
    changed = 0
    for layer in layers:
        activation = type(getattr(getattr(layer, "mlp", None), "act_fn", None)).__name__
        if type(layer).__name__ in LEAN_LAYERS and activation in ("SiLUActivation", "SiLU"):
            mix_in(layer, LeanLayer)
            changed += 1
    if changed:
        last = layers[len(layers) - 1]
        # The first layers may get visual features added to their outputs at visual positions.
        visual = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", ()))
        last.is_last = isinstance(last, LeanLayer) and (depth or len(layers)) > visual
    return changed


def use_loss_head(model: PreTrainedModel) -> bool:
    """Make the model's head compute the loss in chunks, in place; False where it is not a plain linear layer."""
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None and "forward" not in head.__dict__:
        mix_in(head, LossHead)
    head.form = head_form(model)
    return isinstance(head, LossHead)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels that `model.kernels` gives on a device."""

    passes: FusedOps
    """Run between the products of lean layers."""
    words: str
    """Their library, and the reason where it is not the recipe's choice."""
    required: str | None = None
    """The library that the recipe requires."""
    dropout: Literal["auto", "torch"] = "auto"
    """What draws the masks of adapter dropout on a GPU, see `set_dropout_kernels`."""


def choose_kernels(
    wanted: str, device: torch.device, *, lean: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Kernels:
    """Triton's kernels where they can run, else PyTorch's. Triton's are compiled and tried."""
    if wanted == "torch":
        return Kernels(passes=TORCH_OPS, words="PyTorch's", dropout="torch")
    required = wanted if wanted in _WHERE else None
    reason = (why_not_liger if wanted == "liger" else why_not_triton)(device, dtype)
    if lean and reason is None:
        return _on_triton(wanted, required)
    if required is not None:
        raise ConfigError(
            f"model.kernels is {wanted!r}, but {reason}. {_WHERE[required]} Or set model.kernels to auto."
        )
    if device.type == "cuda" and lean:
        _warn_of_eager_passes(str(reason))
    return Kernels(passes=TORCH_OPS, words=f"PyTorch's ({reason})")


def _on_triton(wanted: str, required: str | None) -> Kernels:
    if wanted == "liger":
        from mm_moslora.kernels.fused_ops.liger_ops import LIGER_OPS

        return Kernels(passes=LIGER_OPS, words=f"Liger's (liger-kernel {installed_liger()})", required=required)
    from mm_moslora.kernels.fused_ops.triton_ops import TRITON_OPS

    return Kernels(passes=TRITON_OPS, words=f"Triton's (triton {version('triton')})", required=required)


@cache
def _warn_of_eager_passes(reason: str) -> None:
    logger.warning(
        "%s. Norms, activations and rotations run on PyTorch's operators, each of which reads and writes whole "
        "tensors; a step is estimated to take a quarter longer. Install what is missing, or set model.kernels to torch "
        "to accept this.",
        reason[:1].upper() + reason[1:],
    )


_WHERE = {
    "triton": "They run on a GPU of compute capability 7.0 or more, with the Triton of PyTorch's CUDA builds and a C "
    "compiler.",
    "liger": f"They run on a GPU where liger-kernel is installed (pip install 'liger-kernel{LIGER_RANGE}'; Triton "
    "comes with PyTorch's CUDA builds).",
}
"""Kernels that a recipe may require."""


def attention_words(model: PreTrainedModel) -> str:
    """What a decoder's attention, which is set, runs on on a CPU, for the log."""
    name = model.get_decoder().config._attn_implementation
    return "PyTorch's operators" if name == SEGMENTS else f"transformers' {name}" if name else ""


def use_kernels(model: PreTrainedModel, kernels: Kernels, *, lean: bool = True) -> str:
    """Set the kernels of a model's lean layers, in place."""
    changed = [layer for layer in getattr(model.get_decoder(), "layers", ()) if lean and isinstance(layer, LeanLayer)]
    for layer in changed:
        layer.passes = kernels.passes
    set_dropout_kernels(kernels.dropout)
    if kernels.required and not changed:
        raise ConfigError(
            f"model.kernels is {kernels.required!r}, but {type(model).__name__} has no lean decoder layers, and "
            f"these kernels run in lean layers only ({', '.join(LEAN_LAYERS.values())}). Set model.kernels to auto."
        )
    if not changed:
        return ""
    return f"The kernels between the products of {len(changed)} lean decoder layers are {kernels.words}."


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
