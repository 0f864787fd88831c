"""Whether a run goes on, and how it ended, from the files in its folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STALE_SECONDS = 120.0
"""Where the process cannot be asked: a run that wrote nothing for so long is taken for stopped."""
_WRITTEN = ("state.json", "metrics.jsonl", "summary.json", "evaluation.json", "samples.json", "mixers.json")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands."""

    name: Literal["running", "finished", "stopped", "failed", "killed"]
    """stopped: on request, the same command continues it; killed: its process is gone without a word."""
    reason: str | None = None
    """Why it failed."""


def read_state(folder: Path, stages: Iterable[Path] = ()) -> RunState:
    """The state of a run.

    Args:
        folder: of the run.
        stages: its subfolders with runs of their own, the latest last.
    """
    for place in (folder, *reversed(list(stages))):
        told = _json(place / "state.json")
        if told.get("state") in ("finished", "stopped", "failed"):
            return RunState(name=told["state"], reason=str(told["reason"]) if told.get("reason") else None)
        if told.get("state") == "running":
            return RunState(name=_running(folder, told))
    return RunState(name=_guess(folder))


def _running(folder: Path, told: Mapping[str, Any]) -> Literal["running", "killed", "stopped"]:
    """Whether the process that says so is still there."""
    process = told.get("process")
    if told.get("host") != socket.gethostname() or not isinstance(process, int):
        return "running" if _age(folder) < STALE_SECONDS else "stopped"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "killed"
    except OSError:  # another user's
        pass
    return "running"


def _guess(folder: Path) -> Literal["running", "finished", "stopped"]:
    """For folders of releases without `state.json`."""
    summary = _json(folder / "summary.json")
    # Releases without state.json wrote a summary at the end alone.
    if summary.get("steps") and summary.get("total_steps", summary["steps"]) == summary["steps"]:
        return "finished"
    if (folder / "evaluation.json").is_file() and summary:
        return "finished"
    return "running" if _age(folder) < STALE_SECONDS else "stopped"


def _age(folder: Path) -> float:
    """Seconds since a file of the run or of its stages was written."""
    newest = 0.0
    with suppress(OSError):  # a run may go while it is looked at
        for place in (folder, *folder.iterdir()):
            for name in _WRITTEN:
                with suppress(OSError):
                    newest = max(newest, (place / name).stat().st_mtime)
    return time.time() - newest


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
