"""One line of the table of an evaluation: the score of a task in one image mode, with its counts and origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mm_moslora.utils.identity import sha256_of_values

RULES = ("extraction", "metric", "aggregation", "over_samples", "thinking")
"""Parts of a task that turn answers into a score."""


def variant_of(described: Mapping[str, Any]) -> str:
    """The name of what makes a score another measurement of the same documents: the number of answers to a question,
    what sums them up, and how reasoning is read; empty where these are the usual ones."""
    samples = described.get("decoding", {}).get("samples", 1)
    parts = [samples, described.get("over_samples"), described.get("thinking")]
    return "" if parts == [1, None, None] else f"-{sha256_of_values(parts)[:6]}"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of documents; `total` is the size of the data set (after `limit`)."""

    total: int
    scored: int
    failed: int
    """No answer; counted as wrong in the headline score."""
    not_inferable: int
    """Answered, but the extraction found nothing in any answer; counted as wrong."""
    truncated: int
    """Cut off by max_new_tokens."""
    dropped: int = 0
    """Rows that the protocol leaves out."""
    thinking: int = 0
    """Documents with a `<think>` block in an answer, which is removed before extraction."""
    unclosed_thinking: int = 0
    """Of these, those with a block without an end, so that the answer cannot be read."""
    ungraded: int = 0
    """Answered, but no reply of the judge can be read, or the rules failed; left out of the score."""
    faults: int = 0
    """Of these, answers on which the extraction, the metric or another rule failed."""
    left_out: int = 0
    """Scored, but left out of the score: another answer to the same question has none."""

    @property
    def incomplete(self) -> int:
        """Answers that are missing, or that the rules could not score."""
        return self.failed + self.faults


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One line of the table: a task under a protocol in one image mode, or a baseline."""

    task: str
    protocol: str
    version: int
    mode: str
    """own, blind, wrong; majority or question_majority for baselines."""
    n: int
    score: float
    stderr: float
    low: float
    high: float
    stderr_kind: str
    counts: Counts
    completed: dict[str, float]
    """n, score and stderr over the samples that were answered, with all that count together with them."""
    metrics: dict[str, float] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    """See `measured_scores.mean_likelihood`, or the reason `none`; empty for a baseline."""
    clusters: int | None = None
    """Pictures on which the interval rests, with samples that share none."""
    groups: int | None = None
    """Equally large ones that would give as much certainty."""
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    """n, score, stderr, low, high per category, in the task's score."""
    about: dict[str, Any] = field(default_factory=dict)
    """Protocol, data, selection, model, seed, first prompt, environment and date."""
    folder: str = ""
    """The view with the samples, relative to the run folder; empty for a baseline."""
    remarks: tuple[str, ...] = ()
    """Remarks for readers of the score: why samples failed, that all answers are the same."""

    @property
    def id(self) -> str:
        """Task, protocol and mode."""
        return f"{self.task}@{self.protocol}/{self.mode}"

    @property
    def subject(self) -> tuple[Any, ...]:
        """The documents and rules of a score; only scores of the same subject are compared."""
        # The name of the protocol does not identify the rules of an edited task file.
        rules = [str(self.about.get(rule, "")) for rule in RULES]
        if "grading" in self.about:
            rules.append(sha256_of_values(self.about["grading"]))
        variant = variant_of(self.about)
        return (*self._measured, self.version, *rules, *([variant] if variant else ()))

    @property
    def _measured(self) -> tuple[Any, ...]:
        checksum = self.about.get("selection", {}).get("sha256") or self.about.get("data", {}).get("sha256", "")
        return (self.task, self.protocol, self.about.get("asked_as", self.protocol), checksum, self.n)

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of a result within a run folder; a later result with the same key replaces the earlier one."""
        return (*self._measured, self.mode, variant_of(self.about))

    @property
    def scored(self) -> bool:
        """Whether there is a score."""
        return not math.isnan(self.score)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; nan becomes None."""
        return strict_json(asdict(self))  # type: ignore[no-any-return]


def strict_json(value: Any) -> Any:
    """Plain data with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
