"""LLaVA files as documents.

Question files: an object per line, `{"question_id", "image", "text", "category", "answer" | "answers", "options"}`.
With `video` instead of `image` the frames of a video are shown, at `<video>` or before the text, of a clip with
`video_start` and `video_end`.
Conversation files (the training format): each human/gpt pair is a separate document.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import DataError, EvalError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json
from mm_moslora.utils.untrusted_files import MOST_BYTES, read_text
from mm_moslora_eval.sources.answer_options import options_of
from mm_moslora_eval.sources.document import Document, ImageLike
from mm_moslora_eval.sources.source import matches
from mm_moslora_eval.sources.source_images import image_size, shown_of_record
from mm_moslora_eval.sources.source_videos import END, START

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

_THINKING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
IMAGE, VIDEO = "<image>", "<video>"
Record = Mapping[str, Any]
RecordPictures = tuple[tuple[ImageLike, ...], str | None]
"""The pictures of a record, and the problem with them if there is one."""


def read(path: Path, *, rules: PictureRules, where: Mapping[str, str] | None = None) -> Iterator[Document | None]:
    """Read a question or conversation file, JSON list or JSONL."""
    for row, record in records(path):
        if not matches(record, where):
            yield None
            continue
        position = f"{path}, record {row}"
        pictures = shown_of_record(record, file=path, row=row, rules=rules)
        if "conversations" in record:
            documents = [*_conversation(record, pictures, position, row)]
        else:
            documents = [_question(record, pictures, position)]
        yield from map(_with_frames, documents) if record.get("video") and not record.get("image") else documents


def _with_frames(document: Document) -> Document:
    """The document with its frames in the place of `<video>`, where one stands in the question."""
    if document.question.count(VIDEO) != 1:
        return document
    return replace(document, question=document.question.replace(VIDEO, IMAGE * len(document.images)))


def reference_of(answer: str) -> str:
    """A reference answer without the thinking before it, which is removed from the model's answer, too."""
    return _THINKING.sub("", answer)


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """The objects of a JSON list or of JSON lines, with their numbers."""
    try:
        text = read_text(path, most=MOST_BYTES, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text ({error}); convert it.") from error
    rows: Iterable[tuple[int, Any]]
    if text.lstrip().startswith("["):
        rows = enumerate(_parse(text, str(path)), start=1)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((number, _parse(line, f"{path}, line {number}")) for number, line in lines if line.strip())
    for number, record in rows:
        if not isinstance(record, dict):
            raise EvalError(f"{path}, record {number} is a {type(record).__name__}, expected a JSON object.")
        yield number, record


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, constants=True)
    except StrictJsonError as error:
        raise EvalError(f"{where} {error}; repair or remove it.") from error


def _answers(value: Any) -> tuple[tuple[str, ...], str | None]:
    """The reference answers, and the problem with one if there is one."""
    if value is None:
        return (), None
    listed = value if isinstance(value, list) else [value]
    values = [item.get("answer") if isinstance(item, dict) else item for item in listed]  # VQA: an object per person
    odd = [item for item in values if not _is_plain(item)]
    return tuple(map(str, values)), f"an answer is {odd[0]!r}, expected text" if odd else None


def _is_plain(value: Any) -> bool:
    """Whether a value is text, or a number or a boolean that stands for text."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "", "nan") else None


_KNOWN = {
    "question_id", "id", "image", "video", START, END, "text", "question", "category", "answer", "answers", "options",
    "hint",
}  # fmt: skip


def _question(record: Record, shown: RecordPictures, where: str) -> Document:
    question = record.get("text", record.get("question"))
    name = record.get("question_id", record.get("id"))
    if not isinstance(question, str) or not _is_plain(name):
        raise EvalError(f"{where} needs `question_id` and `text`; found {', '.join(record) or 'nothing'}.")
    answers, odd = _answers(record["answers"] if record.get("answers") is not None else record.get("answer"))
    options, unread = ({}, None) if record.get("options") is None else options_of(record["options"])
    images, problem = shown
    return Document(
        id=str(name),
        images=images,
        question=question,
        options=options,
        answers=tuple(map(reference_of, answers)),
        category=_text(record.get("category")),
        hint=_text(record.get("hint")),
        extra={key: str(value) for key, value in record.items() if key not in _KNOWN},
        problem=problem or odd or unread,
    )


def _conversation(record: Record, shown: RecordPictures, where: str, row: int) -> Iterator[Document]:
    turns = record["conversations"]
    name = str(record.get("id", row))
    images, problem = shown
    fill, odd = _filler(record.get("objects"), turns, where, pictures=images)
    problem = problem or odd
    if not isinstance(turns, list) or len(turns) % 2 or not all(isinstance(turn, dict) for turn in turns):
        raise EvalError(f"{where} (id {name!r}): conversations must be a list of human/gpt pairs.")
    for number, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        roles = (human.get("from"), gpt.get("from"))
        if roles not in (("human", "gpt"), ("user", "assistant")):
            raise EvalError(
                f"{where} (id {name!r}): turns {2 * number} and {2 * number + 1} are from {roles}, not human and gpt."
            )
        yield Document(
            id=f"{name}:{number}" if len(turns) > 2 else name,
            images=images,
            question=fill(str(human.get("value", ""))).strip(),
            answers=(reference_of(fill(str(gpt.get("value", "")))).strip(),),
            category=_text(record.get("category")),
            problem=problem,
        )


def _filler(
    value: Any, turns: Any, where: str, *, pictures: Sequence[ImageLike]
) -> tuple[Callable[[str], str], str | None]:
    """A function that fills the placeholders of boxes in the texts of a conversation, and the problem with them."""
    from mm_moslora.data.boxes.record_objects import ALL, BOX, objects_of, pixel_filler
    from mm_moslora.data.record_faults import RecordError, Where

    whole = turns if isinstance(turns, list) else []
    texts = [str(turn.get("value", "")) if isinstance(turn, dict) else "" for turn in whole]
    at = Where(file=Path(where), line=None, row=0)
    try:
        objects = objects_of(value, texts, images=len(pictures), where=at)
        if objects is None:
            return str, None
        if any(mark in text for text in texts[::2] for mark in (BOX, ALL)):
            return str, f"a question has {BOX} or {ALL}, which depend on the model; ask without"
        if any(ALL in text for text in texts):
            return str, f"an answer has {ALL}, and scores compare one box; write {BOX}"
        if len(pictures) > 1:
            return str, "boxes in records of several pictures are not scored: an answer does not say which one it means"
        return pixel_filler(objects, [image_size(picture) for picture in pictures], at), None
    except RecordError as error:
        return str, f"{error.field} {error.what}"
    except DataError as error:
        return str, f"image cannot be read: {error}"
