"""Guards around what PEFT does with a MoSLoRA configuration without asking anybody; set once, on import."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import peft
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import hotswap
from torch import nn

from mm_moslora.adapters.combine import Combination, add_weighted_adapter
from mm_moslora.adapters.config import MoSLoRAConfig, unmatched_patterns
from mm_moslora.adapters.inject import named_adapter_layers
from mm_moslora.adapters.layer import MoSLoRALayer
from mm_moslora.adapters.tied import untie
from mm_moslora.errors import AdapterError, suggestion
from mm_moslora.folders import writing


def guard_peft() -> None:
    """Make the operations of PEFT that do not know the mixer right, or refuse; called once, on import.

    - `LoraModel.add_weighted_adapter` reads A and B alone: adapters with mixers go to `add_weighted_adapter` here.
    - `hotswap_adapter` sets whatever the new folder lacks to zero, mixers too: it refuses, `hot_swap` takes its place.
    - targets and patterns that match nothing beside others that do, and a PEFT model inside a PEFT model, are refused.
    - adding an adapter with mixers to a layer that a plain LoRA adapter wrapped: quantised layers of PEFT would take it
      for plain LoRA.
    - `PeftModel.save_pretrained` of adapters with mixers says what it could not write.
    - merging into a weight that other modules share would change them, too: such weights are untied first.
    """
    _guard(LoraModel, "add_weighted_adapter", _weighted)
    _guard(LoraModel, "_create_and_replace", _existing)
    _guard(LoraModel, "_prepare_adapter_config", _names)
    _guard(peft.PeftModel, "save_pretrained", _saving)
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
        with writing(save_directory) if ours else contextlib.nullcontext():
            original(self, save_directory, *args, **rest)

    return save


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
    paths = [path for path, _ in model.named_modules() if path]
    targets: Any = config.target_modules
    named = None if targets is None or isinstance(targets, str) else sorted(map(str, targets))
    if named:
        known = {part for path in paths for part in (path, path.rpartition(".")[2])}
        ends = {path[at:] for path in paths for at in _starts(path)}
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


def _starts(path: str) -> Iterable[int]:
    """Where the names begin that a path ends with."""
    return [0, *(at + 1 for at, letter in enumerate(path) if letter == ".")]
