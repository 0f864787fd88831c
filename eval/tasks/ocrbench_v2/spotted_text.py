"""OCRBench v2: texts with their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mm_moslora.utils.untrusted_data import parse_literal

_BOX = re.compile(r"[(\[]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*[)\]]")
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_QUOTED = re.compile(r'\s*"(.*)"\s*')
_LARGEST = 1000
"""Places are shares of 1,000 of the sides."""
_MARKS = "!?.:,*\"()\u00b7[]/'"
"""Marks that a reference may have at an end, and an answer may leave out."""
_UNREADABLE = "###"
"""Reference of a text that nobody can read; what lies in its place does not count."""
Box = tuple[int, int, int, int]
Spot = tuple[Box, str]


def last_box(text: str) -> Box | None:
    """The last box of an answer in round or square brackets, with whole numbers up to 1,000."""
    found = [_box(match.groups()) for match in _BOX.finditer(text)]
    return next((box for box in reversed(found) if box is not None), None)


def _box(numbers: Sequence[Any]) -> Box | None:
    """Four whole numbers from 0 to 1,000, or None."""
    try:
        left, top, right, bottom = (int(str(number).strip()) for number in numbers)
    except ValueError:
        return None
    box = (left, top, right, bottom)
    return box if all(0 <= number <= _LARGEST for number in box) else None


def overlap(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Intersection over union of two boxes, whose numbers are cut to whole ones; 0 where one is no box."""
    try:
        a, b = ([int(number) for number in box] for box in (found, wanted))
        return _shared(a, b) / ((_area(a) + _area(b) - _shared(a, b)) or 1)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _area(box: Sequence[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def spots_in(text: str) -> list[Spot]:
    """The boxes with texts of an answer, `[x1, y1, x2, y2, text]` each, once; a box without an area is none."""
    items: Iterable[Sequence[Any]] = (match[1].strip().split(",", 4) for match in _BRACKETS.finditer(text))
    try:
        if (value := parse_literal(text)) is not None:
            items = _listed(value)
    except ValueError:
        pass
    found: dict[Spot, None] = {}
    for item in items:
        if len(item) >= 5 and (box := _box(item[:4])) is not None:
            said = str(item[4]).replace("\n", "").strip().strip('"').strip("'")
            if box[0] < box[2] and box[1] < box[3]:
                found[box, said] = None
    return [(box, _unquoted(said.replace("\r", ""))) for box, said in found]


def _listed(value: Any) -> Iterator[Sequence[Any]]:
    if isinstance(value, list | tuple):
        yield from (item for item in value if isinstance(item, list | tuple))


def _unquoted(text: str) -> str:
    match = _QUOTED.fullmatch(text)
    return text if match is None else match[1].replace("\\\\", "\\").replace('\\"', '"')


def spotting_score(found: Sequence[Spot], wanted: Sequence[Spot]) -> float:
    """The harmonic mean of precision and recall: a text is found if a box overlaps its box by more than a half, the
    first such one, and if both texts are equal without case.

    What covers an unreadable text with more than half of its area does not count.
    """
    unread = [box for box, text in wanted if text == _UNREADABLE]
    legible = [spot for spot in wanted if spot[1] != _UNREADABLE]
    free = [
        (box, text) for box, text in found if not any(_shared(box, other) / _area(box) > 0.5 for other in unread)
    ]  # fmt: skip
    said, taken, hits = len(free), [False] * len(free), 0
    for box, text in legible:
        for number, (other, read) in enumerate(free):
            if not taken[number] and overlap(other, box) > 0.5:
                taken[number] = True
                hits += _same_text(text.upper(), read.upper())
                break
    return 2 * hits / (said + len(legible)) if hits else 0.0


def _same_text(wanted: str, read: str) -> bool:
    """Equal, or but for one mark at the start, the end, or both of the reference."""
    first, last = wanted[:1] in _MARKS, wanted[-1:] in _MARKS
    return read in {
        wanted, wanted[1:] if first else wanted, wanted[:-1] if last else wanted,
        wanted[1:-1] if first and last else wanted,
    }  # fmt: skip


def reference_spots(boxes: Sequence[Sequence[int]], texts: Sequence[str]) -> list[Spot]:
    """The texts of a picture: every polygon becomes the box around it."""
    found = []
    for points, text in zip(boxes, texts, strict=False):
        across, down = points[0::2], points[1::2]
        found.append(((min(across), min(down), max(across), max(down)), _unquoted(str(text).replace("\r", ""))))
    return found
