"""Put adapters into a model: which modules, and into which component.

A name such as `q_proj` exists in the language model and in the vision tower alike, so targets are resolved inside the
requested component, into whole module paths.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.adapter_options import check_expression
from mm_moslora.adapters.layers.layer_dispatch import why_not_adaptable
from mm_moslora.adapters.layers.uncalled_layers import why_not_called
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.adapters.tree import named_adapter_layers, named_base_modules, stacked_parameters, unwrapped
from mm_moslora.utils.errors import AdapterError, suggestion

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_HEADS = ("lm_head", "output_layer", "embed_out")
# Heads that PEFT trains whole for a task.
_TASK_HEADS = {"SEQ_CLS": SEQ_CLS_HEAD_NAMES, "TOKEN_CLS": SEQ_CLS_HEAD_NAMES, "QUESTION_ANS": ["qa_outputs"]}
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One row of the table of adapted modules."""

    path: str
    """Path of the module in the base model."""
    in_features: int
    """D_in."""
    out_features: int
    """D_out."""
    rank: int
    """R."""
    scaling: float
    """alpha / R, or alpha / sqrt(R)."""
    mixer: str
    """How M started; `none` for plain LoRA (frozen identity)."""
    mixer_trainable: bool
    """Whether M trains."""
    parameters: int
    """Parameters of A, B and a trainable M."""


def resolve_targets(model: nn.Module, component: str = "", targets: str | Sequence[str] = ALL_LINEAR) -> list[str]:
    """Module paths to adapt inside one component.

    Args:
        component: module path of the component, such as `model.language_model`; empty is the whole model.
        targets: `all-linear` (every linear layer but the output head), a list of module names (`q_proj`,
            `self_attn.q_proj`), or a regular expression that matches the whole path within the component.

    Returns:
        Whole paths in the base model, in the model's order.

    Raises:
        AdapterError: no such component, or a target that matches nothing or something that cannot be adapted.
    """
    return resolve_in(model, [component], targets, why_not=why_not_adaptable)


def linear_targets(model: nn.Module, component: str = "") -> str | list[str]:
    """`all-linear`, or the names of a component's linear layers where it holds experts, which `all-linear` refuses."""
    inside = _modules_of(component, dict(named_base_modules(model)))
    if not any(stacked_parameters(inside.items())):
        return ALL_LINEAR
    return list(dict.fromkeys(path.rpartition(".")[2] for path in _linear_paths(inside, _head_modules(model))))


def resolve_in(
    model: nn.Module,
    components: Sequence[str],
    targets: str | Sequence[str],
    *,
    why_not: Callable[[nn.Module], str | None],
) -> list[str]:
    """`resolve_targets` inside several components; `why_not` gives the reason why a layer cannot be adapted."""
    modules = dict(named_base_modules(model))
    heads = _head_modules(model)
    resolved: dict[str, None] = {}
    empty = []
    for component in components:
        inside = _modules_of(component, modules)
        prefix = f"{component}." if component else ""
        paths = _match(inside, targets, heads)
        resolved |= dict.fromkeys(prefix + path for path in paths)
        empty += [] if paths else [component]
    where = " and ".join(repr(name) if name else "the model" for name in components)
    ends = set() if isinstance(targets, str) else set(targets)
    if unmatched := {end for end in ends if not any(f".{path}".endswith(f".{end}") for path in resolved)}:
        names = {part for path in modules for part in (path, path.rpartition(".")[2]) if part}
        raise AdapterError(
            f"Target {min(unmatched)!r} matches no module of {where}.{suggestion(min(unmatched), names)}"
            f"{_linear_names(modules)}"
        )
    if empty or not resolved:
        hint = f" A string is a regular expression for the whole path; names come as a list: [{targets!r}]."
        raise AdapterError(
            f"No module of {repr(empty[0]) if empty and empty[0] else where} matches the targets {targets!r}."
            f"{hint if isinstance(targets, str) else ''}{_linear_names(modules)}"
        )
    for path in resolved:
        reason = why_not(modules[path]) or _why_never_called(path, modules)
        if reason:
            raise AdapterError(f"Target {path!r} cannot carry MoSLoRA: {reason}")
    return list(resolved)


