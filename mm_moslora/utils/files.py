"""Writing, copying, replacing and deleting files. No other module deletes, overwrites or copies files of a run.

A folder is emptied or replaced only if it bears this project's mark, and a file only if this project wrote it.
`tests/packaging/test_doors.py` lists modules that may call `unlink`, `rename`, `replace` or `rmtree`, or write where
somebody's link may stand.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.folder_marks import (
    MARK,
    in_construction,
    is_built,
    is_regular,
    kinds_of,
    names_in,
    refuse_unmarked,
)
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json
from mm_moslora.utils.untrusted_files import MOST_BYTES, MOST_TEXT_BYTES, find_in_model, opened, read_bytes

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ERROR_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which raise errors of their own, name the system's reason."""
_KEPT_BYTES = 2**20
"""Maximum bytes that an `Appender` keeps in memory while the disk is full."""


def sync(path: Path) -> None:
    """Make a file's content, or the entries of a folder, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Free bytes in the file system of a folder."""
    return shutil.disk_usage(folder).free


def is_full(error: BaseException) -> bool:
    """Whether the system refused a write for lack of space, which may be temporary."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    found = _ERROR_OF_RUST.search(str(error))
    return found is not None and int(found[1]) in _FULL


def copy_of_model(source: Path, names: Iterable[str], folder: Path) -> None:
    """Copy files out of the folder of somebody's model, those that are there; no link out of it is followed.

    Code that a configuration names (`auto_map`) is not copied, and its name is left out.

    Args:
        folder: where to; it has none of them.
    """
    for name in names:
        if (path := find_in_model(source, name)) is None:
            continue
        with opened(path, most=MOST_BYTES) as stream, (folder / name).open("xb") as copied:
            if name.endswith(".json") and isinstance(content := parse_json(stream.read(), constants=True), dict):
                content.pop("auto_map", None)
                copied.write(json.dumps(content, indent=2, ensure_ascii=False).encode())
            else:
                stream.seek(0)
                shutil.copyfileobj(stream, copied)


def open_in_place(path: Path | str, flags: int) -> int:
    """Open a file at its path to append to it or to lock it, creating it if missing; returns the descriptor.

    Args:
        path: anybody may have made what is there: a link would lead to a file of the user, and what is appended to a
            hard link to one. The former is refused, the latter becomes a copy.
    """
    path = Path(path)
    _refuse_irregular(path)
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # opening a pipe would block
    descriptor = os.open(path, flags, 0o666)
    if flags & os.O_APPEND and os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        with replacing(path) as own:
            shutil.copyfile(path, own)
        descriptor = os.open(path, flags, 0o666)
    return descriptor


def _refuse_irregular(path: Path) -> None:
    if not os.path.lexists(path) or is_regular(path):
        return
    what = f"a link to {os.readlink(path)}" if path.is_symlink() else "a folder, a pipe or a device"
    raise ConfigError(
        f"{path} is {what}, and would be written; expected a file of this project, or none. Nothing is written through "
        "it. Delete it, or choose another folder."
    )


def writing_in_place(path: Path, *, append: bool = False) -> TextIO:
    """Open a text file for writing at its final place; see `open_in_place`.

    Args:
        append: whether its content is kept. If not, a new file takes its name, and hard links keep what they had.
    """
    if not append and os.path.lexists(path) and is_regular(path):
        path.unlink()
    return open(path, "a" if append else "x", encoding="utf-8", newline="\n", opener=open_in_place)


def write_owner(lock: int, text: str) -> None:
    """Say in a locked file who holds it, unless the file has other names, hard links, which may be the user's."""
    if os.fstat(lock).st_nlink == 1:
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)


def make_subfolder(path: Path, *, below: Path | None = None) -> None:
    """Make a folder inside one of this project, if it is missing.

    Args:
        below: the folder that no link may leave; None: its parent.
    """
    folder = below or path.parent
    for part in path.relative_to(folder).parts:
        folder /= part
        if folder.is_symlink():
            _refuse_irregular(folder)
    path.mkdir(parents=True, exist_ok=True)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder of this project atomically.

    Only after `sync` the new name survives a power loss. An existing file at `target` is replaced, and so is an empty
    folder by a folder; the system refuses to replace anything else.
    """
    path.replace(target)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file of this project, so that readers see the old or the new content, never a part of it.

    The new content survives a power loss.

    Args:
        text: its content; line ends are kept, and so are unpaired surrogates.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream,
    ):
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make a symbolic link, in the place of an earlier one."""
    if path.exists() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, "is no link", str(path))
    with replacing(path) as temporary:
        temporary.symlink_to(target)


