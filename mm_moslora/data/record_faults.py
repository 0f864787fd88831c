"""Faults of records and pictures: stable codes, and one form of message.

`CODE: file:line (record i, id=...) field path: what; what to do`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import BAD_CHARACTER

MAX_TEXT = 2_000_000
"""Characters of one turn; longer ones are refused."""


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    if is_nothing(value):
        return "NaN"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", bytes: "bytes"}
    return names.get(type(value), "a number")


def is_nothing(value: Any) -> bool:
    """Whether a value is null or NaN, which mark empty cells of tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, an empty text, or a structure of such values."""
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return is_nothing(value) or (isinstance(value, list | tuple) and not value)


class Code(StrEnum):
    """Faults that make one record unusable. The names are stable, so scripts may rely on them; see docs/errors.md."""

    BAD_JSON = "BAD_JSON"
    """Not JSON, or JSON that readers interpret differently (a key written twice)."""
    TOO_DEEP = "TOO_DEEP"
    """Nested deeper than any record."""
    TOO_LARGE = "TOO_LARGE"
    """A line or a text above the size limit."""
    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    """The record is a list, a string, a number or null."""
    BAD_ID = "BAD_ID"
    """The id is neither a string nor an integer."""
    NO_TURNS = "NO_TURNS"
    """No conversation."""
    BAD_TURN = "BAD_TURN"
    """A turn is not an object, or a content part is unknown."""
    BAD_ROLE = "BAD_ROLE"
    """An unknown role."""
    ROLES_DO_NOT_ALTERNATE = "ROLES_DO_NOT_ALTERNATE"
    """Two questions or two answers in a row, or an answer first."""
    NO_ANSWER = "NO_ANSWER"
    """The conversation ends with a question."""
    EMPTY_ANSWER = "EMPTY_ANSWER"
    """An answer without text, or of thinking alone that is not learned."""
    UNCLOSED_THINKING = "UNCLOSED_THINKING"
    """An answer that begins with a block of thinking without its end or its start, or with two blocks."""
    BAD_WEIGHT = "BAD_WEIGHT"
    """A weight of an answer that is negative, not finite or no number, two that differ, or no answer above 0."""
    UNFOLLOWED_KEY = "UNFOLLOWED_KEY"
    """A key beside another one that says otherwise, or of an answer that this objective does not learn."""
    BAD_TOOLS = "BAD_TOOLS"
    """Tools that are no list of functions with names."""
    BAD_CALL = "BAD_CALL"
    """A call of a tool that is no JSON, or has no name."""
    NO_CALL = "NO_CALL"
    """A result of a tool without the call that it answers."""
    TOOLS_NOT_RENDERED = "TOOLS_NOT_RENDERED"
    """Tools, calls or results that the chat template leaves out or refuses."""
    NO_PAIR = "NO_PAIR"
    """Not a chosen and a rejected answer to one conversation."""
    EQUAL_ANSWERS = "EQUAL_ANSWERS"
    """The rejected answer is the chosen one."""
    NO_LABEL = "NO_LABEL"
    """Not known whether the answer is good or bad."""
    NO_REFERENCE = "NO_REFERENCE"
    """A question without an answer to compare with, or with one that is none of its options."""
    BAD_TEXT = "BAD_TEXT"
    """A text that is not a string."""
    BAD_CHARACTER = "BAD_CHARACTER"
    """Half a surrogate pair, NUL or another control character."""
    IMAGE_COUNT = "IMAGE_COUNT"
    """Placeholders and pictures do not match."""
    BAD_IMAGE_NAME = "BAD_IMAGE_NAME"
    """An image that is not named by a plain relative path."""
    PATH_ESCAPES = "PATH_ESCAPES"
    """An image path that leaves the image folder."""
    BAD_BOX = "BAD_BOX"
    """A box or point that is no such thing, lies outside of its picture or names none, or a placeholder without one."""
    BOX_CROPPED = "BOX_CROPPED"
    """A box or point in a part of the picture that the model does not see."""
    NO_VISION = "NO_VISION"
    """A record with pictures for a model without a vision encoder."""
    TOO_LONG = "TOO_LONG"
    """Not even the first question and answer fit; an answer is never cut."""
    SPECIAL_TEXT = "SPECIAL_TEXT"
    """A text that spells special tokens, with a tokenizer that cannot read them as text."""
    IMAGE_MISSING = "IMAGE_MISSING"
    """No such file, or no permission."""
    IMAGE_NOT_A_FILE = "IMAGE_NOT_A_FILE"
    """A folder, a pipe or a device."""
    IMAGE_EMPTY = "IMAGE_EMPTY"
    """Zero bytes."""
    IMAGE_FORMAT = "IMAGE_FORMAT"
    """Not a picture, or not in an accepted format."""
    IMAGE_DAMAGED = "IMAGE_DAMAGED"
    """Cut short or broken inside."""
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    """More pixels or bytes than accepted; refused before decoding."""
    IMAGE_ASPECT = "IMAGE_ASPECT"
    """One side much longer than the other, or no size at all."""
    VIDEO_FORMAT = "VIDEO_FORMAT"
    """Not a video, or not in an accepted container; a folder without frames."""
    VIDEO_DAMAGED = "VIDEO_DAMAGED"
    """Cut short or broken inside."""
    VIDEO_TOO_LARGE = "VIDEO_TOO_LARGE"
    """More bytes, or more pixels in the frames that are taken, than accepted; refused before decoding."""
    VIDEO_TOO_LONG = "VIDEO_TOO_LONG"
    """More seconds or frames than accepted."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which record it is: source, line and number."""

    file: Path
    """The source."""
    line: int | None
    """Line of a JSONL file, from 1."""
    row: int
    """Number of the record within its file, from 0."""
    id: str | None = None
    """The record's id, once it is known."""

    def named(self, name: str) -> Where:
        """The same with the record's id."""
        return replace(self, id=name)

    def error(self, code: Code, field: str, what: str, remedy: str, *, path: str | None = None) -> RecordError:
        """The error of one fault."""
        return RecordError(code=code, where=self, field=field, what=what, remedy=remedy, path=path)


