"""Turns the value of a record, in any accepted form, into one form of turns and pictures (`record_turns`).

Accepted forms are LLaVA's `conversations`, chat `messages` with text or content parts (OpenAI, Hugging Face), `texts`
(pairs of user and assistant), `question` and `answer`, and `caption`, each with `image` or `video`, and `text` alone;
A video becomes several frames, which are pictures like any other.
Every fault has the form `CODE: file:line (record i, id=...) field path: what; what to do`; see `record_faults.Code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mm_moslora.data.chat.record_keys import (
    CALLING,
    CALLS,
    RESULTS,
    SPEAKER,
    TOOLS,
    check_blocks,
    check_record,
    check_turn,
    content_of,
    given,
    ignored_keys,
    thinking_of,
    weight_of,
)
from mm_moslora.data.chat.record_turns import IMAGE, VIDEO, Record, Role, Turn
from mm_moslora.data.images.record_picture import ImageError, Picture, PictureRules, find_picture
from mm_moslora.data.record_faults import (
    Code,
    RecordError,
    Where,
    check_characters,
    checked_text,
    is_empty,
    is_nothing,
    kind_of,
)

if TYPE_CHECKING:
    from mm_moslora.data.chat.tool_records import OpenCalls
    from mm_moslora.data.images.video_clip import Clip

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", **dict.fromkeys(CALLING, "assistant"),
    **dict.fromkeys(RESULTS, "tool"),
}  # fmt: skip
_SHOWN = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Type of a content part -> image or video."""
_ANY_MARK = re.compile(f"{IMAGE}|{VIDEO}")


class Mark(NamedTuple):
    """A placeholder of an image or a video in a conversation."""

    kind: str
    """image or video."""
    item: Any = None
    """The image or video, if the conversation itself names it."""


def parse_record(value: Any, where: Where, rules: PictureRules) -> Record:
    """Turn one value into a record.

    Raises:
        RecordError: with one of `record_faults.Code`.
    """
    if not isinstance(value, Mapping):
        raise where.error(Code.NOT_AN_OBJECT, "-", f"is {kind_of(value)}", "write one JSON object per record")
    name = _id(value, where)
    where = where.named(name)
    check_record(value, where)
    if "text" in value and (text := plain_text(value, where)) is not None:
        turn = Turn(role="document", text=text)
        return Record(id=name, turns=(turn,), where=where, ignored=ignored_keys(value))
    named = {"image": _names(value, "image", where), "video": _names(value, "video", where)}
    turns, marks, marked = _turns(value, where, videos=video_mark(value, named) if named["video"] else None)
    if marked and (named["video"] or any(mark.item is not None for mark in marks)):
        marks = filled_marks(marks, named, where)
    elif marked:
        marks = [Mark("image", item) for item in named["image"]] or marks
    else:
        marks = [Mark(kind, item) for kind, items in named.items() for item in items]
        if marks and not any(turn.images for turn in turns):
            turns = _images_asked_first(turns, len(marks))
    key, tools = given(value, TOOLS)
    if key:
        from mm_moslora.data.chat.tool_records import offered

        turns[0] = replace(turns[0], tools=offered(tools, key, where) or turns[0].tools)
    shown = [_named_by(mark, index, where, rules) for index, mark in enumerate(marks)]
    _check_roles(turns, where)
    _check_image_count(turns, len(shown), where)
    has_video, objects = any(mark.kind == "video" for mark in marks), None
    if has_video:
        turns, shown = _with_videos(turns, shown, where)
    parts = [part for turn in turns for part in turn.parts()]
    if value.get("objects") is not None or any("<" in part for part in parts):
        from mm_moslora.data.boxes.record_objects import objects_of

        objects = objects_of(value.get("objects"), parts, images=len(shown), where=where, has_video=has_video)
    return Record(
        id=name, turns=tuple(turns), images=tuple(shown), objects=objects, where=where, ignored=ignored_keys(value)
    )


