"""Types of the stored descriptions that reports read. A folder of results may come from a stranger.

Keys without a type here are only printed. `build_known` refuses a value of another type with its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.utils.untrusted_data import build_known, read_value

MAY_BE_NULL = ("expected_count", "date")
"""Keys of `TaskResult.about` that are written without a value."""
Number = float | None
"""A stored number; None for nan."""


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


@dataclass(frozen=True, kw_only=True)
class _Judge:
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cached: int


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
    asked_as: str = ""
    learned_from: str = ""
    unscored: str = ""
    date: str = ""
    expected_count: int | None = None
    model: _Model | None = None
    selection: _Documents | None = None
    data: _Documents | None = None
    decoding: _Decoding | None = None
    judge: _Judge | None = None
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
class Sample:
    """A row of `samples.jsonl`."""

    index: int = 0
    id: str = ""
    category: str = ""
    question: str = ""
    options: dict[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    prompt: str = ""
    images: tuple[Any, ...] = ()
    cluster: str = ""
    text: str = ""
    parsed: str = ""
    numbers: tuple[float, ...] = ()
    inferable: bool = True
    score: Number = None
    failed: bool = False
    error: str = ""


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


def check_result(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Check an entry of `results.json`.

    Args:
        data: the entry.
        kinds: types of its plain values.

    Raises:
        ConfigError: a value has another type.
    """
    read_value(dict[str, Any], data, source="it", where="the entry")
    numbers = dict.fromkeys(("score", "stderr", "low", "high"), Number)
    many = dict[str, Number]
    for key, kind in {**kinds, **numbers, "metrics": many, "completed": many, "categories": dict[str, many]}.items():
        if key in data:
            read_value(kind, data[key], source="it", where=key)
    for key, kind in (("about", _About), ("likelihood", _Likelihood)):
        build_known(kind, data.get(key, {}), source=f"its {key}")
