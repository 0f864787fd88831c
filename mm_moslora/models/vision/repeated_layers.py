"""Towers on the meta device in less time: of layers that are alike, two run, and the others are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

DENSE = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
"""Matrix products with weights; all other products belong to attention."""


@dataclass(kw_only=True)
class _Kind:
    """What a layer does with some inputs."""

    arguments: Any
    """Of its first call; while they exist, no other tensor has the identity of one of them."""
    outputs: Any
    """Its outputs, of any structure."""
    kept: int
    """Bytes kept for its backward pass, without its weights and inputs."""
    keeps_input: list[bool]
    """Whether it keeps an input tensor, for each of them."""
    dense: int
    """FLOPs of products with weights."""
    attention: int


@contextmanager
def repeated_layers(tower: nn.Module) -> Iterator[None]:
    """A block in which of a tower's layers that are alike one runs on the meta device, and the others are stood in for.

    A stand-in gives outputs of the same shapes, keeps as many bytes for the backward pass, and multiplies matrices with
    as many FLOPs, so that counters of both see what the layer would do.
    """
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    layers = {layer for children in lists if len(children) > 2 for layer in children}
    kinds: dict[Any, _Kind] = {}
    for layer in layers:
        layer.forward = _forward(layer, kinds)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Module, kinds: dict[Any, _Kind]) -> Callable[..., Any]:
    real: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = (args, kwargs)
        named = layer.named_parameters()
        weights = tuple((name, tuple(item.shape), item.dtype, item.requires_grad) for name, item in named)
        key = (type(layer), layer.training, weights, torch.is_grad_enabled(), repr(tree_map(_sight, arguments)))
        if kind := kinds.get(key):
            with torch.no_grad(), torch.device("meta"):
                torch.mm(torch.empty(1, kind.dense // 2), torch.empty(kind.dense // 2, 1))
                torch.bmm(torch.empty(1, 1, kind.attention // 2), torch.empty(1, kind.attention // 2, 1))
        else:
            kind = kinds[key] = _measured(layer, lambda: real(*args, **kwargs), arguments)
        outputs = iter(_Kept.apply(kind, *_tensors(arguments), *layer.parameters()))
        return tree_map(lambda item: next(outputs) if isinstance(item, Tensor) else item, kind.outputs)

    return forward


def _tensors(tree: Any) -> list[Tensor]:
    return [item for item in tree_leaves(tree) if isinstance(item, Tensor)]


def _sight(item: Any) -> Any:
    """What a layer's work depends on: shapes, and which tensor it is where a tensor has values."""
    if not isinstance(item, Tensor):
        return item
    return tuple(item.shape), item.dtype, item.requires_grad, None if item.is_meta else id(item)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _measured(layer: nn.Module, run: Callable[[], Any], arguments: Any) -> _Kind:
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # another tensor could have the storage's address otherwise
        return tensor

    alive: list[Tensor] = []
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        outputs = run()
    flops = counter.get_flop_counts().get("Global", {})
    dense = sum(number for kind, number in flops.items() if kind in DENSE)
    inputs = [_storage(item) for item in _tensors(arguments)]
    not_counted = {*inputs, *(_storage(parameter) for parameter in layer.parameters())}
    return _Kind(
        arguments=arguments, keeps_input=[item in saved for item in inputs],
        outputs=tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, outputs),
        kept=sum(size for item, size in saved.items() if item not in not_counted),
        dense=dense, attention=sum(flops.values()) - dense,
    )  # fmt: skip


class _Kept(torch.autograd.Function):
    """New outputs, for which as much is kept as a layer keeps; it has no gradient."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, *inputs: Tensor) -> tuple[Tensor, ...]:
        own = torch.empty(kind.kept, dtype=torch.uint8, device="meta")
        ctx.save_for_backward(own, *(item for item, kept in zip(inputs, kind.keeps_input, strict=False) if kept))
        return tuple(torch.empty_like(item) for item in _tensors(kind.outputs))
