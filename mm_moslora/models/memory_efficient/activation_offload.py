"""Inputs of checkpointed layers in main memory until the backward pass recomputes the layers.

With checkpointing a layer keeps its input alone, ``[1, S, D]``: 2 D bytes per token in bf16. Offloaded, the inputs take
no memory of the GPU, except that of the layer at work and of the next one, which is fetched meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from mm_moslora.models.transformers_patches import wrap_checkpointing


def offload_inputs(component: PreTrainedModel) -> None:
    """Move the inputs of a component's checkpointed layers to main memory in the forward pass, and back in time.

    Copies run beside the computation, from and to pinned memory. On a CPU they are copies within main memory.

    Args:
        component: with checkpointing; see `mm_moslora.models.trainable_parts.checkpoint_layers`.
    """
    inputs = _OffloadedInputs()

    def around(_: nn.Module, checkpoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(function: Callable[..., Tensor], *args: Any) -> Tensor:
            with saved_tensors_hooks(inputs.pack, inputs.unpack):  # the checkpoint's own hooks take what is inside
                return checkpoint(function, *args)

        return run

    wrap_checkpointing(component, around)


class _OffloadedInputs:
    """The inputs in the order of the forward pass; the backward pass takes them from the last to the first."""

    def __init__(self) -> None:
        self._last: weakref.ref[_HostCopy] | None = None
        self._stream: torch.cuda.Stream | None = None

    def pack(self, tensor: Tensor) -> _HostCopy:
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        copy = _HostCopy(tensor, self._stream if tensor.is_cuda else None, before=self._last)
        self._last = weakref.ref(copy)
        return copy

    def unpack(self, copy: _HostCopy) -> Tensor:
        tensor = copy.take()
        self._last = copy.before
        before = None if copy.before is None else copy.before()
        if before is not None:
            before.fetch()  # while this layer is at work
        return tensor


class _HostCopy:
    """The values of one tensor in main memory, and the tensor with them once it is fetched."""

    def __init__(
        self, tensor: Tensor, stream: torch.cuda.Stream | None, *, before: weakref.ref[_HostCopy] | None
    ) -> None:
        self.device, self.stream, self.before = tensor.device, stream, before
        self.fetched: Tensor | None = None
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start to copy the values back."""
        if self.fetched is not None:
            return
        if self.stream is None:
            self.fetched = self.host
            return
        with torch.cuda.stream(self.stream):  # behind the copy to main memory
            self.fetched = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor; what runs on the current stream after this call sees its values."""
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
        return tensor
