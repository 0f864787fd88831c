"""Strict reading of training records from any source into one form.

Accepted forms are LLaVA's `conversations`, chat `messages` with text or content parts (OpenAI, Hugging Face), `texts`
(pairs of user and assistant), `question` and `answer`, and `caption`, each with `image` or `video`. A video becomes
several frames, which are pictures like any other. Every fault has the form
`CODE: file:line (record i, id=...) field path: what; what to do`; see `record_faults.Code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mm_moslora.data.chat.record_keys import check_record, check_turn, ignored_keys, thinking_of
from mm_moslora.data.images.record_picture import Picture, PictureRules, find_picture
from mm_moslora.data.images.remote_files import find_remote
from mm_moslora.data.images.video_clip import Clip, find_clip
from mm_moslora.data.record_faults import Code, RecordError, Where, is_nothing, kind_of
from mm_moslora.utils.untrusted_files import BAD_CHARACTER

Role = Literal["system", "user", "assistant"]

IMAGE = "<image>"
"""Marks the place of an image in a question."""
VIDEO = "<video>"
"""Marks the place of a video in a question of a record that names videos."""
MAX_TEXT = 2_000_000
"""Characters of one turn; longer ones are refused."""
_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip


_SHOWN = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Type of a content part -> image or video."""
_ANY_MARK = re.compile(f"{IMAGE}|{VIDEO}")


class _Mark(NamedTuple):
    """The place of an image or a video in a conversation."""

    kind: str
    """image or video."""
    given: Any = None
    """The image or video, if the conversation itself names it."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    """The speaker."""
    text: str
    """The content; `<image>` in a user's text is replaced by the next image."""
    places: tuple[int, ...] | None = None
    """Offsets of the `<image>` that are images, for a source that distinguishes them from typed text; None: all are."""

    def parts(self) -> list[str]:
        """The texts before, between and after the images: one more than the number of images."""
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
        """A question in which `<image>` is text, with images before it, each on a separate line."""
        mark = f"{IMAGE}\n"
        return cls(role="user", text=mark * images + text, places=tuple(len(mark) * i for i in range(images)))

    def showing(self, counts: Sequence[int]) -> Turn:
        """The same turn with each of its images replaced by this many consecutive images."""
        first, *rest = self.parts()
        result, places = first, []
        for count, part in zip(counts, rest, strict=True):
            places += [len(result) + len(IMAGE) * index for index in range(count)]
            result += IMAGE * count + part
        return Turn(role=self.role, text=result, places=tuple(places))

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
    """The record's id, or its number."""
    turns: tuple[Turn, ...]
    """An optional system turn, then questions and answers in turn."""
    images: tuple[Picture, ...] = ()
    """In order of their places."""
    where: Where
    """Its place in the source, for messages."""
    ignored: tuple[str, ...] = ()
    """Its keys, and those of its turns, that are not read."""

    @property
    def image_names(self) -> list[str]:
        """Paths, members or URLs of the images."""
        return [picture.name for picture in self.images]


def parse_record(value: Any, where: Where, rules: PictureRules) -> Record:
    """Turn one value into a record.

    Args:
        value: an object in one of the forms at the top.
        where: for messages.
        rules: rules for its pictures.

    Raises:
        RecordError: with one of `record_faults.Code`.
    """
    if not isinstance(value, Mapping):
        raise where.error(Code.NOT_AN_OBJECT, "-", f"is {kind_of(value)}", "write one JSON object per record")
    name = _id(value, where)
    where = where.named(name)
    check_record(value, where)
    named = {"image": _names(value, "image", where), "video": _names(value, "video", where)}
    turns, marks, marked = _turns(value, where, videos=_marked_videos(value, named))
    if not marked:
        marks = [_Mark(kind, item) for kind, items in named.items() for item in items]
        if marks and not any(turn.images for turn in turns):
            turns = _images_asked_first(turns, len(marks))
    else:
        marks = _filled(marks, named, where)
    shown = [_found(mark, index, where, rules) for index, mark in enumerate(marks)]
    _check_roles(turns, where)
    _check_places(turns, len(shown), where)
    if any(isinstance(item, Clip) for item in shown):
        turns = _with_frames(turns, shown)
    images = tuple(picture for item in shown for picture in (item.pictures() if isinstance(item, Clip) else [item]))
    return Record(id=name, turns=tuple(turns), images=images, where=where, ignored=ignored_keys(value))


def _found(mark: _Mark, index: int, where: Where, rules: PictureRules) -> Picture | Clip:
    if mark.kind == "video":
        return find_clip(mark.given, index, where, rules)
    return find_remote(mark.given, index, where, rules) or find_picture(mark.given, index, where, rules)


