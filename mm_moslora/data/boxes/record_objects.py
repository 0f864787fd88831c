"""Boxes and points of records: the key `objects`, and the placeholders in the texts that they fill.

Two forms are read: ms-swift's lists (`ref`, `bbox`, `bbox_type`, `image_id`), and a list of objects with `label`,
`bbox` or `point`, and `image_id`. Coordinates are pixels of the picture's file, upright, or shares of its sides
(`bbox_type: norm1`).
`<ref-object>` and `<bbox>` stand for the next label and the next box or point, `<objects>` for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mm_moslora.data.boxes import are_shares
from mm_moslora.data.boxes.box_forms import FORMS, SPECIAL, CroppedError, coordinates, write_list, write_region
from mm_moslora.data.record_faults import Code, Where, checked_text, is_empty, is_nothing, kind_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

if TYPE_CHECKING:
    from mm_moslora.batch import ImageProcessing

REF, BOX, ALL = "<ref-object>", "<bbox>", "<objects>"
_MARKS = re.compile(f"{REF}|{BOX}|{ALL}")
_OF_LISTS = ("ref", "bbox", "bbox_type", "image_id")
_OF_OBJECT = ("label", "bbox", "point", "image_id")
_SLACK = 1.0
"""Pixels by which a box may leave its picture: annotation tools round; it is cut there."""
_SHAPE = (
    "write {ref: [...], bbox: [[x1, y1, x2, y2], ...], image_id: [...]}, or a list of {label, bbox or point, image_id}"
)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box or a point in a picture."""

    numbers: tuple[float, ...]
    """x1, y1, x2, y2 of a box; x, y of a point."""
    image: int = 0
    """Number of its picture in the record."""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What `objects` of a record holds."""

    refs: tuple[str, ...] = ()
    """For `<ref-object>`, in order."""
    regions: tuple[Region, ...] = ()
    """For `<bbox>`, in order."""
    shares: bool = False
    """Whether coordinates are shares of the picture's sides, 0 to 1."""

    def in_pixels(self, sizes: Sequence[tuple[int, int]], where: Where) -> tuple[Region, ...]:
        """The regions in pixels of their upright pictures, which have these widths and heights."""
        result = []
        for index, region in enumerate(self.regions):
            sides = sizes[region.image] * (len(region.numbers) // 2)
            scaled = [value * side for value, side in zip(region.numbers, sides, strict=True)]
            numbers = scaled if self.shares else region.numbers
            cut = tuple(min(max(value, 0.0), float(side)) for value, side in zip(numbers, sides, strict=True))
            beyond = any(not -_SLACK <= value <= side + _SLACK for value, side in zip(numbers, sides, strict=True))
            if beyond or (len(cut) == 4 and (cut[0] == cut[2] or cut[1] == cut[3])):
                unit = "shares, 0 to 1" if self.shares else f"pixels; its picture has {sides[0]} x {sides[1]}"
                what = f"{_shown(region.numbers)} lies outside of its picture ({unit})"
                remedy = "write corners (not x, y, width, height) in pixels of the file, or drop the record"
                raise where.error(Code.BAD_BOX, f"objects.bbox[{index}]", what, remedy)
            result.append(replace(region, numbers=cut))
        return tuple(result)


def objects_of(
    value: Any, texts: Sequence[str], *, images: int, where: Where, has_video: bool = False
) -> Objects | None:
    """Read `objects` of a record; None where there are none, and no text shows the list of none."""
    objects = Objects() if is_empty(value) else _read(value, where)
    if objects == Objects() and not (images and any(map(_MARKS.search, texts))):
        return None
    if is_nothing(value) or str(value).strip() in ("", "null"):
        mark = next(filter(None, map(_MARKS.search, texts)))
        raise where.error(Code.BAD_BOX, "objects", f"is missing; the texts have {mark[0]}", _SHAPE)
    _check(objects, texts, images=images, where=where, has_video=has_video)
    return objects


def _read(value: Any, where: Where) -> Objects:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except StrictJsonError as error:
            raise where.error(Code.BAD_BOX, "objects", f"is no JSON ({error})", _SHAPE) from error
    if isinstance(value, Mapping):
        return _of_lists(value, where)
    if not isinstance(value, list):
        raise where.error(Code.BAD_BOX, "objects", f"is {kind_of(value)}", _SHAPE)
    refs, regions = [], []
    for index, item in enumerate(value):
        field = f"objects[{index}]"
        if not isinstance(item, Mapping) or not {"bbox", "point"} & item.keys():
            raise where.error(Code.BAD_BOX, field, "has neither bbox nor point", _SHAPE)
        _refuse_unknown(item, _OF_OBJECT, field, where)
        if not is_nothing(item.get("bbox")) and not is_nothing(item.get("point")):
            raise where.error(Code.BAD_BOX, field, "has a bbox and a point", "write two objects")
        kind, count = ("point", 2) if is_nothing(item.get("bbox")) else ("bbox", 4)
        label = "" if is_nothing(item.get("label")) else _label(item["label"], f"{field}.label", where)
        refs += [label] if label else []
        numbers = _numbers(item[kind], f"{field}.{kind}", where, counts=(count,))
        regions.append(Region(numbers=numbers, image=_image(item.get("image_id"), field, where), label=label))
    return Objects(refs=tuple(refs), regions=tuple(regions))


def _of_lists(value: Mapping[str, Any], where: Where) -> Objects:
    _refuse_unknown(value, _OF_LISTS, "objects", where)
    refs, boxes, images = (_list(value.get(key), f"objects.{key}", where) for key in ("ref", "bbox", "image_id"))
    kind = value.get("bbox_type")
    if not is_nothing(kind) and kind not in ("real", "norm1"):
        what, remedy = f"is {ascii(kind)[:60]}", "write real (pixels of the file) or norm1 (shares from 0 to 1)"
        raise where.error(Code.BAD_BOX, "objects.bbox_type", what, remedy)
    if images and len(images) != len(boxes):
        what = f"has {len(images)} numbers, and there are {len(boxes)} boxes"
        raise where.error(Code.BAD_BOX, "objects.image_id", what, "write one per box, or drop the key")
    labels = tuple(_label(text, f"objects.ref[{index}]", where) for index, text in enumerate(refs))
    names = labels if len(labels) == len(boxes) else labels * len(boxes) if len(labels) == 1 else ("",) * len(boxes)
    regions = tuple(
        Region(
            numbers=_numbers(box, f"objects.bbox[{index}]", where, counts=(4, 2)), label=name,
            image=_image(images[index] if images else None, f"objects.image_id[{index}]", where),
        )
        for index, (box, name) in enumerate(zip(boxes, names, strict=True))
    )  # fmt: skip
    return Objects(refs=labels, regions=regions, shares=kind == "norm1")


def _refuse_unknown(value: Mapping[str, Any], known: Sequence[str], field: str, where: Where) -> None:
    odd = [str(key)[:40] for key, item in value.items() if key not in known and not is_nothing(item)]
    if odd:  # detection sets have boxes of other meanings under the same name
        raise where.error(Code.BAD_BOX, field, f"has {', '.join(map(ascii, odd[:4]))}", _SHAPE)


def _list(value: Any, field: str, where: Where) -> list[Any]:
    if is_nothing(value):
        return []
    if not isinstance(value, list | tuple):
        raise where.error(Code.BAD_BOX, field, f"is {kind_of(value)}", "write a list")
    return list(value)


def _label(value: Any, field: str, where: Where) -> str:
    text = checked_text(value, field, where).strip()
    if not text:
        raise where.error(Code.BAD_BOX, field, "is empty", "write what the object is called")
    return text


def _numbers(value: Any, field: str, where: Where, *, counts: Sequence[int]) -> tuple[float, ...]:
    items = list(value) if isinstance(value, list | tuple) else []
    if len(items) not in counts or not all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in items
    ):
        shown = f"has {len(items)} values" if len(items) not in counts and items else f"is {ascii(value)[:60]}"
        remedy = f"write {' or '.join({4: 'x1, y1, x2, y2', 2: 'x, y'}[count] for count in counts)} as numbers"
        raise where.error(Code.BAD_BOX, field, shown, remedy)
    try:
        numbers = tuple(float(item) for item in items)
    except OverflowError:
        numbers = (math.inf,)
    if not all(map(math.isfinite, numbers)):
        raise where.error(Code.BAD_BOX, field, f"is {ascii(value)[:60]}", "write finite numbers")
    if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        what = f"{_shown(numbers)} has reversed corners, or no area"
        remedy = "write the upper left corner first, then the lower right one (not x, y, width, height)"
        raise where.error(Code.BAD_BOX, field, what, remedy)
    return numbers


