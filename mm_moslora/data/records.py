"""Training records: LLaVA JSON and JSONL, and chat messages, read strictly into one form.

Every fault is named as `CODE: file:line (record i, id=...) field path: what; what to do`; the codes are stable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mm_moslora.errors import DataError

IMAGE = "<image>"
MAX_TEXT = 2_000_000
"""Characters of one turn; longer ones are refused."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn; `<image>` in a user's text stands for the next image."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation with the paths of its images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Where:
    """The place of a record, for messages."""

    file: Path
    line: int | None
    index: int
    id: str | None = None

    def error(self, code: str, field: str, what: str, remedy: str) -> RecordError:
        """The error of one fault."""
        return RecordError(code=code, where=self, field=field, what=what, remedy=remedy)


class RecordError(DataError):
    """A record that cannot be used."""

    def __init__(self, *, code: str, where: Where, field: str, what: str, remedy: str) -> None:
        self.code, self.where, self.field, self.what, self.remedy = code, where, field, what, remedy
        line = f":{where.line}" if where.line else ""
        name = f", id={where.id!r}" if where.id else ""
        super().__init__(f"{code}: {where.file}{line} (record {where.index}{name}) field {field}: {what}; {remedy}")


class RecordFile:
    """Random access to the records of one file.

    JSONL is indexed by byte offset, so that memory stays bounded; a JSON list is read once.

    Args:
        path: the file.
        image_folder: images lie below it; None: the file's folder.

    Raises:
        DataError: the file is missing, empty, or no JSON at all.
    """

    def __init__(self, path: Path, image_folder: Path | None = None) -> None:
        self.path = path
        self.image_folder = (image_folder or path.parent).resolve()
        if not path.is_file():
            raise DataError(f"{path} does not exist, expected a LLaVA JSON or JSONL file. Check data.train.")
        with path.open("rb") as stream:
            head = stream.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is UTF-16, expected UTF-8. Convert it (iconv -f UTF-16 -t UTF-8).")
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not text:
            raise DataError(f"{path} is empty: 0 records.")
        self._rows: list[Any] | None = None
        self._offsets: list[tuple[int, int]] = []
        if text.startswith(b"["):
            self._rows = self._read_list()
        else:
            self._offsets = list(self._index_lines())

    def __len__(self) -> int:
        return len(self._offsets) if self._rows is None else len(self._rows)

    def _read_list(self) -> list[Any]:
        raw = self.path.read_bytes()
        try:
            rows = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path} is no valid JSON ({error}). Repair it, or convert it to JSONL, where one bad line costs "
                "one record."
            ) from error
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{self.path} holds {len(rows) if isinstance(rows, list) else type(rows).__name__} records.")
        return rows

    def _index_lines(self) -> Iterator[tuple[int, int]]:
        offset = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield offset, number
                offset += len(line)

    def __getitem__(self, index: int) -> Record:
        """Read and check one record.

        Raises:
            RecordError: the record cannot be used.
        """
        if self._rows is not None:
            return parse_record(self._rows[index], Where(file=self.path, line=None, index=index), self.image_folder)
        offset, line = self._offsets[index]
        where = Where(file=self.path, line=line, index=index)
        with self.path.open("rb") as stream:
            stream.seek(offset)
            raw = stream.readline()
        try:
            row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise where.error("BAD_JSON", "-", f"no valid JSON ({error})", "repair or remove the line") from error
        return parse_record(row, where, self.image_folder)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is written twice")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


def parse_record(row: Any, where: Where, image_folder: Path) -> Record:
    """Turn one JSON value into a record.

    Args:
        row: an object with `conversations` (LLaVA) or `messages` (chat).
        where: for messages.
        image_folder: resolved; images must lie below it.

    Raises:
        RecordError: see the codes in the messages.
    """
    if not isinstance(row, Mapping):
        raise where.error("NOT_AN_OBJECT", "-", f"is {type(row).__name__}", "write an object per record")
    name = row.get("id", where.index)
    where = Where(file=where.file, line=where.line, index=where.index, id=str(name))
    names = _image_names(row, where)
    turns, inline = _turns(row, where)
    names = names or inline
    images = tuple(_image_path(item, index, image_folder, where) for index, item in enumerate(names))
    _check_roles(turns, where)
    turns = _check_places(turns, len(images), where)
    return Record(id=str(name), turns=turns, images=images)


