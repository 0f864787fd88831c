"""Training records: LLaVA JSON and JSONL, and chat messages, read strictly into one form.

Every fault is named as `CODE: file:line (record i, id=...) field path: what; what to do`; see `faults.Code`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mm_moslora.data.faults import Code, RecordError, Where
from mm_moslora.data.jsonfile import JsonFile, StrictJsonError
from mm_moslora.errors import suggestion

Role = Literal["system", "user", "assistant"]

IMAGE = "<image>"
"""Marks the place of an image in a question."""
MAX_TEXT = 2_000_000
"""Characters of one turn; longer ones are refused."""
_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_BAD_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    text: str
    """What is said; `<image>` in a user's text stands for the next image."""
    places: tuple[int, ...] | None = None
    """Offsets of the `<image>` that are images, for a source that tells them apart from typed ones; None: all are."""

    def parts(self) -> list[str]:
        """The texts before, between and behind the images: one more than there are images."""
        if self.role != "user":
            return [self.text]
        if self.places is None:
            return self.text.split(IMAGE)
        starts = [0, *(place + len(IMAGE) for place in self.places)]
        ends = [*self.places, len(self.text)]
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]

    @property
    def images(self) -> int:
        """Images in this turn."""
        return len(self.parts()) - 1

    @classmethod
    def asking(cls, text: str, *, images: int = 0) -> Turn:
        """A question in which `<image>` is text, with images before it, each on a line of its own."""
        mark = f"{IMAGE}\n"
        return cls(role="user", text=mark * images + text, places=tuple(len(mark) * i for i in range(images)))

    def preceded_by(self, text: str) -> Turn:
        """The same turn with literal text before it."""
        first, *rest = self.parts()
        result, places = text + first, []
        for part in rest:
            places.append(len(result))
            result += IMAGE + part
        return Turn(role=self.role, text=result, places=tuple(places))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation with the paths of its images."""

    id: str
    """The record's own id, or its number."""
    turns: tuple[Turn, ...]
    """An optional system turn, then questions and answers in turn."""
    images: tuple[Path, ...] = ()
    """Below the image folder, in order of their places."""
    where: Where
    """Where it came from, for messages."""


class RecordFile:
    """Random access to the records of one file.

    Args:
        path: LLaVA JSON (a list) or JSONL.
        image_folder: images lie below it; None: the file's folder.
        follow_links: accept symbolic links that lead out of the image folder.

    Raises:
        DataError: the file is missing, empty, or no JSON at all.
    """

    def __init__(self, path: Path, image_folder: Path | None = None, *, follow_links: bool = False) -> None:
        self.path = path
        self.image_folder = (image_folder or path.parent).resolve()
        self.follow_links = follow_links
        self._values = JsonFile(path)

    def __len__(self) -> int:
        return len(self._values)

    def where(self, row: int) -> Where:
        """The place of a record, for messages."""
        return Where(file=self.path, line=self._values.line(row), row=row)

    def __getitem__(self, row: int) -> Record:
        """Read and check one record.

        Raises:
            RecordError: the record cannot be used.
        """
        where = self.where(row)
        try:
            value = self._values[row]
        except StrictJsonError as fault:
            code = Code.TOO_DEEP if fault.deep else Code.TOO_LARGE if fault.large else Code.BAD_JSON
            raise where.error(code, "-", str(fault), "repair or remove the record") from fault
        return parse_record(value, where, self.image_folder, follow_links=self.follow_links)


def parse_record(value: Any, where: Where, image_folder: Path, *, follow_links: bool = False) -> Record:
    """Turn one JSON value into a record.

    Args:
        value: an object with `conversations` (LLaVA) or `messages` (chat).
        where: for messages.
        image_folder: resolved; images must lie below it.
        follow_links: accept symbolic links that lead out of it.

    Raises:
        RecordError: with one of `faults.Code`.
    """
    if not isinstance(value, Mapping):
        raise where.error(Code.NOT_AN_OBJECT, "-", f"is {_kind(value)}", "write one JSON object per record")
    name = _id(value, where)
    where = where.named(name)
    turns, inline = _turns(value, where)
    names = _image_names(value, where)
    if names and any(item is not None for item in inline):
        raise where.error(Code.IMAGE_COUNT, "image", "images are named here and in the messages", "name them once")
    names = names or inline
    images = tuple(
        _image_path(item, index, image_folder, where, follow_links=follow_links) for index, item in enumerate(names)
    )
    _check_roles(turns, where)
    _check_places(turns, len(images), where)
    return Record(id=name, turns=tuple(turns), images=images, where=where)


