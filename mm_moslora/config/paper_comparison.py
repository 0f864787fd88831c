"""A recipe against the configuration that the authors of MoSLoRA released, key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mm_moslora.utils.errors import ConfigError, suggestion

AUTHORS_SETTINGS = Path(__file__).parent / "authors_settings.yaml"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key in both."""

    key: str
    authors: Any
    recipe: Any
    reason: str
    """Why they differ; empty where none is on record."""

    @property
    def same(self) -> bool:
        """Whether the values are equal."""
        return _plain(self.authors) == _plain(self.recipe)


def compare_settings(name: str, recipe: Any) -> list[Setting]:
    """Every released setting that a recipe has a key for.

    Args:
        name: of the paper's recipe, or of a file with that name.
        recipe: resolved.

    Raises:
        ConfigError: the paper has no recipe of that name.
    """
    entry = _entry(name)
    reasons: Mapping[str, str] = entry["differs"]
    return [
        Setting(key=key, authors=value, recipe=_value(recipe, key), reason=reasons.get(key, ""))
        for key, value in entry["settings"].items()
    ]


def comparison_text(name: str, recipe: Any) -> str:
    """`compare_settings` as a table, and the released settings without a key."""
    entry, settings = _entry(name), compare_settings(name, recipe)
    rows = [("key", "authors", "recipe", "")]
    for setting in settings:
        note = "same" if setting.same else f"differs: {setting.reason or 'changed in this recipe'}"
        rows.append((setting.key, _shown(setting.authors), _shown(setting.recipe), note))
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    lines = [f"Released: wutaiqiang/MoSLoRA bba79b5, {entry['source']}", ""]
    lines += ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
              for row in rows]  # fmt: skip
    if without := entry["without_key"]:
        lines += ["", "Without a key:"] + [f"  {what}: {text}" for what, text in without.items()]
    different = sum(not setting.same for setting in settings)
    lines += ["", f"{len(settings) - different} of {len(settings)} settings are the same, {different} differ."]
    return "\n".join(lines)


def _entry(name: str) -> Mapping[str, Any]:
    released: dict[str, Mapping[str, Any]] = yaml.safe_load(AUTHORS_SETTINGS.read_text(encoding="utf-8"))
    stem = Path(name).stem
    if stem not in released:
        raise ConfigError(
            f"The authors released no configuration for {stem!r}, expected one of {', '.join(released)}."
            f"{suggestion(stem, released)}"
        )
    return released[stem]


def _value(recipe: Any, key: str) -> Any:
    """The value under a dotted key; None below a part that the recipe leaves out."""
    for part in key.split("."):
        recipe = None if recipe is None else recipe[int(part)] if part.isdigit() else getattr(recipe, part)
    return recipe


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "set"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)
