"""The forms in which families of models write boxes and points, and read them back from answers.

A form says in which units coordinates are counted: pixels of the picture that the model sees, or shares of it in steps.
`PictureFrame` says where the pixels of a file lie in that picture; see `ImageProcessing.frame`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from mm_moslora.config import BoxFormName
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

if TYPE_CHECKING:
    from mm_moslora.batch import ImageProcessing, PictureFrame

SPECIAL = ("\ue0f4", "\ue0f5")
"""Characters around a special token of a form in the text of a `Turn` with `marked`."""
_NUMBER = r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*"
_SIGNS = re.compile(r'\\.|["{}]', re.DOTALL)
_BRACKETS = rf"\[{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?\]"


@dataclass(frozen=True, kw_only=True)
class BoxForm:
    """One form."""

    steps: int | None
    """Steps that a side of the picture has; None: its pixels."""
    most: int | None = None
    """Largest coordinate; None: `steps`, or the picture's side."""
    box: str = "[{}, {}, {}, {}]"
    point: str = "[{}, {}]"
    label: str = "{}"
    """Of an object that a text names."""
    listed: str = ""
    """Of an object among several, with `label` and `place`; empty: JSON."""
    joint: str = ""
    """Between these."""
    down_first: bool = False
    """Whether y stands before x."""
    tokens: tuple[str, ...] = ()
    """Special tokens of the texts above."""
    pattern: str = _BRACKETS
    """Finds two or four numbers in an answer, which may have lost the special tokens, and `label` where it is known."""

    def marked(self) -> BoxForm:
        """The same form, with `SPECIAL` around the special tokens that it writes."""
        tokens = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")
        around = rf"{SPECIAL[0]}\g<0>{SPECIAL[1]}"
        box, point, label = (tokens.sub(around, text) for text in (self.box, self.point, self.label))
        return replace(self, box=box, point=point, label=label)


