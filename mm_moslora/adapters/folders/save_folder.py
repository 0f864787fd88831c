"""Save an adapter: take it out of its model, check it, write its folder; see `folder_format`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.folder_format import (
    FORMAT,
    FORMAT_VERSION,
    OWN_CONFIG,
    OWN_WEIGHTS,
    PREFIX,
    START_PART,
    START_WEIGHTS,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    bare_name,
    is_factor,
    mixers_in,
    named_as_modules,
    read_tensors,
    target_paths,
)
from mm_moslora.adapters.folders.folder_tensors import (
    check_shapes,
    check_values,
    fold_state_dict,
    initial_mixers,
    read_initial_mixers,
    shapes_by_rank,
)
from mm_moslora.adapters.layers.base_weights import why_not_whole
from mm_moslora.adapters.tree import base_fingerprint, base_model, named_adapter_layers, unwrapped
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import discard, read_json, replace_text, staging
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.run_paths import writing


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter as the double folder.

    Args:
        folder: made if missing; files of an earlier save are replaced.
        state: parameter name to full tensor, for values that the model does not hold (ZeRO-3 shards, float32 masters).
            Names are those of `named_parameters`, of the PEFT model or of the base. Must hold every parameter of the
            adapter; anything else in it is ignored.
        base: identity of the base model to remember, such as `{"id": ..., "revision": ...}`; JSON values.

    Raises:
        AdapterError: no such adapter; a factor that is missing, empty, of the wrong shape or not finite.
        OSError: the folder cannot be written.
    """
    adapter_snapshot(model, adapter_name=adapter_name, state=state, base=base).write(Path(folder))


@dataclass(frozen=True, kw_only=True)
class AdapterSnapshot:
    """An adapter taken out of its model, so that it can be written while the model trains."""

    config: AdapterOptions
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    base: dict[str, Any]
    auto_mapping: dict[str, str] | None
    initial_mixers: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the double folder; see `save_adapter`."""
        check_shapes(self.tensors, self.shapes)
        write_folder(
            folder, self.config, self.tensors, base=self.base, auto_mapping=self.auto_mapping,
            start=self.initial_mixers,
        )  # fmt: skip


def adapter_snapshot(
    model: nn.Module,
    *,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
) -> AdapterSnapshot:
    """The adapter that `save_adapter` writes; tensors that are float32 on the CPU are not copied."""
    model = unwrapped(model)
    config = adapter_config(model, adapter_name)
    return AdapterSnapshot(
        config=config,
        tensors=adapter_tensors(model, adapter_name, state),
        shapes=expected_shapes(model, adapter_name),
        base=dict(base or {}) | {"fingerprint": base_fingerprint(model)},
        auto_mapping=_class_of(type(base_model(model))) if config.task_type is None else None,
        initial_mixers=initial_mixers(model, adapter_name),
    )


def adapter_config(model: nn.Module, adapter_name: str) -> AdapterOptions:
    """The configuration of one adapter of a PEFT model or of the base model with adapters inside."""
    if isinstance(model, peft.PeftMixedModel):
        raise AdapterError(
            "A PeftMixedModel cannot be saved, in PEFT neither: its adapters lie inside each other. Merge it "
            "(merge_and_unload), or save the adapters before they are mixed."
        )
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, dict) else {}
    if adapter_name not in configs:
        raise AdapterError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, AdapterOptions):
        raise AdapterError(
            f"Adapter {adapter_name!r} has a {type(config).__name__}, expected MoSLoRAConfig. Save it with its own "
            "library."
        )
    return config


def expected_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names, as in the folder, and shapes of every A, M and B of an adapter."""
    return {
        f"{PREFIX}{path}.{name}": shape
        for path, layer in named_adapter_layers(model)
        if layer.holds(adapter_name)
        for name, shape in layer.named_factor_shapes(adapter_name)
    }