def _named_by(mark: Mark, index: int, where: Where, rules: PictureRules) -> Picture | Clip:
    """The picture or video of a placeholder."""
    if mark.kind == "video":
        from mm_moslora.data.images.video_clip import find_clip

        return find_clip(mark.item, index, where, rules)
    remote = None
    if rules.hosts:
        from mm_moslora.data.images.remote_files import find_remote

        remote = find_remote(mark.item, index, where, rules)
    return remote or find_picture(mark.item, index, where, rules)


def _with_videos(
    turns: list[Turn], shown: Sequence[Picture | Clip], where: Where
) -> tuple[list[Turn], list[Picture | Clip]]:
    """The turns with the places of videos, or of their frames where the model takes no videos, and what is there."""
    from mm_moslora.data.images.video_clip import Clip

    result: list[Turn] = []
    pictures: list[Picture | Clip] = []
    counts: list[int | None] = []
    for item in shown:
        try:
            own = item.pictures() if isinstance(item, Clip) else [item]
        except ImageError as error:
            raise where.error(
                error.code, "video", f"{item.name}: {error.what}", error.remedy, path=item.name
            ) from error
        counts.append(None if own == [item] and isinstance(item, Clip) else len(own))
        pictures += own
    for turn in turns:
        here, counts = counts[: turn.images], counts[turn.images :]
        result.append(turn.showing(here) if here else turn)
    return result, pictures


def _images_asked_first(turns: list[Turn], count: int) -> list[Turn]:
    """Put the pictures of a form without placeholders before the first question."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    text = turns[first].text
    question = Turn.asking(text, images=count) if text else Turn(role="user", text=IMAGE * count)
    return [*turns[:first], question, *turns[first + 1 :]]


def _id(value: Mapping[str, Any], where: Where) -> str:
    name = value.get("id")
    if is_nothing(name):
        return str(where.row)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise where.error(Code.BAD_ID, "id", f"is {kind_of(name)}", "write a string or an integer")
    if isinstance(name, str):
        check_characters(name, "id", where)
    return str(name)


def _names(value: Mapping[str, Any], kind: str, where: Where) -> list[Any]:
    """The values of `image(s)` or `video(s)`; null and NaN, which mark the empty cells of tables, count as absent."""
    names = [value[key] for key in (kind, f"{kind}s") if not is_nothing(value.get(key))]
    if len(names) > 1:
        raise where.error(Code.IMAGE_COUNT, kind, f"both `{kind}` and `{kind}s` are given", "keep one of them")
    return list(names[0]) if names and isinstance(names[0], list | tuple) else names


def _turns(value: Mapping[str, Any], where: Where, *, videos: str | None) -> tuple[list[Turn], list[Mark], bool]:
    """The turns, their images and videos, and whether the form marks where these belong."""
    turns: list[Turn] = []
    marks: list[Mark] = []
    if value.get("system") and not is_nothing(value["system"]):  # ShareGPT and Alpaca keep it beside the conversation
        turns.append(Turn(role="system", text=checked_text(value["system"], "system", where)))
    spoken = "conversations" in value or "messages" in value
    if not spoken and (texts := single_texts(value, where)) is not None:
        single = [
            Turn(role="assistant", text=text, weight=weight) if index % 2 else Turn.asking(text)
            for index, (text, weight) in enumerate(texts)
        ]
        return turns + single, [], False
    key = "messages" if "messages" in value and "conversations" not in value else "conversations"
    items = value.get(key)
    calls: OpenCalls | None = None
    if not isinstance(items, list) or not items:
        if key not in value:
            raise formless(value, key, where)
        what = f"is {kind_of(items)}" if items else "is empty"
        raise where.error(Code.NO_TURNS, key, what, "add at least a question and an answer")
    for index, item in enumerate(items):
        field = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise where.error(Code.BAD_TURN, field, f"is {kind_of(item)}", "write an object per turn")
        speaker, role = _speaker(item, field, where)
        check_turn(item, field, where)
        content = content_of(item)
        thinking = thinking_of(item, role, field, where, content=content)
        tools = ""
        if calls is None and (role == "tool" or speaker in CALLING or given(item, CALLS)[0]):
            from mm_moslora.data.chat.tool_records import OpenCalls

            calls = OpenCalls()
        if calls is not None:
            tools, content = calls.of_turn(item, role, content, field, where)
        if isinstance(content, list):
            text, offsets, own = text_of_parts(role, content, field, where)
            turn, marks = Turn(role=role, text=text, offsets=tuple(offsets)), marks + own
        else:
            turn = _of_text(role, checked_text(content, field, where), videos, marks)
        if role == "assistant":
            text = checked_text(thinking, field, where) + turn.text
            turn = replace(turn, text=text, weight=weight_of(item, field, where))
        turn = replace(turn, tools=tools)
        if calls is not None and speaker in CALLING and turns and turns[-1].role == "assistant":
            turn = calls.joined(turns.pop(), turn, field, where)  # ms-swift: a turn for each call
        turns.append(turn)
    return turns, marks, True


def _speaker(item: Mapping[str, Any], field: str, where: Where) -> tuple[str, Role]:
    """The name of a turn's speaker, and its role."""
    names = [item[key] for key in SPEAKER if not is_nothing(item.get(key))]
    roles = [_ROLES.get(name) if isinstance(name, str) else None for name in names] or [None]
    role = roles[0]
    if role is None or roles != [role] * len(roles):
        shown = " beside ".join(json.dumps(name, ensure_ascii=True, default=str)[:60] for name in names or [None])
        remedy = "use human and gpt, or user, assistant and tool, and system first"
        raise where.error(Code.BAD_ROLE, field, f"role is {shown}", remedy)
    return str(names[0]), role