class RecordError(DataError):
    """A record that cannot be used, with the `field` at fault, such as `conversations[2]`."""

    def __init__(
        self, *, code: Code, where: Where, field: str, what: str, remedy: str, path: str | None = None
    ) -> None:
        self.code, self.where, self.field, self.what, self.remedy, self.path = code, where, field, what, remedy, path
        line = "" if where.line is None else f":{where.line}"
        name = "" if where.id is None else f", id={where.id[:80]!r}"
        super().__init__(f"{code}: {where.file}{line} (record {where.row}{name}) field {field}: {what}; {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling: worker processes send errors to the main process."""
        return _rebuild, (self.code, self.where, self.field, self.what, self.remedy, self.path)


def _rebuild(code: Code, where: Where, field: str, what: str, remedy: str, path: str | None) -> RecordError:
    return RecordError(code=code, where=where, field=field, what=what, remedy=remedy, path=path)


def checked_text(value: Any, field: str, where: Where) -> str:
    """A text of a record: a string, not too long, of characters that are text."""
    if not isinstance(value, str):
        raise where.error(Code.BAD_TEXT, field, f"text is {kind_of(value)}", "write a string")
    if len(value) > MAX_TEXT:
        raise where.error(Code.TOO_LARGE, field, f"has {len(value)} characters", f"stay below {MAX_TEXT}")
    check_characters(value, field, where)
    return value


def check_characters(text: str, field: str, where: Where) -> None:
    """Refuse half a surrogate pair, NUL and other control characters; see `checked_text`."""
    bad = BAD_CHARACTER.search(text)
    if bad:
        what = f"holds U+{ord(bad[0]):04X} at character {bad.start()}"
        surrogate = bad[0] >= "\ud800"
        remedy = "write the whole surrogate pair" if surrogate else "remove control characters"
        raise where.error(Code.BAD_CHARACTER, field, what, remedy)
