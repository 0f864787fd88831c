"""Finding data files, and keeping names inside their folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_moslora.errors import EvalError


def find_file(path: str, *, beside: Path | None = None) -> Path:
    """Look a data file up: as given, beside the task file, then below MM_MOSLORA_DATA, LMUData and ~/LMUData.

    Raises:
        EvalError: it is in none of these places.
    """
    given = Path(path).expanduser()
    places = [given]
    if not given.is_absolute():
        roots = [beside, *(os.environ.get(name) for name in ("MM_MOSLORA_DATA", "LMUData")), Path.home() / "LMUData"]
        places += [Path(root) / given for root in roots if root]
    for place in places:
        if place.is_file():
            return place.resolve()
    looked = ", ".join(str(place) for place in places)
    raise EvalError(
        f"Data file {path!r} was not found; looked at {looked}. Put it there or set MM_MOSLORA_DATA to its folder."
    )


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` below `folder`, or None when the name leads out of it."""
    root = folder.resolve()
    target = (root / name).resolve()
    return target if target.is_relative_to(root) else None


def matches(row: Mapping[str, Any], where: Mapping[str, str] | None) -> bool:
    """Whether a row has the wanted value in every named column."""
    return all(str(row.get(column)) == wanted for column, wanted in (where or {}).items())
