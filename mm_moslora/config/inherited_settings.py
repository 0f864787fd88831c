"""What a run was trained with is taken over by a recipe that starts from its weights.

`adapter.weights` and `model.projector.weights` may name a run, `adapter.weights` and `model.vlm` an export. Its
pictures, and for an adapter its prompts, are then those of the new run, unless the recipe names other values, which is
remarked. A run so knows what its start has seen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_moslora.config.data_config import SourceConfig
from mm_moslora.config.model_config import AdapterConfig, ModelConfig
from mm_moslora.config.recipe import Recipe
from mm_moslora.config.recipe_keys import keys_with
from mm_moslora.config.recipe_paths import from_working_folder, start_of_run
from mm_moslora.utils.run_paths import MANIFEST, PREPROCESSING, PROJECTOR, checkpoints, projector_file
from mm_moslora.utils.untrusted_data import parse_json, parse_yaml
from mm_moslora.utils.untrusted_files import read_text_below

_BESIDE_FILES = ["thinking", "boxes"]
"""Keys of `model` that an export's own tokenizer and processor do not say."""


def with_inherited(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The plain data of a recipe, completed from the runs whose weights it starts from; paths start at the working
    directory.

    Returns:
        The data, and a remark for every value that the recipe names otherwise.
    """
    remarks: list[str] = []
    changed: dict[str, Any] = copy.deepcopy(dict(data))
    model, adapter, train = (changed.get(key, {}) for key in ("model", "adapter", "train"))
    if not all(isinstance(section, dict) for section in (model, adapter, train)):
        return changed, remarks  # the strict reader says so
    output = train.get("output")
    if (checkpoint := _trained_in(adapter.get("weights"), output)) is not None:
        changed["model"] = model
        stored = _recipe_in(checkpoint)
        _take_over(model, stored.get("model"), _keys_of(model, "pictures", "prompts"), "model.", remarks, checkpoint)
        factors = keys_with(AdapterConfig, "inherit", "factors")
        _take_over(adapter, stored.get("adapter"), factors, "adapter.", remarks, checkpoint)
        _take_over_videos(changed, stored, remarks, checkpoint)
        if model.get("vision") and (checkpoint / PROJECTOR).is_file():
            projector = model.setdefault("projector", {})
            if isinstance(projector, dict) and not projector.get("weights"):
                projector["weights"] = _projector_beside(str(adapter["weights"]), checkpoint, stored)
    projector = model.get("projector")
    if isinstance(projector, dict) and (checkpoint := _trained_in(projector.get("weights"), output)) is not None:
        stored = _recipe_in(checkpoint)
        _take_over(model, stored.get("model"), _keys_of(model, "pictures"), "model.", remarks, checkpoint)
    for folder in (adapter.get("weights"), model.get("vlm"), model.get("language")):
        if isinstance(folder, str) and (settings := _settings_in(Path(folder).expanduser())):
            _take_over(model, settings, _BESIDE_FILES, "model.", remarks, Path(folder))
            named = keys_with(SourceConfig, "inherit", "videos")
            videos = [{key: value} for key in named for value in settings.get(key, ())]
            _take_over_videos(changed, {"data": {"train": videos}}, remarks, Path(folder))
    return changed, list(dict.fromkeys(remarks))


def _keys_of(model: Mapping[str, Any], *inherited: str) -> list[str]:
    """Keys of `model` that are taken over; those of the base together, where the recipe names none."""
    named = model.get("language") or model.get("vlm")
    return keys_with(ModelConfig, "inherit", *inherited, *([] if named else ["base"]))


def _trained_in(weights: object, output: object) -> Path | None:
    """The checkpoint that holds weights; where nothing is there any more, that of the run which began with them."""
    if not isinstance(weights, str) or not weights:
        return None
    path = Path(weights).expanduser()
    if not path.exists() and isinstance(output, str):
        path = Path(output).expanduser()
    return _checkpoint_of(path)


def _checkpoint_of(path: Path) -> Path | None:
    """A run's newest checkpoint, the folder itself, or the one around the file or folder."""
    committed = [folder for _, folder in reversed(checkpoints(path)) if (folder / MANIFEST).is_file()]
    return next((folder for folder in (*committed[:1], path, path.parent) if (folder / MANIFEST).is_file()), None)


def _projector_beside(weights: str, checkpoint: Path, stored: Mapping[str, Any]) -> Any:
    """`model.projector.weights` for an adapter that brings its projector; the same at every call of the command."""
    if not Path(weights).expanduser().exists():  # the run's own recipe, which named it
        projector = stored["model"].get("projector")
        return projector.get("weights") if isinstance(projector, Mapping) else None
    return weights if projector_file(weights).is_file() else str(checkpoint)


def _recipe_in(checkpoint: Path) -> dict[str, Any]:
    text = read_text_below(checkpoint, "config.yaml")
    source = str(checkpoint / "config.yaml")
    data: dict[str, Any] = {} if text is None else parse_yaml(text, source=source)
    model = data.get("model")
    if isinstance(model, dict) and start_of_run(data, checkpoint) is not None:  # else the run was moved
        base = {key: model[key] for key in ("language", "vlm", "vision") if key in model}
        of_base = {"model": base, "train": data.get("train")}  # whose output says where relative paths start
        data["model"] = model | from_working_folder(Recipe, of_base, checkpoint, source=source)["model"]
    return data


def _settings_in(export: Path) -> dict[str, Any]:
    """The named settings that an export was trained with; empty for a run, and where nothing is known of it."""
    if (export / MANIFEST).is_file() or (text := read_text_below(export, PREPROCESSING)) is None:
        return {}
    stored = parse_json(text)
    settings = stored.get("settings") if isinstance(stored, Mapping) else None
    return {key: value for key, value in (settings or {}).items() if value is not None}


def _take_over(
    section: dict[str, Any], stored: object, keys: list[str], prefix: str, remarks: list[str], checkpoint: Path
) -> None:
    """Fill the keys that `section` does not name, and remark those that it names otherwise."""
    if not isinstance(stored, Mapping):
        return
    for key in keys:
        value, part, inner = stored, section, key
        if "." in key:
            outer, inner = key.split(".")
            value = stored.get(outer) or {}
            if key != "vision.name" and outer == "vision" and not isinstance(section.get(outer), dict):
                continue  # a language model alone
            if not isinstance(value, Mapping) or inner not in value:
                continue
            part = section.setdefault(outer, {})
            if not isinstance(part, dict):
                continue
        if inner not in value:
            continue
        if inner not in part:
            part[inner] = copy.deepcopy(value[inner])
        elif part[inner] != value[inner]:
            remarks.append(
                f"{prefix}{key} is {part[inner]!r}, and the weights of {checkpoint} were trained with {value[inner]!r}."
            )


def _take_over_videos(data: dict[str, Any], stored: Mapping[str, Any], remarks: list[str], checkpoint: Path) -> None:
    """Frames of videos, where all sources of the training agree and a source of the recipe names none."""
    section, before = data.get("data"), stored.get("data")
    sources = before.get("train") if isinstance(before, Mapping) else None
    if not isinstance(section, dict) or not isinstance(sources, list) or not sources:
        return
    videos = keys_with(SourceConfig, "inherit", "videos")
    settings = [{key: item.get(key) for key in videos} for item in sources if isinstance(item, Mapping)]
    if not settings or any(item != settings[0] for item in settings):
        return
    for name in ("train", "validation"):
        for item in section.get(name) or ():
            if not isinstance(item, dict):
                continue
            if not any(key in item for key in videos):
                item.update({key: value for key, value in settings[0].items() if value is not None})
            remarks += [
                f"data.{name}: {key} is {item[key]!r}, and the weights of {checkpoint} were trained with {value!r}."
                for key, value in settings[0].items()
                if value is not None and item.get(key, value) != value
            ]
