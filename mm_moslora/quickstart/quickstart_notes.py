"""What an earlier call left in a quickstart's folder: which quickstart it is, and notes that may be damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json

logger = logging.getLogger(__name__)

QUICKSTART = "quickstart.json"
"""File that says which quickstart a folder holds."""
_REMEDY = "The folder is left as it is. Choose another --output, or delete the folder."


def kept(path: Path, kind: type, *, fits: Callable[[Any], object]) -> Any:
    """What a JSON file of an earlier call holds.

    Args:
        path: the file.
        kind: what it must hold.
        fits: does with the content what its reader will do; an exception says that the content is damaged.

    Returns:
        The content; None where there is none, or where it is damaged, which a warning says.
    """
    try:
        content = read_json(path, kind)
        fits(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        logger.warning("%s is damaged (%s: %s) and is passed over.", path, type(error).__name__, error)
        return None
    return content


def refuse_other(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another quickstart, before anything is written there.

    Args:
        folder: may be missing, and may be older than `QUICKSTART`.
        asked: which quickstart is wanted, as `QUICKSTART` holds it.

    Raises:
        ConfigError: the folder holds another one.
    """
    held = kept(folder / QUICKSTART, dict, fits=len) or {}
    if changed := [key for key, value in asked.items() if held.get(key, value) != value]:
        raise ConfigError(
            f"{folder} holds another quickstart: {_listed(held, list(held))}. Asked for: {_listed(asked, changed)}. "
            f"{_REMEDY}"
        )


def refuse_other_recipe(folder: Path, stage: str, changed: tuple[str, ...]) -> None:
    """Refuse a folder one of whose stages was trained with another recipe.

    Args:
        folder: of the quickstart.
        stage: its name.
        changed: recipe keys as `key: there -> asked for`.

    Raises:
        ConfigError: there are some.
    """
    if changed:
        raise ConfigError(
            f"{folder} holds another quickstart: the recipe of {stage} differs (there -> asked for) in "
            f"{'; '.join(changed[:6])}. {_REMEDY}"
        )


def _listed(facts: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {facts[key]}" for key in keys)
