"""The run folder: what it may hold before a run starts, and the lock of the run that writes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mm_moslora.utils.errors import CheckpointError, TrainingError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import write_owner
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.run_paths import RUN_FILES, RUN_LOCK, RUN_SIGNS, checkpoints, resume_folder
from mm_moslora.utils.untrusted_files import read_text_below


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
