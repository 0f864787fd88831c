"""Sources of records by number; the values of a JSON list or a JSONL file.

A file is read once to find the start and end of each value (about 200 MB/s), so memory stays bounded.
A value is parsed when it is read. Parsing is strict: JSON that readers interpret differently (a key written twice) is
an error. NaN and Infinity, which pandas writes into empty cells, are accepted as numbers. They make a record unusable
only in a field that needs another type.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.text_format import visible
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json
from mm_moslora.utils.untrusted_files import opened

T = TypeVar("T")
BOM = b"\xef\xbb\xbf"
"""UTF-8 byte order mark."""
MAX_VALUE_BYTES = 16 * 2**20
"""Longest record; longer ones are refused."""
CHUNK = 4 * 2**20
"""Bytes read at once."""
_DELIMITERS = tuple(", ]\t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")


class EmptySourceError(DataError):
    """A source without a record."""

    def __init__(self, name: str | Path) -> None:
        super().__init__(f"{name} is empty: 0 records. Check the export that wrote it.")


class FileStamp(NamedTuple):
    """What tells a version of a file from the next one, without reading it."""

    size: int
    """Bytes."""
    written: int
    """Time of its last change, ns."""

    @classmethod
    def of(cls, file: Path | int) -> FileStamp:
        """The stamp of a file, by its path or descriptor."""
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns)

    def require(self, file: Path | int, path: Path) -> None:
        """Refuse a file that has another stamp now."""
        if (now := FileStamp.of(file)) != self:
            what = f"{now.size} bytes instead of {self.size}" if now.size != self.size else "been written again"
            raise DataError(
                f"{path} has {what} since the run began, so that records would be seen twice or never. Bring back the "
                "file as it was, and leave files alone while a run reads them."
            )


@contextmanager
def reopened(path: Path, stamp: FileStamp) -> Iterator[BufferedReader]:
    """A file that was read before, in the same version."""
    with opened(path, most=None) as stream:
        stamp.require(stream.fileno(), path)
        yield stream


class RecordSource(ABC):
    """Random access to the records of one source."""

    def __init__(self, path: Path, rules: PictureRules) -> None:
        self.path, self.rules = path, rules

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def value(self, row: int) -> Any:
        """The unchecked value of a row.

        Raises:
            StrictJsonError: it is not strict JSON.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes with the source's texts; computing it may read them all."""

    def content(self) -> str:
        """A hash that copies elsewhere share; empty where none is known."""
        return ""

    def commit(self) -> str | None:
        """The commit of a data set of the hub."""
        return None

    def where(self, row: int) -> Where:
        """Source, line and number of a record, for messages."""
        return Where(file=self.path, line=None, row=row)

    def __getitem__(self, row: int) -> Record:
        """Read and check one record.

        Raises:
            RecordError: the record cannot be used.
        """
        return self.parsed(row, parse_record)

    def parsed(self, row: int, parse: Callable[[Any, Where, PictureRules], T]) -> T:
        """Read one value, and check it by the function that knows its form; see `__getitem__`."""
        where = self.where(row)
        try:
            value = self.value(row)
        except StrictJsonError as fault:
            code = Code.TOO_DEEP if fault.deep else Code.TOO_LARGE if fault.large else Code.BAD_JSON
            raise where.error(code, "-", str(fault), "repair or remove the record") from fault
        return parse(value, where, self.rules)


class RecordFile(RecordSource):
    """The records of a JSON list or a JSONL file, in which blank lines, a byte order mark and CRLF do not count.

    Without rules, pictures lie below the file's folder.
    """

    def __init__(self, path: Path, rules: PictureRules | None = None) -> None:
        super().__init__(path, rules or PictureRules(folder=path.parent.resolve()))
        require_file(path)
        with opened(path, most=None) as stream:
            self._stamp = FileStamp.of(stream.fileno())
            head = stream.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
            raise DataError(f"{path} is UTF-16 or UTF-32, expected UTF-8. Convert it (iconv -f UTF-16 -t UTF-8).")
        self._lines: array[int] | None = None
        text = head.removeprefix(BOM).lstrip()
        lines = text.splitlines()
        if lines and text[:1] != b"[" and not any(map(_is_json, lines)):
            raise DataError(
                f"{path} begins with {visible(lines[0][:40].decode(errors='replace'))!r}, expected a JSON list, or "
                "JSON in each line. A table such as CSV is not read: write its rows as JSON. Unpack an archive."
            )
        if text[:1] == b"[":
            self._starts, self._ends = scan_list(path)
        else:
            self._starts, self._ends, self._lines = scan_lines(path)
        if not self._starts:
            raise EmptySourceError(path)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> Where:
        """See `RecordSource.where`; a JSONL file has lines."""
        return Where(file=self.path, line=None if self._lines is None else self._lines[row], row=row)

    def value(self, row: int) -> Any:
        """The parsed value of a row."""
        start, end = self._starts[row], self._ends[row]
        if end - start > MAX_VALUE_BYTES:
            raise StrictJsonError(f"takes {end - start} bytes, at most {MAX_VALUE_BYTES} are read", large=True)
        with reopened(self.path, self._stamp) as stream:
            stream.seek(start)
            raw = stream.read(end - start)
        return parse_json(raw, constants=True, surrogates=True)

    def fingerprint(self) -> str:
        """A hash of the file's bytes."""
        return sha256_of(self.path)

    content = fingerprint