def _image(value: Any, field: str, where: Where) -> int:
    if is_nothing(value):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise where.error(Code.BAD_BOX, field, f"is {ascii(value)[:60]}", "write the picture's number, from 0")
    return value


def _check(objects: Objects, texts: Sequence[str], *, images: int, where: Where, has_video: bool) -> None:
    """Refuse objects that do not fit the texts and pictures of their record, and shares that are not marked as such."""
    marks = [mark for text in texts for mark in _MARKS.findall(text)]
    refs, boxes, lists = (marks.count(mark) for mark in (REF, BOX, ALL))
    shares = next((region for region in objects.regions if not objects.shares and are_shares(region.numbers)), None)
    if shares is not None:
        what = f"{_shown(shares.numbers)} holds shares of the picture's sides, and bbox_type is not norm1"
        remedy = "write {ref: [...], bbox: [...], bbox_type: norm1}, or pixels of the file"
        raise where.error(Code.BAD_BOX, "objects.bbox", what, remedy)
    bad = next((region.image for region in objects.regions if region.image >= images), None)
    if bad is not None or has_video:
        what = f"names picture {bad}; the record has {images}" if bad is not None else "belongs to a video"
        remedy = "pictures are counted from 0" if bad is not None else "boxes in frames are not supported"
        raise where.error(Code.BAD_BOX, "objects", what, remedy)
    if any(character in text for text in (*texts, *objects.refs) for character in SPECIAL):
        what = f"a text has U+{ord(SPECIAL[0]):04X} or U+{ord(SPECIAL[1]):04X}"
        raise where.error(Code.BAD_CHARACTER, "conversations", what, "remove these characters")
    wrong = [
        f"{count} {mark} for {given}"
        for mark, count, given, free in (
            (REF, refs, len(objects.refs), True), (BOX, boxes, len(objects.regions), lists > 0)
        )
        if count != given and (count or not free)
    ]  # fmt: skip
    if wrong:
        remedy = f"write one {REF} per label (or none), one {BOX} per box or point, or {ALL} for the list of all"
        raise where.error(Code.BAD_BOX, "conversations", f"the texts have {' and '.join(wrong)}", remedy)


