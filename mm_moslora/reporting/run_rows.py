"""Rows of the files of a run folder: systems on tasks, answers, adapted modules; see `run_data` for the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.reporting.lens_maps import MEASURES
from mm_moslora.reporting.verdicts import Difference, difference_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import LARGEST, build_known


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of right answers, or another named score, with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One system on one task."""

    name: str
    label: str
    task: str
    score: Score
    categories: dict[str, Score]
    protocol: str = ""
    subject: str = ""
    """Identifies task, protocol and documents; empty where it is unknown."""
    selection: str = "all"
    """Selected documents of the data: all, `first 5`, `3 chosen`."""
    remarks: tuple[str, ...] = ()
    """Caveats of the score."""
    not_inferable: int = 0
    """Answers that could not be read."""
    failed: int = 0
    """Questions without an answer."""
    learned_from: str = ""
    """For answers without a model: the data that they were learned from."""
    less: Difference | None = None
    """The tuned model minus this row, question by question; None where it is unknown."""
    pictures: bool = True
    """For the tuned model: whether its questions show pictures."""
    unit: str = ""
    """Name of the score; empty for a share of right answers."""

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """Rows with different values are never compared."""
        return (self.task, self.protocol, self.subject or self.score.n, self.unit)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One held-out question with the answers before and after tuning."""

    image: str | None = None
    question: str = ""
    answer: str = ""
    before: str | None = None
    after: str | None = None
    before_correct: bool | None = None
    after_correct: bool | None = None
    options: dict[str, str] = field(default_factory=dict)
    """Options of a multiple-choice question by letter."""


@dataclass(frozen=True, kw_only=True)
class MixerRecord:
    """Measures of one adapted module, and its matrices where they were stored."""

    path: str
    rank: int | None
    before: list[list[float]] | None
    after: list[list[float]] | None
    pairs: list[list[float]] | None
    """Energies by pairs of directions of B and A."""
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ForgettingRow:
    """A text or a task before the first step and at the end."""

    what: str
    before: float
    after: float
    difference: Difference
    """After minus before, document by document."""


def _score(item: Mapping[str, Any], source: str) -> Score:
    values = {"n": 0, "low": item.get("mean"), "high": item.get("mean"), **item}
    return build_known(Score, values, source=source)


def read_evaluation_row(item: dict[str, Any], notes: list[str]) -> EvaluationRow | None:
    """A row of `evaluation.json`; None, with a note, where it is damaged."""
    name = str(item.get("name", "?"))
    source = f"evaluation.json: row {name!r}"
    try:
        score = _score(item, source)
        categories = {key: _score(value, f"{source}, {key}") for key, value in (item.get("categories") or {}).items()}
        values = {"name": name, "label": name.replace("_", " "), "task": ""} | {k: v for k, v in item.items() if v}
        values |= {"score": score, "categories": categories, "less": difference_of(item.get("less"))}
        return build_known(EvaluationRow, values | {"pictures": item.get("pictures") is not False}, source=source)
    except (ConfigError, AttributeError) as error:
        notes.append(f"{source} was left out ({error}).")
        return None


def read_sample_row(item: dict[str, Any], notes: list[str]) -> SampleRow | None:
    """A row of `samples.json`; None, with a note, where it is damaged."""
    try:
        return build_known(SampleRow, item, source="samples.json")
    except ConfigError as error:
        notes.append(f"A sample was left out ({error}).")
        return None


def read_mixer(item: dict[str, Any], notes: list[str]) -> MixerRecord | None:
    """A row of `mixers.json`; None, with a note, where it is damaged."""
    path = str(item.get("path", "?"))
    try:
        before, after, pairs = (_matrix(item.get(name)) for name in ("before", "after", "pairs"))
    except (TypeError, ValueError) as error:
        notes.append(f"mixers.json: {path!r} was left out ({error}).")
        return None
    figures = {name: float(item[name]) for name in MEASURES if _is_finite(item.get(name))}
    rank = item.get("rank")
    if not isinstance(rank, int):
        rank = len(after) if after else None
    return MixerRecord(path=path, rank=rank, before=before, after=after, pairs=pairs, figures=figures)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _matrix(value: Any) -> list[list[float]] | None:
    if value is None:
        return None
    rows = [[float(cell) for cell in row] for row in value]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("rows of different length, expected a matrix")
    if not all(_is_finite(cell) for row in rows for cell in row):
        raise ValueError("holds values that are not finite")
    return rows
