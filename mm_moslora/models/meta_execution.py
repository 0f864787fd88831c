"""Running models on the meta device: values that are known, memory of fused attention, and bytes kept for later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from mm_moslora.models.pretrained_vlm import decoder_layers
from mm_moslora.utils.errors import ModelError

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Keeps no probabilities, and runs on the meta device."""


def kept_bytes(run: Callable[[], object], weights: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a computation; each storage counts once, weights do not."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del result
    return total


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device with the memory of fused kernels: the plain operator keeps all probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        width = value.shape[-1]
        filled = nn.functional.pad(value, (0, query.shape[-1] - width))  # latent attention has narrower values
        return FUSED_ATTENTION(query, key, filled, scale=(kwargs or {}).get("scale"))[0][..., :width]


class MetaAndHost(TorchDispatchMode):
    """Moves tensors with values to the meta device when an operator mixes them with meta tensors.

    Whole numbers stay on the host until then, since classes read lengths and places as numbers. Tests of a mask return
    true, as for a picture without padded patches.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        on_meta = {item.is_meta for item in tree_leaves(arguments) if isinstance(item, Tensor)}
        if True in on_meta and func is torch.ops.aten._local_scalar_dense.default:
            return True
        moved = func is torch.ops.aten._to_copy.default and _is_number(args[0])
        if moved or (func.overloadpacket is torch.ops.aten.arange and _counts(*args, **arguments[1])):
            arguments = (args, {**arguments[1], "device": torch.device("cpu")})
        if True in on_meta and func is torch.ops.aten.index.Tensor:
            arguments = ((args[0], [place for item in args[1] for place in _places(item)]), {})
        if len(on_meta) == 2:
            arguments = tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, arguments)
        if func is torch.ops.aten._grouped_mm.default:  # on the meta device for bf16 alone; shapes are the same
            narrow = tree_map(lambda item: item.bfloat16() if _is_float(item) else item, arguments)
            return func(*narrow[0], **narrow[1]).to(args[0].dtype)
        return func(*arguments[0], **arguments[1])


def _is_float(item: object) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _is_number(tensor: Tensor) -> bool:
    """Whether a tensor has whole values that are known: places and lengths, which classes read as numbers."""
    return not tensor.is_meta and not tensor.is_floating_point()


def _counts(*bounds: object, dtype: torch.dtype | None = None, **_: object) -> bool:
    """Whether `arange` with these arguments gives whole numbers."""
    return all(isinstance(bound, int) for bound in bounds) if dtype is None else not dtype.is_floating_point


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index without a mask, of which the meta device does not know how many places it has."""
    if index is None or index.dtype != torch.bool:
        return (index,)
    known = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
    return known.nonzero(as_tuple=True)


@contextmanager
def without_autocast_on_meta() -> Iterator[None]:
    """PEFT switches autocast off for the device of experts, and torch has none on the meta device."""
    own: Any = torch.autocast

    def switch(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else own(device_type, *args, **kwargs)

    with patch.object(torch, "autocast", switch):
        yield


def layer_calls(model: PreTrainedModel) -> list[int]:
    """How often a forward pass of a model runs each of its decoder layers: classes may loop over some of them."""
    decoder, calls = model.get_decoder(), {id(layer): 0 for layer in decoder_layers(model)}

    def count(layer: nn.Module, *_: object) -> None:
        calls[id(layer)] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in decoder_layers(model)]
    trains = decoder.training
    try:
        with torch.no_grad(), MetaAndHost(), FusedAttention():
            decoder.eval()(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
    finally:
        decoder.train(trains)
        for handle in handles:
            handle.remove()
    if not any(calls.values()):
        raise ModelError(f"{type(decoder).__name__} runs no layer of its own list, so its work cannot be counted.")
    return [calls[id(layer)] for layer in decoder_layers(model)]