def _image_names(row: Mapping[str, Any], where: Where) -> list[Any]:
    given = row.get("image", row.get("images"))
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def _turns(row: Mapping[str, Any], where: Where) -> tuple[list[Turn], list[Any]]:
    key = "conversations" if "conversations" in row else "messages"
    items = row.get(key)
    if not isinstance(items, list) or not items:
        raise where.error("NO_TURNS", "conversations", "missing or empty", "add at least a question and an answer")
    turns: list[Turn] = []
    images: list[Any] = []
    for index, item in enumerate(items):
        field = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise where.error("BAD_TURN", field, f"is {type(item).__name__}", "write an object per turn")
        role = _ROLES.get(str(item.get("from", item.get("role"))))
        if role is None:
            found = item.get("from", item.get("role"))
            raise where.error("BAD_ROLE", field, f"role is {found!r}", "use human and gpt, or user and assistant")
        text = _content(item.get("value", item.get("content")), field, where, images)
        turns.append(Turn(role=role, text=text))  # type: ignore[arg-type]
    return turns, images


def _content(value: Any, field: str, where: Where, images: list[Any]) -> str:
    if isinstance(value, list):
        pieces = []
        for part in value:
            if isinstance(part, Mapping) and part.get("type") == "image":
                images.append(part.get("image", part.get("path")))
                pieces.append(f"{IMAGE}\n")
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                pieces.append(part["text"])
            else:
                raise where.error("BAD_PART", field, f"has the part {part!r:.60}", "use image and text parts")
        value = "".join(pieces)
    if not isinstance(value, str):
        raise where.error("BAD_TEXT", field, f"text is {type(value).__name__}", "write a string")
    if len(value) > MAX_TEXT:
        raise where.error("TOO_LONG", field, f"has {len(value)} characters", f"stay below {MAX_TEXT}")
    for character in value:
        if "\ud800" <= character <= "\udfff":
            raise where.error("BAD_CHARACTER", field, f"holds U+{ord(character):04X}", "repair the surrogate pair")
        if character < " " and character not in "\t\n\r":
            raise where.error("BAD_CHARACTER", field, f"holds U+{ord(character):04X}", "remove control characters")
    return value


def _image_path(name: Any, index: int, folder: Path, where: Where) -> Path:
    field = f"image[{index}]"
    if not isinstance(name, str) or not name:
        raise where.error("BAD_IMAGE_NAME", field, f"is {name!r:.60}", "write a path below the image folder")
    if "\0" in name or "\\" in name or name.startswith("~") or "%2e" in name.lower() or ":" in name.split("/")[0]:
        raise where.error("BAD_IMAGE_NAME", field, f"{name!r:.80} is no plain relative path", "no schemes, no escapes")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise where.error("PATH_ESCAPES", field, f"{name!r:.80} leaves the image folder", "use a path below it")
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(folder):
        raise where.error("PATH_ESCAPES", field, f"{name!r:.80} links out of {folder}", "copy the picture inside")
    return path


def _check_roles(turns: list[Turn], where: Where) -> None:
    rest = turns[1:] if turns[0].role == "system" else turns
    offset = len(turns) - len(rest)
    for index, turn in enumerate(rest):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            field = f"conversations[{index + offset}]"
            raise where.error("ROLES_DO_NOT_ALTERNATE", field, f"is {turn.role}, expected {expected}", "alternate turns")
        if turn.role == "assistant" and not turn.text.strip():
            field = f"conversations[{index + offset}]"
            raise where.error("EMPTY_ANSWER", field, "has no text to learn from", "write the answer or drop the turn")
    if not rest or rest[-1].role != "assistant":
        raise where.error("NO_ANSWER", "conversations", "ends without an answer", "end with a gpt turn")


def _check_places(turns: list[Turn], images: int, where: Where) -> tuple[Turn, ...]:
    places = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    if places != images:
        what = f"{places} {IMAGE} in the questions, {images} images"
        raise where.error("IMAGE_COUNT", "conversations", what, "write one placeholder per image")
    return tuple(turns)
