"""The module tree of a model with adapters, without wrappers and without the insides of adapted layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mm_moslora.adapters.folder_format import WRAPPED, bare_name
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.kernels.lora.lora_linear import is_plain
from mm_moslora.utils.identity import sha256_of_text


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers: torch.compile, activation checkpointing, FSDP, `DataParallel`, DDP."""
    while True:
        inner = next((child for name, child in model.named_children() if name in WRAPPED), None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    model = unwrapped(model)
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model with its path, without adapters and their insides."""
    stack: list[tuple[str, nn.Module]] = [("", base_model(model))]
    while stack:
        path, module = stack.pop()
        module = unwrapped(module)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        yield path, module
        prefix = f"{path}." if path else ""
        stack.extend((prefix + name, child) for name, child in reversed(list(module.named_children())))


def stacked_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that hold several matrices each, as experts do, with their paths."""
    for path, module in modules:
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            for name, parameter in module.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) == 3 and shape[0] > 1:
                    yield f"{path}.{name}" if path else name, parameter


def named_adapter_layers(model: nn.Module) -> Iterator[tuple[str, MoSLoRALayer]]:
    """The adapted layers of a model with their paths in the base model."""
    for path, module in base_model(model).named_modules():
        if isinstance(module, MoSLoRALayer):
            yield bare_name(path), module


def adapted_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The adapted layers of any method of PEFT with their paths in the base model."""
    modules = base_model(model).named_modules()
    return [(bare_name(path), layer) for path, layer in modules if isinstance(layer, BaseTunerLayer)]


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter is one of an adapter, of this package or of any method of PEFT, by its name."""
    return any(part.startswith(_prefixes()) for part in name.split("."))


@cache
def _prefixes() -> tuple[str, ...]:
    return (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "modules_to_save")


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base model's structure: module paths and sizes, without adapters, dtype or quantisation.

    Two models with equal fingerprints can carry the same adapter. Their ids decide whether it was made for both.

    Returns:
        64 hexadecimal digits.
    """
    lines = []
    for path, module in named_base_modules(model):
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            lines.append(f"{path} linear {module.in_features} {module.out_features}")
            continue
        for name, parameter in module.named_parameters(recurse=False):
            lines.append(f"{path}.{name} {list(getattr(parameter, 'ds_shape', parameter.shape))}")
    return sha256_of_text("\n".join(sorted(lines)))


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
