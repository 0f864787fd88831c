"""Guards around what PEFT does with a MoSLoRA configuration without asking anybody; set once, on import."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
from peft.tuners.lora import LoraLayer, LoraModel, intruders
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import hotswap, infer_device
from torch import nn

from mm_moslora.adapters.adapter_targets import named_adapter_layers
from mm_moslora.adapters.folders.load_folder import set_values
from mm_moslora.adapters.folders.save_folder import OWN_WEIGHTS, named_as_modules
from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, unmatched_patterns
from mm_moslora.adapters.tied_weights import untie
from mm_moslora.adapters.uncalled_layers import why_not_called
from mm_moslora.adapters.weighted_adapters import Combination, add_weighted_adapter
from mm_moslora.utils.errors import AdapterError, suggestion
from mm_moslora.utils.run_paths import writing


def guard_peft() -> None:
    """Make the operations of PEFT that do not know the mixer right, or refuse; called once, on import.

    - `LoraModel.add_weighted_adapter` reads A and B alone: adapters with mixers go to `add_weighted_adapter` here.
    - `hotswap_adapter` sets whatever the new folder lacks to zero, mixers too: it refuses, `hot_swap` takes its place.
    - targets and patterns that match nothing beside others that do, and a PEFT model inside a PEFT model, are refused.
    - adding an adapter with mixers to a layer that a plain LoRA adapter wrapped: quantised layers of PEFT would take it
      for plain LoRA.
    - `PeftModel.save_pretrained` of adapters with mixers says what it could not write.
    - `PeftModel.load_adapter` into a MoSLoRA adapter that is there (what trainers call to go on from a checkpoint, or
      to load the best one) reads A, M and B: the folded factors are right, but no place to go on from.
    - targets whose weight is read in place, and embeddings that look up something else, are refused.
    - an injection that fails halfway is taken back.
    - `reduce_intruder_dimension` writes A and B beside a mixer that it does not know: it refuses.
    - merging into a weight that other modules share would change them, too: such weights are untied first.
    """
    _guard(LoraModel, "add_weighted_adapter", _weighted)
    _guard(LoraModel, "_create_and_replace", _existing)
    _guard(LoraModel, "_prepare_adapter_config", _names)
    _guard(peft.PeftModel, "save_pretrained", _saving)
    _guard(peft.PeftModel, "load_adapter", _loading)
    _guard(LoraModel, "inject_adapter", _injecting)
    _guard(intruders, "reduce_intruder_dimension", _intruding)
    _guard(BaseTuner, "_check_merge_allowed", _merging)
    # It compares these keys with `to_dict` of both configurations; stock LoRA has no mixer_init.
    keys = hotswap.CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA]
    if "mixer_init" not in keys:
        keys.append("mixer_init")


def _guard(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a guard around a method, once."""
    original = getattr(owner, name)
    if hasattr(original, "_knows_mixers"):
        return
    guarded: Any = functools.wraps(original)(around(original))
    guarded._knows_mixers = True
    setattr(owner, name, guarded)


def _weighted(original: Callable[..., None]) -> Callable[..., None]:
    def add(
        self: Any,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **rest: Any,
    ) -> None:
        layers = [layer for _, layer in named_adapter_layers(self.model)]
        if not any(name in layer.lora_mixer for layer in layers for name in adapters):
            original(self, adapters, weights, adapter_name, combination_type, **rest)
            return
        unknown = sorted(key for key, value in rest.items() if key != "svd_rank" and value not in (None, True, "total"))
        if unknown:
            raise AdapterError(f"{unknown[0]} is not supported for adapters with mixers. Leave it out.")
        kind = cast(Combination, combination_type)
        rank = rest.get("svd_rank")
        add_weighted_adapter(self, adapters, weights, adapter_name, combination=kind, rank=rank)

    return add


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    def save(self: Any, save_directory: str, *args: Any, **rest: Any) -> None:
        ours = any(isinstance(config, MoSLoRAConfig) for config in self.peft_config.values())
        if ours:
            state = rest.get("state_dict")
            rest["state_dict"] = named_as_modules(self, self.state_dict() if state is None else state)
        with writing(save_directory) if ours else contextlib.nullcontext():
            original(self, save_directory, *args, **rest)

    return save


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **rest: Any) -> Any:
        ours = isinstance(self.peft_config.get(adapter_name), MoSLoRAConfig)
        if (
            not ours
            or rest.get("key_mapping")
            or not Path(model_id, rest.get("subfolder") or "", OWN_WEIGHTS).is_file()
        ):
            return original(self, model_id, adapter_name, is_trainable, *args, **rest)
        device = (args[0] if args else rest.get("torch_device")) or infer_device()
        low = bool(rest.get("low_cpu_mem_usage"))
        folder = Path(model_id, rest.get("subfolder") or "")
        result = set_values(self, folder, adapter_name, device=device if low else None, low_cpu_mem_usage=low)
        wide = rest.get("autocast_adapter_dtype", True)
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=wide)
        if not is_trainable:
            self.eval()
        return result

    return load