_QWEN2_TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
_INTERNVL_TOKENS = ("<ref>", "</ref>", "<box>", "</box>")
FORMS: dict[BoxFormName, BoxForm] = {
    "qwen3_vl": BoxForm(steps=1000),
    "qwen2_5_vl": BoxForm(steps=None),
    "qwen2_vl": BoxForm(
        steps=1000, most=999, box="<|box_start|>({},{}),({},{})<|box_end|>", point="<|box_start|>({},{})<|box_end|>",
        label="<|object_ref_start|>{}<|object_ref_end|>", listed="{label}{region}", tokens=_QWEN2_TOKENS,
        pattern=r"(?:<\|object_ref_start\|>(?P<label>[^<]*)<\|object_ref_end\|>\s*)?(?:<\|box_start\|>)?"
        rf"\({_NUMBER},{_NUMBER}\)(?:\s*,\s*\({_NUMBER},{_NUMBER}\))?",
    ),
    "internvl": BoxForm(
        steps=1000, box="<box>[[{}, {}, {}, {}]]</box>", point="<box>[[{}, {}]]</box>", label="<ref>{}</ref>",
        listed="{label}{region}", joint="\n", tokens=_INTERNVL_TOKENS,
        pattern=rf"(?:<ref>(?P<label>[^<]*)</ref>\s*<box>\s*\[)?{_BRACKETS}",
    ),
    "paligemma": BoxForm(
        steps=1023, box="<loc{:04}><loc{:04}><loc{:04}><loc{:04}>", point="<loc{:04}><loc{:04}>",
        listed="{region} {label}", joint=" ; ", down_first=True,
        pattern=r"<loc(\d{4})>\s*<loc(\d{4})>(?:\s*<loc(\d{4})>\s*<loc(\d{4})>)?(?:[ \t]*(?P<label>[^<;\n]*[^<;\s]))?",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FoundBox:
    """A box or a point of an answer."""

    numbers: tuple[float, ...]
    """x1, y1, x2, y2 of a box, or x, y of a point, in pixels of the upright file, within it."""
    label: str = ""
    """What the answer calls it, where that is known."""


class CroppedError(DataError):
    """A box or point that the model does not see."""


def coordinates(numbers: Sequence[float], form: BoxForm, frame: PictureFrame) -> list[int]:
    """The numbers that a form writes for a box or a point in pixels of the file, still x before y."""
    points = [frame.seen(x, y) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    clipped = [(min(max(x, 0.0), frame.width), min(max(y, 0.0), frame.height)) for x, y in points]
    if len(points) == 1:
        share = float(max(abs(points[0][0] - clipped[0][0]), abs(points[0][1] - clipped[0][1])) < 1.0)
    else:
        share = _area(clipped) / _area(points)
    if share < 0.5:
        raise CroppedError(f"{share:.0%} of it is in the part of the picture that the model sees")
    axes = []
    for values, side in zip(zip(*clipped, strict=True), (frame.width, frame.height), strict=True):
        steps = side if form.steps is None else form.steps
        most = int(steps if form.most is None else form.most)
        written = [min(round(value / side * steps), most) for value in values]
        if len(written) == 2 and written[0] == written[1]:  # a box without area would be read back as none
            written = [min(written[0], most - 1), min(written[0], most - 1) + 1]
        axes.append(written)
    return [number for point in zip(*axes, strict=True) for number in point]


def _area(corners: Sequence[tuple[float, float]]) -> float:
    (left, top), (right, bottom) = corners
    return (right - left) * (bottom - top)


def write_region(numbers: Sequence[int], form: BoxForm) -> str:
    """The text of a box or a point with these `coordinates`."""
    points = zip(numbers[::2], numbers[1::2], strict=True)
    ordered = [number for x, y in points for number in ((y, x) if form.down_first else (x, y))]
    return (form.box if len(numbers) == 4 else form.point).format(*ordered)


def write_list(objects: Sequence[tuple[str, Sequence[int]]], form: BoxForm) -> str:
    """The text of several objects with their labels and `coordinates`."""
    if form.listed:
        texts = (
            form.listed.format(label=form.label.format(label) if label else "", region=write_region(numbers, form))
            for label, numbers in objects
        )
        return form.joint.join(text.strip() for text in texts)
    items = [
        {"bbox_2d" if len(numbers) == 4 else "point_2d": list(numbers)} | ({"label": label} if label else {})
        for label, numbers in objects
    ]
    return json.dumps(items, ensure_ascii=False)


def read_boxes(
    answer: str, processing: ImageProcessing | None, size: tuple[int, int], *, shown: tuple[int, int] | None = None
) -> list[FoundBox]:
    """The boxes and points in an answer, in pixels of the picture's file; empty where the model's form is not known.

    Boxes whose corners are reversed, and numbers beyond the form's range, are no boxes and are left out.

    Args:
        answer: of the model, with or without special tokens.
        size: width and height of the upright picture that the answer is about.
        shown: those of the picture that the model saw in its place, of which what it wrote is shares; None: the same.

    Raises:
        ModelError: the model's processing of pictures cannot be followed.
    """
    if processing is None or processing.boxes is None:
        return []
    form = FORMS[processing.boxes]
    matches = list(re.finditer(form.pattern, answer))
    if not matches:
        return []
    frame = processing.frame(size)
    seen = frame if shown in (None, size) else processing.frame(shown)
    counted = (seen.width, seen.height) if form.steps is None else (form.steps, form.steps)
    boxes = [(match, _in_file(match, form, frame, size, counted)) for match in matches]
    named = _labels(answer) if "label" not in matches[0].re.groupindex else []
    return [FoundBox(numbers=numbers, label=_label(match, named)) for match, numbers in boxes if numbers]


def _in_file(
    match: re.Match[str], form: BoxForm, frame: PictureFrame, size: tuple[int, int], counted: tuple[float, float]
) -> tuple[float, ...]:
    """The numbers of a match in pixels of a file; `counted` are those of the sides in the match's units."""
    names = match.re.groupindex.values()
    texts = [text for index, text in enumerate(match.groups(), 1) if index not in names and text is not None]
    result: list[float] = []
    for first, second in zip(map(float, texts[::2]), map(float, texts[1::2]), strict=True):
        x, y = (second, first) if form.down_first else (first, second)
        width, height = counted
        if x > width or y > height:
            return ()
        point = frame.in_file(x / width * frame.width, y / height * frame.height)
        result += [min(max(value, 0.0), float(side)) for value, side in zip(point, size, strict=True)]
    whole = len(result) == 2 or (result[0] < result[2] and result[1] < result[3])
    return tuple(round(value, 2) for value in result) if whole else ()


def _labels(answer: str) -> list[tuple[int, int, str]]:
    """Where the JSON objects of an answer begin and end that hold no others, and their labels."""
    result, start, quoted = [], -1, False
    for sign in _SIGNS.finditer(answer):
        if sign[0] == '"':
            quoted = start >= 0 and not quoted
        elif sign[0] == "{" and not quoted:
            start = sign.start()
        elif sign[0] == "}" and not quoted and start >= 0:
            with suppress(StrictJsonError):
                value: dict[str, Any] = parse_json(answer[start : sign.end()])
                result.append((start, sign.end(), str(value.get("label", ""))))
            start = -1
    return result


def _label(match: re.Match[str], named: Sequence[tuple[int, int, str]]) -> str:
    """What an answer calls a place: named by the pattern, or by the JSON object around it."""
    if "label" in match.re.groupindex:
        return (match["label"] or "").strip()
    index = bisect(named, match.start(), key=itemgetter(0)) - 1
    return named[index][2] if index >= 0 and match.end() < named[index][1] else ""
