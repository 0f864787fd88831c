"""`MoSLoRAModel`: the tuner that PEFT puts around a model for every LoRA configuration, with mixers or without.

PEFT finds a tuner and a configuration class by the type in `adapter_config.json`. That type stays LORA, so that PEFT
without this package loads the folder as plain LoRA; `peft_patches` enters the classes of this module for it.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from mm_moslora.adapters.adapter_options import unmatched_patterns
from mm_moslora.adapters.folder_format import (
    MIXER_PART,
    OWN_CONFIG,
    OWN_TYPE,
    REFERENCE_MIXERS,
    START_PART,
    declares_mixers,
    downloaded,
    first_mixer,
    is_factor,
    named_as_modules,
)
from mm_moslora.adapters.folders.diffusers_saving import patch_diffusers
from mm_moslora.adapters.folders.folder_tensors import fold_state_dict, unexpected_entry
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.base_weights import stop_repacking
from mm_moslora.adapters.layers.layer_dispatch import create_layer
from mm_moslora.adapters.layers.uncalled_layers import why_not_called
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, config_from_dict
from mm_moslora.adapters.tree import base_model, named_adapter_layers, named_base_modules, untie
from mm_moslora.utils.errors import AdapterError, suggestion

# One entry for all modules: a type that cannot carry a mixer must raise, not fall through to PEFT's plain LoRA.
MoSLoRAConfig.layer_classes[nn.Module] = create_layer


class LoraConfigOfFolder(LoraConfig):
    """What PEFT makes for LORA: `MoSLoRAConfig` of a folder with mixers, else `LoraConfig`; and for `OWN_TYPE`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain `LoraConfig`, or `MoSLoRAConfig` for the type of options that name a mixer."""
        if kwargs.get("peft_type") == OWN_TYPE:
            return config_from_dict(kwargs)
        if declares_mixers(kwargs):
            raise AdapterError(
                "The folder holds mixers (lora_use_mixer), which this way of loading drops. Load it with "
                "mm_moslora.adapters.load_adapter."
            )
        return LoraConfig(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoraConfig:
        """The configuration of an adapter folder, or of one on the hub; see `peft.PeftConfig.from_pretrained`."""
        own = downloaded(pretrained_model_name_or_path, (OWN_CONFIG,), subfolder=subfolder, **kwargs)
        kind: type[LoraConfig] = LoraConfig if own is None else MoSLoRAConfig
        return kind.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


class MoSLoRAModel(LoraModel):
    """PEFT's `LoraModel`, which knows mixers; the same for every configuration that is no `MoSLoRAConfig`."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # PEFT calls this first with model and configuration, before it changes anything.
        if isinstance(peft_config, MoSLoRAConfig):
            for name, value in self._whole_targets.items():
                setattr(peft_config, name, value)
            _check_names(self.model, peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, or nothing of it; see `peft.tuners.tuners_utils.BaseTuner`."""
        config = self.peft_config.get(adapter_name)
        patch_diffusers()
        if not isinstance(config, MoSLoRAConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        self._whole_targets = _whole_targets(model, config)
        layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRALayer)]
        before = {id(layer) for layer in layers if layer.holds(adapter_name)}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _take_out(model, adapter_name, spared=before)
            raise
        if isinstance(config.target_modules, set):  # PEFT saves an adapted embedding with its base, by the short name
            ends = {path.rpartition(".")[2] for path in config.target_modules}
            config.target_modules |= ends.intersection(EMBEDDING_LAYER_NAMES)
        if not config.inference_mode:
            stop_repacking(model)

    def _create_and_replace(  # type: ignore[override]  # LoraModel's parameters, which are not BaseTuner's
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(lora_config, MoSLoRAConfig):
            stock = isinstance(target, LoraLayer) and not isinstance(target, MoSLoRALayer)
            if stock and not lora_config.is_plain(current_key):
                raise AdapterError(
                    f"{current_key} carries a plain {type(target).__module__}.{type(target).__name__} of another "
                    "adapter, which cannot hold a mixer. Load that adapter with mm_moslora.adapters.load_adapter, or "
                    "add the MoSLoRA adapter first."
                )
            if not lora_config.inference_mode and (reason := why_not_called(parent, target_name)):
                raise AdapterError(f"Target {current_key!r} cannot carry MoSLoRA: {reason}")
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """See PEFT's; it reads A and B alone."""
        layers = [layer for _, layer in named_adapter_layers(self.model)]
        if mixed := next((name for name in adapters if any(name in layer.lora_mixer for layer in layers)), None):
            raise AdapterError(
                f"Adapter {mixed!r} has mixers, and PEFT would add up A and B alone. Add up plain LoRA "
                '(export_adapter with layout="peft").'
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        untie(self.model)  # every way of merging in PEFT asks here first
        super()._check_merge_allowed()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        if isinstance(config, MoSLoRAConfig):
            for _, layer in named_adapter_layers(model):
                layer.mixer(adapter_name)  # refuses what no reader knows
            # In place: PEFT goes on with it for the modules that train whole.
            state_dict |= named_as_modules(model, state_dict)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        starts = {name: tensor for name, tensor in state_dict.items() if START_PART in name}
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in starts}
        if first_mixer(state_dict, REFERENCE_MIXERS):
            raise AdapterError(
                "The values hold mixers of the MoSLoRA authors' code. Load their folder with "
                "mm_moslora.adapters.load_adapter."
            )
        if not isinstance(config, MoSLoRAConfig):
            mixed = any(MIXER_PART in name for name in state_dict)
            state_dict = fold_state_dict(state_dict) if mixed else state_dict
            renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            if mixed and (stray := min(filter(is_factor, renamed), default=None)):
                raise AdapterError(
                    f"The values hold {stray}, and adapter {adapter_name!r}, a plain LoRA, has no place for it. Load "
                    "them as an adapter of their own (load_adapter, PeftModel.from_pretrained)."
                )
            return renamed
        if extra := unexpected_entry(state_dict, config, embeddings=_embeddings(model)):
            raise AdapterError(
                f"The values hold {extra!r}, for which the configuration of adapter {adapter_name!r} has no place."
            )
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if problem := _misfit(model, adapter_name, renamed):
            raise AdapterError(
                f"These values are not those of adapter {adapter_name!r}: {problem}. Load them under another adapter "
                "name, or delete that adapter (delete_adapter) first."
            )
        # For the layers' own hook.
        return renamed | {name.replace(START_PART, f"{START_PART}{adapter_name}."): starts[name] for name in starts}


def _embeddings(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the base's embedding and head."""
    base: Any = base_model(model)
    own: list[nn.Module | None] = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # a model without
            own.append(getattr(base, ask)())
    return {
        f"{path}.weight": tuple(getattr(module.weight, "ds_shape", module.weight.shape))
        for path, module in model.named_modules()
        if any(module is end for end in own) and isinstance(getattr(module, "weight", None), Tensor)
    }


def _whole_targets(model: nn.Module, config: MoSLoRAConfig) -> dict[str, Any]:
    """Options of a configuration that names whole paths of modules; empty for every other one."""
    # PEFT reads a name that ends in `gate_proj` or `w1`, in a model whose experts once were modules, as an expert's.
    names, modules = config.target_modules, dict(named_base_modules(model))
    if not names or isinstance(names, str) or any(name not in modules for name in names):
        return {}
    options = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    return {name: copy.copy(getattr(config, name)) for name in options}


def _check_names(model: nn.Module, config: MoSLoRAConfig) -> None:
    if isinstance(model, peft.PeftModel):
        raise AdapterError(
            "The model is a PeftModel already. A second wrapper saves names that no loader reads. Give it another "
            "adapter with add_moslora or model.add_adapter, or take the first one out (model.unload())."
        )
    if config.target_parameters:  # as PEFT reads some names of layers, such as gate_proj and w1
        raise AdapterError(
            f"{min(config.target_parameters)} holds the weights of experts, which carry no mixer. Name linear layers "
            "by their whole paths, or adapt experts with peft.LoraConfig(target_parameters=...)."
        )
    paths = [path for path, _ in model.named_modules() if path]
    targets: Any = config.target_modules
    named = None if targets is None or isinstance(targets, str) else sorted(map(str, targets))
    if named:
        names = {part for path in paths for part in (path, path.rpartition(".")[2])}
        ends = {".".join(parts[at:]) for parts in (path.split(".") for path in paths) for at in range(len(parts))}
        for target in named:
            if target not in ends and target != "all-linear":
                raise AdapterError(f"Target {target!r} matches no module of the model.{suggestion(target, names)}")
    if targets is not None and targets != "all-linear":
        paths = [path for path in paths if check_target_module_exists(config, path)]
    if not config.inference_mode:  # what was trained loads, whatever its configuration says besides
        lost = unmatched_patterns(config, paths)
        if lost:
            raise AdapterError(
                f"{', '.join(lost)} matches none of the {len(paths)} modules (the first: {', '.join(paths[:5])}). A "
                "key is a regular expression for the end of a module path."
            )


def _take_out(model: nn.Module, adapter_name: str, *, spared: set[int]) -> None:
    """Remove an adapter, and the layers that hold nothing else; layers in `spared` stay as they are."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, MoSLoRALayer) or id(layer) in spared:
                continue
            if set(layer.adapter_names()) - {adapter_name}:
                layer.delete_adapter(adapter_name)
            else:
                setattr(parent, name, layer.get_base_layer())


def _misfit(model: nn.Module, adapter_name: str, values: dict[str, Tensor]) -> str | None:
    """Why values under the model's names are not those of an adapter in it; None if they are."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRALayer)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        return "it is merged into the weights"
    if stray := min(
        (name for name in values if is_factor(name) or name.endswith(".lora_magnitude_vector.weight")), default=None
    ):
        return f"it has no {stray}"
    ends = tuple(f".lora_{kind}.{adapter_name}.weight" for kind in ("A", "B", "magnitude_vector"))
    ends += tuple(f".lora_embedding_{kind}.{adapter_name}" for kind in ("A", "B"))
    mixer = f"{MIXER_PART}{adapter_name}."
    present = named_as_modules(model, model.state_dict())
    adapter_state = {name: tensor for name, tensor in present.items() if name.endswith(ends) or mixer in name}
    mixed = {name.partition(mixer)[0] for name in values if mixer in name}
    # Values without a mixer mean the identity.
    named = [name for name in adapter_state if mixer not in name or name.partition(mixer)[0] in mixed]
    lost = [name for name in named if name not in values]
    if lost:
        return f"they lack {min(lost)}"
    if unknown := min((name for name in values if mixer in name and name not in adapter_state), default=None):
        return f"it has no {unknown}"
    for name, own in adapter_state.items():
        value = values.get(name)
        if value is not None and own.numel() and own.shape != value.shape:  # a shard of ZeRO-3 is empty
            return f"{name} is {list(own.shape)} there and {list(value.shape)} here"
        if value is not None and not (value.is_floating_point() and torch.isfinite(value).all()):
            return f"{name} holds {value.dtype} or numbers that are not finite, expected finite floats"
    return None
