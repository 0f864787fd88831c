"""The run folder: what it may hold before a run, its lock, and `state.json`, which says how the run ended."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.launch.heartbeat import process_start
from mm_moslora.launch.launcher import STATE
from mm_moslora.utils.errors import CheckpointError, DistributedError, MoSLoRAError, TrainingError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import read_json, replace_json, write_owner
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.run_paths import RUN_FILES, RUN_LOCK, RUN_SIGNS, checkpoints, resume_folder
from mm_moslora.utils.untrusted_files import read_text_below

logger = logging.getLogger(__name__)


def refuse_folder(run: Path) -> None:
    """Refuse a run folder that is a file, or that holds files of another program."""
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise TrainingError(f"The run folder {run} cannot be made: {existing} is a file. Choose another train.output.")
    refuse_strangers(run, RUN_FILES, kind="run", also=RUN_SIGNS)


def refuse_resume(run: Path, resume: str) -> None:
    """Refuse a value of `--resume` that contradicts the contents of the run folder, or names no folder."""
    resume_folder(resume)
    if resume == "never" and checkpoints(run):
        raise CheckpointError(
            f"{run} already holds checkpoints, but resume is never. Choose another train.output, or resume: auto."
        )
    if resume == "required" and not any(run.glob("checkpoint-*")):  # `newest_valid` reports damaged checkpoints
        raise CheckpointError(f"{run} holds no checkpoint, but resume is required. Check train.output.")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a run folder for this run; the kernel frees the lock when the process ends."""
    from mm_moslora.utils import distributed  # torch, which the refusals above do without

    with ExitStack() as stack:
        with distributed.failing_together("Taking the run folder"):
            if distributed.is_main():
                refuse_folder(folder)
                stack.enter_context(_lock(folder))
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / RUN_LOCK, wait=False)
    except BlockingIOError as error:
        owner = (read_text_below(folder, RUN_LOCK, errors="replace") or "").strip()
        raise TrainingError(
            f"{folder} is in use by another run ({owner or 'owner unknown'}). "
            "Wait for it, stop it, or choose another train.output."
        ) from error
    except OSError as error:
        raise TrainingError(
            f"The run folder {folder} cannot be written ({error.strerror}). Choose another with train.output, or with "
            "--output of the quickstart."
        ) from error
    with lock as descriptor:
        write_owner(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield


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
    from mm_moslora.utils import distributed

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
