"""A scored answer, the numbers of a set of them, and the mean with its error."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from mm_moslora.reporting.verdicts import Difference
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.sources.document import Document


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One document with its extracted and scored answer."""

    document: Document
    text: str
    parsed: str
    """The extracted answer; empty: not inferable."""
    score: float
    """nan: not scored, or without a readable grade of a judge."""
    failed: bool = False
    """No answer: the sample could not be asked or the model failed on it. It scores 0."""
    cluster: Hashable = None
    """Identifier of the sample's cluster, such as its image."""
    numbers: tuple[float, ...] = ()
    """Further numbers of a judge, for the aggregation."""
    judged: bool = False
    """A judge read the answer: `parsed` comes from its reply."""
    draw: int = 0
    """Number of the copy in a bootstrap draw; grouping treats copies as different samples."""


def with_scores(samples: Sequence[Scored]) -> list[Scored]:
    """The samples that have a score."""
    return [sample for sample in samples if not math.isnan(sample.score)]


def graded_pairs(a: Sequence[Scored], b: Sequence[Scored]) -> tuple[list[Scored], list[Scored]]:
    """The samples of two systems on the documents for which both have a score, in the order of the first."""
    others = {sample.document.id: sample for sample in b}
    pairs = [(sample, others[sample.document.id]) for sample in a]
    kept = [pair for pair in pairs if not any(math.isnan(sample.score) for sample in pair)]
    return [left for left, _ in kept], [right for _, right in kept]


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """The numbers of a set of scored samples."""

    score: float
    stderr: float
    low: float
    high: float
    """95 % interval."""
    stderr_kind: str
    """analytic, clustered or bootstrap."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""


def mean_with_error(samples: Sequence[Scored]) -> Aggregate:
    """Mean score; the error is clustered by image if several samples share an image.

    Right/wrong scores without clusters get Wilson's interval, which is valid near 0 and 1. Clustered scores that are
    all right or all wrong get it too, with each cluster counted once: without variation the error is unknown, not zero.
    """
    scores = [sample.score for sample in samples]
    centre = error_bars.mean(scores)
    clusters = [sample.cluster for sample in samples]
    independent = len(set(clusters))
    if independent < len(clusters):
        stderr, kind = error_bars.clustered_stderr(scores, clusters), "clustered"
    else:
        stderr, kind = error_bars.mean_stderr(scores), "analytic"
    if set(scores) <= {0.0, 1.0} and (kind == "analytic" or len(set(scores)) == 1):
        low, high = error_bars.wilson_interval(sum(scores[:independent]), independent)
    else:
        low, high = error_bars.normal_interval(centre, stderr)
    return Aggregate(score=centre, stderr=stderr, low=max(0.0, low), high=min(1.0, high), stderr_kind=kind)


def difference_between(a: Sequence[Scored], b: Sequence[Scored]) -> Difference:
    """The paired difference A - B on the same documents; questions about one picture form a cluster.

    Args:
        a: samples of one system.
        b: samples of another system, in any order.
    """
    others = {sample.document.id: sample.score for sample in b}
    return error_bars.paired(
        [sample.score for sample in a], [others[sample.document.id] for sample in a],
        clusters=[index if sample.cluster is None else sample.cluster for index, sample in enumerate(a)],
    ).as_difference  # fmt: skip
