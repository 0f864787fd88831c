"""Finds data files and picture folders relative to the task file, not to the working directory; folders' checksums."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of, sha256_of_bytes
from mm_moslora.utils.untrusted_files import beside as resolve_model_paths

_DERIVED = "cache-"
"""Prefix of the cache files that `datasets` writes into the folder of the data."""


def find_file(path: str, *, beside: Path | None = None, where: str = "") -> Path:
    """Look a data file up: beside the task file, then below MM_MOSLORA_DATA, LMUData and ~/LMUData."""
    file = _first(path, "Data file", Path.is_file, beside)
    if file is None:
        tried = ", ".join(map(str, _candidates(path, beside)))
        raise EvalError(
            f"Data file {path!r} was not found; looked at {tried}.{where} Put it there or set MM_MOSLORA_DATA to its "
            "folder."
        )
    return file


def find_data(path: str, *, beside: Path | None = None) -> Path | None:
    """A file or folder, looked up as by `find_file`; None if it does not exist, so that it may be an id on the hub."""
    return _first(path, "Data set", Path.exists, beside)


def picture_folder(image_folder: str | None, data: Path, *, beside: Path | None = None) -> Path:
    """The folder of a data file's pictures, resolved: as the task file beside it names it, else that of the data."""
    if image_folder is None:
        return (data if data.is_dir() else data.parent).resolve()
    folder = resolve_model_paths(beside or Path.cwd(), image_folder)
    if folder.is_dir():
        return folder.resolve()
    other = data.parent / image_folder
    hint = f" There is {other}; image folders are relative to the file that names them." if other.is_dir() else ""
    raise EvalError(f"The image folder {image_folder!r} of {data} would be {folder}, which is no folder.{hint}")


def _candidates(path: str, beside: Path | None) -> list[Path]:
    first = resolve_model_paths(beside or Path.cwd(), path)
    if Path(path).expanduser().is_absolute():
        return [first]
    roots = [*(os.environ.get(name) for name in ("MM_MOSLORA_DATA", "LMUData")), Path.home() / "LMUData"]
    return [first, *(Path(root) / path for root in roots if root)]


def _first(path: str, what: str, exists: Callable[[Path], bool], beside: Path | None) -> Path | None:
    """The first candidate that exists, resolved; a path that exists in the working directory alone is refused."""
    candidates = _candidates(path, beside)
    existing = next((candidate for candidate in candidates if exists(candidate)), None)
    if existing is None and exists(Path.cwd() / path):
        raise EvalError(
            f"{what} {path!r} is not at {candidates[0]}, but at {Path.cwd() / path}. Paths in a task file are relative "
            "to the task file, not to the working directory: correct the path, or write an absolute one."
        )
    return existing.resolve() if existing is not None else None


def matches(row: Mapping[str, Any], where: Mapping[str, str] | None) -> bool:
    """Whether a row has the wanted value in every named column; each `*` in it stands for any text."""
    return all(
        fnmatchcase(str(row.get(column)), re.sub(r"[?[]", r"[\g<0>]", wanted))
        for column, wanted in (where or {}).items()
    )


def folder_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files; equal for a copy in another place."""
    lines = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith((".", _DERIVED)) or not path.is_file():
                continue
            lines.append(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n")
    return sha256_of_bytes("".join(lines).encode("utf-8", "surrogateescape"))
