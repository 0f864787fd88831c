"""Finds the start and end of every value of a JSON list or a JSONL file.

The scan looks only at quotes, backslashes and brackets. It is vectorised over chunks of a few megabytes, so that a
gigabyte takes seconds and memory does not depend on the size. A value is checked when it is read. Only a list that is
damaged or has values that are no objects is decoded, value by value.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import opened

BOM = b"\xef\xbb\xbf"
"""UTF-8 byte order mark."""
MAX_VALUE_BYTES = 16 * 2**20
"""Longest record; longer ones are refused."""
CHUNK = 4 * 2**20
"""Bytes read at once."""

_QUOTE, _BACKSLASH, _OPEN, _CLOSE = 1, 2, 3, 4
_KINDS = np.zeros(256, dtype=np.uint8)
for _kind, _characters in ((_QUOTE, b'"'), (_BACKSLASH, b"\\"), (_OPEN, b"[{"), (_CLOSE, b"]}")):
    _KINDS[list(_characters)] = _kind
_DELIMITERS = tuple(", ]\t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")
_SPACES = np.zeros(256, dtype=bool)
_SPACES[list(b" \t\r\n")] = True

_Offsets = NDArray[np.int64]


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


def scan_list(path: Path) -> tuple[array[int], array[int]] | None:
    """Starts and ends (bytes) of the values of a list of objects, or None for any other content.

    None is returned for a list that breaks off, has text between or after its values, or has values that are no
    objects.
    """
    starts, ends = array("Q"), array("Q")
    with opened(path, most=None) as stream:
        stream.seek(len(BOM) if stream.read(len(BOM)) == BOM else 0)
        buffer, offset = b"", stream.tell()
        begun = False
        while chunk := stream.read(CHUNK):
            buffer += chunk
            if not begun:
                body = buffer.lstrip()
                if not body:
                    return None
                offset, buffer, begun = offset + len(buffer) - len(body) + 1, body[1:], True
            part = _scan(buffer)
            if part is None or not _separated(buffer, part, first=not starts):
                return None
            starts.frombytes((part.starts + offset).astype(np.uint64).tobytes())
            ends.frombytes((part.ends + offset).astype(np.uint64).tobytes())
            if part.closed >= 0:
                rest = buffer[part.closed + 1 :] + stream.read(CHUNK)
                return None if rest.strip() else (starts, ends)
            # The text after the last whole value is read again, together with the next chunk.
            done = int(part.ends[-1]) if len(part.ends) else 0
            offset, buffer = offset + done, buffer[done:]
            if len(buffer) > MAX_VALUE_BYTES:
                return None
    return None


class _Part:
    """The values that lie completely in a buffer."""

    def __init__(self, starts: _Offsets, ends: _Offsets, closed: int) -> None:
        self.starts, self.ends, self.closed = starts, ends, closed


def _scan(buffer: bytes) -> _Part | None:
    """The values of a buffer that begins between two values; None when other text lies between values."""
    kinds = _KINDS[np.frombuffer(buffer, dtype=np.uint8)]
    _drop_escaped(kinds)
    offsets = np.flatnonzero(kinds)
    characters = kinds[offsets]
    quotes = characters == _QUOTE
    inside = np.logical_xor.accumulate(quotes) if len(quotes) else quotes
    outside = ~inside
    step = np.zeros(len(characters), dtype=np.int32)
    step[outside & (characters == _OPEN)] = 1
    step[outside & (characters == _CLOSE)] = -1
    depth = np.cumsum(step, dtype=np.int32)
    closing = np.flatnonzero(depth < 0)
    closed = -1
    if len(closing):
        closed = int(offsets[closing[0]])
        if buffer[closed : closed + 1] != b"]":
            return None
        stop = int(closing[0])
        offsets, step, depth, quotes = offsets[:stop], step[:stop], depth[:stop], quotes[:stop]
    if np.any(quotes & (depth == 0)):  # a bare string
        return None
    starts = offsets[(step == 1) & (depth == 1)]
    ends = offsets[(step == -1) & (depth == 0)] + 1
    if closed >= 0 and len(starts) != len(ends):
        return None
    return _Part(starts[: len(ends)], ends, closed)


def _drop_escaped(kinds: NDArray[np.uint8]) -> None:
    """Blank out the character after an escaping backslash; in a run of backslashes every other one escapes."""
    slashes = np.flatnonzero(kinds == _BACKSLASH)
    if not len(slashes):
        return
    order = np.arange(len(slashes))
    new = np.ones(len(slashes), dtype=bool)
    new[1:] = slashes[1:] != slashes[:-1] + 1
    row = np.maximum.accumulate(np.where(new, order, 0))
    escaped = slashes[(order - row) % 2 == 0] + 1
    kinds[slashes] = 0
    kinds[escaped[escaped < len(kinds)]] = 0


def _separated(buffer: bytes, part: _Part, *, first: bool) -> bool:
    """Whether exactly one comma, and white space, lies between the values."""
    if part.closed >= 0:
        behind = buffer[int(part.ends[-1]) if len(part.ends) else 0 : part.closed]
        if behind.strip(b" \t\r\n"):
            return False
    if not len(part.starts):
        return True
    raw = np.frombuffer(buffer, dtype=np.uint8)
    begins = np.concatenate([[0], part.ends[:-1]])
    widths = part.starts - begins
    if not first and widths[0] == 0:
        return False
    if first:
        if buffer[: int(part.starts[0])].strip(b" \t\r\n"):
            return False
        begins, widths = begins[1:], widths[1:]
    if not len(widths):
        return True
    if not widths.all():
        return False
    firsts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    between = raw[np.repeat(begins - firsts, widths) + np.arange(int(widths.sum()))]
    solid = ~_SPACES[between]
    commas: Any = np.add.reduceat(solid, firsts, dtype=np.int64)
    return bool((commas == 1).all() and (between[solid] == ord(",")).all())


def scan_list_carefully(path: Path) -> tuple[array[int], array[int]]:
    """Starts and ends (bytes) of the values of a list, found one by one: slow, for lists that `scan_list` refuses.

    Raises:
        DataError: not UTF-8, or not a list to its end; the error names the byte.
    """
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
