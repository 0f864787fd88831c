"""Safe access to files that data name: records, table cells, task files and run folders.

Names come from the authors of the data and are never trusted:

- A name is a plain path below a declared root: the folder that a recipe or a task file declares, or else the folder of
  the file that holds the name. The working directory has no influence.
- It has no scheme, protocol chain, `..`, `~` or control characters, and no symbolic link leads out of the root, unless
  links are allowed. An absolute path is accepted where it lies below the root.
- Only regular files are opened: no folder, pipe, socket or device.
- Their size is limited, also while they grow during reading.

Paths from a user, such as those in recipes and command arguments, may lead anywhere (`beside`); these functions still
open them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import BufferedReader
from pathlib import Path, PurePosixPath

from mm_moslora.utils.errors import DataError

MOST_TEXT_BYTES = 2**29
"""Limit of a text that is read as a whole, such as the metrics of a run."""
MOST_BYTES = 2**31
"""Limit of data that are read as a whole, such as a question file or all answers of a run."""
BAD_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
"""Control characters and unpaired surrogates, which no text and no name may contain."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""Prefix of a URL or of a protocol chain."""


class FileFault(StrEnum):
    """Why a named file is not opened."""

    BAD_NAME = "bad name"
    """Not a plain path."""
    ESCAPES = "escapes"
    """It leads out of the root."""
    MISSING = "missing"
    """The file is missing or not readable."""
    NOT_A_FILE = "not a file"
    """A folder, a pipe, a socket or a device."""
    TOO_LARGE = "too large"
    """More bytes than the limit."""


class FileError(DataError):
    """A named file that was not opened."""

    def __init__(self, fault: FileFault, name: str, what: str, remedy: str) -> None:
        self.fault, self.name, self.what, self.remedy = fault, name, what, remedy
        super().__init__(f"{name}: {what}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Make the error picklable for worker processes."""
        return FileError, (self.fault, self.name, self.what, self.remedy)


def find_below(root: Path, name: object, *, follow_links: bool = False) -> Path:
    """The path for a name in data; opening checks whether the file exists.

    Args:
        root: resolved root folder.
        follow_links: accept symbolic links that lead out of the root.
    """
    if not isinstance(name, str) or not name.strip():
        what = "is empty" if isinstance(name, str) else f"is no text ({type(name).__name__})"
        raise FileError(FileFault.BAD_NAME, "name", what, f"write a path below {root}")
    shown = ascii(name)[:100]
    bad = BAD_CHARACTER.search(name) or "\\" in name or name.startswith("~") or "%2e" in name.lower()
    if bad or SCHEME.match(name) or "::" in name:
        remedy = f"write a path below {root}, without scheme, ~, backslash or escapes"
        raise FileError(FileFault.BAD_NAME, shown, "is no plain relative path", remedy)
    pure = PurePosixPath(name)
    if ".." in pure.parts or (pure.is_absolute() and not _lies_in(name, root)):
        raise FileError(FileFault.ESCAPES, shown, f"leaves {root}", f"write a path below {root}")
    path = root / name
    if follow_links:
        return path
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise FileError(FileFault.BAD_NAME, shown, f"is no path ({error})", "shorten or repair it") from error
    if not real.is_relative_to(root):
        raise FileError(FileFault.ESCAPES, shown, f"links out of {root}", f"copy the file below {root}")
    return real


def find_in_model(folder: Path, name: str) -> Path | None:
    """The path of a file in the folder of a model; None where it is missing.

    Args:
        folder: the folder. In the hub's cache its files are links to blobs of the repository.
    """
    root = Path(os.path.realpath(folder))
    blobs = next((parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"), root)
    path = Path(os.path.realpath(find_below(root, name, follow_links=True)))
    if not path.is_relative_to(root) and not path.is_relative_to(blobs):
        raise FileError(FileFault.ESCAPES, ascii(name)[:100], f"links out of {root}", f"copy the file below {root}")
    return path if os.path.lexists(path) else None


def _lies_in(name: str, root: Path) -> bool:
    """Whether an absolute path lies below a folder, as written or after resolving links."""
    return Path(name).is_relative_to(root) or Path(os.path.realpath(name)).is_relative_to(root)


def beside(folder: Path, name: str) -> Path:
    """A path from a user's file: relative paths start at the folder of that file, `~` is the home folder."""
    return folder / Path(name).expanduser()


@contextmanager
def opened(path: Path, *, most: int | None) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Args:
        most: maximum size, bytes; None: no limit, for files that are not read as a whole.
    """
    name = str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # opening a pipe would block
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "check the path and the folder that it starts from"
        socket = isinstance(error, OSError) and error.errno == errno.ENXIO
        fault = FileFault.NOT_A_FILE if socket else FileFault.MISSING
        raise FileError(fault, name, f"cannot be opened ({reason})", remedy) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileError(FileFault.NOT_A_FILE, name, "is a folder, a pipe or a device", "name a file")
    with os.fdopen(descriptor, "rb") as stream:
        if most is not None and status.st_size > most:
            raise _too_large(name, f"takes {status.st_size} bytes", most)
        yield stream


def _too_large(name: str, what: str, most: int) -> FileError:
    return FileError(FileFault.TOO_LARGE, name, what, f"stay below {most} bytes")


def read_bytes(path: Path, *, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; see `opened`."""
    with opened(path, most=most) as stream:
        data = stream.read(most + 1)
    if len(data) > most:  # it grew, or its file system reports no sizes
        raise _too_large(str(path), f"gives more than {most} bytes", most)
    return data


def read_text(path: Path, *, most: int = MOST_TEXT_BYTES, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file, line ends as `\\n`; see `opened`."""
    return read_bytes(path, most=most).decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")


def read_text_below(root: Path, name: str, *, errors: str = "strict") -> str | None:
    """The text of a file in a folder of untrusted origin; None where the file is missing.

    Args:
        root: the folder, as a user named it.
        errors: what to do with bytes that are not UTF-8, as for `bytes.decode`.
    """
    path = find_below(Path(os.path.realpath(root)), name)
    if not os.path.lexists(path):  # a run may be moved or deleted meanwhile
        return None
    try:
        return read_text(path, errors=errors)
    except FileError:
        if os.path.lexists(path):
            raise
        return None
