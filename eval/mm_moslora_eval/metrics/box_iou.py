"""Places in texts: intersection over union of boxes `[x1, y1, x2, y2]`, and points in boxes, polygons and masks."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

from mm_moslora.data.boxes import are_shares
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

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


Point = tuple[float, float]
_PLACE = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?[\])]")


def first_point(text: str) -> Point | None:
    """The first point `(x, y)` or `[x, y]` of a text, or the middle of its first box; None without one."""
    match = _PLACE.search(text)
    if match is None:
        return None
    x, y, *corner = [float(part) for part in match.groups() if part is not None]
    return ((x + corner[0]) / 2, (y + corner[1]) / 2) if corner else (x, y)


def inside(answer: str, reference: str) -> float:
    """1 where the first point of an answer lies in the reference.

    A reference is JSON: a box `[x1, y1, x2, y2]`, a polygon `[[x, y], ...]`, or a mask `{"size": [height, width],
    "counts": [...]}` of run lengths down the columns, as COCO writes them, that begin with the outside.
    """
    try:
        area: Any = parse_json(reference)
    except StrictJsonError as error:
        raise ValueError(f"the reference {reference[:80]!r} {error}") from error
    point = first_point(answer)
    if _is_numbers(area, 4) and area[0] < area[2] and area[1] < area[3]:
        return float(point is not None and area[0] <= point[0] <= area[2] and area[1] <= point[1] <= area[3])
    if isinstance(area, list) and len(area) >= 3 and all(_is_numbers(corner, 2) for corner in area):
        return float(point is not None and _in_polygon(point, area))
    if isinstance(area, dict) and _is_mask(area.get("size"), area.get("counts")):
        return float(point is not None and _in_mask(point, area["size"], area["counts"]))
    raise ValueError(f"the reference {reference[:80]!r} is neither a box nor a polygon nor a mask with an area")


def _is_numbers(value: Any, count: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    )


def _is_mask(size: Any, counts: Any) -> bool:
    fits = _is_numbers(size, 2) and _is_numbers(counts) and min([*size, *counts]) >= 0
    return fits and sum(counts[1::2]) > 0 and sum(counts) == size[0] * size[1]


def _in_polygon(point: Point, corners: list[list[float]]) -> bool:
    """Whether a line to the right of the point crosses an odd number of sides."""
    x, y = point
    crossed = [
        (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1
        for (x1, y1), (x2, y2) in pairwise([*corners, corners[0]])
    ]
    return sum(crossed) % 2 == 1


def _in_mask(point: Point, size: list[int], counts: list[int]) -> bool:
    height, width = size
    column, row = int(point[0]), int(point[1])
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        return False
    place = column * height + row
    return next((index % 2 == 1 for index, end in enumerate(accumulate(counts)) if place < end), False)