def _injecting(original: Callable[..., None]) -> Callable[..., None]:
    def inject(self: Any, model: nn.Module, adapter_name: str, *args: Any, **rest: Any) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRALayer)]
        before = {id(layer) for layer in layers if layer.holds(adapter_name)}
        try:
            original(self, model, adapter_name, *args, **rest)
        except Exception:
            if isinstance(self.peft_config.get(adapter_name), MoSLoRAConfig):
                _take_out(model, adapter_name, spared=before)
            raise

    return inject


def _take_out(model: nn.Module, adapter_name: str, *, spared: set[int]) -> None:
    """Remove whatever there is of an adapter, and the layers that hold nothing else; not in layers that had it."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, MoSLoRALayer) or id(layer) in spared:
                continue
            if set(layer.adapter_names()) - {adapter_name}:
                layer.delete_adapter(adapter_name)
            else:
                setattr(parent, name, layer.get_base_layer())


def _intruding(original: Callable[..., None]) -> Callable[..., None]:
    def reduce(peft_model: Any, old_adapter_name: str = "default", *args: Any, **rest: Any) -> None:
        if isinstance(peft_model.peft_config.get(old_adapter_name), MoSLoRAConfig):
            raise AdapterError(
                "reduce_intruder_dimension writes A and B of a new adapter and knows no mixer. Give it plain LoRA: "
                "peft.PeftModel.from_pretrained on the folder of this adapter."
            )
        original(peft_model, old_adapter_name, *args, **rest)

    return reduce


def _merging(original: Callable[..., None]) -> Callable[..., None]:
    def check(self: Any) -> None:  # what every way of merging in PEFT calls first
        untie(self.model)
        original(self)

    return check


def _existing(original: Callable[..., None]) -> Callable[..., None]:
    def create(self: Any, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, **rest: Any) -> None:
        stock = isinstance(target, LoraLayer) and not isinstance(target, MoSLoRALayer)
        path = rest.get("current_key") or (args[-1] if args and isinstance(args[-1], str) else "")
        if stock and isinstance(lora_config, MoSLoRAConfig) and not lora_config.is_plain(path):
            raise AdapterError(
                f"{path} carries a plain {type(target).__module__}.{type(target).__name__} of another adapter, which "
                "cannot hold a mixer. Load that adapter with mm_moslora.adapters.load_adapter, or add the MoSLoRA "
                "adapter first."
            )
        parent: Any = rest.get("parent") or next((item for item in args if isinstance(item, nn.Module)), None)
        trains = isinstance(lora_config, MoSLoRAConfig) and not lora_config.inference_mode
        if trains and not isinstance(parent, nn.MultiheadAttention):  # whose out_proj PEFT adapts with the whole
            reason = why_not_called(parent, path.rpartition(".")[2])
            if reason:
                raise AdapterError(f"Target {path!r} cannot carry MoSLoRA: {reason}")
        original(self, lora_config, adapter_name, target, *args, **rest)

    return create


def _names(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, peft_config: Any, model_config: Any) -> Any:
        # The first moment at which the model and the configuration are there, and nothing is changed.
        if isinstance(peft_config, MoSLoRAConfig):
            _check_names(self.model, peft_config)
        return original(self, peft_config, model_config)

    return prepare


def _check_names(model: nn.Module, config: MoSLoRAConfig) -> None:
    if isinstance(model, peft.PeftModel):
        raise AdapterError(
            "The model is a PeftModel already; wrapped once more, nobody could load what it saves. Give it another "
            "adapter with add_moslora or model.add_adapter, or take the first one out (model.unload())."
        )
    if config.target_parameters:
        raise AdapterError(
            f"The model holds {', '.join(config.target_parameters)} as parameters and not as linear layers (PEFT takes "
            "the old names of experts for target_parameters), which cannot carry MoSLoRA. Name linear layers, or take "
            "peft.LoraConfig."
        )
    paths = [path for path, _ in model.named_modules() if path]
    targets: Any = config.target_modules
    named = None if targets is None or isinstance(targets, str) else sorted(map(str, targets))
    if named:
        known = {part for path in paths for part in (path, path.rpartition(".")[2])}
        ends = {".".join(parts[at:]) for parts in (path.split(".") for path in paths) for at in range(len(parts))}
        for target in named:
            if target not in ends and target != "all-linear":
                raise AdapterError(f"Target {target!r} matches no module of the model.{suggestion(target, known)}")
    if targets is not None and targets != "all-linear":
        paths = [path for path in paths if check_target_module_exists(config, path)]
    if not config.inference_mode:  # what was trained loads, whatever its configuration says besides
        lost = unmatched_patterns(config, paths)
        if lost:
            raise AdapterError(
                f"{', '.join(lost)} matches none of the modules to adapt. A key is a regular expression for the end of "
                "a module path."
            )