def replace_json(path: Path, data: Any) -> None:
    """Replace a JSON file; see `replace_text`."""
    replace_text(path, json.dumps(data, indent=1, sort_keys=False, default=str))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a temporary file to write; it replaces `path` at the end and is deleted after an error."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")  # process ids are not unique between hosts
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staging(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to write files into; they move to `folder` at the end and are deleted after an error.

    Args:
        folder: the final folder; created in one rename if it is missing.
        names: names of the files, in the order in which they move into an existing folder.

    A folder that `building` has just made is the temporary folder itself: the next call clears what a killed process
    leaves in it.
    """
    if in_construction(folder):
        yield folder
        for path in folder.iterdir():
            sync(path)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as outer:
        staged = Path(outer, "staged")
        staged.mkdir()
        yield staged
        for path in staged.iterdir():
            sync(path)
        if not folder.exists():
            rename(staged, folder)
        else:
            for name in names:
                rename(staged / name, folder / name)


def discard(path: Path) -> None:
    """Delete a file that this project wrote, if it exists."""
    path.unlink(missing_ok=True)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a file or folder to `NAME.SUFFIX`, or to `NAME.SUFFIX1` if that exists; returns the new path."""
    names = (path.with_name(f"{path.name}.{suffix}{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    rename(path, aside)
    return aside


def read_json(path: Path, kind: type = dict, *, below: Path | None = None, linked: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        below: the folder that no link may leave, such as a run or a checkpoint of anybody; None: the file's own. In the
            hub's cache, links lead to its blobs.
        linked: links are followed, for a file that a user names, a model, or a part of the installed package.
    """
    if not linked:
        below = below or path.parent
        path = find_in_model(below, str(path.relative_to(below))) or path
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        data = parse_json(read_bytes(path, most=MOST_TEXT_BYTES), constants=True)
    except StrictJsonError as error:
        raise StrictJsonError(f"{path} {error}") from error
    if not isinstance(data, kind):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected {'an object' if kind is dict else 'a list'}")
    return data


def mark(folder: Path, kind: str) -> None:
    """Mark an existing folder as this project's, so that it may be emptied or replaced later."""
    if kind in kinds_of(folder):
        return
    with writing_in_place(folder / MARK, append=True) as stream:
        stream.write(f"{kind}\n")
        stream.flush()
        os.fsync(stream.fileno())
    sync(folder)


def remove(folder: Path, *, mark: str = MARK) -> None:
    """Delete a folder of this project with its contents, if it exists.

    The mark is deleted last, so that an interrupted deletion can be completed later. Where the system refuses to delete
    a file, the file and the mark stay.
    """
    refuse_unmarked(folder, mark)
    if not os.path.lexists(folder):
        return
    with contextlib.suppress(OSError):  # an empty folder
        folder.rmdir()
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another thread or process may delete it, too
        for item in folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            elif item.name != mark:
                with contextlib.suppress(OSError):
                    item.unlink()
    with contextlib.suppress(OSError):
        sync(folder)  # before the mark is deleted: files that a power loss restores must still be marked
        if {item.name for item in folder.iterdir()} <= {mark}:
            (folder / mark).unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def building(folder: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A marked temporary folder to fill; it replaces `folder` at the end and is deleted after an error.

    Remains of a killed process are deleted first, so only one process at a time may build a folder: callers must hold
    a lock.

    Args:
        replaces: name of the file that marks an old folder there, which is then replaced. None: an existing folder is
            kept, such as one that another host made meanwhile, and the new one is deleted; a folder with nothing but
            the project's mark is replaced.
    """
    if replaces is not None:
        refuse_unmarked(folder, replaces)
    part = folder.with_name(f".{folder.name}.partial")
    remove(part)
    part.mkdir(parents=True)
    mark(part, "temporary")
    try:
        yield part
        if replaces is not None:
            remove(folder, mark=replaces)
        elif names_in(folder) == {MARK}:
            remove(folder)
        try:
            part.rename(folder)
        except OSError:
            # On a network file system, another host's folder may not be visible at once.
            if not is_built(folder):
                raise
        else:
            if replaces != MARK:
                discard(folder / MARK)
    finally:
        remove(part)


class Appender:
    """Appends lines to a file, each in one call, and buffers lines while the disk is full.

    Args:
        path: opened for every line, so that it may be moved and its disk may be mounted again.
        say: called with a sentence when the disk starts to refuse, and when it accepts the buffered lines.
    """

    def __init__(self, path: Path, *, say: Callable[[str], None] = logger.warning) -> None:
        self.path, self._say = path, say
        self._waiting = b""
        self._refused = False
        self._lost = 0

    def add(self, line: str) -> None:
        """Append a line; the line end is added. A refused write is not an error."""
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        if len(self._waiting) + len(data) <= _KEPT_BYTES:
            self._waiting += data
        else:
            self._lost += 1
        self.flush()

    def flush(self) -> bool:
        """Try to write the buffered lines; returns whether none is left."""
        if not self._waiting:
            return True
        try:
            descriptor = open_in_place(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(descriptor, self._waiting) :]
            finally:
                os.close(descriptor)
        except (OSError, ConfigError) as error:
            if not self._refused:
                reason = getattr(error, "strerror", error)
                self._say(f"{self.path} cannot be written ({reason}); its lines are kept and tried again.")
            self._refused = True
            return False
        if self._refused:
            self._say(f"{self.path} is written again; {self._lost} lines were lost.")
        self._refused, self._lost = False, 0
        return True
