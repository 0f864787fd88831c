"""Operations on several adapters at once.

Shapes: A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import MIXER_PART, PREFIX, is_inner, mixers_in
from mm_moslora.adapters.folders.folder_tensors import check_tensors, differing_copies
from mm_moslora.adapters.folders.kept_start import set_starts
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.folders.save_folder import expected_shapes
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.factor_modules import Mixer
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, from_lora_config
from mm_moslora.adapters.tree import matched_path, named_adapter_layers, unwrapped
from mm_moslora.kernels.lora.lora_math import delta_weight
from mm_moslora.utils.errors import AdapterError

Combination = Literal["cat", "svd"]


@torch.no_grad()
def add_weighted_adapter(
    model: peft.PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    combination: Combination = "cat",
    rank: int | None = None,
) -> None:
    """Add an adapter with the weighted sum of other adapters' updates as its update.

    Args:
        model: the PEFT model; the new adapter is not made active. Modules that adapters train whole (`modules_to_save`)
            are added up as well: the base's weights and the weighted sum of what each adapter changed in them.
        adapters: names of the adapters to add up; plain LoRA and MoSLoRA may be mixed.
        weights: one factor each, negative ones too.
        adapter_name: name of the new adapter.
        combination: `cat` is exact: the factors side by side, the mixers as blocks of one, the ranks added up. `svd` is
            the best plain LoRA of a given rank.
        rank: R of `svd`; None takes the largest rank of the adapters.

    Raises:
        AdapterError: unknown adapter or combination, a name that is taken, not as many weights as adapters, an adapter
            that has more than A, M, B and whole modules, or none of them.
    """
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"There are {len(adapters)} adapters and {len(weights)} weights; give one weight each.")
    if combination not in ("cat", "svd"):
        raise AdapterError(
            f"The combination {combination!r} has no meaning for three factors: it would average A, M and B apart from "
            "each other. Use 'cat' (exact) or 'svd' (best plain LoRA of a rank)."
        )
    if adapter_name in _tuner(model).peft_config:
        raise AdapterError(f"The model has an adapter {adapter_name!r} already. Choose another adapter_name.")
    layers = _layers_of(model, adapters)
    ranks = {name: max(layer.r[name] for layer in layers.values() if layer.holds(name)) for name in adapters}
    new_rank = sum(ranks.values()) if combination == "cat" else rank or max(ranks.values())
    tuner = _tuner(model)
    config = _combined_config(tuner.peft_config[adapters[0]], new_rank, plain=combination == "svd")
    whole = {name for adapter in adapters for name in tuner.peft_config[adapter].modules_to_save or ()}
    config.modules_to_save = sorted(whole) or None
    config.target_modules = {path for path in layers if not is_inner(path)}  # type: ignore[assignment]
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    for layer in layers.values():
        parts = [
            (weight, layer.factors(name)) for name, weight in zip(adapters, weights, strict=True) if layer.holds(name)
        ]
        target = layer.factors(adapter_name)
        target.A.zero_()
        target.B.zero_()
        if combination == "svd":
            updates = [weight * delta_weight(own.A, own.M, own.B, own.scaling) for weight, own in parts]
            # The best A and B for the sum, with the singular values in B.
            U, S, Vh = torch.linalg.svd(cast(Tensor, sum(updates)).flatten(1), full_matrices=False)
            count = min(len(target.A), len(S))
            target.A.flatten(1)[:count] = Vh[:count].to(target.A)
            target.B.flatten(1)[:, :count] = (U[:, :count] * S[:count]).to(target.B)
            continue
        assert target.M is not None
        target.M.copy_(torch.eye(new_rank))
        layer.keep_start(adapter_name, _start_side_by_side(layer, adapters, new_rank))
        start = 0
        for weight, factors in parts:
            stop = start + len(factors.A)
            target.A[start:stop] = factors.A
            target.B[:, start:stop] = factors.B * (weight * factors.scaling)
            if factors.M is not None:
                target.M[start:stop, start:stop] = factors.M
            start = stop
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            _add_up_module(module, list(zip(adapters, weights, strict=True)), adapter_name)
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def _start_side_by_side(layer: MoSLoRALayer, adapters: Sequence[str], rank: int) -> dict[str, Tensor]:
    """The start of a mixer, with the starts of other adapters as blocks; empty where one of them is unknown."""
    blocks = []
    for name in filter(layer.holds, adapters):
        if name not in layer.lora_mixer:
            blocks.append(torch.eye(layer.r[name]))
        elif name in layer.starts and (mixer := layer.starts[name].mixer):
            blocks.append(cast(Mixer, layer.lora_mixer[name]).form.matrix(mixer))
        else:
            return {}
    blocks.append(torch.eye(rank - sum(map(len, blocks))))
    return {"weight": torch.block_diag(*blocks)}


def _add_up_module(module: ModulesToSaveWrapper, weights: list[tuple[str, float]], adapter_name: str) -> None:
    states = {name: part.state_dict() for name, part in module.modules_to_save.items()}
    base = module.original_module.state_dict()
    for key, target in states[adapter_name].items():
        if target.is_floating_point():
            changes = (w * (states[name][key].float() - base[key].float()) for name, w in weights if name in states)
            target.copy_(sum(changes, base[key].float()))


def _tuner(model: nn.Module) -> Any:
    return model.base_model if isinstance(model, peft.PeftModel) else model


def _layers_of(model: nn.Module, adapters: Sequence[str]) -> dict[str, MoSLoRALayer]:
    configs = cast(dict[str, Any], _tuner(model).peft_config)
    for name in adapters:
        if name not in configs:
            raise AdapterError(f"The model has no adapter {name!r}; it has {sorted(configs)}.")
        if configs[name].use_dora:
            raise AdapterError(f"Adapter {name!r} uses DoRA: its update is not a sum of factors. Merge it instead.")
        for option in ("trainable_token_indices", "lora_bias", "target_parameters"):
            if getattr(configs[name], option):
                raise AdapterError(f"Adapter {name!r} has {option}, which cannot be added up. Merge it instead.")
    layers = dict(named_adapter_layers(_tuner(model).model))
    paths_of = {name: {path for path, layer in layers.items() if layer.holds(name)} for name in adapters}
    for name, paths in paths_of.items():
        if not paths:
            raise AdapterError(f"Adapter {name!r} sits in no module that carries MoSLoRA, and cannot be added up.")
        for mixer in (cast(Mixer, layers[path].lora_mixer[name]) for path in paths if name in layers[path].lora_mixer):
            if not mixer.form.fixed:
                mixer.matrix()  # says why it has none
    return {path: layers[path] for path in sorted(set().union(*paths_of.values()))}


def _combined_config(source: LoraConfig, rank: int, *, plain: bool) -> MoSLoRAConfig:
    config = source if isinstance(source, MoSLoRAConfig) else from_lora_config(source)
    # B carries the weights and the scalings, so that s is 1.
    return dataclasses.replace(
        config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False, init_lora_weights=True,
        mixer_form="dense", factor_form="free", mixer_pattern={}, mixer_init="identity", mixer_trainable=not plain,
        share="none", shared_factors={},
    )  # fmt: skip


@torch.no_grad()
def hot_swap(model: peft.PeftModel, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Copy the values of another adapter folder into an adapter of the model; its modules stay.

    Works on a compiled model, which does not compile again. Plain LoRA may be swapped in: its mixers are the identity.

    Args:
        model: the PEFT model; the adapter keeps its name.
        folder: an adapter folder with the same modules and ranks.
        adapter_name: the adapter to replace.

    Raises:
        AdapterError: modules, ranks, scalings or layout differ, or the adapter is merged; nothing is changed then.
    """
    model = cast(peft.PeftModel, unwrapped(model))
    content = read_folder(folder)
    layers = {path: layer for path, layer in named_adapter_layers(model) if layer.holds(adapter_name)}
    if not layers:
        raise AdapterError(f"The model has no adapter {adapter_name!r} to swap.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise AdapterError(f"Adapter {adapter_name!r} is merged into the weights. Unmerge it before swapping.")
    shapes = expected_shapes(model, adapter_name)
    tensors = dict(content.tensors)
    mixers = mixers_in(tensors)
    for path, layer in layers.items():
        if adapter_name in layer.lora_mixer and f"{PREFIX}{path}" not in mixers:
            identity = cast(Mixer, layer.lora_mixer[adapter_name]).form.identity(layer.r[adapter_name])
            tensors |= {f"{PREFIX}{path}{MIXER_PART}{name}": tensor for name, tensor in identity.items()}
    check_tensors(tensors, shapes)
    extra = sorted(tensors.keys() - shapes.keys())
    if extra:
        raise AdapterError(
            f"{folder} holds {extra[0]!r} besides the factors, which cannot be swapped in. Load it anew."
        )
    current: Any = model.peft_config[adapter_name]
    keys = ("use_rslora", "use_dora", "alpha_pattern", "lora_dropout", *(["mixer_form"] if mixers else []))
    if copies := differing_copies(current.shared_factors, tensors):
        raise AdapterError(
            f"Layers share {copies[0]} in the model, and {folder} holds another {copies[1]}. Load it as an adapter of "
            "its own."
        )
    for key in keys:
        if getattr(current, key) != getattr(content.config, key):
            raise AdapterError(
                f"{folder} has {key}={getattr(content.config, key)!r}, the adapter in the model "
                f"{getattr(current, key)!r}. Load it as an adapter of its own."
            )
    if list(content.config.target_parameters or ()) != list(current.target_parameters or ()):
        raise AdapterError(f"{folder} adapts other experts than the adapter in the model. Load it as one of its own.")
    for path, layer in layers.items():
        for name, _ in layer.named_factor_shapes(adapter_name):
            kind, _, rest = name.partition(".")
            owner = getattr(layer, kind)[adapter_name]
            value = tensors[f"{PREFIX}{path}.{name}"]
            if rest:
                owner.load_state_dict({rest: value}, strict=False)
            else:
                owner.copy_(value)
        # The out_proj of an attention follows the attention.
        layer.lora_alpha[adapter_name] = content.config.alpha_for(matched_path(path, layer))
        layer.set_scale(adapter_name, 1.0)
    set_starts(model, adapter_name, content.start)
    current.lora_alpha = content.config.lora_alpha
