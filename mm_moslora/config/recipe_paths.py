"""Paths in recipes: a relative path starts at the recipe file, whatever the working directory is.

Relative paths in presets and in overrides start at the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.config.recipe_keys import facts_at
from mm_moslora.config.run_config import TrainConfig
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.run_paths import RUN_SIGNS, file_and_folder

_LOOKED_UP = ("model", "weights")
_TASK_FILE = re.compile(r"(.+\.ya?ml)((?:@[^@/]*)?)")
_PATTERN = re.compile(r"[*?\[{]")


def from_working_folder(
    kind: type, data: Mapping[str, Any], folder: Path, *, source: str, typed: Sequence[str] = ()
) -> dict[str, Any]:
    """The plain data of a recipe file, with relative paths rewritten to start at the working directory.

    Args:
        kind: the recipe's class, whose keys say what is a path.
        typed: keys that overrides will set; their paths are not rewritten.

    Raises:
        ConfigError: a path does not exist relative to the file, but exists relative to the working directory.
    """
    start = start_of_run(data, folder) or folder
    if start.resolve() == Path.cwd().resolve():
        return dict(data)
    train = data.get("train")
    if train is None or (isinstance(train, Mapping) and train.get("output") is None):
        data = {**data, "train": {**(train or {}), "output": TrainConfig.output}}

    def change(key: str, value: str) -> str:
        is_typed = any(key == name or key.startswith(f"{name}.") for name in typed)
        return value if is_typed else _reached(_path_of(kind, key), key, value, start, source)

    changed: dict[str, Any] = _changed(data, "", change)
    return changed


def absolute(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a recipe with absolute paths, so that the file can be written to any folder."""
    folder = Path.cwd()

    def change(key: str, value: str) -> str:
        return _with_paths_rewritten(_path_of(kind, key), value, folder, lambda name: str(folder / name))

    changed: dict[str, Any] = _changed(data, "", change)
    return changed


def may_differ_by_host(kind: type, key: str, value: object) -> bool:
    """Whether a key holds a path, such as a copy on a local disk; a model's name on a hub is none."""
    exists = isinstance(value, str) and (value.startswith("~") or os.path.isabs(value) or Path(value).exists())
    path = _path_of(kind, key)
    return exists if path in _LOOKED_UP else path not in ("", "engine")


def _path_of(kind: type, key: str) -> str:
    """What path a key holds; see `recipe_keys`. Empty: none."""
    return facts_at(kind, key).get("path", "")


def start_of_run(data: Mapping[str, Any], folder: Path) -> Path | None:
    """The working directory of the run to which a resolved recipe in a run or checkpoint folder belongs."""
    train = data.get("train")
    output = train.get("output") if isinstance(train, Mapping) else None
    if not isinstance(output, str) or os.path.isabs(output):
        return None
    parts = Path(os.path.normpath(output)).parts
    for candidate in (folder.resolve(), folder.resolve().parent):
        if parts and parts == candidate.parts[-len(parts) :]:
            return Path(*candidate.parts[: -len(parts)])
    return None


def _changed(data: Any, key: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(data, Mapping):
        return {name: _changed(item, f"{key}.{name}" if key else str(name), change) for name, item in data.items()}
    if isinstance(data, list):
        return [_changed(item, f"{key}.{number}", change) for number, item in enumerate(data)]
    return change(key, data) if isinstance(data, str) else data


def _with_paths_rewritten(path: str, value: str, start: Path, rewrite: Callable[[str], str]) -> str:
    """Apply `rewrite` to the paths of a value that are relative to `start`; a model's name counts as a path only where
    it exists."""
    if not path or not value or value.startswith(("~", "hf:")) or os.path.isabs(value):
        return value
    if path == "engine":
        return rewrite(value) if value.endswith(".json") else value
    if path in _LOOKED_UP:
        return rewrite(value) if Path(value).exists() else value
    return rewritten_task(value, start, rewrite) if path == "task" else rewrite(value)


def rewritten_task(value: str, start: Path, rewrite: Callable[[str], str]) -> str:
    """A task or group with the paths in its name rewritten; the name of a shipped one holds none.

    Args:
        value: as for `mm-moslora eval run`, such as `FILE.yaml@PROTOCOL`, `llava:FILE@IMAGE_FOLDER`, `@FILE.yaml:NAME`.
    """

    def rewritten(name: str) -> str:
        return name if os.path.isabs(name) or name.startswith("~") else rewrite(name)

    kind, _, rest = value.partition(":")
    if kind == "tsv":
        return f"tsv:{rewritten(rest)}"
    if kind == "llava":
        file, folder = file_and_folder(rest, start=start)
        return f"llava:{rewritten(file)}" + (f"@{rewritten(folder)}" if folder else "")
    if value.startswith("@"):
        file, separator, group = value.removeprefix("@").rpartition(":")
        return f"@{rewritten(file)}:{group}" if separator else value
    match = _TASK_FILE.fullmatch(value)
    return value if match is None else f"{rewritten(match[1])}{match[2]}"


def _reached(kind: str, key: str, value: str, start: Path, source: str) -> str:
    """A value with its paths rewritten to start at the working directory, or absolute where they lie outside of it."""

    def rewrite(name: str) -> str:
        path, other = start / name, Path.cwd() / name
        # A run's folder need not exist, so another folder of that name proves no mistake.
        meant = any(any(other.glob(sign)) for sign in RUN_SIGNS) if kind == "output" else _exists(other)
        if not _exists(path) and meant:
            raise ConfigError(
                f"{source}: {key} is {name!r}, which does not exist at {path}, but at {other}. Relative paths in a "
                f"recipe start at the recipe file: write {os.path.relpath(other, start)!r}, or an absolute path. On "
                "the command line (--KEY PATH) they start at the working directory."
            )
        full, working_folder = os.path.abspath(path), os.getcwd()
        return os.path.relpath(full, working_folder) if Path(full).is_relative_to(working_folder) else full

    if kind in _LOOKED_UP:  # a hub id unless the folder exists; a tag of weights is often also the name of a folder
        if not value or value.startswith("~") or os.path.isabs(value):
            return value
        other = Path.cwd() / value
        is_path = other.is_file() if kind == "weights" else other.is_dir()
        return rewrite(value) if (start / value).exists() or is_path else value
    return _with_paths_rewritten(kind, value, start, rewrite)


def _exists(path: Path) -> bool:
    """Whether the path exists; for a pattern, whether the folder before the pattern exists."""
    match = _PATTERN.search(str(path))
    return path.exists() if match is None else Path(str(path)[: match.start()].rpartition("/")[0] or "/").is_dir()
