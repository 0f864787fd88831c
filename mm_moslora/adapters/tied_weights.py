"""Weights that modules share: tied ones of the base, which a merge unties, and factors that adapted layers share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.sharing.sharing_forms import ALONE, sharing_named
from mm_moslora.adapters.tree import adapted_layers, named_adapter_layers
from mm_moslora.kernels.lora.lora_linear import is_plain
from mm_moslora.utils.errors import AdapterError


@torch.no_grad()
def untie(model: nn.Module) -> None:
    """Untie the tied weights of a model if an adapted layer has one of them.

    Merging into a tied weight would change the other modules that hold it, too: an update of the head would become one
    of the embedding. All weights are untied together, because `tie_word_embeddings`, which becomes False, applies to
    all of them when the model is loaded again.

    Args:
        model: PEFT model, or the base model with adapters inside; changed in place.
    """
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


def further_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that have several, and the first one, under which `named_parameters` has them."""
    firsts: dict[int, str] = {}
    every = ((id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: first for key, name in every if (first := firsts.setdefault(key, name)) != name}


def share_factors(model: nn.Module, adapter_name: str, config: AdapterOptions) -> None:
    """Give every group of layers that share a factor one module of it, that of the group's first layer.

    Args:
        model: the base model with the adapter inside; changed in place.
        adapter_name: the adapter.
        config: its `shared_factors`, where they are empty, become those that its `share` finds.

    Raises:
        AdapterError: nothing to share, or a group of layers that cannot share.
    """
    layers = {path: layer for path, layer in named_adapter_layers(model) if layer.holds(adapter_name)}
    linear = {path: layer for path, layer in layers.items() if layer.shares_factors}
    form = sharing_named(config.share) if not config.shared_factors else None
    if form is not None:
        config.shared_factors = form.partition(model, list(linear))
    for factor, groups in config.shared_factors.items():
        _check_groups(factor, groups, linear, adapter_name, config)
        for first, *others in groups:
            for path in others:
                own, theirs = (getattr(linear[name], f"lora_{factor}") for name in (path, first))
                own[adapter_name] = theirs[adapter_name]


def _check_groups(
    factor: str, groups: list[list[str]], layers: Mapping[str, MoSLoRALayer], adapter_name: str, config: AdapterOptions
) -> None:
    """Refuse groups with a layer that is not there or twice, or whose layers have factors of different shapes."""
    why = "shared_factors" if config.share == ALONE else f"share is {config.share!r}"
    where, seen = f"{why}: {factor} of", set[str]()
    for group in groups:
        for path in group:
            if path not in layers or path in seen:
                problem = "is in two places" if path in seen else "is no adapted linear layer"
                raise AdapterError(f"{where} {', '.join(group[:3])} would be one, but {path} {problem}.")
            seen.add(path)
            if factor == "B" and not config.has_own_mixer(path):
                raise AdapterError(
                    f"{where} {', '.join(group[:3])} would be one, but {path} has no mixer of its own (mixer_pattern), "
                    "and would differ from the others in nothing. Give it one, or exclude it."
                )
        shapes = {path: (layers[path].r[adapter_name], layers[path].widths[factor == "B"]) for path in group}
        devices = {path: getattr(layers[path].get_base_layer().weight, "device", None) for path in group}
        for kind, values in (("rank and width", shapes), ("device", devices)):
            if odd := next((path for path in group if values[path] != values[group[0]]), None):
                raise AdapterError(
                    f"{where} {group[0]} and {odd} cannot be one: {kind} {values[group[0]]} and {values[odd]}. Choose "
                    "other targets (exclude_modules, rank_pattern), or another form of sharing."
                )
