"""Recipes by path or by the name of a shipped one, with overrides of the command line."""

from __future__ import annotations

import copy
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.config.inherited_settings import with_inherited
from mm_moslora.config.recipe import Recipe, YamlRecipe
from mm_moslora.config.recipe_keys import kind_at
from mm_moslora.config.recipe_paths import from_working_folder
from mm_moslora.config.usual_names import OF_OTHER_TRAINERS
from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.run_paths import checkpoints
from mm_moslora.utils.untrusted_data import parse_yaml, parse_yaml_value
from mm_moslora.utils.untrusted_files import opened, read_text

logger = logging.getLogger(__name__)

RECIPES_FOLDER = Path(__file__).with_name("recipes")
R = TypeVar("R", bound=YamlRecipe)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by the name of a shipped recipe, and apply dotted overrides.

    Args:
        name_or_path: a YAML file, one of `recipe_names()`, or the folder of a run or checkpoint.
        overrides: `optim.lr=1e-4` items. Relative paths start at the working directory (in a recipe file: at that
            file). Values are read as YAML unless the key takes only text. List items are addressed by number; the
            number after the last item appends one.

    Raises:
        ConfigError: no such recipe, an unknown key or an impossible value; names the override that causes the error.
    """
    return read_recipe(Recipe, name_or_path, overrides, presets=RECIPES_FOLDER)


def read_recipe(kind: type[R], name_or_path: str | Path, overrides: Sequence[str] = (), *, presets: Path) -> R:
    """Read a recipe of any kind; see `load_recipe`."""
    path = Path(name_or_path)
    resolved = path.is_dir()  # a run's: it names every key
    if resolved:
        path = recipe_of_run(path)
    is_file = path.is_file()
    if not is_file:
        preset = presets / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml") or not preset.is_file():
            raise ConfigError(
                f"No recipe {str(name_or_path)!r}: neither a file nor a shipped recipe."
                f"{suggestion(str(name_or_path), recipe_names(presets))} Shipped: {', '.join(recipe_names(presets))}."
            )
        path = preset
    elif _holds_records(path):
        names = ", ".join(recipe_names(presets))
        raise ConfigError(
            f"{path} holds data, expected a recipe. Name the data in one: RECIPE --data.train '[{{path: {path}, "
            f"image_folder: FOLDER}}]', where RECIPE is a YAML file, a run or a shipped recipe ({names})."
        )
    data = parse_yaml(read_text(path), source=str(path))
    if is_file and path.resolve().parent != presets.resolve():
        typed = [item.partition("=")[0].strip().lstrip("-") for item in overrides]
        data = from_working_folder(kind, data, path.parent, source=str(path), typed=typed)
    inherits = kind is Recipe and not resolved

    def build(items: Sequence[str]) -> tuple[R, list[str]]:
        changed = _overridden(kind, data, items)
        changed, remarks = with_inherited(changed) if inherits else (changed, [])
        return kind.from_dict(changed, source=str(path)), remarks

    try:
        recipe, remarks = build(overrides)
    except ConfigError as error:
        if not (guilty := _guilty(build, overrides, str(error))):
            raise
        word = "Override" if len(guilty) == 1 else "Overrides"
        what = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{word} {', '.join(map(repr, guilty))}: {what}") from error
    for remark in remarks:
        logger.warning("%s: %s", path, remark)
    return recipe


def _overridden(kind: type[YamlRecipe], data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The plain data of a recipe with the overrides applied."""
    changed: dict[str, Any] = copy.deepcopy(dict(data))
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"Override {item!r} is not of the form key=value, such as optim.lr=1e-4.")
        keys = key.strip().lstrip("-").split(".")
        set_dotted(kind, changed, keys, parse_text(value) if kind_at(kind, keys) is str else parse_scalar(value), item)
    return changed


def _guilty(build: Callable[[Sequence[str]], object], overrides: Sequence[str], message: str) -> list[str]:
    """The overrides that cause an error: removing one of them removes the error, or else changes it."""
    cured, changed = [], []
    for number, item in enumerate(overrides):
        try:
            build([*overrides[:number], *overrides[number + 1 :]])
            cured.append(item)
        except ConfigError as error:
            changed += [item] if str(error) != message else []
    return cured or changed


