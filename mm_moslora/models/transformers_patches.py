"""What the project replaces in live models of transformers, and why; everything else goes through public interfaces.

No patch here changes a class or a function of the library: each acts on one model. The tests
(`tests/models/test_transformers_patches.py`) fail when an installed release changes what a patch stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def mix_in(layer: nn.Module, mixin: type[nn.Module]) -> None:
    """Give a layer a class of a mixin, whose `forward` goes first, and its own class, or a subclass of that, in place.

    A wrapper around the layer would change the names of its weights, by which models are saved, merged and read; and
    transformers has no registry of layer classes, as it has one of attention functions.
    """
    classes: tuple[Any, Any] = (mixin, type(layer))  # mypy takes a class of modules for unhashable
    layer.__class__ = _mixed(*classes)


@cache
def _mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(mixin, kind):
        return mixin
    name = mixin.__name__.removesuffix("Layer") + kind.__name__
    return type(name, (mixin, kind), {"__module__": mixin.__module__})


@contextmanager
def attention_within(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention of the decoder within the block, which is one forward pass, and while decoding one token.

    `set_attn_implementation` visits every module and may load packages.
    """
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def wrap_checkpointing(
    model: PreTrainedModel, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Tensor]]
) -> None:
    """Put a function around the checkpoint function of every layer that has gradient checkpointing on.

    `gradient_checkpointing_enable` takes no function of the caller's.
    """
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            checkpoint: Any = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = wrap(layer, checkpoint)  # type: ignore[assignment]
