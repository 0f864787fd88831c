"""Writing, replacing and deleting files: the only module that takes anything away from a disk.

A folder is emptied or replaced only if it bears a mark of this project, and a file only if this project wrote it.
`tests/utils/test_files.py` finds no `unlink`, `rename`, `replace` or `rmtree` in any other module.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError

logger = logging.getLogger(__name__)

MARK = ".mm_moslora"
"""A file in a folder of this project, one kind a line (`quickstart`, `comparison`, `temporary`, ...)."""
PAGE_SIGN = b'name="generator" content="mm_moslora"'
"""In the head of every HTML page of this project."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KEPT_BYTES = 2**20
"""What an `Appender` keeps in memory, at most, of what a full disk does not take."""
_HEAD_BYTES = 4096


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written in the file system of a folder."""
    return shutil.disk_usage(folder).free


def sha256_of(file: Path | BufferedReader) -> str:
    """Hex digest of a file, or of what is left of a stream."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_full(error: BaseException) -> bool:
    """Whether the system refused for want of room, which may come back."""
    return isinstance(error, OSError) and error.errno in _FULL


def rename(path: Path, target: Path) -> None:
    """Give a file or folder of this project another name in one move.

    Whether that survives a loss of power, `sync` decides. A file at `target` is replaced, and so is an empty folder by
    a folder; the system refuses to replace anything else.
    """
    path.replace(target)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file of this project so that a reader sees the old or the new one, never a half.

    The new one survives a loss of power.

    Args:
        path: the file.
        text: its content; line ends stay as they are, and so do halves of surrogate pairs.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream,
    ):
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync(path.parent)


