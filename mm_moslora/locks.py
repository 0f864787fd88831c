"""Locks between processes, in files: freed by the kernel when the process that holds one ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from typing import IO


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
