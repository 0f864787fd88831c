"""Intersection over union of boxes that texts hold as `[x1, y1, x2, y2]`, and the first box of a text."""

from __future__ import annotations

import re

from mm_moslora.data.boxes import are_shares

Box = tuple[float, float, float, float]
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def first_box(text: str) -> str:
    """The first box in a text, as text; empty without one. RefCOCO's rule: one answer, not the best of several."""
    match = _BOX.search(text)
    return "" if match is None else match[0]


def iou(parsed: str, reference: str) -> float:
    """Intersection over union of the first box of two texts, 0 to 1; 0 where one has no box, or none with an area."""
    a, b = _box(parsed), _box(reference)
    if a is None or b is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(a) + _area(b) - shared)


def iou_50(parsed: str, reference: str) -> float:
    """1 where `iou` is at least 0.5, the accuracy of RefCOCO."""
    return float(iou(parsed, reference) >= 0.5)


def fault_of_reference(text: str, width: int, height: int) -> str | None:
    """Why no answer about a picture of this size could equal the box of a reference; None for a good one.

    One pixel beyond the picture is accepted, as in training: annotation tools round.
    """
    box = _box(text)
    if box is None:
        return f"the reference {text[:60]!r} holds no box [x1, y1, x2, y2] with an area"
    if (count := len(_BOX.findall(text))) > 1:
        return f"the reference {text[:60]!r} holds {count} boxes, and scores compare one"
    if are_shares(box):
        remedy = "write pixels of the file, or a record with objects and bbox_type: norm1"
        return f"the reference {first_box(text)} holds shares of the picture's sides; {remedy}"
    if min(box[:2]) < -1 or box[2] > width + 1 or box[3] > height + 1:
        return f"the reference {first_box(text)} lies outside of its picture ({width} x {height} pixels)"
    return None


def _box(text: str) -> Box | None:
    match = _BOX.search(text)
    if match is None:
        return None
    left, top, right, bottom = map(float, match.groups())
    return (left, top, right, bottom) if left < right and top < bottom else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
