"""A task is a protocol: where documents come from, how they are put, decoded, read, scored and added up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mm_moslora.errors import EvalError

from .documents import DataSet, Document, checked, digest
from .prompt import Prompt
from .sources import find_file


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the documents of a task come from."""

    kind: Literal["llava", "tsv", "hf"]
    path: str
    """A file (see `sources.find_file`), or for `hf` a folder, a file or a hub id."""
    image_folder: str | None = None
    """llava: images lie below it; None: the file's folder."""
    drop_without_image: bool = False
    """tsv: leave out rows without a picture (counted)."""
    answer_lists: bool = True
    """tsv: an answer written as a list holds several references."""
    md5: str | None = None
    """Expected checksum of the file."""
    split: str = "test"
    """hf: split."""
    config: str | None = None
    """hf: configuration name."""
    lm_eval_task: str | None = None
    """hf: records of this lm-evaluation-harness task (`metrics.commonsense.LM_EVAL_TASKS`) in the original columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """hf: our name (id, image, question, options, answer, category, hint) -> the data set's column."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are produced; always greedy."""

    kind: Literal["generate", "loglikelihood", "continuation"] = "generate"
    """loglikelihood: the option whose letter is most likely after the prompt; continuation: the option whose whole text
    is most likely after the bare text of the prompt, without a chat template (lm-evaluation-harness)."""
    choice: Literal["sum", "per_character", "per_byte"] = "sum"
    """What is most likely: by log-probability, or by that over the option's length (`acc`, `acc_norm`, `acc_bytes`)."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EvalError(f"decoding.max_new_tokens is {self.max_new_tokens}, expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A score somebody reported under this protocol."""

    model: str
    score: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark under one protocol."""

    name: str
    protocol: str = "own"
    """llava, vlmevalkit, lmms_eval, official, or own."""
    version: int = 1
    """Raised whenever a score could change."""
    title: str = ""
    source: Source
    prompt: Prompt = field(default_factory=Prompt)
    decoding: Decoding = field(default_factory=Decoding)
    extraction: str = "text"
    """A name in `scoring.EXTRACTORS`."""
    metric: str = "exact"
    """A name in `scoring.METRICS`."""
    aggregation: str = "mean"
    """A name in `scoring.AGGREGATIONS`."""
    expected_count: int | None = None
    """Documents in the full set; another number is reported."""
    licence: str = "unknown"
    """Of the data."""
    published: tuple[Published, ...] = ()
    notes: str = ""
    """What a reader of the score must know."""
    folder: str | None = None
    """Where the task file lies; data files are looked for there too."""

    def __post_init__(self) -> None:
        from .scoring import check_names

        if not self.name or any(character in self.name for character in "/\\@ \t\n"):
            raise EvalError(f"Task name {self.name!r} is not acceptable: use letters, digits, `-`, `_` and `.`.")
        check_names(self)

    @property
    def id(self) -> str:
        """Name and protocol."""
        return f"{self.name}@{self.protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the place of the file."""
        data = asdict(self)
        del data["folder"]
        return data

    @property
    def asked(self) -> str:
        """Hash of everything that decides the answers; extraction, metric and aggregation do not."""
        return digest([self.name, self.protocol, self.version, asdict(self.prompt), asdict(self.decoding)])

    def load(self) -> DataSet:
        """Read the documents.

        Raises:
            EvalError: the file is missing, has another checksum, or cannot be read; the message says where.
        """
        if self.source.kind == "hf":
            from .sources import hf

            return hf.load(self.source)
        path = find_file(self.source.path, beside=Path(self.folder) if self.folder else None)
        sha256 = _checksum(path, self.source.md5)
        read = list(self._read(path))
        documents = checked((document for document in read if document is not None), source=str(path))
        return DataSet(documents=documents, path=str(path), sha256=sha256, dropped=read.count(None))

    def _read(self, path: Path) -> Iterator[Document | None]:
        from .sources import llava, tsv

        if self.source.kind == "llava":
            return llava.read(path, image_folder=self.source.image_folder)
        return tsv.read(path, drop_without_image=self.source.drop_without_image, answer_lists=self.source.answer_lists)


def _checksum(path: Path, expected_md5: str | None) -> str:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            md5.update(chunk)
    if expected_md5 is not None and md5.hexdigest() != expected_md5:
        raise EvalError(
            f"{path} has MD5 {md5.hexdigest()}, the protocol expects {expected_md5}: it is another version or damaged. "
            "Fetch it again, or copy the task file and change `source.md5`."
        )
    return sha256.hexdigest()
