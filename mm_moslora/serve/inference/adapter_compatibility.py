"""Check that the adapter of one run fits the model of another: prompts, pictures and base weights must match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_moslora.config import ModelConfig
from mm_moslora.config.recipe_keys import ANY_ADAPTER
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.load_model import model_of, recipe_of
from mm_moslora.models.model_paths import stored_fingerprints
from mm_moslora.models.processing.llava_processor import plain_template
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.identity import difference
from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint

_REVISIONS = {
    "model.language": "model.language_revision", "model.vlm": "model.vlm_revision",
    "model.vision.name": "model.vision.revision",
}  # fmt: skip


def refuse_other_settings(assembly: Parts, main: Path, checkpoint: Path) -> None:
    """Refuse an adapter that was trained with other prompts, pictures or base weights."""
    served = find_checkpoint(main)
    if (served / MANIFEST).is_file():
        differing = _differing_keys(served, checkpoint)
    else:
        differing = _differing_parts(assembly, model_of(checkpoint))
    if differing:
        raise ModelError(
            f"{checkpoint} cannot be an adapter of {main}: {'; '.join(differing)}. Its adapter was trained with other "
            "prompts, pictures or weights, and its answers would be worse. Serve it on its own."
        )


def _differing_keys(served: Path, added: Path) -> list[str]:
    """Recipe keys with different values in two checkpoints."""
    a, b = (
        {key: repr(value) for key, value in values.items() if key.startswith("model.")}
        for values in (recipe_of(folder).values(without=ANY_ADAPTER) for folder in (served, added))
    )
    hash_a, hash_b = stored_fingerprints(served), stored_fingerprints(added)
    for key in hash_a.keys() & hash_b.keys() & a.keys() & b.keys():
        # Models are compared by content; their paths may differ.
        if hash_a[key] == hash_b[key]:
            b |= {same: a[same] for same in (key, _REVISIONS.get(key, key)) if same in a}
        else:
            _, first, second = difference(hash_a[key], hash_b[key])
            a[key], b[key] = f"{a[key]} ({first})", f"{b[key]} ({second})"
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return [f"{key} is {a.get(key, 'unset')} in the served model, {b.get(key, 'unset')} here" for key in keys]


def _differing_parts(assembly: Parts, added: ModelConfig) -> list[str]:
    """Differences between an export, which has no recipe, and a run, found by comparing the loaded parts."""
    parts = load_parts(added, weights="none")
    config = assembly.model.config
    template = assembly.processor.chat_template if assembly.is_pretrained_vlm else assembly.tokenizer.chat_template
    other = parts.tokenizer if parts.template_processor is None else parts.template_processor
    vision = added.vision if added.vlm is None else None
    pairs: dict[str, tuple[Any, Any]] = {
        "the chat template or system prompt": (plain_template(template), plain_template(other.chat_template)),
        "the number of visual tokens": (assembly.tokens_per_image, parts.tokens_per_image),
        **_image_settings(
            getattr(assembly.processor, "image_processor", None), getattr(parts.processor, "image_processor", None)
        ),
    }
    if vision is not None:
        pairs["model.vision.feature_layer"] = (getattr(config, "vision_feature_layer", None), vision.feature_layer)
    return [
        f"{name} differs" if isinstance(a, str) else f"{name} is {a} in the served model, {b} here"
        for name, (a, b) in pairs.items()
        if a != b
    ]


def _image_settings(served: Any, added: Any) -> dict[str, tuple[Any, Any]]:
    """Settings of two image processors by name; only settings that both have are compared."""
    if served is None or added is None:
        return {"the vision encoder": (served is not None, added is not None)}
    a, b = served.to_dict(), added.to_dict()
    names = sorted((a.keys() & b.keys()) - {"image_processor_type", "processor_class", "_processor_class"})
    return {f"{name} of pictures": (_plain(a[name]), _plain(b[name])) for name in names}


def _plain(value: Any) -> Any:
    """A setting in a comparable form: sizes without unset sides, lists for tuples."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: item for key, item in dict(value).items() if item is not None}
    return list(value) if isinstance(value, list | tuple) else value
