"""Forms of records besides LLaVA's `conversations` with the pictures in the text, and the placeholders of videos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mm_moslora.data.chat.record_keys import check_turn, checked_text, is_empty, thinking_of, weight_of
from mm_moslora.data.record_faults import Code, RecordError, Where, kind_of

IMAGE = "<image>"
"""Marks where an image belongs in a question."""
VIDEO = "<video>"
"""Marks where a video belongs in a question of a record that names videos."""
_SHOWN = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Type of a content part -> image or video."""


class Mark(NamedTuple):
    """A placeholder of an image or a video in a conversation."""

    kind: str
    """image or video."""
    item: Any = None
    """The image or video, if the conversation itself names it."""


def plain_text(value: Mapping[str, Any], where: Where) -> str | None:
    """The text of a record that is learned whole; None for another form."""
    others = {"conversations", "messages", "texts", "question", "caption", "image", "images", "video", "videos"}
    if not isinstance(value.get("text"), str) or value.keys() & others:
        return None
    for key in ("system", "objects", "tools"):
        if not is_empty(value.get(key)):
            remedy = "a plain text stands alone; drop the key, or the record"
            raise where.error(Code.UNFOLLOWED_KEY, key, f"is {kind_of(value[key])}", remedy)
    text = checked_text(value["text"], "text", where)
    if not text.strip():
        raise where.error(Code.NO_TURNS, "text", "there is no text to learn from", "write a text, or drop the record")
    return text


def single_texts(value: Mapping[str, Any], where: Where) -> list[tuple[str, float]] | None:
    """Questions and answers in turn with their weights, of a form in which `<image>` is text; None for a conversation.

    The form is `texts` (objects with `user` and `assistant`), `question` and `answer`, or `caption` alone.
    """
    items = value.get("texts")
    if isinstance(items, list):
        texts: list[tuple[str, float]] = []
        for index, item in enumerate(items):
            field = f"texts[{index}]"
            if not isinstance(item, Mapping):
                what, remedy = f"is {kind_of(item)}", "write an object with user and assistant"
                raise where.error(Code.BAD_TURN, field, what, remedy)
            check_turn(item, field, where)
            weight = weight_of(item, field, where)
            asked, answer = (checked_text(item.get(key), f"{field}.{key}", where) for key in ("user", "assistant"))
            thinking = thinking_of(item, "assistant", field, where, content=answer)
            texts += [(asked, weight), (checked_text(thinking, field, where) + answer, weight)]
        if not texts:
            raise where.error(Code.NO_TURNS, "texts", "is empty", "add at least a question and an answer")
        return texts
    if "question" in value and "answer" in value:
        asked, answer = (checked_text(value[key], key, where) for key in ("question", "answer"))
        thinking = thinking_of(value, "assistant", "", where, content=answer)
        return [(asked, 1.0), (checked_text(thinking, "-", where) + answer, 1.0)]
    return [("", 1.0), (checked_text(value["caption"], "caption", where), 1.0)] if "caption" in value else None


def text_of_parts(role: str, content: list[Any], field: str, where: Where) -> tuple[str, list[int], list[Mark]]:
    """The text of a content in parts, as chat messages have them, with the offsets of its placeholders."""
    text = ""
    offsets: list[int] = []
    marks: list[Mark] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in _SHOWN and role == "user":
            shown = _SHOWN[kind]
            keys = (shown, f"{shown}_url", "path", "url")
            marks.append(Mark(shown, next((part[key] for key in keys if part.get(key)), None)))
            offsets.append(len(text))
            text += f"{IMAGE}\n"
        elif kind == "text":
            text += checked_text(part.get("text"), f"{field}.content[{index}]", where)
        else:
            shown = json.dumps(part, ensure_ascii=True, default=str)[:60]
            remedy = "use parts of type text, and of type image or video in the user's turns"
            raise where.error(Code.BAD_TURN, f"{field}.content[{index}]", f"is {shown}", remedy)
    return text, offsets, marks


def video_mark(value: Mapping[str, Any], named: Mapping[str, list[Any]]) -> str:
    """The placeholder of videos in a record that names some: `<video>`, or without it `<image>`, as in LLaVA-Video."""
    return VIDEO if named["image"] or VIDEO in json.dumps(value, ensure_ascii=True, default=str) else IMAGE


def filled_marks(marks: list[Mark], named: dict[str, list[Any]], where: Where) -> list[Mark]:
    """Assign the videos and images that a record names to the placeholders in its conversation."""
    names = {kind: list(items) for kind, items in named.items() if items}
    if not names:
        return marks
    for kind in names:
        if any(mark.item is not None for mark in marks):
            raise where.error(Code.IMAGE_COUNT, kind, f"{kind}s are named here and in the messages", "name them once")
    for kind in ("image", "video"):
        count = sum(mark.kind == kind for mark in marks)
        if count != len(named[kind]):
            what = f"{count} <{kind}> in the questions, {len(named[kind])} {kind}s"
            raise where.error(Code.IMAGE_COUNT, "conversations", what, f"write one <{kind}> per {kind}, in human turns")
    return [Mark(mark.kind, names[mark.kind].pop(0)) for mark in marks]


def formless(value: Mapping[str, Any], key: str, where: Where) -> RecordError:
    """The error of a record in none of the forms; names the keys that it has."""
    keys = ", ".join(ascii(str(name)[:40]) for name in list(value)[:8])
    remedy = (
        "write conversations, messages, texts, question and answer, caption, or text without pictures; for a table, "
        "map its columns with `columns` of the source"
    )
    return where.error(Code.NO_TURNS, key, f"is missing; the record has {keys or 'no key'}", remedy)
