"""Which layers of a model read the same tensor: a probe that runs a copy of the model without its weights.

In the copy every weight is one zero, seen in the weight's shape, and linear layers put out zeros. So the copy of an 8 B
model takes no memory, but the model's own code runs, with values: masks, routers and caches work as they do in it.
The weights of the model are not read; on the meta device it gives the same result.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mm_moslora.utils.errors import AdapterError, reason_of

logger = logging.getLogger(__name__)

_TOKENS = 4
_Read = tuple[Any, ...]
"""What identifies the input of a call while all inputs are alive: memory, shape, strides, and version."""


@torch.no_grad()
def layers_by_input(model: nn.Module, paths: Sequence[str]) -> list[list[str]]:
    """Groups of layers that read the same tensor in every call, with the layers in the order of `paths`.

    A layer that the pass does not call (an expert that no token reaches) is in a group of its own.

    Args:
        model: a model of transformers, or a UNet of diffusers, with or without adapters, on any device; not changed.
        paths: of the layers in it.

    Raises:
        AdapterError: a model that holds some of the layers does not run without its weights.
    """
    reads: dict[str, _Read] = {}
    faults: dict[str, str] = {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            copied = _without_weights(model)
        except Exception as error:  # whatever modules raise that cannot be copied
            raise AdapterError(_refusal(type(model).__name__, error)) from error
        for path, part in copied.named_modules():
            inside = [name for name in paths if name not in reads and (not path or name.startswith(f"{path}."))]
            if not _is_model(part) or not inside:
                continue
            try:
                reads |= {name: (path, *read) for name, read in _reads(copied, part, inside).items()}
                faults = {name: fault for name, fault in faults.items() if name not in inside}
            except Exception as error:  # an outer model may want inputs that its parts do without
                faults |= {name: _refusal(type(part).__name__, error) for name in inside if name not in faults}
    if unread := next((name for name in paths if name in faults and name not in reads), None):
        raise AdapterError(f"What {unread} reads is not known: {faults[unread]}")
    idle = [name for name in paths if name not in reads]
    if len(idle) == len(paths):
        raise AdapterError(
            f"None of the {len(paths)} layers is called by a model of transformers or diffusers (first: {paths[0]})."
        )
    if idle:
        logger.warning("%d layers share no factor, since the probe does not reach them: %s ...", len(idle), idle[0])
    groups: dict[Any, list[str]] = {}
    for name in paths:
        groups.setdefault(reads.get(name, name), []).append(name)
    return list(groups.values())


def _refusal(kind: str, error: Exception) -> str:
    return f"a copy of {kind} without its weights does not run ({type(error).__name__}: {reason_of(error)[:200]})."


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy with zeros as weights, in evaluation mode, whose linear layers put out zeros."""
    zeros: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        zero = torch.zeros((), dtype=dtype).expand(getattr(tensor, "ds_shape", tensor.shape))
        zeros[id(tensor)] = nn.Parameter(zero, requires_grad=False) if isinstance(tensor, nn.Parameter) else zero
    copied = copy.deepcopy(model, zeros).eval()
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module.__dict__.pop("forward", None)  # of accelerate, around the layer's own
        if (width := _linear_width(module)) is not None:
            module.forward = _Zeros(width)
    if isinstance(copied, PreTrainedModel):
        copied.set_attn_implementation("eager")  # others want a GPU, or packed rows
        copied.set_experts_implementation("eager")
    return copied


def _linear_width(module: nn.Module) -> int | None:
    """D_out of a linear layer, adapted or quantised too; None: the module computes something else, as some routers."""
    inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(inner, Conv1D):
        return int(inner.nf)
    if not isinstance(inner, nn.Linear):
        return None
    shape = (inner.out_features, inner.in_features)
    own = type(inner).forward is not nn.Linear.forward and inner.weight.is_floating_point()
    return None if own and inner.weight.shape == shape else inner.out_features


class _Zeros:
    """The forward pass of a linear layer with a weight of zeros."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers or of diffusers, whose configuration tells what it takes."""
    return isinstance(module, PreTrainedModel) or any(kind.__name__ == "ModelMixin" for kind in type(module).__mro__)


def _reads(model: nn.Module, part: nn.Module, paths: Sequence[str]) -> dict[str, _Read]:
    """What each of the layers reads in a pass through a part of the model."""
    reads: dict[str, _Read] = {}
    alive: list[Tensor] = []

    def watch(name: str, x: Tensor) -> None:
        alive.append(x)
        reads[name] = (*reads.get(name, ()), x.data_ptr(), x.shape, x.stride(), x._version)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))  # type: ignore[misc]
        for name in paths
    ]
    try:
        part(**dict(_inputs(part)))
    finally:
        for handle in handles:
            handle.remove()
    return reads


def _inputs(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """A few tokens, a picture, or noise and a text, by the names that a forward pass takes."""
    config: Any = part.config
    names = inspect.signature(part.forward).parameters
    text = [name for name in ("input_ids", "decoder_input_ids") if name in names]
    if text:
        special = {value for name, value in vars(config).items() if name.endswith("token_id")}
        ids = next(number for number in range(len(special) + 1) if number not in special)
        yield from ((name, torch.full((1, _TOKENS), ids)) for name in text)
    elif "grid_thw" in names:
        sides = 2 * config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        yield next(iter(names)), torch.zeros(sides * sides, width)
        yield "grid_thw", torch.tensor([[1, sides, sides]])
    elif "sample" in names:
        side, width = 2 ** len(config.down_block_types), config.cross_attention_dim
        yield "sample", torch.zeros(1, config.in_channels, side, side)
        yield "timestep", torch.zeros(1)
        yield "encoder_hidden_states", torch.zeros(1, _TOKENS, width[0] if isinstance(width, list | tuple) else width)
        if config.addition_embed_type == "text_time":  # of SDXL
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            yield "added_cond_kwargs", {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    else:
        side = config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        yield (
            "pixel_values" if "pixel_values" in names else next(iter(names)),
            torch.zeros(1, getattr(config, "num_channels", 3), height, width),
        )
    if "use_cache" in names:
        yield "use_cache", False
