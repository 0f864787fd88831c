"""Load an adapter folder: everything is checked before the model is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from mm_moslora.adapters.adapter_targets import inject
from mm_moslora.adapters.folder_format import (
    MIXER,
    OWN_CONFIG,
    OWN_WEIGHTS,
    PREFIX,
    START_MIXER,
    STOCK_WEIGHTS,
    read_manifest,
    read_tensors,
)
from mm_moslora.adapters.folders.folder_tensors import (
    check_shapes,
    check_values,
    read_initial_mixers,
    shapes_by_rank,
    unexpected_entry,
)
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder, read_foreign
from mm_moslora.adapters.folders.moved_modules import at_paths_of
from mm_moslora.adapters.layers.layer_dispatch import factor_shapes, why_not_adaptable
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, config_from_dict
from mm_moslora.adapters.tree import base_fingerprint, named_adapter_layers, named_base_modules
from mm_moslora.utils.errors import AdapterError, suggestion
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.run_paths import why_no_adapter_folder


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    base: Mapping[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
    component: str | None = None,
) -> peft.PeftModel:
    """Load a folder of `save_adapter`, stock PEFT, diffusers or the paper's authors into a model.

    Module paths of another version of the model's class are exchanged if exactly one way fits all modules by shapes.

    Args:
        model: the base model, or a PEFT model. An adapter of this name that is there already gets the values, if its
            modules, ranks and scalings are the same, and is added if there is none.
        trainable: whether it is going to train; if not, the model is put into evaluation mode. A plain LoRA folder
            gets a trainable identity mixer when it trains, a frozen one (plain LoRA) otherwise.
        base: identity of the base model; an entry that contradicts the folder's is an error.
        autocast_adapter_dtype: keep the factors in float32 when the base is in half precision.
        component: for a file of diffusers, which part of the pipeline the model is (unet); None: the only one there.

    Returns:
        The PEFT model.

    Raises:
        AdapterError: a file that is missing, truncated, changed or stale; an adapter for another base; a factor of the
            wrong shape. The model is untouched then.
    """
    content = read_folder(folder, trainable=trainable, component=component)
    source = str(folder)
    content = at_paths_of(model, content, source=source)
    config = content.config
    _check_base(model, content.base, base or {}, source)
    paths = sorted(config.target_modules or ())
    config.inference_mode = not trainable
    exists = isinstance(model, peft.PeftModel) and adapter_name in model.peft_config
    if isinstance(model, peft.PeftModel) and exists:
        _check_same(model, adapter_name, content, source)
        wrapped = model
    else:
        check_shapes(content.tensors, _planned_shapes(model, config, paths, content.tensors, source), source=source)
        with _usable(source):
            wrapped = inject(
                model, config, paths, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )
    try:
        if problem := _misfit(wrapped, adapter_name, content.tensors):
            raise AdapterError(f"{source} {problem}. It was made for another base model, or its files were changed.")
        set_peft_model_state_dict(wrapped, content.tensors | content.initial_mixers, adapter_name=adapter_name)
    except AdapterError:
        if wrapped is not model:
            wrapped.unload()
        elif not exists:
            wrapped.delete_adapter(adapter_name)
        raise
    wrapped.set_requires_grad(adapter_name, requires_grad=trainable)
    if not trainable:
        wrapped.eval()  # as PeftModel.from_pretrained does: an adapter's dropout is on in a fresh layer
    return wrapped


@torch.no_grad()
def restore_mixers(model: nn.Module, folder: Path, *, adapter_name: str = "default") -> None:
    """Set what the optimiser's state does not hold of an adapter: mixers that do not train, and the initial ones."""
    # Drawing them again is not exact: with another number of threads or on another device, a QR rounds otherwise.
    layers = {f"{PREFIX}{path}": layer for path, layer in named_adapter_layers(model) if layer.holds(adapter_name)}
    if initial := read_initial_mixers(folder, read_manifest(folder)):
        for name, layer in layers.items():
            layer.keep_initial_mixer(adapter_name, initial.get(f"{name}{START_MIXER}"))
    frozen = {
        f"{name}{MIXER}": buffer
        for name, layer in layers.items()
        if adapter_name in layer.lora_mixer
        for buffer in layer.lora_mixer[adapter_name].buffers()
    }
    tensors = read_folder(folder).tensors if frozen else {}
    for name, buffer in frozen.items():
        if name not in tensors or tensors[name].shape != buffer.shape:
            raise AdapterError(f"{folder} has no {name} of shape {list(buffer.shape)}. It is of another adapter.")
        buffer.copy_(tensors[name])


def _check_same(model: peft.PeftModel, adapter_name: str, content: AdapterFolder, source: str) -> None:
    """Refuse values for an existing adapter that would compute other outputs with them."""
    layers = {path: layer for path, layer in named_adapter_layers(model) if layer.holds(adapter_name)}
    own, theirs = content.config, cast(MoSLoRAConfig, model.peft_config[adapter_name])
    there = {path: (layer.r[adapter_name], layer.scaling[adapter_name]) for path, layer in layers.items()}
    saved = {path: (own.rank_for(path), own.scaling_for(path)) for path in own.target_modules or ()}
    problem = ""
    if there.keys() != saved.keys():
        problem = "it is in other modules"
    elif differing := next((path for path in there if there[path] != saved[path]), None):
        parts = ("rank {} and scaling {:g}".format(*pair[differing]) for pair in (there, saved))
        problem = "{} has {} there and {} in the folder".format(differing, *parts)
    elif own.use_dora != theirs.use_dora:
        problem = f"use_dora is {theirs.use_dora} there and {own.use_dora} in the folder"
    if problem:
        raise AdapterError(
            f"The model has an adapter {adapter_name!r} already, and {source} cannot take its place: {problem}. Load "
            "it under another adapter_name, or delete that one (delete_adapter) first."
        )