def adapter_tensors(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor of an adapter under its name in the folder, in float32 on the CPU; see `save_adapter`."""
    full = named_as_modules(model, model.state_dict())
    if state is not None:
        own = {_bare(name): name for name in full}
        parameters = {_bare(name) for name, _ in model.named_parameters()}
        values = {_bare(name): tensor for name, tensor in state.items()}
        lost = sorted(
            name for name in parameters - values.keys() if "lora_" in name and f".{adapter_name}." in f"{name}."
        )
        if lost:
            raise AdapterError(
                f"The state to save lacks {len(lost)} parameters of adapter {adapter_name!r}, first {lost[0]!r}. "
                "Gather all of them before saving."
            )
        full |= {own[name]: tensor for name, tensor in values.items() if name in own}
    tensors = get_peft_model_state_dict(model, state_dict=full, adapter_name=adapter_name, save_embedding_layers=False)
    for name, tensor in tensors.items():
        if reason := why_not_whole(tensor):
            raise AdapterError(f"{name} {reason}")
    prefix = "" if isinstance(model, peft.PeftModel) else PREFIX
    return {prefix + bare_name(name): tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    """A parameter's name without the parts that wrappers and PEFT add."""
    return re.sub(r"^(module\.)*", "", bare_name(name)).removeprefix(PREFIX)


def write_folder(
    folder: Path,
    config: AdapterOptions,
    tensors: Mapping[str, Tensor],
    *,
    base: Mapping[str, Any],
    auto_mapping: Mapping[str, Any] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the double folder from factors under their names in the folder."""
    paths = target_paths(tensors)
    check_shapes(tensors, shapes_by_rank(config, tensors))
    check_values(tensors)
    contents = {STOCK_WEIGHTS: fold_state_dict(tensors), OWN_WEIGHTS: tensors}
    if start:
        contents[START_WEIGHTS] = start
    with writing(folder), staging(folder, (STOCK_CONFIG, *contents, OWN_CONFIG)) as staged:
        for name, content in contents.items():
            save_file(_apart(content), staged / name, metadata={"format": "pt"})
        _write_json(staged / STOCK_CONFIG, stock_config(config, paths, auto_mapping))
        own = config_to_dict(config) | {"target_modules": paths, "inference_mode": True}
        files = {name: sha256_of(staged / name) for name in contents}
        _write_json(staged / OWN_CONFIG, _manifest(own, files=files, base=base))
        if not start:
            discard(folder / START_WEIGHTS)  # of an earlier adapter


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without shared memory, as safetensors requires; tied modules that train whole share it."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        result[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    return result


def _manifest(config: dict[str, Any], *, files: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
    needed = dict(files)
    start = needed.pop(START_WEIGHTS, None)  # a folder without it loads
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config,
        "files": needed,
        "base": dict(base),
    } | ({} if start is None else {"start": start})


def stock_config(
    config: AdapterOptions, paths: Sequence[str] | None, auto_mapping: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of stock PEFT's `adapter_config.json`; `paths` are the adapted modules (None: as they are)."""
    changes: dict[str, Any] = {"inference_mode": True, "auto_mapping": auto_mapping}
    if not config.changes_base:  # else PEFT must take the same start out of its base
        changes["init_lora_weights"] = True
    if paths is not None:
        changes |= {"target_modules": list(paths), "exclude_modules": None}
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    data = config_to_dict(config.to_lora_config(**changes))
    alpha = data["lora_alpha"]
    return data | {"lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


def config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """Plain JSON data of a configuration; `config_from_dict` reads it back equal."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _class_of(kind: type[nn.Module]) -> dict[str, str]:
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def complete_folder(folder: Path, config: AdapterOptions, *, auto_mapping: Mapping[str, Any] | None) -> None:
    """Turn what `PeftModel.save_pretrained` just wrote, with or without weights, into the double folder."""
    weights = folder / STOCK_WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder / 'adapter_model.bin'} is a pickle: stock PEFT would load it and drop the mixers. "
            "Save with safe_serialization=True, and remove that file."
        )
    if _is_intact(folder):  # it is an adapter folder already; only the configuration is new
        manifest = read_json(folder / OWN_CONFIG)
        own, start = read_tensors(folder / OWN_WEIGHTS), read_initial_mixers(folder, manifest)
        write_folder(folder, config, own, base=manifest["base"], auto_mapping=auto_mapping, start=start)
        return
    if not weights.is_file():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / STOCK_CONFIG, stock_config(config, None, auto_mapping))
            _write_json(folder / OWN_CONFIG, _manifest(config_to_dict(config), files={}, base={}))
        return
    # The base weight of an adapted embedding, which PEFT adds unless save_embedding_layers is False, keeps its dtype.
    tensors = {bare_name(name): t if ".base_layer." in name else t.float() for name, t in read_tensors(weights).items()}
    start = {name: tensors.pop(name).float() for name in list(tensors) if START_PART in name}
    if empty := next((name for name, tensor in tensors.items() if is_factor(name) and not tensor.numel()), None):
        raise AdapterError(f"{empty} of {weights} is empty. Gather the factors of all ranks before saving.")
    mixed = (path for path in target_paths(tensors) if not config.is_plain(path))
    mixers = mixers_in(tensors)
    bare = next((path for path in mixed if f"{PREFIX}{path}" not in mixers), None)
    if bare is not None:
        raise AdapterError(
            f"{weights} has no mixer for {bare}, and the configuration gives it one: they are not of one adapter. Save "
            "the model (save_adapter, save_pretrained), or write the configuration into a folder of its own."
        )
    write_folder(folder, config, tensors, base={}, auto_mapping=auto_mapping, start=start)


def _is_intact(folder: Path) -> bool:
    """Whether the folder holds A, M and B, their fold, and no other weights."""
    try:
        files = read_json(folder / OWN_CONFIG)["files"]
        names = (STOCK_WEIGHTS, OWN_WEIGHTS)
        return set(files) == set(names) and all(sha256_of(folder / name) == files[name] for name in names)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def name_base(folder: Path, base: str, *, revision: str | None, kind: type[nn.Module] | None) -> None:
    """Write into `adapter_config.json` which model the adapter belongs to, so that PEFT's Auto classes load both."""
    data = read_json(folder / STOCK_CONFIG)
    data |= {"base_model_name_or_path": base, "revision": revision}
    if kind is not None:
        data |= {"task_type": None, "auto_mapping": _class_of(kind)}
    _write_json(folder / STOCK_CONFIG, data)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")