def _is_json(line: bytes) -> bool:
    """Whether a line is a JSON value, or begins as an object that is damaged or longer than what was read."""
    try:
        parse_json(line)
    except StrictJsonError:
        return line.lstrip().startswith(b"{")
    return True


def require_file(path: Path) -> None:
    """Refuse a path without a file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file, expected LLaVA JSON or JSONL. Check its path.")


def scan_lines(path: Path) -> tuple[array[int], array[int], array[int]]:
    """Starts, ends (bytes) and numbers (from 1) of the lines that are not blank."""
    starts, ends, numbers = array("Q"), array("Q"), array("Q")
    with opened(path, most=None) as stream:
        offset = len(BOM) if stream.read(len(BOM)) == BOM else 0
        stream.seek(offset)
        begun, filled, number = offset, False, 1  # the unfinished line at the end of a chunk
        while chunk := stream.read(CHUNK):
            raw = np.frombuffer(chunk, dtype=np.uint8)
            breaks = np.flatnonzero(raw == 10)
            first = np.concatenate([[0], breaks + 1])
            last = np.append(breaks, len(raw))
            full = np.zeros(len(first), dtype=bool)
            inside = first < last
            full[inside] = raw[first[inside]] > 32
            for line in np.flatnonzero(inside & ~full):  # lines that begin with white space are rare
                full[line] = bool(chunk[first[line] : last[line]].strip())
            full[0] |= filled
            whole = np.flatnonzero(full[:-1])
            begins = first + offset
            begins[0] = begun
            starts.frombytes(begins[whole].astype(np.uint64).tobytes())
            ends.frombytes((breaks[whole] + offset + 1).astype(np.uint64).tobytes())
            numbers.frombytes((whole + number).astype(np.uint64).tobytes())
            begun, filled, number = int(begins[-1]), bool(full[-1]), number + len(breaks)
            offset += len(chunk)
        if filled:
            starts.append(begun)
            ends.append(offset)
            numbers.append(number)
    return starts, ends, numbers


def scan_list(path: Path) -> tuple[array[int], array[int]]:
    """Starts and ends (bytes) of the values of a list; refuses one that breaks off, and names the byte."""
    starts, ends = array("Q"), array("Q")
    window = _Window(path)
    window.peek()
    window.skip()  # the opening bracket
    while (following := window.peek()) != "]":
        if starts:
            if following != ",":
                raise window.broken("neither a comma nor the end of the list follows", len(starts))
            window.skip()
            window.peek()
        start, end = window.value(len(starts))
        starts.append(start)
        ends.append(end)
    window.skip()
    if window.peek():
        raise window.broken("text behind the end of the list", len(starts))
    return starts, ends


class _Window:
    """A sliding window of decoded text over a JSON list in a file; `at` and `byte` advance together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = self._chunks()
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        self.byte = 0
        self.decoder = json.JSONDecoder()

    def _chunks(self) -> Iterator[bytes]:
        with opened(self.path, most=None) as stream:
            if stream.read(len(BOM)) == BOM:
                self.byte = len(BOM)
            else:
                stream.seek(0)
            while chunk := stream.read(CHUNK):
                yield chunk

    def _more(self) -> bool:
        """Read the next chunk and drop the consumed text."""
        chunk = next(self.bytes, None)
        if chunk is None:
            return False
        try:
            self.text, self.at = self.text[self.at :] + self.decode.decode(chunk), 0
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 ({error.reason}). Convert it to UTF-8.") from error
        return True

    def _move(self, index: int) -> None:
        self.byte += len(self.text[self.at : index].encode("utf-8"))
        self.at = index

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._move(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Consume the character that `peek` returned."""
        self._move(self.at + 1)

    def value(self, row: int) -> tuple[int, int]:
        """Byte range of the next value."""
        while True:
            try:
                _, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.broken(f"record {row} is nested too deeply", row) from error
            except ValueError as error:
                if len(self.text) - self.at <= MAX_VALUE_BYTES and self._more():
                    continue
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise self.broken(f"record {row} breaks off or is damaged ({what})", row) from error
            cut = self.text[end : end + 1] not in _DELIMITERS  # a number may go on in the next chunk
            if cut and len(self.text) - self.at <= MAX_VALUE_BYTES and self._more():
                continue
            start = self.byte
            self._move(end)
            return start, self.byte

    def broken(self, what: str, rows: int) -> DataError:
        """The error of a list that cannot be read to its end."""
        return DataError(
            f"{self.path} is no valid JSON list at byte {self.byte}: {what}; the {rows} records before it are whole. "
            "Repair it, or convert it to JSONL, where one bad line costs one record."
        )
