"""The stacked parameters of experts in a model: which ones names mean, and which ones `all-linear` does not reach."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from mm_moslora.adapters.folder_format import wrapper_paths
from mm_moslora.adapters.layers.expert_parameters import why_not_adaptable_parameter
from mm_moslora.adapters.tree import named_base_modules
from mm_moslora.utils.errors import AdapterError, suggestion


def stacked_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that hold several matrices each, as experts do, with their paths.

    Args:
        modules: with their paths.
    """
    for path, module in modules:
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            for name, parameter in module.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) == 3 and shape[0] > 1:
                    yield f"{path}.{name}" if path else name, parameter


def short_names(paths: Iterable[str]) -> list[str]:
    """Names of stacked parameters for `target_parameters`: that of the module and that of the parameter."""
    return list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))


def resolve_parameters(model: nn.Module, components: Sequence[str], names: Iterable[str]) -> list[str]:
    """Whole paths of the stacked parameters to adapt, in the model's order: the one in which PEFT nests its wrappers.

    Args:
        model: with or without adapters.
        components: module paths to look in; "" is the whole model.
        names: `target_parameters`: whole paths, or their ends, such as ``experts.gate_up_proj``.

    Raises:
        AdapterError: a name that matches nothing, or a parameter that is no stack of matrices.
    """
    wanted, modules = list(dict.fromkeys(names)), list(named_base_modules(model))
    unmatched, resolved = set(wanted), []
    inside = tuple(f"{component}." for component in components if component)
    for path, module in modules:
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            matches = {target for target in wanted if full == target or full.endswith(f".{target}")}
            if not matches or ("" not in components and not full.startswith(inside)):
                continue
            unmatched -= matches
            if not path:
                raise AdapterError(
                    f"Parameter {name!r} lies in the model itself, and PEFT adapts those of modules inside. Wrap the "
                    "model in a module."
                )
            if reason := why_not_adaptable_parameter(module, name):
                raise AdapterError(f"Parameter {full!r} cannot carry MoSLoRA: {reason}")
            resolved.append(full)
    if unmatched:
        stacked = short_names(path for path, _ in stacked_parameters(modules))
        held = f" Stacked parameters here: {', '.join(stacked)}." if stacked else " It has no stacked parameters."
        where = " and ".join(repr(name) if name else "the model" for name in components)
        raise AdapterError(
            f"target_parameters names {min(unmatched)!r}, which is no parameter of {where}."
            f"{suggestion(min(unmatched), stacked)}{held}"
        )
    return resolved


def check_nesting(saved: Sequence[str], present: Sequence[str]) -> None:
    """Refuse factors that a folder nests otherwise than the model; see `folder_format.parameter_at`.

    Args:
        saved: paths of parameters in the folder's order; ends of paths have none.
        present: those of the model.

    Raises:
        AdapterError: another order, by which the factors would be exchanged without a word.
    """
    saved_at, present_at = wrapper_paths(saved), wrapper_paths(present)
    if set(saved) == set(present) and saved_at != present_at:
        path = next(path for path in present_at if saved_at.get(path) != present_at[path])
        raise AdapterError(
            f"The folder holds factors of {saved_at.get(path)} where the model nests those of {present_at[path]}: its "
            "modules register their parameters in another order. Load it with the version of transformers it was made "
            "with, merge, and save the model."
        )


def not_excluded(config: Any, parameters: Sequence[str]) -> list[str]:
    """The parameters in modules that a configuration does not take out again; PEFT looks at layers only.

    Args:
        config: its `exclude_modules`, `layers_to_transform`, `layers_pattern` and `modules_to_save` are read.
        parameters: whole paths.

    Raises:
        AdapterError: there are none left.
    """
    own, chosen = copy.copy(config), []
    for parameter in parameters:
        holder = parameter.rpartition(".")[0]
        own.target_modules = {holder.rpartition(".")[2]}
        if check_target_module_exists(own, holder):
            chosen.append(parameter)
    if parameters and not chosen:
        raise AdapterError(
            "exclude_modules, layers_to_transform, layers_pattern and modules_to_save leave none of the "
            f"{len(parameters)} stacked parameters (the first: {parameters[0]})."
        )
    return chosen


def layers_read_as_experts(model: nn.Module, config: LoraConfig) -> list[str]:
    """Layers that PEFT, where this package is not imported, takes for experts by their names, and leaves out.

    Args:
        model: without adapters.
        config: plain LoRA's, with whole paths of modules.
    """
    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model=model, conversions=None)
    except ValueError:  # some of the names that belong together are missing
        read.target_modules = []
    return sorted(set(config.target_modules or ()) - set(read.target_modules or ()))


def refuse_left_out_experts(modules: dict[str, nn.Module], *, linear: int, names: str, hint: str | None) -> None:
    """Refuse `all-linear` without `target_parameters` where experts, most weights of their model, are parameters.

    Args:
        modules: of the component, by their paths.
        linear: number of weights of its linear layers.
        names: of its linear layers, for the message.
        hint: what to say where they cannot be adapted; None: they can.

    Raises:
        AdapterError: a module that is no layer holds a parameter ``[E, D_out, D_in]`` with E above 1.
    """
    stacked = {path: parameter.numel() for path, parameter in stacked_parameters(modules.items())}
    if stacked:
        share = sum(stacked.values()) / (sum(stacked.values()) + linear)
        hint = hint or f" Adapt them, too, with target_parameters (adapter.target_parameters): {short_names(stacked)}."
        raise AdapterError(
            f"all-linear would leave out {share:.0%} of the weights of linear maps: {len(stacked)} parameters hold "
            f"several matrices each, as experts do, such as {min(stacked)!r}.{hint} Or name the linear layers to adapt."
            f"{names}"
        )
