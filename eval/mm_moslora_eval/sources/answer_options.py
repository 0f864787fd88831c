"""Options of a question, the answer that names one of them, and boxes, in the forms in which data sets write them."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_images import image_size
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list

LETTERS = string.ascii_uppercase
_BRACKETED = re.compile(r"[(（]([A-Za-z])[)）]")
_OWN_LETTER = re.compile(r"[(（]?([A-Z])[)）.:]\s*(.*)", re.S)
_NONE = ("", "nan", "None", "[]")
"""Texts of questions without options."""


def options_of(value: Any, *, lettered: bool = False, optional: bool = False) -> tuple[dict[str, str], str | None]:
    """The options by their letters, and the problem with them if there is one."""
    if isinstance(value, str):
        inner = value.strip()[1:-1].strip()
        texts: Any = parse_list(value) or ([inner] if parse_list(inner) else _written(value))
        if not texts and not optional and value.strip() not in _NONE:
            return {}, f"the options are {value[:60]!r}, expected a list, or `(A) ... (B) ...`"
        value = texts
    if isinstance(value, Mapping):
        named = {str(letter): text for letter, text in value.items()}
    elif isinstance(value, list | tuple):
        if len(value) > len(LETTERS):
            return {}, f"there are {len(value)} options, at most {len(LETTERS)} have a letter"
        named = dict(zip(LETTERS, _without_letters(value) if lettered else value, strict=False))
    elif value is None or value != value:  # a missing cell may be NaN
        return {}, None
    else:
        return {}, f"the options are {value!r}, expected a list"
    named = {letter: str(text) if isinstance(text, list | tuple) else text for letter, text in named.items()}
    odd = [text for text in named.values() if not isinstance(text, str | int | float | None)]
    if odd:
        return {}, f"an option is {str(odd[0])[:60]!r}, expected text"
    return {letter: str(text) for letter, text in named.items() if text is not None and str(text) != "nan"}, None


def _written(text: str) -> list[str]:
    """The options that a text writes as `(A) red (B) blue`, on one line or several, from A on; else none."""
    marks = list(_BRACKETED.finditer(text))
    if len(marks) < 2 or "".join(mark[1].upper() for mark in marks) != LETTERS[: len(marks)]:
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [text[mark.end() : end].strip().split("\n")[0].strip() for mark, end in zip(marks, ends, strict=True)]


def _without_letters(values: Sequence[Any]) -> Sequence[Any]:
    """The texts of options; where each is a text behind its own letter, such as `(A) red` or `A. red`, without it."""
    parts = [_OWN_LETTER.fullmatch(str(value)) for value in values]
    own = [part[2] for part, letter in zip(parts, LETTERS, strict=False) if part and part[2] and part[1] == letter]
    return own if len(own) == len(values) > 1 else values


def answers_of(
    value: Any, options: Mapping[str, str], answer_is: str, *, where: str
) -> tuple[tuple[str, ...], str | None]:
    """The references, letters where they name options, and the problem with one if there is one."""
    if value is None or value == "":
        return (), None
    given = list(value) if isinstance(value, list | tuple) else [value]
    given = [item["answer"] if isinstance(item, dict) and "answer" in item else item for item in given]
    if not options:
        return tuple(map(str, given)), None
    found = [_named(item, options, answer_is, where=where) for item in given]
    unknown = [str(item) for item, letters in zip(given, found, strict=True) if not letters]
    letters = tuple(letter for one in found for letter in one)
    form = "" if answer_is == "auto" else f"the {answer_is} of "
    problem = f"answer {unknown[0]!r} is not {form}one of the options {', '.join(options)}" if unknown else None
    return letters or tuple(unknown), problem


def _named(value: Any, options: Mapping[str, str], answer_is: str, *, where: str) -> tuple[str, ...]:
    """The letters of the options that an answer names: of equal options every letter is right."""
    text = str(value)
    bracketed = _BRACKETED.fullmatch(text.strip())
    letter = bracketed[1].upper() if bracketed else text
    index = LETTERS[int(text)] if text.isdecimal() and len(text) < 3 and int(text) < len(LETTERS) else ""
    forms = {
        "letter": tuple(name for name in options if name == letter),
        "index": tuple(name for name in options if name == index),
        "text": tuple(name for name, option in options.items() if option == text),
    }
    if answer_is in forms:
        return forms[answer_is]
    read = {form: names for form, names in forms.items() if names}
    if not isinstance(value, str) and "index" in read:
        return read["index"]
    for form, names in read.items():
        if form != "text" and not set(names) <= set(read.get("text", names)):
            article = "an" if form == "index" else "a"
            raise EvalError(
                f"Document {where!r}: answer {text!r} is option {names[0]} as {article} {form} and option "
                f"{read['text'][0]} as a text. Set source.answer_is to {form} or text."
            )
    return next(iter(read.values()), ())


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
