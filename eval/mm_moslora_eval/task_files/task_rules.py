"""Rules of the shipped benchmarks: the tables of `rules.py` in the folder of a benchmark.

The names of a folder's tasks and rules begin with its own, so a name tells where it is defined, and a run imports the
rules of its own benchmarks alone.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.task_files import TASKS


def folder_of(name: str) -> str:
    """The folder whose tasks and rules have names that begin as this one; empty where there is none."""
    return max((one for one in _folders() if name == one or name.startswith(f"{one}_")), key=len, default="")


@cache
def _folders() -> tuple[str, ...]:
    return tuple(sorted({path.parent.name for path in TASKS.glob("*/*.yaml")}))


@cache
def _rules(folder: str) -> ModuleType | None:
    if not (TASKS / folder / "rules.py").is_file():
        return None
    try:
        return importlib.import_module(f"mm_moslora_eval.task_files.{folder}.rules")
    except Exception as error:  # whatever the file raises
        where = TASKS / folder / "rules.py"
        raise EvalError(f"{where} cannot be imported: {type(error).__name__}: {error}. Mend it.") from error


def rule(table: str, name: str) -> Any | None:
    """The entry of a name in a table of the folder that it belongs to; None where there is none."""
    folder = folder_of(name)
    return getattr(_rules(folder), table, {}).get(name) if folder else None


def all_rules(table: str) -> dict[str, Any]:
    """The entries of all folders in their tables of this name."""
    return {name: entry for folder in _folders() for name, entry in getattr(_rules(folder), table, {}).items()}
