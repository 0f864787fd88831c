"""The difference of two arms with documents and seeds as random samples. Pure Python.

Shapes: an arm's scores on a task are ``K x N``, seeds by documents. Sources: Owen 2007 (crossed random effects), Miller
2024 (2411.00640, clustered errors), Satterthwaite 1946 (degrees of freedom), Holm 1979.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from mm_moslora_eval.scoring.error_bars import (
    alike_interval,
    alike_p_value,
    clustered_stderr,
    mean,
    sample_stddev,
    t_quantile,
    t_two_sided,
)

Scores = Sequence[Sequence[float]]
"""``K x N``."""
LEVEL, POWER = 0.95, 0.8
_ROUNDING = 1e-24
"""A variance of shares below this is rounding: all differences are equal."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of one arm on one task."""

    scores: Scores
    """``K x N``: a row per seed."""
    clusters: Sequence[Hashable]
    """``N``: cluster of each document, such as the image of a question."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its error."""

    value: float
    stderr: float
    degrees: float
    """Degrees of freedom, by Satterthwaite; infinite where the error is exactly zero."""
    documents: float
    """Share of the variance that comes from documents, 0 to 1."""
    low: float
    high: float
    """95 % interval."""
    groups: int
    """Number of independent documents, over all tasks."""

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a true value of zero."""
        if math.isnan(self.stderr):
            return math.nan
        if self.stderr == 0:
            return alike_p_value(self.value, self.groups)
        return t_two_sided(self.value / self.stderr, self.degrees)

    def detectable(self, *, comparisons: int = 1) -> float:
        """The smallest true value that a repetition would find significant with 80 % power.

        Args:
            comparisons: number of p-values that are corrected together (the strictest step of Holm's procedure).
        """
        if math.isnan(self.stderr):
            return self.stderr
        if self.stderr == 0:  # all differences are equal; a rare other one may still exist
            return alike_interval(0.0, self.groups, level=LEVEL)[1]
        strict = t_quantile(1 - (1 - LEVEL) / comparisons, self.degrees)
        return (strict + t_quantile(2 * POWER - 1, self.degrees)) * self.stderr


def arm_mean(tasks: Mapping[str, TaskScores]) -> Estimate:
    """The mean over seeds, documents and (with equal weight) tasks, with its error for new documents and new seeds."""
    zero = {
        name: TaskScores(scores=[[0.0] * len(task.clusters)], clusters=task.clusters) for name, task in tasks.items()
    }
    return _estimate(tasks, zero, seedless=True)


def difference(a: Mapping[str, TaskScores], b: Mapping[str, TaskScores]) -> Estimate:
    """A - B on the same documents, with its error for new documents and new seeds.

    The variance is that of the documents (of differences of seed means, clustered) plus that of each arm's seeds (as
    independent draws), minus their common part (the noise of single answers). With one seed, the variance between an
    arm's seeds is unknown and left out.

    Args:
        a: task -> scores of A; the tasks weigh equally.
        b: scores of B, on the same documents in the same order.
    """
    return _estimate(a, b, seedless=False)


def _estimate(a: Mapping[str, TaskScores], b: Mapping[str, TaskScores], *, seedless: bool) -> Estimate:
    count = len(a)
    value, by_documents, shared, squares = 0.0, 0.0, 0.0, 0.0
    groups = sum(len(set(task.clusters)) for task in a.values())
    for name, left in a.items():
        right = b[name]
        pairs = zip(_columns(left.scores), _columns(right.scores), strict=True)
        differences = [x - y for x, y in pairs]
        value += mean(differences) / count
        stderr = clustered_stderr(differences, left.clusters)
        variance = 0.0 if math.isnan(stderr) else stderr**2 / count**2
        by_documents += variance
        squares += variance**2 / max(1, len(set(left.clusters)) - 1)
        shared += (_interaction(left) + (0.0 if seedless else _interaction(right))) / count**2
    by_seeds = 0.0
    for arm in (a,) if seedless else (a, b):
        means = [
            mean(values) for values in zip(*([mean(row) for row in task.scores] for task in arm.values()), strict=True)
        ]
        if len(means) > 1:
            part = sample_stddev(means) ** 2 / len(means)
            by_seeds += part
            squares += part**2 / (len(means) - 1)
    # Estimates of components may exceed the total; the error is never smaller than either source alone.
    variance = max(by_documents, by_seeds, by_documents + by_seeds - shared)
    return _with_interval(value, variance, squares, by_documents, groups=groups)


def _with_interval(value: float, variance: float, squares: float, by_documents: float, *, groups: int) -> Estimate:
    stderr = math.sqrt(variance) if variance > _ROUNDING else 0.0
    degrees = max(1.0, variance**2 / squares) if stderr else math.inf
    if stderr:
        half = t_quantile(LEVEL, degrees) * stderr
        low, high = value - half, value + half
    else:
        low, high = alike_interval(value, groups, level=LEVEL)
    return Estimate(
        value=value, stderr=stderr, degrees=degrees, low=low, high=high, groups=groups,
        documents=min(1.0, by_documents / variance) if variance else 1.0,
    )  # fmt: skip


def _columns(scores: Scores) -> list[float]:
    """Seed means, ``N``."""
    return [mean(column) for column in zip(*scores, strict=True)]


def _interaction(task: TaskScores) -> float:
    """The common part of the variances of documents and seeds: single answers that change with the seed."""
    seeds, documents = len(task.scores), len(task.clusters)
    groups = len(set(task.clusters))
    if seeds < 2 or groups < 2:
        return 0.0
    by_document, total = _columns(task.scores), mean([mean(row) for row in task.scores])
    square = 0.0
    for row in task.scores:
        own = mean(row)
        sums: dict[Hashable, float] = defaultdict(float)
        for score, usual, cluster in zip(row, by_document, task.clusters, strict=True):
            sums[cluster] += score - own - usual + total
        square += math.fsum(item * item for item in sums.values())
    return square * groups / (groups - 1) / ((seeds - 1) * seeds * documents**2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order; NaN stays NaN and does not count."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
