"""The state of a run, from its recorded state and the heartbeats of its ranks, readable on any host."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mm_moslora.launch.heartbeat import FOLDER, Heartbeat, is_running, read_heartbeats
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora.utils.untrusted_files import read_text_below

STALE_SECONDS = 120.0
"""Ranks write a heartbeat every second. A longer silence means that a rank is gone, where its process cannot be
checked. The limit allows for caches of network file systems and for different clocks."""
SETTLED_SECONDS = 5.0
"""Silence after which a process that is not found counts as gone; containers have their own process ids."""
EARLIER_SECONDS = 5.0
"""Heartbeats that are older than the run's start by more than this belong to an earlier start."""
_WRITTEN = ("state.json", "metrics.jsonl", "summary.json", "evaluation.json", "samples.json", "mixers.json")

Name = Literal["running", "finished", "stopped", "failed", "killed"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run."""

    name: Name
    """stopped: on request, the same command continues it; killed: its processes ended without recording a state."""
    reason: str | None = None
    """The reason of a failure, or facts about silent ranks."""
    ranks: tuple[int, ...] = ()
    """The ranks that the reason names, as far as they are known."""


def read_state(folder: Path) -> RunState:
    """The state of a run; secrets are removed from its reason."""
    state = _state(folder)
    return state if state.reason is None else replace(state, reason=redact_text(state.reason))


def _state(folder: Path) -> RunState:
    recorded = read_object(folder / "state.json")
    if recorded.get("state") in ("finished", "stopped", "failed"):
        return _ended(folder, recorded)
    if recorded.get("state") == "running":
        return _running(folder, recorded)
    return RunState(name=_guess(folder))


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where the file is missing or holds something else."""
    try:
        return parse_object(read_text_below(path.parent, path.name) or "{}", constants=True)
    except ValueError:
        return {}


def _ended(folder: Path, recorded: Mapping[str, Any]) -> RunState:
    """The state that the run recorded; where one of several ranks failed, the reason starts with it."""
    reason = str(recorded["reason"]) if recorded.get("reason") else None
    named = recorded.get("ranks")
    ranks = tuple(rank for rank in named if isinstance(rank, int)) if isinstance(named, list) else ()
    if reason and len(ranks) == 1 and "rank " not in reason:
        failures = [beat.failure for beat in _beats(folder)]
        if len(failures) > 1 and failures.count(None) >= 1:  # an error on all ranks names none of them
            reason = f"Rank {ranks[0]}: {reason}"
    return RunState(name=recorded["state"], reason=reason, ranks=ranks)


def _running(folder: Path, recorded: Mapping[str, Any]) -> RunState:
    """Whether the processes of a run without a recorded end still run."""
    beats = _beats(folder)
    if not beats:
        return _without_beats(folder, recorded)
    gone = [
        beat
        for beat in beats
        if not beat.is_over
        and (beat.age > SETTLED_SECONDS and beat.is_dead() if beat.is_here() else beat.age > STALE_SECONDS)
    ]
    failed = [beat for beat in beats if beat.failure or beat.gave_up]
    if any(not beat.is_over and beat not in gone for beat in beats):
        quiet = [beat for beat in beats if (not beat.is_over and beat.age > STALE_SECONDS) or beat in gone]
        return _state_of_ranks("running", [*failed, *quiet])
    if failed:
        return _state_of_ranks("failed", failed)
    if gone or any(beat.phase != "ended" for beat in beats):
        return _state_of_ranks("killed", gone or beats)
    return RunState(name=_guess(folder))  # all ended without being able to write


def _beats(folder: Path) -> list[Heartbeat]:
    """Heartbeats of the current start of a run; `state.json` is written at its beginning."""
    try:
        began = (folder / "state.json").stat().st_mtime
    except OSError:
        return []
    recorded = read_object(folder / "state.json")
    if recorded.get("state") != "running" and isinstance(recorded.get("since"), int | float):
        began = float(recorded["since"])
    return [beat for beat in read_heartbeats(folder / FOLDER) if beat.written >= began - EARLIER_SECONDS]


def _state_of_ranks(name: Name, beats: Sequence[Heartbeat]) -> RunState:
    """A state with a reason about some ranks."""
    if not beats:
        return RunState(name=name)
    return RunState(
        name=name, reason="; ".join(_rank_text(beat) for beat in beats[:3]), ranks=tuple(beat.rank for beat in beats)
    )  # fmt: skip


def _rank_text(beat: Heartbeat) -> str:
    where = f"at step {beat.step}"
    if beat.failure:
        return f"{beat.who} failed {where}: {beat.failure}"
    if beat.gave_up:
        return f"{beat.who} gave up waiting {where} ({beat.phase})"
    # In whole minutes: dashboards send an event whenever the text changes.
    age = beat.age if beat.age < 60 else beat.age // 60 * 60
    return f"{beat.who} is silent for {format_seconds(age)}, last seen {where} ({beat.phase})"


def _without_beats(folder: Path, recorded: Mapping[str, Any]) -> RunState:
    """The state by the recorded process, or where it cannot be checked, by the ages of the run's files."""
    process, age = recorded.get("process"), _age(folder)
    if recorded.get("host") == socket.gethostname() and isinstance(process, int):
        return RunState(name="running" if is_running(process, started=recorded.get("started")) else "killed")
    if age < STALE_SECONDS:
        return RunState(name="running")
    return RunState(name="killed", reason=f"Nothing was written for {format_seconds(age)}.")


def _guess(folder: Path) -> Literal["running", "finished", "stopped"]:
    """For folders without a `state.json` that can be read."""
    summary = read_object(folder / "summary.json")
    if summary.get("steps") and summary.get("total_steps", summary["steps"]) == summary["steps"]:
        return "finished"
    if (folder / "evaluation.json").is_file() and summary:
        return "finished"
    return "running" if _age(folder) < STALE_SECONDS else "stopped"


def _age(folder: Path) -> float:
    """Seconds since a file of the run last changed."""
    newest = 0.0
    for name in _WRITTEN:
        with suppress(OSError):
            newest = max(newest, (folder / name).stat().st_mtime)
    return time.time() - newest
