"""A task is a protocol: the source of documents, the prompt, decoding, extraction, metric and aggregation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval import sources
from mm_moslora_eval.protocol.grading import BY_PROMPT, Grading
from mm_moslora_eval.protocol.task_prompt import FIELDS, WORDINGS, TaskPrompt
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS, is_judged
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES, check_ids, check_repeated
from mm_moslora_eval.scoring.scored_sample import THINK, Markers
from mm_moslora_eval.sources import Source
from mm_moslora_eval.sources.document import DataSet, Document, first_id
from mm_moslora_eval.sources.source_tables import from_cache

_NAME = re.compile(r"\w[\w.+-]*")
THINKING_TOKENS = 2048
"""New tokens for an answer that thinks, at least: the default of `data.max_length`, so longer ones are not learned."""
_LONGEST_ID = 200
"""Most bytes of `NAME@PROTOCOL`, which is the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding of answers: greedy, or by beam search."""

    kind: Literal["generate", "loglikelihood"] = "generate"
    """loglikelihood: the option with the most likely letter after the prompt."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    beams: int = 1
    """generate only: beams of transformers' beam search, of which the likeliest is the answer; 1: greedy."""
    temperature: float = 0.0
    """generate only: tokens are drawn by their probabilities at this temperature; 0: the likeliest."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Drawn from so many of the likeliest tokens; 0: from all."""
    seed: int = 0
    """Of the draws; local models give the same answers again."""
    samples: int = 1
    """Answers to each question, which `over_samples` of the task sums up."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            if getattr(self, name) < 1:
                raise EvalError(f"decoding.{name} is {getattr(self, name)}, expected 1 or more.")
        self._check_sampling()
        if self.beams > 1 and self.kind != "generate":
            raise EvalError(f"decoding.beams is {self.beams}, but decoding.kind {self.kind} generates nothing.")

    def _check_sampling(self) -> None:
        if not (0 <= self.temperature <= 10 and 0 < self.top_p <= 1 and self.top_k >= 0 and self.samples >= 1):
            raise EvalError(
                f"decoding has temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k} and samples "
                f"{self.samples}; expected 0 to 10, above 0 to 1, 0 or more, and 1 or more."
            )
        drawn = [name for name in ("top_p", "top_k", "seed", "samples") if getattr(self, name) != _GREEDY[name]]
        if drawn and not self.temperature:
            raise EvalError(
                f"decoding.{drawn[0]} is {getattr(self, drawn[0])}, but decoding.temperature is 0: the likeliest "
                "answer is always the same. Set a temperature."
            )
        if self.temperature and (self.beams > 1 or self.kind != "generate"):
            raise EvalError(
                f"decoding.temperature is {self.temperature}, which goes with kind generate and one beam, not with "
                f"kind {self.kind} and {self.beams} beams."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is as in greedy decoding."""
        return {name: value for name, value in asdict(self).items() if name not in _GREEDY or value != _GREEDY[name]}

    @property
    def decides(self) -> dict[str, Any]:
        """What decides an answer: all but the number of answers, so that more can be asked for later."""
        return {name: value for name, value in self.to_dict().items() if name != "samples"}


_GREEDY = {"beams": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "samples": 1}