def _holds_records(path: Path) -> bool:
    """Whether a file is training data by its name, or is a JSON list."""
    if path.suffix == ".json":
        with opened(path, most=None) as stream:
            return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    return path.name.lower().endswith((".jsonl", ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tsv"))


def recipe_of_run(folder: Path) -> Path:
    """The resolved recipe in the newest checkpoint of a run."""
    files = [item / "config.yaml" for item in (folder, *(item for _, item in reversed(checkpoints(folder))))]
    for path in files:
        if path.is_file():
            return path
    raise ConfigError(f"{folder} is a folder without config.yaml, neither a checkpoint nor a run with checkpoints.")


def recipe_names(presets: Path = RECIPES_FOLDER) -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def override_items(tokens: Sequence[str]) -> list[str]:
    """Turn `--optim.lr 1e-4`, `--optim.lr=1e-4` and `optim.lr=1e-4` into `optim.lr=1e-4`.

    Raises:
        ConfigError: a key without a value, or an option that is neither the command's nor a key.
    """
    items, waiting = [], None
    for token in tokens:
        if waiting is None and token.startswith("--"):
            _refuse_option(token[2:].partition("=")[0])
        if waiting is not None:
            items.append(f"{waiting}={token}")
            waiting = None
        elif "=" in token:
            items.append(token.lstrip("-"))
        elif token.startswith("--"):
            waiting = token.lstrip("-")
        else:
            raise ConfigError(f"{token!r} is no override. Write --key value or key=value, such as --optim.lr 1e-4.")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value. Write --{waiting} VALUE.")
    return items


def _refuse_option(key: str) -> None:
    """Refuse a key without a section, which is most likely a misspelt option of the command."""
    if "." not in key and key not in {item.name for item in fields(Recipe)}:
        here = OF_OTHER_TRAINERS.get(key)
        hint = f" Did you mean --{here}?" if here else ""
        raise ConfigError(
            f"No option --{key}.{hint} Keys of the recipe carry their section, such as --optim.lr 1e-4; the command's "
            "own options are in its --help."
        )


def parse_scalar(text: str) -> Any:
    """Read one value as YAML, and numbers as people write them (1e-4).

    Raises:
        ConfigError: not YAML, such as a bracket that is not closed.
    """
    try:
        value = parse_yaml_value(text) if text.strip() else ""
    except ConfigError as error:
        raise ConfigError(f"{text[:200]!r} is no YAML value: it {error}") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse_text(text: str) -> str | None:
    """Read one value of a key that takes text: unchanged except for surrounding quotes; null is None."""
    bare = text.strip()
    if bare in ("null", "~"):
        return None
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    value = parse_scalar(bare) if quoted else text
    return value if isinstance(value, str) else text


def set_dotted(kind: Any, data: Any, keys: list[str], value: Any, item: str) -> None:
    """Set one value of nested plain data in place.

    Args:
        keys: the key path. List items are addressed by number; the number after the last item appends one.

    Raises:
        ConfigError: the path goes through a value, or past the end of a list.
    """
    for depth, key in enumerate(keys):
        if isinstance(data, list):
            part: Any = _index(data, key, item)
        elif isinstance(data, dict):
            part = key
            data.setdefault(key, None)
        else:
            raise ConfigError(f"Override {item!r}: {'.'.join(keys[:depth])} holds a value, not a group of keys.")
        if depth == len(keys) - 1:
            data[part] = value
        elif data[part] is None:
            listed = typing.get_origin(kind_at(kind, keys[: depth + 1])) in (list, tuple)
            data[part] = [] if listed else {}
        data = data[part]


def _index(data: list[Any], key: str, item: str) -> int:
    """The index of a list item; the index after the last item appends one."""
    count = len(data)
    if not (key.isascii() and key.isdigit()) or int(key) > count:
        allowed = f"0 to {count - 1} change the items that it has, {count}" if count else "it has no item, 0"
        raise ConfigError(f"Override {item!r}: {key!r} is not an index of this list: {allowed} adds one.")
    if int(key) == count:
        data.append(None)
    return int(key)