def _of_text(role: Role, text: str, videos: str | None, marks: list[Mark]) -> Turn:
    """A turn with placeholders of images in its text; with `videos` also of videos, which are recorded."""
    if role != "user":
        return Turn(role=role, text=text)
    if videos is None:
        return Turn(role=role, text=_image_first(text))
    marks += [Mark("video" if mark == videos else "image") for mark in _ANY_MARK.findall(text)]
    return Turn(role=role, text=_image_first(text.replace(VIDEO, IMAGE)))


def _image_first(text: str) -> str:
    """LLaVA's rule: the only image of a question is moved before it, to a separate line; several images are not moved.

    Half of LLaVA's instruction data has the image at the end; chat and evaluation put it first.
    """
    if text.count(IMAGE) != 1:
        return text
    rest = text.replace(IMAGE, "").strip()
    return f"{IMAGE}\n{rest}" if rest else IMAGE


def _check_roles(turns: list[Turn], where: Where) -> None:
    lead = int(turns[0].role == "system")
    expected = "user"
    for index, turn in enumerate(turns[lead:], start=lead):
        field = f"conversations[{index}]"
        if turn.role not in (expected, "tool"):  # results of tools have their calls
            remedy = "questions and answers take turns, a question first"
            raise where.error(Code.ROLES_DO_NOT_ALTERNATE, field, f"is {turn.role}, expected {expected}", remedy)
        expected = "user" if turn.role == "assistant" else "assistant"
        if turn.role == "assistant":
            check_blocks(turn.text, field, where)
        if turn.role == "assistant" and not turn.text.strip() and not turn.tools:
            raise where.error(
                Code.EMPTY_ANSWER, field, "has no text to learn from", "write the answer or drop the turn"
            )
    if turns[-1].role != "assistant":
        raise where.error(
            Code.NO_ANSWER, f"conversations[{len(turns) - 1}]", "nothing is answered", "end with a gpt turn"
        )
    if not any(turn.weight for turn in turns if turn.role == "assistant"):
        raise where.error(Code.BAD_WEIGHT, "conversations", "all answers weigh 0", "drop the record")


def _check_image_count(turns: list[Turn], images: int, where: Where) -> None:
    marked = sum(turn.images for turn in turns)
    if marked == images:
        return
    with_images = [index for index, turn in enumerate(turns) if turn.images]
    place = f" (turns {with_images})" if with_images else ""
    what = f"{marked} {IMAGE} in the questions{place}, {images} images"
    ignored = [index for index, turn in enumerate(turns) if turn.role != "user" and IMAGE in turn.text]
    if ignored:
        what += f"; the ones in turns {ignored} do not count"
    raise where.error(Code.IMAGE_COUNT, "conversations", what, f"write one {IMAGE} per image, in human turns")


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
