"""`state.json`: whether a run is active, and how it ended."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.launch.heartbeat import process_start
from mm_moslora.launch.launcher import STATE
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError, MoSLoRAError
from mm_moslora.utils.files import read_json, replace_json
from mm_moslora.utils.redaction import redact_text

logger = logging.getLogger(__name__)


@dataclass
class RunEnding:
    """The run's own record of its end; an exception adds its message."""

    finished: bool = False
    """Every step was done, or early stopping ended the run; otherwise it was asked to stop."""
    begun: bool = False
    """Whether the run started at all; a refused attempt must not overwrite the state of an existing run."""


@contextmanager
def record_run_state(folder: Path) -> Iterator[RunEnding]:
    """Keep `state.json` of a run folder up to date while a run is active; see `mm_moslora.reporting.run_data`."""
    # A process that is killed leaves "running"; readers check its process id and the heartbeats.
    own = os.getpid()
    began: dict[str, Any] = {
        "process": own, "started": process_start(own), "host": socket.gethostname(), "since": round(time.time(), 3),
    }  # fmt: skip
    before = _read_state(folder)
    if distributed.is_main():
        _write(folder, {"state": "running", **began})
    ending = RunEnding()
    try:
        yield ending
    except BaseException as error:
        reason = _reason(error)
        ranks = list(error.ranks) if isinstance(error, DistributedError) else [distributed.rank()] if reason else []
        over = {
            "state": "failed" if reason else "stopped",
            "reason": reason,
            "ranks": ranks,
            **began,
            "ended": time.time(),
        }
        if distributed.is_main():
            gone = reason is None and before is not None and before.get("state") == "running"  # this run has its lock
            _write(folder, over if before is None or ending.begun or gone else before)
        elif reason and (ending.begun or 0 in ranks) and (_read_state(folder) or {}).get("state") == "running":
            _write(folder, over)
        raise
    if distributed.is_main():
        _write(folder, {"state": "finished" if ending.finished else "stopped", **began, "ended": time.time()})


def record_failure(folder: Path, reason: str, *, ranks: Sequence[int]) -> None:
    """Record the end of a run, with the ranks to blame, before its process is ended, by the first rank that knows."""
    state = _read_state(folder)
    if state is not None and state.get("state") == "running":
        over = {"state": "failed", "reason": redact_text(reason), "ranks": list(ranks), "ended": time.time()}
        _write(folder, state | over)


def _read_state(folder: Path) -> dict[str, Any] | None:
    """The current content of the file; None where it is missing or damaged."""
    try:
        return dict(read_json(folder / STATE))
    except (OSError, ValueError, TypeError):
        return None


def _reason(error: BaseException) -> str | None:
    """One line about an exception; None for Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return None
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return redact_text(first if isinstance(error, MoSLoRAError) else f"{type(error).__name__}: {first}")


def _write(folder: Path, state: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / STATE, state)
    except OSError as error:  # a full disk must not hide the reason for the end
        logger.warning("%s could not be written (%s).", folder / STATE, error)
