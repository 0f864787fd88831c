"""A benchmark's question with everything needed to ask and to score it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval.sources.source import Source

if TYPE_CHECKING:
    from PIL.Image import Image


_STORED = ("id", "question", "options", "answers", "category", "hint", "extra", "problem")
"""Fields of a document that are stored: all but its images."""
_WORDS = {"image": "a picture", "video": "a video", "options": "options", "image_folder": "a picture or video"}


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A reference to a picture in a table, which is read when needed."""

    reader: Callable[[int, str, int], bytes]
    row: int
    column: str
    number: int = 0
    """Its number in a list of pictures."""
    identity: str = ""
    """What identifies it without its bytes, of a frame of a video; empty: its bytes."""

    def read(self) -> bytes:
        """The bytes of the file."""
        return self.reader(self.row, self.column, self.number)


ImageLike: TypeAlias = "Path | Image | bytes | StoredImage"
"""A file, an opened picture, the bytes of an image file, or a reference to them."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One question of a data set."""

    id: str
    images: tuple[ImageLike, ...] = ()
    question: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text; empty for open questions."""
    answers: tuple[str, ...] = ()
    """References; a letter when there are options."""
    category: str | None = None
    hint: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further columns that a prompt or an aggregation names."""
    problem: str | None = None
    """The reason why the document cannot be asked; it is then counted as failed, never dropped."""
    first_id: int | None = field(default=None, compare=False)
    """The least id of its data set, from which ids count; None where they are no numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as plain data."""
        plain = {name: getattr(self, name) for name in _STORED}
        return plain | {"options": dict(self.options), "answers": list(self.answers), "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Document:
        """The inverse of `to_dict`; the document has no images."""
        own = {name: data[name] for name in _STORED} | {"answers": tuple(data["answers"])}
        return cls(**own, first_id=data.get("first_id"))

    @property
    def reference(self) -> str:
        """The most frequent reference, of equally frequent ones the first; empty without any."""
        return Counter(self.answers).most_common(1)[0][0] if self.answers else ""

    @property
    def hash(self) -> str:
        """Hash of everything except the images."""
        return sha256_of_values(self.to_dict())

    def column(self, name: str) -> str:
        """The value in a column: the category, the id, or a further column; empty without one."""
        own = {"id": self.id, "category": self.category, "hint": self.hint}
        return str(self.extra.get(name) or own.get(name) or "")

    def with_problem(self, problem: str | None) -> Document:
        """The document marked with a problem; an earlier problem is kept."""
        return self if problem is None or self.problem is not None else replace(self, problem=problem)


def first_id(ids: Iterable[str]) -> int | None:
    """The least of the ids of a data set; None where one is no number."""
    numbers = [int(name) if name.isdecimal() else None for name in ids]
    return None if None in numbers else min((number for number in numbers if number is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The documents of a task and their origin."""

    documents: tuple[Document, ...]
    path: str
    sha256: str
    dropped: int = 0
    """Rows left out on purpose (the protocol skips rows without an image)."""
    revision: str | None = None
    """Commit of a data set from the hub."""

    @property
    def holds_pictures(self) -> bool:
        """Whether its pictures are in memory, as those of a TSV: it is not kept beside another data set."""
        return any(isinstance(image, bytes) for document in self.documents for image in document.images)

    @property
    def shows_videos(self) -> bool:
        """Whether some of its images are frames of videos."""
        return any(getattr(image, "video", None) is not None for one in self.documents for image in one.images)

    def to_dict(self) -> dict[str, Any]:
        """The description of the data for result files."""
        about = {"path": self.path, "sha256": self.sha256, "rows": len(self.documents), "dropped": self.dropped}
        about |= {"revision": self.revision} if self.revision else {}
        return about | ({} if any(document.images for document in self.documents) else {"pictures": 0})


def checked(documents: Iterable[Document], stated: Source, *, path: str, dropped: int = 0) -> tuple[Document, ...]:
    """Check the whole set and mark documents with an answer that cannot be right, or without what they must have."""
    read = tuple(documents)
    if dropped and not read:
        raise EvalError(
            f"{path}: all {dropped} rows are left out: none suits source.where, none has a picture "
            "(drop_without_image), whose column is `image` or `image_path`, or all lists of documents are empty."
        )
    some = any(any(document.answers) for document in read)  # a set without any reference is exported, not scored
    for name in sorted(stated.named):
        if read and all(document.problem is None and not _has(document, name) for document in read):
            columns = ", ".join(read[0].extra) or "none"
            raise EvalError(
                f"{path}: no document has {_WORDS[name]} (`{name}`). Its column has another name or another form; "
                f"further columns: {columns}."
            )
    result = tuple(
        document.with_problem(
            None if document.id in stated.unanswerable else _answer_problem(document, needed=some)
        ).with_problem(_lack(document, stated))
        for document in read
    )
    if not result:
        raise EvalError(f"{path} holds no documents; expected at least one row.")
    seen: set[str] = set()
    repeated = [document.id for document in result if document.id in seen or seen.add(document.id)]  # type: ignore[func-returns-value]
    if repeated:
        shown = ", ".join(repr(name) for name in list(dict.fromkeys(repeated))[:5])
        raise EvalError(f"{path}: {len(repeated)} repeated ids ({shown}); give every row an id of its own.")
    return result


def _has(document: Document, name: str) -> bool:
    of_video = [getattr(image, "video", None) is not None for image in document.images]
    if name == "image_folder":
        return bool(of_video)
    return bool(document.options) if name == "options" else any(of_video) if name == "video" else not all(of_video)


def _lack(document: Document, stated: Source) -> str | None:
    count = sum(getattr(image, "video", None) is None for image in document.images)
    if stated.pictures not in (None, count):
        return f"has {count} pictures, expected {stated.pictures}"
    return next((f"has no {_WORDS[name].split()[-1]}" for name in stated.has if not _has(document, name)), None)


def _answer_problem(document: Document, *, needed: bool) -> str | None:
    if needed and not any(document.answers):
        return "no reference answer, though other documents have one"
    if document.options and document.answers and not set(document.answers) <= document.options.keys():
        return f"answer {document.answers[0]!r} is not one of the options {', '.join(document.options)}"
    return None
