"""Locks between processes, in files: freed by the kernel when the process that holds one ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mm_moslora.utils.files import discard

_descriptors: set[int] = set()
"""Of the files whose locks this process holds or waits for."""


def held(path: Path, *, wait: bool) -> AbstractContextManager[int]:
    """Take the lock of a file for a `with` block, which gets the file's descriptor.

    Args:
        path: the file; made if it is missing. What it holds stays.
        wait: for whoever holds the lock.

    Raises:
        BlockingIOError: somebody holds it, and `wait` is false.
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _descriptors.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        _free(descriptor)
        raise
    return _until_freed(descriptor)


@contextmanager
def _until_freed(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        _free(descriptor)


def _free(descriptor: int) -> None:
    if descriptor in _descriptors:  # a forked process has closed it
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _leave_to_parent() -> None:
    """A forked process shares the locks, and one that outlives its parent would keep them."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """Wait until no other process is making a folder, and keep others from it; the lock file is gone at the end.

    Args:
        folder: may be missing, and may be replaced meanwhile.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with held(path, wait=True) as descriptor:
            if not _is_at(path, descriptor):  # whoever held it has deleted it
                continue
            try:
                yield
            finally:
                discard(path)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
