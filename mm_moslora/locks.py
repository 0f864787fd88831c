"""Locks between processes, in files: freed by the kernel when the process that holds one ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mm_moslora.files import discard


def take(stream: IO[str], *, wait: bool) -> None:
    """Take the lock of an open file, until it is closed.

    Args:
        stream: the file.
        wait: for whoever holds it.

    Raises:
        BlockingIOError: somebody holds it, and `wait` is false.
    """
    fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    # A forked process shares the lock, and one that outlives this process would keep it.
    os.register_at_fork(after_in_child=stream.close)


@contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """Wait until no other process is making a folder, and keep others from it; the lock file is gone at the end.

    Args:
        folder: may be missing, and may be replaced meanwhile.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a", encoding="utf-8") as stream:
            take(stream, wait=True)
            if not _is_at(path, stream):  # whoever held it has deleted it
                continue
            try:
                yield
            finally:
                discard(path)
            return


def _is_at(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
