"""Random access to the values of a JSON list or a JSONL file through an index of byte ranges: memory stays bounded.

A file is read once to find the start and end of each value (`json_scan`, about 200 MB/s). A value is parsed when it is
read. Parsing is strict: JSON that readers interpret differently (a key written twice) is an error. NaN and Infinity,
which pandas writes into empty cells, are accepted as numbers. They make a record unusable only in a field that needs
another type.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moslora.data.sources.json_scan import BOM, MAX_VALUE_BYTES, scan_lines, scan_list
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import opened

MAX_DEPTH = 64
"""Deepest nesting; a record needs 5."""
_CHUNK = 4 * 2**20
_DELIMITERS = tuple(", ]\t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")


class StrictJsonError(ValueError):
    """One value that cannot be used. `deep` and `large` mark exceeded limits; otherwise the JSON is broken."""

    def __init__(self, message: str, *, deep: bool = False, large: bool = False) -> None:
        super().__init__(message)
        self.deep, self.large = deep, large


def require_file(path: Path) -> None:
    """Refuse a path without a file.

    Raises:
        DataError: there is no file.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file, expected LLaVA JSON or JSONL. Check its path.")


class JsonFile:
    """The values of one file.

    Args:
        path: a JSON list, or JSONL (one value per line; blank lines do not count). A byte order mark and CRLF are
            accepted.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a list that breaks off or has no values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        with opened(path, most=None) as stream:
            head = stream.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
            raise DataError(f"{path} is UTF-16 or UTF-32, expected UTF-8. Convert it (iconv -f UTF-16 -t UTF-8).")
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        self.is_list = head.removeprefix(BOM).lstrip()[:1] == b"["
        if not self.is_list:
            self._starts, self._ends, self._lines = scan_lines(path)
        elif (found := scan_list(path)) is not None:
            self._starts, self._ends = found
        else:
            self._index_list()
        if not self._starts:
            raise DataError(f"{path} is empty: 0 records. Check the export that wrote it.")

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, row: int) -> int | None:
        """Line number of a value, from 1; None in a list, where values do not correspond to lines."""
        return None if self.is_list else self._lines[row]

    def __getitem__(self, row: int) -> Any:
        """Parse one value.

        Raises:
            StrictJsonError: it is not strict JSON.
        """
        start, end = self._starts[row], self._ends[row]
        if end - start > MAX_VALUE_BYTES:
            raise StrictJsonError(f"takes {end - start} bytes, at most {MAX_VALUE_BYTES} are read", large=True)
        with opened(self.path, most=None) as stream:
            stream.seek(start)
            raw = stream.read(end - start)
        return parse_strictly(raw, constants=True)

    def _index_list(self) -> None:
        """Find the values one by one: slow, for lists that are damaged or contain no objects. Errors name the place."""
        window = _Window(self.path)
        window.peek()
        window.skip()  # the opening bracket
        while (following := window.peek()) != "]":
            if len(self):
                if following != ",":
                    raise window.broken("neither a comma nor the end of the list follows", len(self))
                window.skip()
                window.peek()
            start, end = window.value(len(self))
            self._starts.append(start)
            self._ends.append(end)
        window.skip()
        if window.peek():
            raise window.broken("text behind the end of the list", len(self))


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
            while chunk := stream.read(_CHUNK):
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

    def _move(self, place: int) -> None:
        self.byte += len(self.text[self.at : place].encode("utf-8"))
        self.at = place

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


def parse_strictly(raw: bytes | bytearray, *, max_depth: int = MAX_DEPTH, constants: bool = False) -> Any:
    """Parse one JSON value.

    Args:
        raw: UTF-8.
        max_depth: deepest nesting.
        constants: accept NaN and Infinity, which are not JSON, as numbers.

    Raises:
        StrictJsonError: broken, NaN or Infinity without `constants`, a key written twice, nested too deeply, or half a
            surrogate pair.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"is not UTF-8 at byte {error.start}") from error
    try:
        refuse = None if constants else _no_constant
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=refuse)
    except RecursionError as error:
        raise StrictJsonError(f"is nested more than {max_depth} levels deep", deep=True) from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"is no valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # the hooks below, and integers beyond Python's limit of digits
        raise StrictJsonError(f"is no valid JSON ({error})") from error
    if _too_deep(value, max_depth):
        raise StrictJsonError(f"is nested more than {max_depth} levels deep", deep=True)
    return value


def _too_deep(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for group in level
            if isinstance(group, dict | list)
            for item in (group.values() if isinstance(group, dict) else group)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key[:80]!r} is written twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")