def _modules_of(component: str, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    if not component:
        return {path: module for path, module in modules.items() if path}
    if component not in modules:
        raise AdapterError(
            f"The model has no component {component!r}.{suggestion(component, modules)} "
            f"At the top it has: {', '.join(path for path in modules if path and path.count('.') < 2)}."
        )
    prefix = f"{component}."
    return {path.removeprefix(prefix): module for path, module in modules.items() if path.startswith(prefix)}


def _match(inside: dict[str, nn.Module], targets: str | Sequence[str], heads: set[int]) -> list[str]:
    if targets == ALL_LINEAR:
        _refuse_left_out_experts(inside)
        linear = _linear_paths(inside, heads)
        left_out = {path for path in linear if _why_never_called(path, inside)}
        if left_out:
            kinds = ", ".join(sorted({path.rpartition(".")[2] for path in left_out}))
            logger.info(
                "all-linear leaves out %d layers; their weight is read without a call: %s.", len(left_out), kinds
            )
        return [path for path in linear if path not in left_out]
    if isinstance(targets, str):
        check_expression(targets, "targets")
        pattern = re.compile(targets)
        return [path for path in inside if pattern.fullmatch(path)]
    return [path for path in inside if any(f".{path}".endswith(f".{name}") for name in targets)]


def _linear_paths(inside: dict[str, nn.Module], heads: set[int]) -> list[str]:
    return [
        path
        for path, module in inside.items()
        if _is_linear(module) and id(module) not in heads and path.rpartition(".")[2] not in _HEADS
    ]


def _refuse_left_out_experts(inside: dict[str, nn.Module]) -> None:
    """Refuse `all-linear` where experts, most weights of their model, are parameters and no layers."""
    stacked = {path: parameter.numel() for path, parameter in stacked_parameters(inside.items())}
    if stacked:
        linear = sum(p.numel() for module in inside.values() if _is_linear(module) for p in module.parameters())
        share = sum(stacked.values()) / (sum(stacked.values()) + linear)
        raise AdapterError(
            f"all-linear would leave out {share:.0%} of the weights of linear maps: {len(stacked)} parameters hold "
            f"several matrices each, as experts do, such as {min(stacked)!r}. Name the linear layers to adapt."
            f"{_linear_names(inside)}"
        )


def _is_linear(module: nn.Module) -> bool:
    """Linear layers of every kind, quantised ones too: they must raise later, not be skipped."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return (
        hasattr(module, "in_features") and hasattr(module, "out_features") and "linear" in type(module).__name__.lower()
    )


def _head_modules(model: nn.Module) -> set[int]:
    heads = set()
    for _, module in named_base_modules(model):
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if head is not None:
            heads.add(id(head.get_base_layer() if isinstance(head, BaseTunerLayer) else head))
    return heads


def _why_never_called(path: str, modules: dict[str, nn.Module]) -> str | None:
    parent, _, name = path.rpartition(".")
    return why_not_called(modules.get(parent), name)


def _linear_names(modules: dict[str, nn.Module]) -> str:
    names = dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module))
    return f" Linear layers here: {', '.join(names)}." if names else " It has no linear layer."


def add_moslora(
    model: nn.Module,
    config: MoSLoRAConfig,
    *,
    component: str | Sequence[str] = "",
    targets: str | Sequence[str] | None = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> peft.PeftModel:
    """Put an adapter into a model.

    Args:
        model: any module tree, or a PEFT model that gets one more adapter. Changed in place; frozen but for the adapter
            when it is the first.
        config: the adapter's configuration; not changed. Its `exclude_modules`, `layers_to_transform`,
            `layers_pattern` and `modules_to_save` take modules out of the targets, as in PEFT.
        component: module path of the component to adapt, or several that share this adapter; empty is the whole model.
        targets: see `resolve_targets`; None takes the configuration's `target_modules`, `all-linear` if it has none.
        autocast_adapter_dtype: keep the factors in float32 when the base is in half precision (PEFT's default).

    Returns:
        The PEFT model around `model`.

    Raises:
        AdapterError: see `resolve_targets`; a pattern of the configuration that matches nothing; a rank that does not
            fit its mixer; an adapter of this name. The model is untouched then.
    """
    _check_arguments(model, config, adapter_name)
    components = [component] if isinstance(component, str) else list(component)
    if targets is None:
        targets = cast("str | Sequence[str] | None", config.target_modules) or ALL_LINEAR
    paths = chosen_paths(config, resolve_in(model, components, targets, why_not=why_not_adaptable))
    for path in paths:
        if config.mixer_for(path) == "butterfly" and config.rank_for(path) % 2:
            raise AdapterError(f"{path} has rank {config.rank_for(path)}, but a butterfly mixer needs an even one.")
    return inject(model, config, paths, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def _check_arguments(model: object, config: object, adapter_name: object) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"The model is a {type(model).__name__}, expected a torch.nn.Module.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise AdapterError(
            f"The model is wrapped already ({type(model).__name__}), so the adapter's names would be another model's. "
            "Add the adapter first, and compile or distribute what add_moslora returns."
        )
    if not isinstance(config, MoSLoRAConfig):
        plain = " Plain LoRA is MoSLoRAConfig(mixer_init='identity', mixer_trainable=False)."
        hint = plain if isinstance(config, peft.LoraConfig) else ""
        raise AdapterError(f"The configuration is a {type(config).__name__}, expected a MoSLoRAConfig.{hint}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise AdapterError(f"The adapter's name is {adapter_name!r}, expected text without a dot.")


def chosen_paths(config: Any, paths: list[str]) -> list[str]:
    """The targets that a configuration of PEFT does not take out again."""
    # PEFT does not look at the layer's number where a target is a whole path.
    own = copy.copy(config)
    if heads := _TASK_HEADS.get(str(getattr(config.task_type, "value", config.task_type))):
        own.modules_to_save = [*(config.modules_to_save or ()), *heads]
    chosen = []
    for path in paths:
        own.target_modules = {path.rpartition(".")[2]}
        if check_target_module_exists(own, path):
            chosen.append(path)
    if not chosen:
        options = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        filters = ", ".join(f"{name}={value!r}" for name in options if (value := getattr(own, name, None)))
        first = ", ".join(paths[:_SHOWN])
        raise AdapterError(f"{filters} leaves none of the {len(paths)} targets (the first: {first}).")
    return chosen


def inject(
    model: nn.Module, config: MoSLoRAConfig, paths: Sequence[str], *, adapter_name: str, autocast_adapter_dtype: bool
) -> peft.PeftModel:
    """Put an adapter into exactly the modules at these whole paths; see `add_moslora`."""
    wrapper = next((module for module in model.modules() if unwrapped(module) is not module), None)
    if wrapper is not None:
        raise AdapterError(
            f"Parts of the model are wrapped ({type(wrapper).__name__}), so the adapter's names would be another "
            "model's. Add or load the adapter first, and compile or wrap what that returns."
        )
    own = copy.deepcopy(config)
    own.target_modules = set(paths)  # type: ignore[assignment]  # PEFT keeps lists as sets
    own.exclude_modules, own.layers_to_transform, own.layers_pattern = None, None, None
    if isinstance(model, peft.PeftModel):
        if adapter_name in model.peft_config:
            raise AdapterError(f"The model has an adapter {adapter_name!r} already. Choose another adapter_name.")
        model.add_adapter(adapter_name, own, autocast_adapter_dtype=autocast_adapter_dtype)
        wrapped = model
    else:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise AdapterError("The model holds adapters already. Pass the PeftModel that add_moslora returned.")
        wrapped = peft.get_peft_model(
            model, own, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
        )
    adapted = {path for path, layer in named_adapter_layers(wrapped) if layer.holds(adapter_name)}
    assert adapted == set(paths), f"asked for {sorted(adapted ^ set(paths))[:_SHOWN]} and PEFT did otherwise"
    return wrapped


def adapted_modules(model: nn.Module, *, adapter_name: str | None = None) -> list[AdaptedModule]:
    """The adapted modules, one row each: of one adapter, or of all (None) in the order of their names."""
    rows = []
    for path, layer in named_adapter_layers(model):
        for name in layer.adapter_names():
            if adapter_name not in (None, name):
                continue
            M = layer.mixer(name)
            trains = M is not None and bool(layer.lora_mixer[name].trainable)
            factors = (*layer.outer_factors(name), *([M] if M is not None and trains else ()))
            width_in, width_out = layer.widths
            rows.append(
                AdaptedModule(
                    path=path,
                    in_features=width_in,
                    out_features=width_out,
                    rank=layer.r[name],
                    scaling=layer.scaling[name],
                    mixer="none" if M is None else layer.mixer_init[name],
                    mixer_trainable=trains,
                    # A ZeRO-3 shard is empty on most ranks; DeepSpeed keeps the whole size beside it.
                    parameters=sum(int(getattr(factor, "ds_numel", factor.numel())) for factor in factors),
                )
            )
    return rows
