"""Whether the adapter of one run may be used on the model of another: both must read a request in the same way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.assembly import Assembly, text_and_images
from mm_moslora.models.load_model import model_of
from mm_moslora.models.model_paths import stored_fingerprints
from mm_moslora.models.processing.llava_processor import plain_template
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint

_OTHERWISE_FREE: dict[type, frozenset[str]] = {
    ModelConfig: frozenset({"language_mode", "language_last_n", "attention", "lean_layers", "kernels"}),
    VisionConfig: frozenset({"mode", "last_n", "feature_cache", "feature_cache_gib"}),
    ProjectorConfig: frozenset({"weights", "mode", "scale_to_embeddings", "fit_to_answers"}),
}
"""Keys of a recipe's `model` that decide neither what a model is shown nor what its base computes. Every other key is
compared, so a key that is added to a recipe is compared until it is named here."""


def refuse_other_settings(assembly: Assembly, main: Path, checkpoint: Path) -> None:
    """Refuse an adapter that was trained on prompts, pictures or base weights of another kind.

    Args:
        assembly: the model that is served.
        main: the folder that it was loaded from.
        checkpoint: of the run whose adapter is to be added.

    Raises:
        ModelError: names every key that differs, with both values.
    """
    served = find_checkpoint(main)
    if (served / MANIFEST).is_file():
        differing = _differing_keys(served, checkpoint)
    else:
        differing = _differing_parts(assembly, model_of(checkpoint))
    if differing:
        raise ModelError(
            f"{checkpoint} cannot be an adapter of {main}: {'; '.join(differing)}. Its adapter was trained on other "
            "prompts, pictures or weights and would answer worse. Serve it on its own."
        )


def _differing_keys(served: Path, added: Path) -> list[str]:
    """Of two checkpoints with recipes: each key whose values differ."""
    ours, theirs = (_flat("model", model_of(folder)) for folder in (served, added))
    known, other = stored_fingerprints(served), stored_fingerprints(added)
    for key in known.keys() & other.keys() & ours.keys() & theirs.keys():
        # A part is what it holds; where it lies may differ.
        if known[key] == other[key]:
            theirs[key] = ours[key]
        else:
            ours[key], theirs[key] = f"{ours[key]} ({known[key][:8]})", f"{theirs[key]} ({other[key][:8]})"
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    return [f"{key} is {ours.get(key, 'unset')} where it is served and {theirs.get(key, 'unset')} here" for key in keys]


def _flat(prefix: str, part: Any) -> dict[str, str]:
    free = _OTHERWISE_FREE[type(part)]
    found: dict[str, str] = {}
    for item in dataclasses.fields(part):
        value, key = getattr(part, item.name), f"{prefix}.{item.name}"
        if item.name in free:
            continue
        found |= _flat(key, value) if type(value) in _OTHERWISE_FREE else {key: repr(value)}
    return found


def _differing_parts(assembly: Assembly, added: ModelConfig) -> list[str]:
    """Of an export, which has no recipe, and a run: what differs in the parts themselves."""
    theirs = text_and_images(added)
    config = assembly.model.config
    template = assembly.processor.chat_template if assembly.is_pretrained_vlm else assembly.tokenizer.chat_template
    other = theirs.tokenizer if theirs.template_processor is None else theirs.template_processor
    vision = added.vision if added.vlm is None else None
    pairs: dict[str, tuple[Any, Any]] = {
        "the chat template or system prompt": (plain_template(template), plain_template(other.chat_template)),
        "the number of visual tokens": (assembly.tokens_per_image, theirs.tokens_per_image),
        **_image_settings(getattr(assembly.processor, "image_processor", None), theirs.image_processor),
    }
    if vision is not None:
        pairs["model.vision.feature_layer"] = (getattr(config, "vision_feature_layer", None), vision.feature_layer)
    return [
        f"{name} is another one here" if isinstance(ours, str) else f"{name} is {ours} where it is served, {here} here"
        for name, (ours, here) in pairs.items()
        if ours != here
    ]


def _image_settings(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Settings of two image processors by name; what only one of them knows is left out."""
    if ours is None or theirs is None:
        return {"the vision encoder": (ours is not None, theirs is not None)}
    mine, other = ours.to_dict(), theirs.to_dict()
    names = sorted((mine.keys() & other.keys()) - {"image_processor_type", "processor_class", "_processor_class"})
    return {f"{name} of pictures": (_plain(mine[name]), _plain(other[name])) for name in names}


def _plain(value: Any) -> Any:
    """A setting in a form that compares: sizes without their empty sides, lists for tuples."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: item for key, item in dict(value).items() if item is not None}
    return list(value) if isinstance(value, list | tuple) else value