@contextmanager
def _usable(source: str) -> Iterator[None]:
    """Turn PEFT's errors about a configuration into `AdapterError`; it checks many options only where it uses them."""
    try:
        yield
    except AdapterError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        raise AdapterError(f"The configuration of {source} cannot be used ({error}). Copy the folder again.") from error


def _misfit(model: peft.PeftModel, adapter_name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Why an adapter's tensors do not fit the model that it was put into; None if they do."""
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    lost = expected.keys() - tensors.keys()
    if lost:
        return f"lacks {min(lost)!r}"
    known_tensors = expected
    if tensors.keys() - expected.keys():  # the base's embeddings, which PEFT saves when the vocabulary was resized
        known_tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True)
    for name, tensor in tensors.items():
        if name not in known_tensors:
            return f"holds {name!r}, for which the model has no place"
        shape = getattr(known_tensors[name], "ds_shape", known_tensors[name].shape)
        if tensor.shape != shape:
            return f"holds {name!r} of shape {list(tensor.shape)}, expected {list(shape)}"
    return None


def read_folder(folder: str | Path, *, trainable: bool = False, component: str | None = None) -> AdapterFolder:
    """Read and verify an adapter folder without a model."""
    root = Path(folder)
    if not root.is_dir():
        raise AdapterError(why_no_adapter_folder(root))
    has_config, has_weights = (root / OWN_CONFIG).is_file(), (root / OWN_WEIGHTS).is_file()
    if has_config != has_weights:
        present, missing = (OWN_CONFIG, OWN_WEIGHTS) if has_config else (OWN_WEIGHTS, OWN_CONFIG)
        raise AdapterError(
            f"{root} has {present} but no {missing}. Copy the whole folder; or delete {present} to load the folded "
            "factors as plain LoRA."
        )
    with _usable(str(root)):
        content = _read_own(root) if has_config else read_foreign(root, trainable=trainable, component=component)
    if not content.config.target_modules:
        raise AdapterError(f"{root} holds no factors of an adapter. Save it again.")
    check_shapes(content.tensors, shapes_by_rank(content.config, content.tensors), source=str(root))
    check_values(content.tensors, source=str(root))
    if extra := unexpected_entry(content.tensors, content.config):
        raise AdapterError(
            f"{root} holds {extra!r}, for which its configuration has no place. Load the folder that was saved, or "
            "save it again with the option that the entry belongs to (modules_to_save, lora_bias, bias, use_dora)."
        )
    return content


def _read_own(root: Path) -> AdapterFolder:
    manifest = read_manifest(root)
    try:
        config = config_from_dict(manifest["config"])
    except AdapterError as error:
        raise AdapterError(f"{root / OWN_CONFIG}: {error}") from error
    if lost := {STOCK_WEIGHTS, OWN_WEIGHTS} - manifest["files"].keys():
        raise AdapterError(f"{root / OWN_CONFIG} has no sha256 of {min(lost)}. Copy the folder again.")
    for name, digest in manifest["files"].items():
        path = root / name
        if not path.is_file():
            raise AdapterError(f"{root} lacks {name}. Copy the whole folder.")
        if sha256_of(path) != digest:
            raise AdapterError(_stale(root, name))
    tensors, initial = read_tensors(root / OWN_WEIGHTS), read_initial_mixers(root, manifest)
    return AdapterFolder(config=config, tensors=tensors, base=manifest["base"], initial_mixers=initial)


def _stale(root: Path, name: str) -> str:
    if name == STOCK_WEIGHTS:
        return (
            f"{root / name} is not the fold of {OWN_WEIGHTS}: its sha256 differs from {OWN_CONFIG}. It was damaged, or "
            f"another program saved over it. If it is the newer one, delete {OWN_CONFIG} and {OWN_WEIGHTS} and it "
            "loads as plain LoRA; else copy the folder again."
        )
    return f"{root / name} is damaged or truncated: its sha256 differs from {OWN_CONFIG}. Copy the folder again."


def _check_base(model: nn.Module, saved: Mapping[str, Any], base: Mapping[str, Any], source: str) -> None:
    for key in sorted(saved.keys() & base.keys()):
        if saved[key] is not None and base[key] is not None and saved[key] != base[key]:
            raise AdapterError(
                f"{source} was made for a base with {key} {saved[key]!r}, this one has {base[key]!r}. Load the base "
                "it was made for."
            )
    expected = saved.get("fingerprint")
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # only counted: its vocabulary lacks the tokens that its tokenizer would add
    if expected is not None and expected != base_fingerprint(model):
        named = ", ".join(f"{key} {value}" for key, value in saved.items() if key != "fingerprint" and value)
        raise AdapterError(
            f"{source} was made for another base model{f' ({named})' if named else ''}: module names or sizes differ. "
            "Load the base it was made for."
        )


def _planned_shapes(
    model: nn.Module, config: MoSLoRAConfig, paths: list[str], tensors: Mapping[str, Tensor], source: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the folder must have to fit the model."""
    modules = dict(named_base_modules(model))
    shapes = shapes_by_rank(config, tensors)
    for path in paths:
        if path not in modules:
            raise AdapterError(f"{source} adapts {path!r}, which the model lacks.{suggestion(path, modules)}")
        if reason := why_not_adaptable(modules[path]):
            raise AdapterError(f"{source} adapts {path!r}, which cannot carry MoSLoRA: {reason}")
        factors = factor_shapes(modules[path], config.rank_for(path))
        shapes |= {f"{PREFIX}{path}.{name}": shape for name, shape in factors.items()}
    return shapes