def _marked_videos(value: Mapping[str, Any], named: Mapping[str, list[Any]]) -> str | None:
    """The placeholder of videos in the texts of a record: `<video>`, or `<image>` as in LLaVA-Video if there is no
    `<video>`; None for a record without a video, in which `<video>` is text."""
    if not named["video"]:
        return None
    return VIDEO if named["image"] or VIDEO in json.dumps(value, ensure_ascii=True, default=str) else IMAGE


def _filled(marks: list[_Mark], named: dict[str, list[Any]], where: Where) -> list[_Mark]:
    """Assign the images or videos that a record names to the places in its conversation.

    Raises:
        RecordError: they are named twice, or their number differs from that of the places.
    """
    names = {kind: list(items) for kind, items in named.items() if items}
    if not names:
        return marks
    for kind in names:
        if any(mark.given is not None for mark in marks):
            raise where.error(Code.IMAGE_COUNT, kind, f"{kind}s are named here and in the messages", "name them once")
    if "video" not in names:  # `_check_places` counts these and names the turns
        return [_Mark("image", item) for item in names["image"]]
    for kind in ("image", "video"):
        places = sum(mark.kind == kind for mark in marks)
        if places != len(named[kind]):
            what = f"{places} <{kind}> in the questions, {len(named[kind])} {kind}s"
            raise where.error(Code.IMAGE_COUNT, "conversations", what, f"write one <{kind}> per {kind}, in human turns")
    return [_Mark(mark.kind, names[mark.kind].pop(0)) for mark in marks]


def _with_frames(turns: list[Turn], shown: Sequence[Picture | Clip]) -> list[Turn]:
    """The turns with every video replaced by one image per frame."""
    counts = [item.count if isinstance(item, Clip) else 1 for item in shown]
    result = []
    for turn in turns:
        own, counts = counts[: turn.images], counts[turn.images :]
        result.append(turn.showing(own) if own else turn)
    return result


