"""A record: turns of a conversation, or a plain text, with pictures in places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mm_moslora.data.images.record_picture import Picture
from mm_moslora.data.record_faults import Code, Where

if TYPE_CHECKING:
    from mm_moslora.data.boxes.record_objects import Objects

IMAGE = "<image>"
"""Marks where an image belongs in a question."""
VIDEO = "<video>"
"""Marks where a video belongs in a question of a record that names videos."""
Role = Literal["system", "user", "assistant", "tool", "document"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    """The speaker."""
    text: str
    """The content; `<image>` in a user's text is replaced by the next image."""
    offsets: tuple[int, ...] | None = None
    """Offsets of the `<image>` that are images, and of the `<video>` that are videos, for a source that distinguishes
    them from typed text; None: every `<image>` is an image."""
    weight: float = 1.0
    """Of the tokens of an answer in the loss; 0: it is context."""
    tools: str = ""
    """JSON text (`tool_records`): the tools that are offered, at the first turn; the calls of an answer; the id and the
    name of the call that a result answers."""
    marked: bool = False
    """Whether the characters `box_forms.SPECIAL` in the text enclose special tokens, which boxes have in some forms."""

    def parts(self) -> list[str]:
        """The texts before, between and after the images: one more than the number of images."""
        if self.role != "user":
            return [self.text]
        if self.offsets is None:
            return self.text.split(IMAGE)
        starts = [0, *(offset + len(IMAGE) for offset in self.offsets)]
        ends = [*self.offsets, len(self.text)]
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]

    @property
    def said(self) -> str:
        """The text, and the JSON text of tools."""
        return self.text + self.tools

    @property
    def images(self) -> int:
        """Images and videos in this turn."""
        return len(self.parts()) - 1

    def filled(self, fill: Callable[[str], str]) -> Turn:
        """The same turn with its texts changed, which hold special tokens afterwards; its images stay."""
        first, *rest = map(fill, self.parts())
        result, offsets = first, []
        for mark, part in zip(self.marks, rest, strict=True):
            offsets.append(len(result))
            result += mark + part
        return replace(self, text=result, offsets=tuple(offsets) if self.role == "user" else None, marked=True)

    @property
    def marks(self) -> list[str]:
        """`<image>` or `<video>` for each of them; the two are of one length."""
        if self.offsets is None:
            return [IMAGE] * self.images
        return [self.text[offset : offset + len(IMAGE)] for offset in self.offsets]

    @classmethod
    def asking(cls, text: str, *, images: int = 0) -> Turn:
        """A question in which `<image>` is text, with images before it, each on a separate line."""
        mark = f"{IMAGE}\n"
        return cls(role="user", text=mark * images + text, offsets=tuple(len(mark) * i for i in range(images)))

    def showing(self, shown: Sequence[int | None]) -> Turn:
        """The same turn with each of its images replaced by this many consecutive images, or by one video (None)."""
        first, *rest = self.parts()
        result, offsets = first, []
        for count, part in zip(shown, rest, strict=True):
            offsets += [len(result) + len(IMAGE) * index for index in range(1 if count is None else count)]
            result += (VIDEO if count is None else IMAGE * count) + part
        return replace(self, text=result, offsets=tuple(offsets))

    def preceded_by(self, text: str) -> Turn:
        """The same turn with literal text before it."""
        first, *rest = self.parts()
        result, offsets = text + first, []
        for mark, part in zip(self.marks, rest, strict=True):
            offsets.append(len(result))
            result += mark + part
        return replace(self, text=result, offsets=tuple(offsets))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation with the paths of its images."""

    id: str
    """The record's id, or its number."""
    turns: tuple[Turn, ...]
    """An optional system turn, then questions and answers in turn; or one plain text."""
    images: tuple[Picture, ...] = ()
    """In order of their placeholders."""
    objects: Objects | None = None
    """Boxes and points for the placeholders in the turns, which depend on the model; `record_examples` fills them."""
    where: Where
    """Source and number, for messages."""
    ignored: tuple[str, ...] = ()
    """Its keys, and those of its turns, that are not read."""

    def learned(self, supervise: Literal["all", "last"]) -> tuple[Turn, ...]:
        """The turns with their weights under `DataConfig.supervise`.

        Raises:
            RecordError: no answer is learned.
        """
        if supervise == "all":
            return self.turns
        *earlier, last = self.turns
        if not last.weight:
            what, remedy = "the last answer weighs 0, and data.supervise is last", "drop the record"
            raise self.where.error(Code.BAD_WEIGHT, "conversations", what, remedy)
        return *(replace(turn, weight=0.0) for turn in earlier), last

    @property
    def is_document(self) -> bool:
        """Whether it is a text, all of which is learned, and no conversation."""
        return self.turns[0].role == "document"

    @property
    def image_names(self) -> list[str]:
        """Paths, members or URLs of the images."""
        return [picture.name for picture in self.images]
