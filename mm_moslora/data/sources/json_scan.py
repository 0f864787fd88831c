"""Finds the start and end of every value of a JSON list or a JSONL file without parsing the values.

The scan looks only at quotes, backslashes and brackets. It is vectorised over chunks of a few megabytes, so that a
gigabyte takes seconds and memory does not depend on the size. A value is checked when it is read.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_moslora.utils import untrusted_files

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
_SPACES = np.zeros(256, dtype=bool)
_SPACES[list(b" \t\r\n")] = True

_Places = NDArray[np.int64]


def scan_lines(path: Path) -> tuple[array[int], array[int], array[int]]:
    """Starts, ends (bytes) and numbers (from 1) of the lines that are not blank."""
    starts, ends, numbers = array("Q"), array("Q"), array("Q")
    with untrusted_files.opened(path, most=None) as stream:
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
            for place in np.flatnonzero(inside & ~full):  # lines that begin with white space are rare
                full[place] = bool(chunk[first[place] : last[place]].strip())
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
    with untrusted_files.opened(path, most=None) as stream:
        stream.seek(len(BOM) if stream.read(len(BOM)) == BOM else 0)
        buffer, offset = b"", stream.tell()
        opened = False
        while chunk := stream.read(CHUNK):
            buffer += chunk
            if not opened:
                body = buffer.lstrip()
                if not body:
                    return None
                offset, buffer, opened = offset + len(buffer) - len(body) + 1, body[1:], True
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

    def __init__(self, starts: _Places, ends: _Places, closed: int) -> None:
        self.starts, self.ends, self.closed = starts, ends, closed


def _scan(buffer: bytes) -> _Part | None:
    """The values of a buffer that begins between two values; None when other text lies between values."""
    kinds = _KINDS[np.frombuffer(buffer, dtype=np.uint8)]
    _drop_escaped(kinds)
    places = np.flatnonzero(kinds)
    found = kinds[places]
    quotes = found == _QUOTE
    inside = np.logical_xor.accumulate(quotes) if len(quotes) else quotes
    outside = ~inside
    step = np.zeros(len(found), dtype=np.int32)
    step[outside & (found == _OPEN)] = 1
    step[outside & (found == _CLOSE)] = -1
    depth = np.cumsum(step, dtype=np.int32)
    closing = np.flatnonzero(depth < 0)
    closed = -1
    if len(closing):
        closed = int(places[closing[0]])
        if buffer[closed : closed + 1] != b"]":
            return None
        stop = int(closing[0])
        places, step, depth, quotes = places[:stop], step[:stop], depth[:stop], quotes[:stop]
    if np.any(quotes & (depth == 0)):  # a bare string
        return None
    starts = places[(step == 1) & (depth == 1)]
    ends = places[(step == -1) & (depth == 0)] + 1
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