def replace_json(path: Path, data: Any) -> None:
    """Replace a JSON file; see `replace_text`."""
    replace_text(path, json.dumps(data, indent=1, sort_keys=False, default=str))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file's path, to be written; it takes the place of `path` at the end and is gone after a failure."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")  # process ids repeat from host to host
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staging(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write files into, which move to `folder` when all are written and are gone after a failure.

    Args:
        folder: the final place; made in one move if it is missing.
        names: of the files, in the order in which they move into a folder that is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as place:
        staged = Path(place, "staged")
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
    """Delete a file that this project wrote; one that is not there is fine."""
    path.unlink(missing_ok=True)


def unused(path: Path) -> Path:
    """The path, with a number behind its name where something has that name already."""
    number = 0
    while os.path.lexists(candidate := path.with_name(f"{path.name}{number or ''}")):
        number += 1
    return candidate


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a file or folder to `NAME.SUFFIX`, or `NAME.SUFFIX1` where that exists; returns the new path."""
    aside = unused(path.with_name(f"{path.name}.{suffix}"))
    rename(path, aside)
    return aside


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file of this project.

    Args:
        path: the file.
        kind: what it must hold.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the text says how.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, kind):
        raise ValueError(f"it holds a {type(data).__name__}, expected a {kind.__name__}")
    return data


def mark(folder: Path, kind: str) -> None:
    """Mark an existing folder as one of this project's, so that it may be emptied or replaced later."""
    if kind in _kinds(folder):
        return
    with (folder / MARK).open("a", encoding="utf-8") as stream:
        stream.write(f"{kind}\n")
        stream.flush()
        os.fsync(stream.fileno())
    sync(folder)


def _kinds(folder: Path) -> list[str]:
    try:
        return (folder / MARK).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def is_built(folder: Path) -> bool:
    """Whether a folder is there and holds more than the project's mark, which an interrupted deletion leaves."""
    return bool(_names(folder) - {MARK})


def _names(folder: Path) -> set[str]:
    try:
        return {item.name for item in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def refuse_strangers(folder: Path, names: Sequence[str], *, kind: str, also: Sequence[str] = ()) -> None:
    """Refuse to write into a folder where files of somebody else have the names that are going to be written.

    Args:
        folder: may be missing.
        names: files and folders that will be written there.
        kind: of the mark that shows that those that are there are this project's.
        also: patterns of other files that show the same.

    Raises:
        ConfigError: one of the names is there, and no mark.
    """
    found = [name for name in names if os.path.lexists(folder / name)]
    if not found or kind in _kinds(folder) or any(any(folder.glob(pattern)) for pattern in also):
        return
    raise ConfigError(
        f"{folder} already holds {', '.join(found[:5])}, and nothing shows that a {kind} of mm_moslora wrote it, so it "
        f"is left alone. Choose another folder. If a {kind} did write it, say so: echo {kind} >> {folder / MARK}"
    )


def output_file(path: Path, *, sign: bytes | None = None) -> Path:
    """A file to write, as it was given.

    Args:
        path: the file.
        sign: bytes near the beginning of every file that this project writes in its place, which are therefore
            replaced; None: no file is replaced.

    Raises:
        ConfigError: there is a folder, or a file that does not bear the sign.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the file to write. Add a name to it.")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
        if sign is None or sign not in head:
            raise ConfigError(f"{path} exists and is not replaced. Choose another name, or delete it first.")
    return path


def refuse_full_folder(folder: Path) -> None:
    """Refuse a folder for new files where none can be made, or that holds something.

    Raises:
        ConfigError: it does, or it cannot be made.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ConfigError(f"{folder} cannot be made: {there} is a file or a broken link. Choose a new folder.")
    try:  # permissions alone do not tell: root has them under /proc, and on file systems that are read-only
        with tempfile.TemporaryDirectory(prefix=".", dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made in {there}: {error.strerror}. Choose a new folder.") from error
    if is_built(folder):
        raise ConfigError(f"{folder} is not empty. Choose a new folder, so that no old file is mistaken for a new one.")


def remove(folder: Path, *, mark: str = MARK) -> None:
    """Delete a folder of this project and what is in it; one that is not there is fine.

    The mark goes last, so that what an interrupted deletion leaves can be deleted later. A file that the system does
    not delete is left there, and the mark with it.

    Args:
        folder: what to delete.
        mark: name of the file in it that shows whose it is.

    Raises:
        ConfigError: it holds something and has no such file.
    """
    _refuse_unmarked(folder, mark)
    if not os.path.lexists(folder):
        return
    with contextlib.suppress(OSError):  # an empty folder
        folder.rmdir()
        return
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        elif item.name != mark:
            with contextlib.suppress(OSError):
                item.unlink()
    with contextlib.suppress(OSError):
        sync(folder)  # before the mark goes: a loss of power must not bring back anything that it shows to be ours
        if {item.name for item in folder.iterdir()} <= {mark}:
            (folder / mark).unlink(missing_ok=True)
            folder.rmdir()


def _refuse_unmarked(folder: Path, mark: str) -> None:
    """Raise where something lies at the path that has no mark, and is no folder that is empty but for the project's."""
    marked = not folder.is_symlink() and (folder / mark).is_file()
    if not os.path.lexists(folder) or marked or (folder.is_dir() and not is_built(folder)):
        return
    raise ConfigError(
        f"{folder} is in the way and is not deleted: it has no {mark}, so nothing shows that mm_moslora made it. "
        "Move it away."
    )


@contextmanager
def building(folder: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A marked folder to fill; it takes the place of `folder` at the end and is gone after a failure.

    What a killed process left of an earlier attempt is deleted first, so one process at a time may build a folder:
    whoever calls this holds a lock.

    Args:
        folder: the final place.
        replaces: name of the file that marks an old folder there, which is then replaced. None: a folder that is there
            at the end, another host's say, counts, and what was built is dropped; one that holds nothing but the
            project's mark is replaced.

    Raises:
        ConfigError: something without a mark is in the way.
    """
    if replaces is not None:
        _refuse_unmarked(folder, replaces)
    part = folder.with_name(f".{folder.name}.partial")
    remove(part)
    part.mkdir(parents=True)
    mark(part, "temporary")
    try:
        yield part
        if replaces is not None:
            remove(folder, mark=replaces)
        elif _names(folder) == {MARK}:
            remove(folder)
        try:
            part.rename(folder)
        except OSError:
            # A network file system may say for a while that a folder of another host is not there.
            if not is_built(folder):
                raise
        else:
            if replaces != MARK:
                discard(folder / MARK)
    finally:
        remove(part)


class Appender:
    """Appends lines to a file, each in one call, and keeps those that the disk refuses until it takes them.

    Args:
        path: opened for every line, so that it may be moved and its disk may come back.
        say: told once, in words, when the disk begins to refuse, and once when it takes what was kept.
    """

    def __init__(self, path: Path, *, say: Callable[[str], None] = logger.warning) -> None:
        self.path, self._say = path, say
        self._waiting = b""
        self._refused = False
        self._lost = 0

    def add(self, line: str) -> None:
        """Append a line; its end is added. A disk that refuses it is no error."""
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        if len(self._waiting) + len(data) <= _KEPT_BYTES:
            self._waiting += data
        else:
            self._lost += 1
        self.flush()

    def flush(self) -> bool:
        """Try to write what waits; whether nothing waits any more."""
        if not self._waiting:
            return True
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(descriptor, self._waiting) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._refused:
                self._say(f"{self.path} cannot be written ({error.strerror}); what it misses is kept and tried again.")
            self._refused = True
            return False
        if self._refused:
            self._say(f"{self.path} is written again; {self._lost} lines were lost.")
        self._refused, self._lost = False, 0
        return True
