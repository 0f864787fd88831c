"""File locks between processes, and new folders, which are made under one.

The kernel frees a lock when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mm_moslora.utils.files import building, discard, open_in_place
from mm_moslora.utils.folder_marks import MARK, in_construction, refuse_full_folder

logger = logging.getLogger(__name__)

_descriptors: set[int] = set()
"""Descriptors of the files that this process has locked or waits to lock."""


def lock_file(path: Path, *, wait: bool) -> AbstractContextManager[int]:
    """Lock a file inside a `with` block, which gets the file's descriptor.

    Args:
        path: the file; created if missing. Its content is kept.
        wait: whether to wait for another holder, which a line of the log says.
    """
    descriptor = open_in_place(path, os.O_RDWR)
    _descriptors.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            logger.info("Waiting for another process, which holds %s.", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
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
    if descriptor in _descriptors:  # otherwise a forked process has closed it
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _leave_to_parent() -> None:
    """Close the inherited descriptors after a fork, so that a child does not keep its parent's locks."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """Lock the creation of a folder against other processes; the lock file is deleted at the end.

    Args:
        folder: may be missing, and may be replaced meanwhile.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock_file(path, wait=True) as descriptor:
            if not _is_at(path, descriptor):  # the previous holder has deleted the file
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `folder` when the block ends, and is deleted after an error.

    Args:
        folder: missing, empty, or a link to an empty folder. One that a `new_folder` around this one builds is filled
            as it is.
    """
    if in_construction(folder):
        yield folder
        return
    refuse_full_folder(folder)
    folder = Path(os.path.realpath(folder))  # a link leads to where there is room, and stays
    with lock_beside(folder):
        refuse_full_folder(folder)  # another process may have made it meanwhile
        try:
            with building(folder, replaces=MARK) as part:
                yield part
        except OSError as error:
            if isinstance(error.filename, str):  # the path that the user knows
                error.filename = error.filename.replace(f".{folder.name}.partial", folder.name)
            raise
        discard(folder / MARK)  # the folder is the user's now, and this project replaces nothing in it
