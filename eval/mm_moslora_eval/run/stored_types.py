"""Types of the stored files that scores and reports are made of. A folder of results may come from a stranger.

Keys without a type here are only printed. `check_row` and `build_known` refuse a value of another type with its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from mm_moslora.utils.errors import ConfigError, EvalError
from mm_moslora.utils.untrusted_data import build_known, build_strictly, read_value
from mm_moslora_eval.scoring.measured_scores import LARGEST

MAY_BE_NULL = ("expected_count", "date")
"""Keys of `TaskResult.about` that are written without a value."""
Number = float | None
"""A stored number; None for nan."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _Documents:
    """A data set or a selection of it."""

    name: str = "all"
    of: int | None = None
    path: str = ""
    sha256: str = ""
    rows: int | None = None
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class _Code:
    commit: str
    dirty: bool = False


@dataclass(frozen=True, kw_only=True)
class _Circumstances:
    model: dict[str, Any]
    environment: dict[str, Any]
    code: _Code | None = None


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    kind: str
    max_new_tokens: int
    beams: int = 1
    temperature: float = 0.0
    samples: int = 1


@dataclass(frozen=True, kw_only=True)
class _Agreement:
    file: str
    n: int
    agreed: int
    share: float
    low: float
    high: float
    least: float


@dataclass(frozen=True, kw_only=True)
class _Judge:
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cached: int
    agreement: _Agreement | None = None
    shortened: int = 0


@dataclass(frozen=True, kw_only=True)
class _ByRules:
    """The score of a judged task without a judge."""

    extraction: str
    metric: str
    score: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Tokens of the answers, and their cost where prices were given."""

    prompt: int
    completion: int
    cost: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Message:
    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _About:
    """See `TaskResult.about`."""

    title: str = ""
    notes: str = ""
    extraction: str = ""
    metric: str = ""
    aggregation: str = ""
    unit: str = ""
    asked_as: str = ""
    learned_from: str = ""
    over_samples: str = ""
    changed: tuple[str, ...] = ()
    thinking_markers: tuple[tuple[str, ...], ...] = ()
    unscored: str = ""
    date: str = ""
    expected_count: int | None = None
    model: _Model | None = None
    selection: _Documents | None = None
    data: _Documents | None = None
    decoding: _Decoding | None = None
    judge: _Judge | None = None
    by_rules: _ByRules | None = None
    tokens: _Tokens | None = None
    differences: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    published: tuple[dict[str, Any], ...] = ()
    first_prompt: tuple[_Message, ...] = ()
    computed_by: tuple[_Circumstances, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Likelihood:
    none: str = ""
    n: int = 0
    missing: int = 0
    nats: float = 0.0
    stderr: Number = None
    low: Number = None
    high: Number = None


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """A row of `samples.jsonl`."""

    id: str
    cluster: str
    score: Number
    index: int = 0
    category: str | None = None
    question: str = ""
    options: dict[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    prompt: str = ""
    images: tuple[Any, ...] = ()
    text: str | None = None
    parsed: str = ""
    failed: bool = False
    numbers: tuple[float, ...] = ()
    inferable: bool = True
    judged: bool = False
    error: str | None = None
    reference: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if any(abs(number) > LARGEST for number in (self.score or 0.0, *self.numbers)):
            raise ConfigError(f"a score of {self.id!r} is {self.score} {self.numbers}, expected at most {LARGEST:g}.")


@dataclass(frozen=True, kw_only=True)
class TaskSample(StoredSample):
    """A sample that answers a task."""

    text: str | None = field()
    parsed: str = field()
    failed: bool = field()


@dataclass(frozen=True, kw_only=True)
class StoredAnswer:
    """A line of `answers.jsonl`."""

    key: str
    text: str | None
    tokens: int | None
    finish_reason: str | None
    options: dict[str, Any] | None
    error: str | None
    reference: dict[str, Any] | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """A line of `documents.jsonl`."""

    id: str
    question: str
    options: dict[str, str]
    answers: tuple[str, ...]
    category: str | None
    hint: str | None
    extra: dict[str, Any]
    problem: str | None
    key: str
    prompt: str
    images: tuple[Any, ...]
    paths: tuple[str | None, ...]
    cluster: str
    more_keys: tuple[str, ...] = ()
    first_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Rules:
    name: str
    protocol: str
    aggregation: str = "mean"


@dataclass(frozen=True, kw_only=True)
class View(_About):
    """A `task.json`."""

    task: _Rules
    mode: str


SHOWN = frozenset(
    {"index", "id", "category", "question", "options", "answers", "prompt", "text", "parsed", "inferable", "score",
     "failed", "error"}
)  # fmt: skip
"""Keys of a sample that a page shows."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """When and with what a run was last scored."""

    date: str = ""
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    batch_size: int
    seed: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """A line of `invocations.jsonl`."""

    date: str
    command: str
    settings: _Settings
    model: dict[str, Any]
    code: _Code | None = None


def check_row(kind: type[T], row: Mapping[str, Any], *, source: str) -> T:
    """A stored row in its type; other keys are passed over, and null is a value."""
    names = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    try:
        return build_strictly(kind, {name: row[name] for name in names if name in row}, source=source)
    except ConfigError as error:
        raise EvalError(f"{error} The file is damaged.") from error


def check_view(described: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The content of a `task.json` without nulls."""
    try:
        build_known(View, described, source=source)
    except ConfigError as error:
        raise EvalError(f"{error} The file is damaged.") from error
    return {key: item for key, item in described.items() if item is not None}


def check_result(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Check an entry of `results.json`."""
    read_value(dict[str, Any], data, source="it", where="the entry")
    numbers = dict.fromkeys(("score", "stderr", "low", "high"), Number)
    many = dict[str, Number]
    for key, kind in {**kinds, **numbers, "metrics": many, "completed": many, "categories": dict[str, many]}.items():
        if key in data:
            read_value(kind, data[key], source="it", where=key)
    for key, kind in (("about", _About), ("likelihood", _Likelihood)):
        build_known(kind, data.get(key, {}), source=f"its {key}")