@dataclass(frozen=True, kw_only=True)
class AnswerReasoning:
    """The reasoning in an answer, which is no part of what is extracted."""

    strip: bool = True
    """Remove it before the extraction."""
    markers: tuple[Markers, ...] = ()
    """Texts before and after reasoning, besides `<think>` and those of the model's chat template."""

    def __post_init__(self) -> None:
        if not all(text for pair in self.markers for text in pair):
            raise EvalError(f"thinking.markers is {self.markers!r}, expected pairs of texts that are not empty.")

    def all_markers(self, of_model: Sequence[Sequence[str]] = ()) -> tuple[Markers, ...]:
        """The markers whose blocks are removed."""
        own = [(start, end) for start, end in of_model]
        return tuple(dict.fromkeys((THINK, *self.markers, *own))) if self.strip else ()


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
    """A name in `answer_scoring.METRICS` or `JUDGED`."""
    grading: Grading | None = None
    """With `metric: judge`: how a judge grades the answers."""
    over_samples: str = "mean"
    """A name in `score_aggregation.OVER_SAMPLES`: what several answers to a question come to."""
    thinking: AnswerReasoning = field(default_factory=AnswerReasoning)
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
    changed: tuple[str, ...] = ()
    """Keys that the user has set for a run, as `key=value`."""
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
            OVER_SAMPLES.check(self.over_samples)
            check_repeated(self.over_samples, self.aggregation, samples=self.decoding.samples)
            if self.grading is not None and self.grading.rule:
                METRICS.check(self.grading.rule)
        except EvalError as error:
            raise EvalError(f"Task {self.name!r}: {error}") from error
        if odd:
            raise EvalError(f"Task {self.name!r}: the tag {odd[0]!r} is none; use letters, digits, `_`, `-` and `.`.")
        if (self.metric == BY_PROMPT) != (self.grading is not None):
            raise EvalError(
                f"Task {self.name!r}: metric is {self.metric!r} {'with' if self.grading else 'without'} a grading; "
                f"metric: {BY_PROMPT} and grading (the judge's prompt, and the replies that count) belong together."
            )

    @property
    def code(self) -> dict[str, dict[str, str]]:
        """File and hash of those of its rules that an imported file added, by the key of the task."""
        metrics: NamedParts[Any] = JUDGED if is_judged(self.metric) else METRICS
        tables: tuple[NamedParts[Any], ...] = (EXTRACTORS, metrics, AGGREGATIONS, OVER_SAMPLES, WORDINGS)
        parts = self.extraction, self.metric, self.aggregation, self.over_samples, self.prompt.function or ""
        return {table.kind: origin for table, part in zip(tables, parts, strict=True) if (origin := table.origin(part))}

    @property
    def id(self) -> str:
        """Name and protocol."""
        return f"{self.name}@{self.protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the folder of the file, and without what is as usual."""
        data = asdict(self)
        del data["folder"]
        usual = (("grading", None), ("over_samples", "mean"), ("thinking", asdict(AnswerReasoning())), ("changed", ()))
        for name, value in usual:
            if data[name] == value:
                del data[name]
        return data | {"decoding": self.decoding.to_dict()}

    def reference_of(self, document: Document) -> str:
        """The reference answer as the model would say it; empty without one, and where a judge scores the task."""
        answer = "" if is_judged(self.metric) else document.reference
        return self.reference.replace("{answer}", answer) if answer else ""

    @property
    def request_hash(self) -> str:
        """Hash of everything that determines the answers, so without extraction, metric and aggregation."""
        return sha256_of_values([self.name, self.protocol, self.version, self.prompt.decides(), self.decoding.decides])

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
                the aggregation; names the place.
        """
        beside = Path(self.folder) if self.folder else None
        data = sources.load(self.source, beside=beside)
        if "{options}" in self.prompt.template and not any(one.options or one.problem for one in data.documents):
            raise EvalError(
                f"Task {self.name!r}: prompt.template names {{options}}, but no document of {data.path} has any: the "
                "column has another name or another form (source.columns.options)."
            )
        columns = {name for document in data.documents for name in document.extra}
        if unknown := sorted(self.prompt.columns - columns):
            known = ", ".join(sorted({*FIELDS, *self.prompt.fragments, *columns}))
            raise EvalError(
                f"Task {self.name!r}: prompt.template names {{{unknown[0]}}}, which no document of {data.path} has. "
                f"Known: {known}.{suggestion(unknown[0], known.split(', '))}"
            )
        check_ids(self.aggregation, data.documents)
        if (least := first_id(document.id for document in data.documents)) is not None:
            data = replace(data, documents=tuple(replace(one, first_id=least) for one in data.documents))
        return data

    def load_cached(self) -> DataSet:
        """The documents, of data sets of the hub only those in its cache: the network is not touched.

        Raises:
            EvalError: see `load`; or the hub's data set is not in the cache.
        """
        if self.source.kind != "hf":
            return self.load()
        with from_cache():
            return self.load()
