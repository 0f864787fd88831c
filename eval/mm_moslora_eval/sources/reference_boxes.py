"""References that are boxes, as data sets write them, in pixels of the picture's file."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Literal, get_args

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_images import image_size

BoxForm = Literal["box_xyxy", "box_xywh", "box_norm1"]
"""Corners in pixels; corner, width and height in pixels; corners as shares of width and height (0 to 1)."""
BOX_FORMS: tuple[str, ...] = get_args(BoxForm)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", re.I)


def with_reference_box(document: Document, form: str) -> Document:
    """The document with its box as `[x1, y1, x2, y2]` in pixels; another reference is a problem of the document."""
    if document.problem is not None or not document.answers:
        return document
    written = ", ".join(document.answers)
    numbers = [float(number) for number in _NUMBER.findall(written[:1000])]
    if len(numbers) != 4:
        return document.with_problem(f"the reference {written[:80]!r} is no box: expected four numbers")
    try:
        left, top, right, bottom = _corners(document, numbers, form)
    except MoSLoRAError as error:
        return document.with_problem(f"the picture of the box cannot be read: {error}")
    if not (left < right and top < bottom and math.isfinite(right + bottom)):
        return document.with_problem(f"the reference {written[:80]!r} is no {form}: it has no area")
    return replace(document, answers=(f"[{left:g}, {top:g}, {right:g}, {bottom:g}]",))


def _corners(document: Document, numbers: list[float], form: str) -> list[float]:
    if form == "box_xywh":
        x, y, width, height = numbers
        return [x, y, x + width, y + height]
    if form == "box_norm1":
        width, height = _size(document)
        return [round(number * side, 2) for number, side in zip(numbers, (width, height) * 2, strict=True)]
    return numbers


def _size(document: Document) -> tuple[int, int]:
    """Width and height of the document's only picture."""
    if len(document.images) != 1:
        raise EvalError(f"the document has {len(document.images)} pictures, expected one")
    return image_size(document.images[0])