def _kind(value: Any) -> str:
    """A JSON type, in JSON's words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number")


def _id(value: Mapping[str, Any], where: Where) -> str:
    name = value.get("id")
    if name is None:
        return str(where.row)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise where.error(Code.BAD_ID, "id", f"is {_kind(name)}", "write a string or an integer")
    if isinstance(name, str):
        _check_characters(name, "id", where)
    return str(name)


def _image_names(value: Mapping[str, Any], where: Where) -> list[Any]:
    if value.get("image") is not None and value.get("images") is not None:
        raise where.error(Code.IMAGE_COUNT, "image", "both `image` and `images` are given", "keep one of them")
    given = value.get("image") if value.get("image") is not None else value.get("images")
    if given is None and "image" in value:
        raise where.error(Code.BAD_IMAGE_NAME, "image", "is null", "leave the key out of a record without a picture")
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def _turns(value: Mapping[str, Any], where: Where) -> tuple[list[Turn], list[Any]]:
    key = "messages" if "messages" in value and "conversations" not in value else "conversations"
    items = value.get(key)
    if not isinstance(items, list) or not items:
        what = f"is {_kind(items)}" if items else "is missing or empty"
        hint = suggestion(key, [str(name) for name in value]) if key not in value else ""
        raise where.error(Code.NO_TURNS, key, what, f"add at least a question and an answer.{hint}")
    turns: list[Turn] = []
    images: list[Any] = []
    for index, item in enumerate(items):
        field = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise where.error(Code.BAD_TURN, field, f"is {_kind(item)}", "write an object per turn")
        speaker = item.get("from", item.get("role"))
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            found = json.dumps(speaker, ensure_ascii=True)[:60]
            raise where.error(
                Code.BAD_ROLE, field, f"role is {found}", "use human and gpt, or user and assistant, and system first"
            )
        turns.append(_turn(role, item.get("value", item.get("content")), field, where, images))
    return turns, images


def _turn(role: Role, content: Any, field: str, where: Where, images: list[Any]) -> Turn:
    if not isinstance(content, list):
        text = _text(content, field, where)
        return Turn(role=role, text=_image_first(text) if role == "user" else text)
    text = ""
    places: list[int] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and role == "user":
            images.append(part.get("image", part.get("path")))
            places.append(len(text))
            text += f"{IMAGE}\n"
        elif kind == "text":
            text += _text(part.get("text"), f"{field}.content[{index}]", where)
        else:
            found = json.dumps(part, ensure_ascii=True, default=str)[:60]
            remedy = "use parts of type text, and of type image in the user's turns"
            raise where.error(Code.BAD_TURN, f"{field}.content[{index}]", f"is {found}", remedy)
    return Turn(role=role, text=text, places=tuple(places))


def _image_first(text: str) -> str:
    """LLaVA's rule: the only image of a question stands before it, on a line of its own; several stay in place.

    Half of LLaVA's instruction data has it at the end; chat and evaluation show it first.
    """
    if text.count(IMAGE) != 1 or text.startswith(IMAGE):
        return text
    rest = text.replace(IMAGE, "").strip()
    return f"{IMAGE}\n{rest}" if rest else IMAGE


def _text(value: Any, field: str, where: Where) -> str:
    if not isinstance(value, str):
        raise where.error(Code.BAD_TEXT, field, f"text is {_kind(value)}", "write a string")
    if len(value) > MAX_TEXT:
        raise where.error(Code.TOO_LARGE, field, f"has {len(value)} characters", f"stay below {MAX_TEXT}")
    _check_characters(value, field, where)
    return value


def _check_characters(text: str, field: str, where: Where) -> None:
    bad = _BAD_CHARACTER.search(text)
    if bad:
        what = f"holds U+{ord(bad[0]):04X} at character {bad.start()}"
        surrogate = bad[0] >= "\ud800"
        remedy = "write the whole surrogate pair" if surrogate else "remove control characters"
        raise where.error(Code.BAD_CHARACTER, field, what, remedy)


def _image_path(name: Any, index: int, folder: Path, where: Where, *, follow_links: bool) -> Path:
    field = f"image[{index}]"
    if not isinstance(name, str) or not name.strip():
        found = _kind(name) if not isinstance(name, str) else "empty"
        raise where.error(Code.BAD_IMAGE_NAME, field, f"is {found}", "write a path below the image folder")
    shown = ascii(name)[:100]
    bad = _BAD_CHARACTER.search(name) or "\\" in name or name.startswith("~") or "%2e" in name.lower()
    if bad or _SCHEME.match(name):
        what = f"{shown} is no plain relative path"
        remedy = "write a path below the image folder, without scheme, ~, backslash or escapes; nothing is downloaded"
        raise where.error(Code.BAD_IMAGE_NAME, field, what, remedy, path=name)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        remedy = f"write a path below {folder}"
        raise where.error(Code.PATH_ESCAPES, field, f"{shown} leaves the image folder", remedy, path=name)
    path = folder / name
    if follow_links:
        return path
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        remedy = "shorten or repair the path"
        raise where.error(Code.BAD_IMAGE_NAME, field, f"{shown} ({error})", remedy, path=name) from error
    if not real.is_relative_to(folder):
        remedy = "copy the picture there, or set follow_links for this source"
        raise where.error(Code.PATH_ESCAPES, field, f"{shown} links out of {folder}", remedy, path=name)
    return real


def similar_file(path: Path) -> str:
    """A hint when a missing file exists under another spelling of its name; empty otherwise."""
    other = [
        path.with_name(unicodedata.normalize("NFC", path.name)),
        path.with_name(unicodedata.normalize("NFD", path.name)),
    ]
    other += [path.with_suffix(suffix) for suffix in (".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".gif", ".webp")]
    for candidate in other:
        if candidate != path and candidate.is_file():
            return f" There is {candidate.name!a}."
    return ""


def _check_roles(turns: list[Turn], where: Where) -> None:
    lead = int(turns[0].role == "system")
    for index, turn in enumerate(turns[lead:], start=lead):
        expected = "user" if (index - lead) % 2 == 0 else "assistant"
        field = f"conversations[{index}]"
        if turn.role != expected:
            remedy = "questions and answers take turns, a question first"
            raise where.error(Code.ROLES_DO_NOT_ALTERNATE, field, f"is {turn.role}, expected {expected}", remedy)
        if turn.role == "assistant" and not turn.text.strip():
            raise where.error(
                Code.EMPTY_ANSWER, field, "has no text to learn from", "write the answer or drop the turn"
            )
    if turns[-1].role != "assistant":
        raise where.error(
            Code.NO_ANSWER, f"conversations[{len(turns) - 1}]", "nothing is answered", "end with a gpt turn"
        )


def _check_places(turns: list[Turn], images: int, where: Where) -> None:
    places = sum(turn.images for turn in turns)
    if places == images:
        return
    asked = [index for index, turn in enumerate(turns) if turn.images]
    what = f"{places} {IMAGE} in the questions (turns {asked}), {images} images"
    ignored = [index for index, turn in enumerate(turns) if turn.role != "user" and IMAGE in turn.text]
    if ignored:
        what += f"; the ones in turns {ignored} do not count"
    raise where.error(Code.IMAGE_COUNT, "conversations", what, f"write one {IMAGE} per image, in human turns")


__all__ = ["IMAGE", "Record", "RecordError", "RecordFile", "Role", "Turn", "parse_record", "similar_file"]
