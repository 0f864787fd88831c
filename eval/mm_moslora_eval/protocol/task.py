"""A task is a protocol: the source of documents, the prompt, decoding, extraction, metric and aggregation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval import sources
from mm_moslora_eval.metrics.question_groups import OptionMeasure
from mm_moslora_eval.protocol.task_prompt import TaskPrompt
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, check_ids
from mm_moslora_eval.sources import Source
from mm_moslora_eval.sources.document import DataSet, Document, digest

_NAME = re.compile(r"\w[\w.+-]*")
THINKING_TOKENS = 2048
"""New tokens for an answer that thinks, at least: the default of `data.max_length`, so longer ones are not learned."""
_LONGEST_ID = 200
"""Most bytes of `NAME@PROTOCOL`, which is the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding of answers: greedy, or by beam search."""

    kind: Literal["generate", "loglikelihood", "continuation"] = "generate"
    """loglikelihood: the option with the most likely letter after the prompt. continuation: the option with the most
    likely text after the bare text of the prompt, without a chat template (lm-evaluation-harness)."""
    choice: OptionMeasure = "sum"
    """Score of an option: its log-probability, or that divided by its length (`acc`, `acc_norm`, `acc_bytes`)."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    beams: int = 1
    """generate only: beams of transformers' beam search, of which the likeliest is the answer; 1: greedy."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise EvalError(f"decoding.{name} is {getattr(self, name)}, expected 1 or more.")
        if self.beams > 1 and self.kind != "generate":
            raise EvalError(f"decoding.beams is {self.beams}, but decoding.kind {self.kind} generates nothing.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without `beams` where decoding is greedy: answers stored by earlier versions stay valid."""
        data = asdict(self)
        if self.beams == 1:
            del data["beams"]
        return data


def shown_name(task: str, protocol: str) -> str:
    """`NAME@PROTOCOL`, and the name alone for a user's own task, since `own` is an image mode, too."""
    return task if protocol == "own" else f"{task}@{protocol}"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published score under this protocol."""

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
    """Incremented with every change that can change a score."""
    title: str = ""
    source: Source
    prompt: TaskPrompt = field(default_factory=TaskPrompt)
    decoding: Decoding = field(default_factory=Decoding)
    extraction: str = "text"
    """A name in `answer_scoring.EXTRACTORS`, with options as `named_parts` writes them; so for the next ones."""
    metric: str = "exact"
    """A name in `answer_scoring.METRICS`."""
    reference: str = "{answer}"
    """The text whose log-likelihood is reported; `{answer}` is the most frequent reference."""
    aggregation: str = "mean"
    """A name in `score_aggregation.AGGREGATIONS`."""
    expected_count: int | None = None
    """Documents in the full set; results note any other number."""
    licence: str = "unknown"
    """Licence of the data."""
    unverified: tuple[str, ...] = ()
    """Facts (expected_count, licence) that are not verified against the data or its card."""
    published: tuple[Published, ...] = ()
    notes: str = ""
    """Notes for readers of the score."""
    differences: tuple[str, ...] = ()
    """Differences from the harness after which the protocol is named, one sentence each."""
    tags: tuple[str, ...] = ()
    """Words by which `eval list` finds the task and `@TAG` chooses it, such as `tier_a` and `charts`."""
    folder: str | None = None
    """Folder of the task file; relative paths of its source start there. None: the working directory."""

    def __post_init__(self) -> None:
        for kind, name in (("name", self.name), ("protocol", self.protocol)):
            if not _NAME.fullmatch(name):  # both become part of a folder's name
                raise EvalError(
                    f"Task {kind} {ascii(name)[:100]} is not acceptable: use letters, digits, `_`, `-` and `.`, not "
                    "`-` or `.` first."
                )
        if len(self.id.encode()) > _LONGEST_ID:
            raise EvalError(f"Task {self.id[:40]}... has a name of more than {_LONGEST_ID} bytes; shorten it.")
        if "{answer}" not in self.reference:
            raise EvalError(f"Task {self.name!r}: reference is {self.reference!r}, expected a text with {{answer}}.")
        self._check_names()

    def _check_names(self) -> None:
        odd = [tag for tag in self.tags if not _NAME.fullmatch(tag)]
        try:
            EXTRACTORS.check(self.extraction)
            METRICS.check(self.metric, also=JUDGED)
            AGGREGATIONS.check(self.aggregation)
        except EvalError as error:
            raise EvalError(f"Task {self.name!r}: {error}") from error
        if odd:
            raise EvalError(f"Task {self.name!r}: the tag {odd[0]!r} is none; use letters, digits, `_`, `-` and `.`.")

    @property
    def code(self) -> dict[str, dict[str, str]]:
        """Where those of its rules come from that are not of this package, by `extraction`, `metric`, `aggregation`."""
        tables = (EXTRACTORS, self.extraction), (METRICS, self.metric), (AGGREGATIONS, self.aggregation)
        return {table.kind: origin for table, part in tables if (origin := table.origin(part))}

    def load_code(self) -> None:
        """Load the functions of its rules, so that none is missing when the answers are there.

        Raises:
            EvalError: code of another package that does not load, or of a file that is not trusted.
        """
        EXTRACTORS[self.extraction], AGGREGATIONS[self.aggregation]
        if self.metric not in JUDGED:
            METRICS[self.metric]

    @property
    def id(self) -> str:
        """Name and protocol."""
        return f"{self.name}@{self.protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the folder of the file."""
        data = asdict(self)
        del data["folder"]
        return data

    def reference_of(self, document: Document) -> str:
        """The reference answer as the model would say it; empty without one, and where a judge scores the task."""
        answer = "" if self.metric in JUDGED else document.reference
        return self.reference.replace("{answer}", answer) if answer else ""

    @property
    def request_hash(self) -> str:
        """Hash of everything that determines the answers, so without extraction, metric and aggregation.

        The places of images are left out, since the key of every answer covers them.
        """
        prompt = {key: value for key, value in asdict(self.prompt).items() if key not in ("image_tags", "strip_parts")}
        return digest([self.name, self.protocol, self.version, prompt, self.decoding.to_dict()])

    def within(self, limit: int | None, *, thinking_tokens: int = 0) -> Task:
        """The task with the length of answers that a run asks for; it decides their identity, as the task's own does.

        Args:
            limit: new tokens; None: the task's own, and at least `thinking_tokens`.
            thinking_tokens: what a model needs that is asked to think before it answers; 0: it is not.
        """
        if self.decoding.kind != "generate":
            return self
        most = limit or max(self.decoding.max_new_tokens, thinking_tokens)
        return replace(self, decoding=replace(self.decoding, max_new_tokens=most))

    def load(self) -> DataSet:
        """Read the documents.

        Raises:
            EvalError: the file is missing, has another checksum, or cannot be read, or its ids or columns do not suit
                the aggregation; names the place. See `load_code`, too.
        """
        self.load_code()
        data = sources.load(self.source, beside=Path(self.folder) if self.folder else None)
        check_ids(self.aggregation, data.documents)
        return data
