"""Weights that modules share: tied ones of the base, which a merge unties."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from mm_moslora.adapters.tree import adapted_layers
from mm_moslora.kernels.lora.lora_linear import is_plain


@torch.no_grad()
def untie(model: nn.Module) -> None:
    """Untie the tied weights of a model if an adapted layer has one: a merge would change the others that hold it."""
    # All are untied together: `tie_word_embeddings`, which becomes False, applies to all when the model is loaded.
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_plain(parameter):
                holders[id(parameter)].append((module, name))
    adapted = [weight for _, layer in adapted_layers(model) for weight in layer.get_base_layer().parameters()]
    if all(len(holders[id(weight)]) < 2 for weight in adapted):
        return
    for _, *others in holders.values():
        for module, name in others:
            own: Any = getattr(module, name)
            setattr(module, name, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True:
            config.tie_word_embeddings = False