def _images_asked_first(turns: list[Turn], count: int) -> list[Turn]:
    """Put the pictures of a form without placeholders before the first question."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    text = turns[first].text
    asked = Turn.asking(text, images=count) if text else Turn(role="user", text=IMAGE * count)
    return [*turns[:first], asked, *turns[first + 1 :]]


def _id(value: Mapping[str, Any], where: Where) -> str:
    name = value.get("id")
    if is_nothing(name):
        return str(where.row)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise where.error(Code.BAD_ID, "id", f"is {kind_of(name)}", "write a string or an integer")
    if isinstance(name, str):
        _check_characters(name, "id", where)
    return str(name)


def _names(value: Mapping[str, Any], kind: str, where: Where) -> list[Any]:
    """The values of `image` or `images`, or of `video` or `videos`; null and NaN, which mark the empty cells of
    tables, count as absent."""
    given, several = (None if is_nothing(value.get(key)) else value[key] for key in (kind, f"{kind}s"))
    if given is not None and several is not None:
        raise where.error(Code.IMAGE_COUNT, kind, f"both `{kind}` and `{kind}s` are given", "keep one of them")
    given = several if given is None else given
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _turns(value: Mapping[str, Any], where: Where, *, videos: str | None) -> tuple[list[Turn], list[_Mark], bool]:
    """The turns, their images and videos, and whether the form marks the places of these."""
    turns: list[Turn] = []
    marks: list[_Mark] = []
    if value.get("system") and not is_nothing(value["system"]):  # ShareGPT and Alpaca keep it beside the conversation
        turns.append(Turn(role="system", text=_text(value["system"], "system", where)))
    for find in (_pairs, _question_and_answer):
        simple = find(value, where)
        if simple is not None:
            return turns + simple, [], False
    key = "messages" if "messages" in value and "conversations" not in value else "conversations"
    items = value.get(key)
    if not isinstance(items, list) or not items:
        if key not in value:
            raise _formless(value, key, where)
        what = f"is {kind_of(items)}" if items else "is empty"
        raise where.error(Code.NO_TURNS, key, what, "add at least a question and an answer")
    for index, item in enumerate(items):
        field = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise where.error(Code.BAD_TURN, field, f"is {kind_of(item)}", "write an object per turn")
        speaker = item.get("from", item.get("role"))
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            found = json.dumps(speaker, ensure_ascii=True, default=str)[:60]
            raise where.error(
                Code.BAD_ROLE, field, f"role is {found}", "use human and gpt, or user and assistant, and system first"
            )
        check_turn(item, role, field, where)
        thinking = thinking_of(item, role, field, where)
        content = item.get("value", item.get("content"))
        if isinstance(content, list):
            turn = _of_parts(role, content, field, where, marks)
        else:
            turn = _of_text(role, _text(content, field, where), videos, marks)
        turns.append(Turn(role=role, text=_text(thinking, field, where) + turn.text) if thinking else turn)
    return turns, marks, True


def _formless(value: Mapping[str, Any], key: str, where: Where) -> RecordError:
    """The error of a record in none of the forms; names the keys that it has."""
    found = ", ".join(ascii(str(name)[:40]) for name in list(value)[:8])
    remedy = (
        "write conversations, messages, texts, question and answer, or caption; for a table, map its columns with "
        "`columns` of the source"
    )
    return where.error(Code.NO_TURNS, key, f"is missing; the record has {found or 'no key'}", remedy)


def _pairs(value: Mapping[str, Any], where: Where) -> list[Turn] | None:
    """`texts`: a list of objects with `user` and `assistant`."""
    items = value.get("texts")
    if not isinstance(items, list) or "conversations" in value or "messages" in value:
        return None
    turns: list[Turn] = []
    for index, item in enumerate(items):
        field = f"texts[{index}]"
        if not isinstance(item, Mapping):
            raise where.error(Code.BAD_TURN, field, f"is {kind_of(item)}", "write an object with user and assistant")
        check_turn(item, "assistant", field, where)
        turns += [Turn.asking(_text(item.get("user"), f"{field}.user", where)),
                  Turn(role="assistant", text=_text(item.get("assistant"), f"{field}.assistant", where))]  # fmt: skip
    if not turns:
        raise where.error(Code.NO_TURNS, "texts", "is empty", "add at least a question and an answer")
    return turns


def _question_and_answer(value: Mapping[str, Any], where: Where) -> list[Turn] | None:
    """`question` and `answer`, or `caption` alone."""
    if "conversations" in value or "messages" in value:
        return None
    if "question" in value and "answer" in value:
        question, answer = (_text(value[key], key, where) for key in ("question", "answer"))
    elif "caption" in value:
        question, answer = "", _text(value["caption"], "caption", where)
    else:
        return None
    return [Turn.asking(question), Turn(role="assistant", text=answer)]


def _of_text(role: Role, text: str, videos: str | None, marks: list[_Mark]) -> Turn:
    """A turn with placeholders of images in its text; with `videos` also of videos, which are recorded."""
    if role != "user":
        return Turn(role=role, text=text)
    if videos is None:
        return Turn(role=role, text=_image_first(text))
    marks += [_Mark("video" if found == videos else "image") for found in _ANY_MARK.findall(text)]
    return Turn(role=role, text=_image_first(text.replace(VIDEO, IMAGE)))


def _of_parts(role: Role, content: list[Any], field: str, where: Where, marks: list[_Mark]) -> Turn:
    """A turn of content parts, as chat messages have them."""
    text = ""
    places: list[int] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping):
            check_turn(part, role, f"{field}.content[{index}]", where)
        if isinstance(kind, str) and kind in _SHOWN and role == "user":
            shown = _SHOWN[kind]
            keys = (shown, f"{shown}_url", "path", "url")
            marks.append(_Mark(shown, next((part[key] for key in keys if part.get(key)), None)))
            places.append(len(text))
            text += f"{IMAGE}\n"
        elif kind == "text":
            text += _text(part.get("text"), f"{field}.content[{index}]", where)
        else:
            found = json.dumps(part, ensure_ascii=True, default=str)[:60]
            remedy = "use parts of type text, and of type image or video in the user's turns"
            raise where.error(Code.BAD_TURN, f"{field}.content[{index}]", f"is {found}", remedy)
    return Turn(role=role, text=text, places=tuple(places))


def _image_first(text: str) -> str:
    """LLaVA's rule: the only image of a question is moved before it, to a separate line; several images are not moved.

    Half of LLaVA's instruction data has the image at the end; chat and evaluation put it first.
    """
    if text.count(IMAGE) != 1:
        return text
    rest = text.replace(IMAGE, "").strip()
    return f"{IMAGE}\n{rest}" if rest else IMAGE


def _text(value: Any, field: str, where: Where) -> str:
    if not isinstance(value, str):
        raise where.error(Code.BAD_TEXT, field, f"text is {kind_of(value)}", "write a string")
    if len(value) > MAX_TEXT:
        raise where.error(Code.TOO_LARGE, field, f"has {len(value)} characters", f"stay below {MAX_TEXT}")
    _check_characters(value, field, where)
    return value


def _check_characters(text: str, field: str, where: Where) -> None:
    bad = BAD_CHARACTER.search(text)
    if bad:
        what = f"holds U+{ord(bad[0]):04X} at character {bad.start()}"
        surrogate = bad[0] >= "\ud800"
        remedy = "write the whole surrogate pair" if surrogate else "remove control characters"
        raise where.error(Code.BAD_CHARACTER, field, what, remedy)


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
