"""Adapted layers that read the same input (query, key and value; gate and up) are computed in one node.

The first of them to be called computes all of them; the others pick up their result. A layer that is called with
another tensor after all computes for itself, and from the next pass on its family does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters.layers.adapter_layers import FusedLinear
from mm_moslora.kernels.lora.fused_lora_linear import fused_linears
from mm_moslora.kernels.lora.lora_matmul import LinearOperands

_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that read one input, in the order in which models call them."""

_SECOND_INPUTS = {"key_value_states", "encoder_hidden_states", "context", "latents", "key", "memory"}
"""Arguments of a module that may read its keys and values from elsewhere."""


def link_siblings(model: nn.Module) -> int:
    """Let adapted layers that read the same input compute together, wherever names and signatures say that they do.

    `add_moslora` and `load_adapter` call it; after `peft.get_peft_model` call it yourself. The results are the same
    but for the order of sums; it takes effect in training only.

    Args:
        model: PEFT model, or the base model with adapters inside.

    Returns:
        The number of families found.
    """
    found = 0
    for parent in model.modules():
        if _SECOND_INPUTS & set(inspect.signature(type(parent).forward).parameters):
            continue
        for names in _FAMILIES:
            layers = [child for name in names if isinstance(child := parent._modules.get(name), FusedLinear)]
            if len(layers) > 1 and len({layer.widths[0] for layer in layers}) == 1:
                family = SiblingProjections(layers)
                for layer in layers:
                    layer.siblings = family
                found += 1
    return found


class SiblingProjections:
    """The family of one input."""

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        """Nothing is computed together before the first layer is called."""
        self.layers = tuple(layers)
        self._together = self._together_before = True
        self._input: Tensor | None = None
        self._version = -1
        self._ready: dict[int, Tensor] = {}

    def output(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """A layer's output for x, or None if it must compute for itself.

        Args:
            layer: of this family (a replica of one computes for itself).
            x: ``[..., D_in]``.
        """
        if layer is self.layers[0]:
            return self._compute(x) if torch.is_grad_enabled() and self._may_compute() else None
        if self._input is not x or self._version != x._version:
            # A pass that fell back to single layers leaves nothing behind to be mistaken about.
            self._together = self._together and not self._ready
            return None
        ready = self._ready.pop(id(layer), None)
        if not self._ready:
            self._input = None
        return ready

    def _may_compute(self) -> bool:
        """Checkpointing needs the same nodes in the forward pass and in its repetition during the backward pass."""
        self._input, self._ready = None, {}
        if torch._C._current_graph_task_id() == -1:
            self._together_before = self._together
        return self._together_before

    def _compute(self, x: Tensor) -> Tensor | None:
        chosen: list[tuple[FusedLinear, LinearOperands]] = []
        for layer in self.layers:
            # Such hooks (ZeRO-3's, for one) give every layer an input tensor of its own.
            hooked = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
            operands = None if hooked else layer.fused_operands(x)
            if operands is not None:
                chosen.append((layer, operands))
        if len(chosen) < 2 or chosen[0][0] is not self.layers[0]:
            return None
        layers = tuple(layer for layer, _ in chosen)
        window = layers[0].step_window
        shared = None if window is None else window.products(layers)
        own, *others = fused_linears(x, [operands for _, operands in chosen], shared)
        self._input, self._version = x, x._version
        self._ready = {id(layer): result for layer, result in zip(layers[1:], others, strict=True)}
        return own

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: no results."""
        return self.__dict__ | {"_input": None, "_ready": {}}
