"""The options of a question, and the answer that names one of them, in the forms in which data sets write them."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mm_moslora.utils.errors import EvalError
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