def filler(
    objects: Objects, sizes: Sequence[tuple[int, int]], processing: ImageProcessing | None, where: Where
) -> Callable[[str], str]:
    """A function that fills the placeholders of the texts of a record, called on them in order."""
    regions = objects.in_pixels(sizes, where)
    if processing is None or processing.boxes is None:
        raise ConfigError(
            f"The records have boxes ({where.file}), and neither the family nor the vocabulary of this model says in "
            f"which form it knows them. Set model.boxes to one of {', '.join(FORMS)}."
        )
    form = FORMS[processing.boxes].marked()
    frames = {region.image: processing.frame(sizes[region.image]) for region in regions}
    written = []
    for index, region in enumerate(regions):
        try:
            written.append((region.label, coordinates(region.numbers, form, frames[region.image])))
        except CroppedError as error:
            field, remedy = f"objects.bbox[{index}]", "set model.image_aspect to pad or resize, or drop the record"
            raise where.error(Code.BOX_CROPPED, field, f"{_shown(region.numbers)}: {error}", remedy) from error

    texts = {
        REF: iter([form.label.replace("{}", label) for label in objects.refs]),
        BOX: iter([write_region(numbers, form) for _, numbers in written]),
    }
    every = write_list(written, form)

    def of_mark(match: re.Match[str]) -> str:
        if match[0] == ALL and not every:
            what = f"is empty, and the form {processing.boxes} writes no list of none"
            raise where.error(Code.BAD_BOX, "objects", what, f"write the answer in words instead of {ALL}")
        return every if match[0] == ALL else next(texts[match[0]], match[0])

    return lambda text: _MARKS.sub(of_mark, text)


def pixel_filler(objects: Objects, sizes: Sequence[tuple[int, int]], where: Where) -> Callable[[str], str]:
    """As `filler`, for scores: labels as they are, and boxes as `[x1, y1, x2, y2]`, see `Objects.in_pixels`."""
    regions = objects.in_pixels(sizes, where)
    texts = {REF: iter(objects.refs), BOX: map(_shown, (region.numbers for region in regions))}
    return lambda text: _MARKS.sub(lambda match: next(texts.get(match[0], iter(())), match[0]), text)


def reference_box(objects: Objects, texts: Sequence[str]) -> Region | None:
    """The first box that the last of the texts shows."""
    *earlier, last = (text.count(BOX) for text in texts)
    return objects.regions[sum(earlier)] if last else None


def _shown(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{number:.3f}'.rstrip('0').rstrip('.') for number in numbers)}]"
