"""Paths in recipes: relative ones start at the recipe file, whatever the working directory is.

Presets that are called by name have no place of their own, and overrides are typed by a person: their relative paths
start at the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mm_moslora.config.run_config import TrainConfig
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.run_paths import RUN_SIGNS, file_and_folder

_PATHS = (
    "data.train.*.path", "data.train.*.image_folder", "data.validation.*.path", "data.validation.*.image_folder",
    "data.cache", "model.projector.weights", "model.vision.feature_cache", "adapter.weights", "train.output",
)  # fmt: skip
_MODELS = ("model.language", "model.vlm", "model.vision.name", "model.vision.pretrained", "model.vision.fuse_with")
"""A folder, a file, or a name that is looked up elsewhere."""
_TASKS = "validate.tasks.*"
_TASK_FILE = re.compile(r"(.+\.ya?ml)((?:@[^@/]*)?)")
_PATTERN = re.compile(r"[*?\[{]")


def seen_from_here(data: Mapping[str, Any], folder: Path, *, source: str, typed: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data of a recipe file, its relative paths as they are reached from the working directory.

    Args:
        data: as it stands in the file.
        folder: of the file.
        source: the file, for messages.
        typed: keys that overrides will set; theirs are left alone.

    Raises:
        ConfigError: a path leads nowhere from the file, but somewhere from the working directory.
    """
    start = _start_of_run(data, folder) or folder
    if start.resolve() == Path.cwd().resolve():
        return dict(data)
    train = data.get("train")
    if train is None or (isinstance(train, Mapping) and train.get("output") is None):
        data = {**data, "train": {**(train or {}), "output": TrainConfig.output}}

    def change(key: str, value: str) -> str:
        is_typed = any(key == name or key.startswith(f"{name}.") for name in typed)
        return value if is_typed else _reached(key, value, start, source)

    found: dict[str, Any] = _changed(data, "", change)
    return found


def absolute(data: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data of a recipe with absolute paths, so that it may be written anywhere."""
    here = Path.cwd()
    found: dict[str, Any] = _changed(
        data, "", lambda key, value: _placed(key, value, here, lambda name: str(here / name))
    )
    return found


def _start_of_run(data: Mapping[str, Any], folder: Path) -> Path | None:
    """Where a run was started whose resolved recipe lies in its own folder, or in a checkpoint there."""
    train = data.get("train")
    output = train.get("output") if isinstance(train, Mapping) else None
    if not isinstance(output, str) or os.path.isabs(output):
        return None
    parts = Path(os.path.normpath(output)).parts
    for place in (folder.resolve(), folder.resolve().parent):
        if parts and parts == place.parts[-len(parts) :]:
            return Path(*place.parts[: -len(parts)])
    return None


def _changed(data: Any, key: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(data, Mapping):
        return {name: _changed(item, f"{key}.{name}" if key else str(name), change) for name, item in data.items()}
    if isinstance(data, list):
        return [_changed(item, f"{key}.{number}", change) for number, item in enumerate(data)]
    return change(key, data) if isinstance(data, str) else data


def _placed(key: str, value: str, start: Path, place: Callable[[str], str]) -> str:
    """A value with its relative paths, which begin at `start`, given to `place`, a name of a model only where it is
    there already."""
    if not value or value.startswith(("~", "hf:")) or os.path.isabs(value):
        return value
    if key == "train.zero":
        return place(value) if value.endswith(".json") else value
    if key in _MODELS:
        return place(value) if Path(value).exists() else value
    if fnmatchcase(key, _TASKS):
        return _task(value, start, place)
    return place(value) if any(fnmatchcase(key, path) for path in _PATHS) else value


def _task(value: str, start: Path, place: Callable[[str], str]) -> str:
    """A task: the name of a shipped one, a task file and protocol, or a data file and picture folder."""

    def placed(name: str) -> str:
        return name if os.path.isabs(name) or name.startswith("~") else place(name)

    kind, _, rest = value.partition(":")
    if kind == "tsv":
        return f"tsv:{placed(rest)}"
    if kind == "llava":
        file, folder = file_and_folder(rest, start=start)
        return f"llava:{placed(file)}" + (f"@{placed(folder)}" if folder else "")
    match = _TASK_FILE.fullmatch(value)
    return value if match is None else f"{placed(match[1])}{match[2]}"


def _reached(key: str, value: str, start: Path, source: str) -> str:
    def place(name: str) -> str:
        there, here = start / name, Path.cwd() / name
        # A run's folder need not exist, and any other of its name says nothing.
        meant = any(any(here.glob(sign)) for sign in RUN_SIGNS) if key == "train.output" else _exists(here)
        if not _exists(there) and meant:
            raise ConfigError(
                f"{source}: {key} is {name!r}, which is not at {there}, but at {here}. Relative paths in a recipe "
                f"start at the recipe file: write {os.path.relpath(here, start)!r}, or an absolute path. On the "
                "command line (--KEY PATH) they start at the working directory."
            )
        return _shown(there)

    if key in _MODELS:  # a hub's name, where no folder is there
        if not value or value.startswith("~") or os.path.isabs(value):
            return value
        return place(value) if (start / value).exists() or _is_model(key, Path.cwd() / value) else value
    return _placed(key, value, start, place)


def _is_model(key: str, path: Path) -> bool:
    """Whether a name would be taken for this path; tags of weights are often names of folders, too."""
    return path.is_file() if key.endswith("pretrained") else path.is_dir()


def _exists(path: Path) -> bool:
    """Whether something is there; of a pattern, the folder before it."""
    match = _PATTERN.search(str(path))
    return path.exists() if match is None else Path(str(path)[: match.start()].rpartition("/")[0] or "/").is_dir()


def _shown(path: Path) -> str:
    """A path from the working directory where it lies below that, else an absolute one."""
    full = os.path.abspath(path)
    here = os.getcwd()
    return os.path.relpath(full, here) if Path(full).is_relative_to(here) else full
