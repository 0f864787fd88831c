"""Webdataset tar files as sources: members that share a name up to the first dot are one record.

Nothing is extracted. A file is read once to find the offset of each member; bytes are read from there when needed.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora.data.images.record_picture import PictureRules, StoredPicture
from mm_moslora.data.images.video_clip import SUFFIXES as VIDEO_SUFFIXES
from mm_moslora.data.record_faults import Where
from mm_moslora.data.sources.record_file import MAX_VALUE_BYTES, EmptySourceError, FileStamp, RecordSource, reopened
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of_text
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json
from mm_moslora.utils.untrusted_files import opened

MAX_MEMBERS = 20_000_000
"""Members of one tar file; more are refused."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarSource(RecordSource):
    """The records of some tar files.

    A record has a `.json` member (an object in any form of `records`) or a `.txt` member (a caption). Its other members
    are pictures and videos. A json member may name only pictures of the same record.
    """

    def __init__(self, pattern: str, rules: PictureRules) -> None:
        super().__init__(Path(pattern), rules)
        self.files = files_of(pattern)
        self._stamps = [FileStamp.of(path) for path in self.files]
        self._keys: list[str] = []
        self._file, self._firsts = array("L"), array("Q")
        self._members: list[tuple[str, int, int]] = []
        for number, path in enumerate(self.files):
            if self._stamps[number].size:
                self._index(number, path)
        self._firsts.append(len(self._members))
        if not self._keys:
            raise EmptySourceError(pattern)

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, row: int) -> Where:
        """The tar file and the row."""
        return Where(file=self.files[self._file[row]], line=None, row=row, id=self._keys[row])

    def value(self, row: int) -> Any:
        """The record's object with references to its pictures."""
        path, stamp = self.files[self._file[row]], self._stamps[self._file[row]]
        members = {
            kind: (start, size) for kind, start, size in self._members[self._firsts[row] : self._firsts[row + 1]]
        }
        shown = {
            kind: StoredPicture(f"{path}:{self._keys[row]}.{kind}", partial(_bytes, path, stamp, *span))
            for kind, span in members.items()
            if _shown_as(kind)
        }
        if "json" in members:
            value = parse_json(_read(path, stamp, *members["json"]), constants=True, surrogates=True)
            if not isinstance(value, dict):
                return value
            return self._with_shown(value, shown, self._keys[row])
        if "txt" in members:
            caption = _read(path, stamp, *members["txt"]).decode("utf-8", errors="surrogateescape").strip()
            return {"id": self._keys[row], "caption": caption, **_named(shown)}
        raise StrictJsonError(f"has members {', '.join(sorted(members))[:200]}, but neither json nor txt")

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of change of the tar files."""
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return sha256_of_text(repr(stats))

    def content(self) -> str:
        """A hash of names and sizes of the tar files."""
        return sha256_of_text(repr([(path.name, path.stat().st_size) for path in self.files]))

    def _with_shown(self, value: dict[str, Any], shown: dict[str, StoredPicture], key: str) -> dict[str, Any]:
        """The object with names of members replaced by the members; without names it gets all members of its record."""
        value = {"id": key, **value}
        own = {f"{key}.{kind}": picture for kind, picture in shown.items()}
        own |= {Path(name).name: picture for name, picture in own.items()}
        for name, members in _named(shown).items():
            single = name.removesuffix("s")
            listed = value.get(single) if value.get(single) is not None else value.get(name)
            items = members if listed is None else listed if isinstance(listed, list) else [listed]
            value = {key: item for key, item in value.items() if key not in (single, name)}
            value[name] = [own.get(item, item) if isinstance(item, str) else item for item in items]
        return value

    def _index(self, number: int, path: Path) -> None:
        last = None
        for name, start, size in _members(path):
            folder, _, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != last:
                self._keys.append(key)
                self._file.append(number)
                self._firsts.append(len(self._members))
                last = key
            self._members.append((kind.lower(), start, size))


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, start and size (bytes) of every file in a tar file."""
    try:
        with opened(path, most=None) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for count, member in enumerate(tar):
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if count >= MAX_MEMBERS:
                    raise DataError(f"{path} has more than {MAX_MEMBERS} members. Split it.")
                if member.isdir():
                    continue
                _check_member(path, member)
                yield member.name, member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a plain tar file ({error}). Repair it; a compressed one has no random access: "
            "unpack it to .tar first."
        ) from error


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    name = member.name
    if not member.isreg():
        raise DataError(f"{path}: member {name[:100]!a} is a link or a device, expected files only. Rebuild the file.")
    if member.issparse():
        raise DataError(f"{path}: member {name[:100]!a} is sparse, which hides its size. Rebuild the file.")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DataError(f"{path}: member {name[:100]!a} has a path that leaves the archive. Rebuild the file.")
    if member.offset_data + member.size > path.stat().st_size:
        raise DataError(f"{path}: member {name[:100]!a} breaks off at the end of the file. Copy the file again.")


def _read(path: Path, stamp: FileStamp, start: int, size: int) -> bytes:
    if size > MAX_VALUE_BYTES:
        raise StrictJsonError(f"takes {size} bytes, at most {MAX_VALUE_BYTES} are read", large=True)
    return _bytes(path, stamp, start, size)


def _bytes(path: Path, stamp: FileStamp, start: int, size: int) -> bytes:
    with reopened(path, stamp) as stream:
        return os.pread(stream.fileno(), size, start)


def _shown_as(kind: str) -> str | None:
    """images, videos, or None for a member that is neither."""
    suffix = kind.rpartition(".")[2]
    return "images" if suffix in IMAGE_SUFFIXES else "videos" if f".{suffix}" in VIDEO_SUFFIXES else None


def _named(shown: dict[str, StoredPicture]) -> dict[str, list[StoredPicture]]:
    """The pictures and videos among the members, by kind."""
    pictures: dict[str, list[StoredPicture]] = {}
    for kind in sorted(shown):
        pictures.setdefault(str(_shown_as(kind)), []).append(shown[kind])
    return pictures


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern names, in order; refuses one that names none."""
    match = _BRACES.search(pattern)
    if match:
        first, last = match.groups()
        names = [
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
        return [path for name in names for path in files_of(name)]
    files = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(pattern))]
    if not files:
        raise DataError(f"{pattern} does not exist or is no file. Check its path.")
    return files
