"""A recipe against the configuration that the authors of MoSLoRA released, key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.config.recipe import YamlRecipe, leaves, read_recipe
from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.untrusted_data import parse_yaml

AUTHORS_SETTINGS = Path(__file__).parent / "authors_settings.yaml"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key in both."""

    key: str
    authors: Any
    recipe: Any
    reason: str
    """Why the paper's recipe differs; empty where none is on record, or where the value is not that recipe's."""

    @property
    def same(self) -> bool:
        """Whether the values are equal."""
        return _plain(self.authors) == _plain(self.recipe)


def compare_settings(name: str, recipe: YamlRecipe, *, presets: Path) -> list[Setting]:
    """Every released setting that a recipe has a key for.

    Args:
        name: of the paper's recipe, or of a file with that name.
        recipe: resolved.
        presets: folder of the shipped recipes, the paper's among them.

    Raises:
        ConfigError: the paper has no recipe of that name.
    """
    entry, shipped = _entry(name), _shipped(name, recipe, presets)
    reasons: Mapping[str, str] = entry["differs"]
    settings = []
    for key, value in entry["settings"].items():
        own = _value(recipe, key)
        reason = reasons.get(key, "") if own == _value(shipped, key) else ""
        settings.append(Setting(key=key, authors=value, recipe=own, reason=reason))
    return settings


def _shipped(name: str, recipe: YamlRecipe, presets: Path) -> YamlRecipe:
    return read_recipe(type(recipe), presets / f"{Path(name).stem}.yaml", presets=presets)


def other_changes(name: str, recipe: YamlRecipe, *, presets: Path) -> dict[str, tuple[Any, Any]]:
    """Keys that the release does not list and whose value is another than the paper's recipe's: both values."""
    listed = tuple(_entry(name)["settings"])
    before, after = leaves(_shipped(name, recipe, presets).to_dict()), leaves(recipe.to_dict())
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and key not in listed and not any(key.startswith(f"{k}.") for k in listed)
    }


def comparison_text(name: str, recipe: YamlRecipe, *, presets: Path) -> str:
    """`compare_settings` as a table, `other_changes`, and the released settings without a key."""
    entry, settings = _entry(name), compare_settings(name, recipe, presets=presets)
    rows = [("key", "authors", "recipe", "")]
    for setting in settings:
        note = "same" if setting.same else f"differs: {setting.reason or 'changed in this recipe'}"
        rows.append((setting.key, _shown(setting.authors), _shown(setting.recipe), note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"Released: wutaiqiang/MoSLoRA bba79b5, {entry['source']}", ""]
    lines += ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
              for row in rows]  # fmt: skip
    if changed := other_changes(name, recipe, presets=presets):
        lines += ["", "Changed in this recipe, and not listed in the release:"]
        lines += [f"  {key}: {_shown(before)} -> {_shown(after)}" for key, (before, after) in changed.items()]
    if without := entry["without_key"]:
        lines += ["", "Without a key:"] + [f"  {what}: {text}" for what, text in without.items()]
    different = sum(not setting.same for setting in settings)
    lines += ["", f"{len(settings) - different} of {len(settings)} settings are the same, {different} differ."]
    return "\n".join(lines)


def _entry(name: str) -> Mapping[str, Any]:
    released: dict[str, Mapping[str, Any]] = parse_yaml(
        AUTHORS_SETTINGS.read_text(encoding="utf-8"), source=AUTHORS_SETTINGS.name
    )
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
