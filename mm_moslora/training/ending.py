"""`state.json`: that a run is under way, and how it ended, for whoever looks into its folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora import distributed
from mm_moslora.errors import MoSLoRAError
from mm_moslora.files import replace_json
from mm_moslora.redaction import redact_text

logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass
class Ending:
    """What the run itself says about its end; an exception says more."""

    finished: bool = False
    """Every step was done, or no more were worth it; otherwise it was asked to stop."""
    begun: bool = False
    """Whether the run went on at all: an attempt that is refused says nothing about a run that is there."""


@contextmanager
def recorded(folder: Path) -> Iterator[Ending]:
    """Keep `state.json` of a run folder for the length of a run; see `mm_moslora.report.schema`.

    A process that is killed leaves "running" with its process id, by which a reader finds out.
    """
    began = {"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 3)}
    before = _before(folder)
    _write(folder, {"state": "running", **began})
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        reason = _reason(error)
        over = {"state": "failed" if reason else "stopped", "reason": reason, **began, "ended": time.time()}
        _write(folder, over if before is None or ending.begun else before)
        raise
    _write(folder, {"state": "finished" if ending.finished else "stopped", **began, "ended": time.time()})


def _before(folder: Path) -> dict[str, Any] | None:
    """How an earlier attempt ended."""
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _reason(error: BaseException) -> str | None:
    """One line; None for Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return None
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return redact_text(first if isinstance(error, MoSLoRAError) else f"{type(error).__name__}: {first}")


def _write(folder: Path, state: dict[str, Any]) -> None:
    if not distributed.is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / STATE, state)
    except OSError as error:  # a full disk must not hide why the run ended
        logger.warning("%s could not be written (%s).", folder / STATE, error)
