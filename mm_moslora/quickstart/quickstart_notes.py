"""Records of earlier calls in a quickstart's folder: settings, seconds of stages, JSON files that may be damaged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json, replace_json
from mm_moslora.utils.text_format import format_seconds

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

QUICKSTART = "quickstart.json"
"""File with the settings of the quickstart in a folder."""
_REMEDY = "The folder is left unchanged. Choose another --output, or delete the folder."


def read_earlier(path: Path, kind: type, *, fits: Callable[[Any], object]) -> Any:
    """The content of a JSON file of an earlier call.

    Args:
        fits: uses the content as its reader will; an exception means that the content is damaged.

    Returns:
        The content; None where the file is missing, or damaged, which a warning reports.
    """
    try:
        content = read_json(path, kind)
        fits(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        logger.warning("%s is damaged (%s: %s) and is ignored.", path, type(error).__name__, error)
        return None
    return content


def refuse_other(folder: Path, requested: Mapping[str, Any]) -> None:
    """Refuse a folder of another quickstart before anything is written there.

    Args:
        folder: may be missing, or have no `QUICKSTART` file.
    """
    recorded = read_earlier(folder / QUICKSTART, dict, fits=len) or {}
    if changed := [key for key, value in requested.items() if recorded.get(key, value) != value]:
        raise ConfigError(
            f"{folder} holds another quickstart: {_listed(recorded, list(recorded))}. "
            f"Requested: {_listed(requested, changed)}. {_REMEDY}"
        )


def refuse_other_recipe(folder: Path, stage: str, changed: tuple[str, ...]) -> None:
    """Refuse a folder with a stage that was trained with another recipe."""
    if changed:
        raise ConfigError(
            f"{folder} holds another quickstart: the recipe of {stage} differs (there -> requested) in "
            f"{'; '.join(changed[:6])}. {_REMEDY}"
        )


def _listed(facts: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {facts[key]}" for key in keys)


class StageClock:
    """Seconds per stage, summed over interruptions."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "timing.json"
        self.seconds: dict[str, float] = (
            read_earlier(self.path, dict, fits=lambda content: format_seconds(math.fsum(content.values()))) or {}
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block as a part of a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            # A stage that only reads back its result must not replace the time that it took.
            if spent > self.seconds.get(name, 0) / 4:
                self.seconds[name] = self.seconds.get(name, 0) + spent
                replace_json(self.path, self.seconds)

    @property
    def total(self) -> float:
        """Of all stages."""
        return math.fsum(self.seconds.values())


def tuned_summary(folder: Path) -> dict[str, Any]:
    """The summary of the tuned stage; where it is damaged, an earlier call's copy, or an empty one."""
    for source in (folder / "tune", folder):
        if summary := read_earlier(
            source / "summary.json", dict, fits=lambda content: content["tokens_per_image"] + content["memory_gib"]
        ):
            return dict(summary)
    return {}
