"""Whose a folder or file is: marks, signs, and refusals of what another program wrote."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_files import FileError, opened, read_text_below

MARK = ".mm_moslora"
"""Mark file in a folder of this project, with one kind per line (`quickstart`, `comparison`, `temporary`, ...)."""
PAGE_SIGN = re.compile(
    rb'<!doctype html>\s*<html lang="en">\s*<head>\s*(<meta [^<>]*>\s*)*<meta name="generator" content="mm_moslora">'
)
"""Beginning of every HTML page of this project."""
_HEAD_BYTES = 4096


def is_regular(path: Path) -> bool:
    """Whether it is a file, and no link, pipe or device."""
    return stat.S_ISREG(os.lstat(path).st_mode)


def kinds_of(folder: Path) -> list[str]:
    """The kinds in a folder's mark."""
    try:
        return (read_text_below(folder, MARK, errors="replace") or "").splitlines()
    except FileError:
        return []


def is_built(folder: Path) -> bool:
    """Whether a folder exists and holds more than the project's mark, which an interrupted deletion leaves."""
    return bool(names_in(folder) - {MARK})


def names_in(folder: Path) -> set[str]:
    """Names in a folder, which may be missing."""
    try:
        return {item.name for item in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def in_construction(folder: Path) -> bool:
    """Whether a folder is one that `building` has just made, with nothing in it yet."""
    return names_in(folder) == {MARK} and "temporary" in kinds_of(folder) and folder.name.endswith(".partial")


def refuse_strangers(folder: Path, names: Sequence[str], *, kind: str, also: Sequence[str] = ()) -> None:
    """Refuse a folder with files of another program under the names that are about to be written.

    Args:
        folder: may be missing.
        kind: kind of the mark that shows that the existing files are this project's.
    """
    present = [name for name in names if os.path.lexists(folder / name)]
    if not present or kind in kinds_of(folder) or any(any(folder.glob(pattern)) for pattern in also):
        return
    raise ConfigError(
        f"{folder} already holds {', '.join(present[:5])}, and nothing shows that a {kind} of mm_moslora wrote it, so "
        f"it is left alone. Choose another folder. If a {kind} did write it, mark it: echo {kind} >> {folder / MARK}"
    )


def output_file(path: Path, *, sign: re.Pattern[bytes] | None = None) -> Path:
    """Check an output file that a user named.

    Args:
        sign: how files begin that this project writes there; such files are replaced. None: no file is replaced.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the file to write. Add a name to it.")
    if os.path.lexists(path):
        head = b""
        if sign is not None and is_regular(path):
            with opened(path, most=None) as stream:
                head = stream.read(_HEAD_BYTES)
        if sign is None or not sign.match(head):
            raise ConfigError(f"{path} exists and is not replaced. Choose another name, or delete it first.")
    return path


def refuse_full_folder(folder: Path) -> None:
    """Refuse a folder for new files that cannot be created, or that is not empty."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{folder} cannot be made: {existing} is a file or a broken link. Choose a new folder.")
    try:  # permissions do not suffice: root has them under /proc and on read-only file systems
        with tempfile.TemporaryDirectory(prefix=".", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made in {existing}: {error.strerror}. Choose a new folder.") from error
    if is_built(folder):
        raise ConfigError(f"{folder} is not empty. Choose a new folder, so that old files are not taken for new ones.")


def refuse_unmarked(folder: Path, mark: str) -> None:
    """Refuse a path without the mark, unless it is a folder that is empty or holds only the project's mark."""
    marked = not folder.is_symlink() and (folder / mark).is_file()
    if not os.path.lexists(folder) or marked or (folder.is_dir() and not is_built(folder)):
        return
    raise ConfigError(
        f"{folder} is in the way and is not deleted: it has no {mark}, so nothing shows that mm_moslora made it. "
        "Move it away."
    )
