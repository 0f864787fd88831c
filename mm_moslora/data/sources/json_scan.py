"""Finds the start and end of every value of a JSON list or a JSONL file, in bounded memory.

The values of a list are decoded one by one to find their ends; a line is checked when it is read.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import opened

BOM = b"\xef\xbb\xbf"
"""UTF-8 byte order mark."""
MAX_VALUE_BYTES = 16 * 2**20
"""Longest record; longer ones are refused."""
CHUNK = 4 * 2**20
"""Bytes read at once."""

_DELIMITERS = tuple(", ]\t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")


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
