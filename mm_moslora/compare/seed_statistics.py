"""Differences of arms with documents and seeds as crossed random effects; seeds are blocks.

The runs of one seed share the order of the data, and the start of A where the arms have one. So arms are compared seed
by seed, and what moves all arms of a seed alike is no error of their differences.

Shapes: an arm's scores on a task are ``K x N``, seeds by documents; NaN is a missing answer. Sources: Owen 2007
(crossed random effects), Henderson 1953 (components by moments), Bell and McCaffrey 2002 (clustered errors of few or
uneven clusters), Satterthwaite 1946 (degrees of freedom), Holm 1979. The variance between runs: `run_variance`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from mm_moslora_eval.scoring.estimates import alike_interval, alike_p_value, shown_by_t_test, t_quantile, t_two_sided
from numpy.typing import NDArray

from mm_moslora.compare.run_variance import ROUNDING, Runs, Spread, pooled, residual, variance_of_means

Grid = NDArray[np.float64]
Scores = Sequence[Sequence[float]]
"""``K x N``."""
LEVEL, POWER = 0.95, 0.8
_STEPS, _CLOSE = 200, 1e-12
"""Most alternating steps of the least squares, which converge at once without missing answers, and when they end."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores of one arm on one task."""

    scores: Scores
    """``K x N``: a row per seed."""
    clusters: Sequence[Hashable]
    """``N``: cluster of each document, such as the image of a question."""
    seeds: Sequence[int] = ()
    """``K``: number of each seed; empty: from 0 on."""

    @property
    def numbers(self) -> Sequence[int]:
        """Numbers of the seeds."""
        return self.seeds or range(len(self.scores))

    def answered(self) -> list[int]:
        """Numbers of the seeds with any answer."""
        return [number for number, row in zip(self.numbers, self.scores, strict=True) if np.isfinite(row).any()]

    def of(self, seeds: Iterable[int]) -> TaskScores:
        """The scores of these seeds, in the order of their numbers."""
        rows = dict(zip(self.numbers, self.scores, strict=True))
        numbers = sorted(rows.keys() & set(seeds))
        return replace(self, scores=[rows[number] for number in numbers], seeds=numbers)


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components; the squared error of a mean is ``documents / N + seeds / K + answers / (K N)``."""

    documents: float
    """Between documents (of one, clustering included)."""
    seeds: float
    """Between seeds (of one of each arm)."""
    answers: float
    """Single answers that change with the seed."""


@dataclass(frozen=True, kw_only=True)
class ArmEstimate:
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
    """Number of independent documents, over all tasks; fewer than clusters where some are much larger."""
    fewest: int
    """Number of independent documents of the task with the fewest."""
    run_degrees: float
    """Degrees of freedom of the variance between runs; 0 where it is unknown, and left out of the error."""
    components: Components
    size: tuple[int, int]
    """Seeds in common and documents."""

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a true value of zero."""
        if math.isnan(self.stderr):
            return math.nan
        if self.stderr == 0:
            return alike_p_value(self.value, self.fewest)
        return t_two_sided(self.value / self.stderr, self.degrees)

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def detectable(self, *, comparisons: int = 1) -> float:
        """The true value that a repetition shows at 5 % with 80 % power, one of so many p-values that Holm corrects."""
        if math.isnan(self.stderr):
            return self.stderr
        level = 1 - (1 - LEVEL) / comparisons
        if self.stderr == 0:  # all differences are equal; a rare other one may still exist
            return alike_interval(0.0, self.fewest, level=level)[1]
        return shown_by_t_test(level, self.degrees, power=POWER) * self.stderr


def arm_mean(tasks: Mapping[str, TaskScores], *, bounded: bool = True) -> ArmEstimate:
    """The mean over seeds, documents and (with equal weight) tasks, with its error for new documents and new seeds."""
    tasks = _of_seeds(tasks, _seeds(tasks))
    squares, degrees = residual([_runs(tasks)], blocks=False)
    return _estimate([tasks], [Spread(squares=squares, degrees=degrees)], bounded=bounded)


def differences(
    arms: Mapping[str, Mapping[str, TaskScores]], reference: Mapping[str, TaskScores], *, bounded: bool = True
) -> dict[str, ArmEstimate]:
    """Each arm minus the reference, by document and seed, with its error for new documents and new seeds."""
    # The variance is that of the documents (of differences of seed means, clustered) plus that of each arm's runs
    # around the common effects of the seeds, minus their common part (chance in single answers). With one seed, the
    # variance between runs is unknown and left out. Left out are documents without an answer of one arm, seeds without
    # a run of one, and arms without a seed of the reference. Tasks weigh equally. `bounded`: scores lie between 0 and
    # 1, so that equal differences still bound the error.
    if other := next((tasks for tasks in arms.values() if tasks.keys() != reference.keys()), None):
        raise ValueError(f"The arms were measured on different tasks: {list(other)} and {list(reference)}.")
    seeds = {name: common for name, tasks in arms.items() if (common := _seeds(tasks, reference))}
    if not seeds:
        return {}
    runs = [_runs(_of_seeds(arms[name], both)) for name, both in seeds.items()]
    own, *spreads = pooled([_runs(_of_seeds(reference, _seeds(reference))), *runs])
    return {
        name: _estimate([_of_seeds(arms[name], both), _of_seeds(reference, both)], [spread, own], bounded=bounded)
        for (name, both), spread in zip(seeds.items(), spreads, strict=True)
    }


def _seeds(*arms: Mapping[str, TaskScores]) -> set[int]:
    """Numbers of the seeds with answers of every arm, on every task, on documents that all of them answered."""
    seeds = set.intersection(*(set(task.answered()) for tasks in arms for task in tasks.values()))
    while seeds:
        grids = {name: _in_common([arm[name].of(seeds) for arm in arms], name)[0] for name in arms[0]}
        answered = np.all([np.isfinite(grid).any(axis=1) for of in grids.values() for grid in of], axis=0)
        if answered.all():
            break
        seeds = {number for number, complete in zip(sorted(seeds), answered, strict=True) if complete}
    return seeds


def _of_seeds(tasks: Mapping[str, TaskScores], seeds: set[int]) -> dict[str, TaskScores]:
    return {name: task.of(seeds) for name, task in tasks.items()}


def _runs(tasks: Mapping[str, TaskScores]) -> Runs:
    """The deviations of an arm's runs, from all documents that the arm answered."""
    deviations: dict[int, float] = {}
    for name, task in tasks.items():
        ((grid,), _) = _in_common([task], name)
        for number, effect in zip(task.numbers, _fit(grid).effects / len(tasks), strict=True):
            deviations[number] = deviations.get(number, 0.0) + effect
    return deviations


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Least squares of document and seed effects on one grid; every document weighs equally, whatever is missing."""

    means: Grid
    """``N``, of documents, over seeds."""
    effects: Grid
    """``K``, of seeds; their mean is 0."""
    answered: NDArray[np.intp]
    """``N``, answers of each document."""
    brought: Grid
    """``K x N``: what chance in each answer brings to the mean of its document; 0 where a document has one answer."""


@dataclass(frozen=True, kw_only=True)
class _Stratum:
    """Tasks with documents of the same clusters, on other clusters than the rest; or one task."""

    deviations: Grid
    """``N``: what each document brings to the deviation of the mean; larger by what its cluster itself moves the mean
    of its task (Bell and McCaffrey 2002)."""
    shares: Grid
    """``N``: how much each document counts in the mean."""
    answers: Grid
    """``K x N``: what chance in each answer brings to it; 0 where an arm has one answer to a document."""
    weights: Grid
    """``2 x N``: how much of that variance a document has, and the same with 0 where `answers` does not know it."""
    clusters: NDArray[np.intp]
    """``N``, from 0 on."""
    lone: bool
    """Whether a task has one cluster, so that nothing shows how clusters differ."""
    unseen: float
    """Variance of the mean if one cluster differed by 1 in each task on which all documents are alike, or that has one
    cluster."""

    @property
    def independent(self) -> float:
        """The number of clusters of equal size with the same degrees of freedom: fewer than there are, if uneven."""
        squares = np.square(np.bincount(self.clusters, self.shares))
        return 1.0 if self.lone else float(squares.sum() ** 2 / np.square(squares).sum())

    def by_documents(self) -> float:
        """Variance of the mean from its documents, as far as they show it."""
        return float(np.square(np.bincount(self.clusters, self.deviations)).sum())

    def by_answers(self) -> float:
        """Variance of the mean from single answers; 0 where no document has several, or all are of one cluster."""
        (total, estimated), groups = self.weights.sum(axis=1), int(self.clusters.max()) + 1
        if groups < 2 or not estimated:
            return 0.0
        sums = np.square([np.bincount(self.clusters, row, groups) for row in self.answers]).sum()
        return float(sums * groups / (groups - 1) * total / estimated)


def _estimate(arms: Sequence[Mapping[str, TaskScores]], spreads: Sequence[Spread], *, bounded: bool) -> ArmEstimate:
    value, strata, seeds = _strata(arms)
    by_seeds, run_degrees = variance_of_means(spreads, seeds)
    documents = [stratum.by_documents() for stratum in strata]
    if by_seeds + sum(documents) > ROUNDING:
        unseen = [stratum.unseen if bounded else math.nan if stratum.lone else 0.0 for stratum in strata]
        documents = [part + other for part, other in zip(documents, unseen, strict=True)]
    unknown, independent = any(map(math.isnan, documents)), [stratum.independent for stratum in strata]
    by_documents = 0.0 if unknown else sum(documents)
    squares = sum(part**2 / max(1, groups - 1) for part, groups in zip(documents, independent, strict=True))
    squares += by_seeds**2 / run_degrees if run_degrees else 0.0
    # Estimates of components may exceed the total; the error is never smaller than either source alone.
    common = min(sum(stratum.by_answers() for stratum in strata), max(by_documents, by_seeds))
    alone = (max(0.0, by_documents - common), max(0.0, by_seeds - common))
    documents_asked = sum(len(stratum.deviations) for stratum in strata)
    groups = [int(count + _CLOSE**0.5) for count in independent]
    variance = math.nan if unknown else sum(alone) + common
    stderr = 0.0 if variance <= ROUNDING else math.sqrt(variance)
    degrees = max(1.0, variance**2 / squares) if stderr else math.inf
    if not stderr and not bounded:
        stderr = math.nan  # unknown: nothing bounds the differences of other documents
    low, high = _interval(value, stderr, degrees, groups=min(groups), level=LEVEL)
    return ArmEstimate(
        value=value, stderr=stderr, degrees=degrees, low=low, high=high, groups=sum(groups), fewest=min(groups),
        documents=min(1.0, by_documents / variance) if variance > 0 else 1.0, run_degrees=run_degrees,
        components=Components(
            documents=alone[0] * documents_asked, seeds=alone[1] * seeds, answers=common * documents_asked * seeds
        ),
        size=(seeds, documents_asked),
    )  # fmt: skip


def _strata(arms: Sequence[Mapping[str, TaskScores]]) -> tuple[float, list[_Stratum], int]:
    """The mean or the difference, over tasks; what its documents and answers bring to it; and the number of seeds."""
    value, count, seeds = 0.0, len(arms[0]), 0
    of: dict[Hashable, int] = {}
    parts: list[tuple[set[int], list[_Stratum]]] = []  # clusters, by number over all tasks, and the tasks on them
    for name in arms[0]:
        grids, clusters = _in_common([arm[name] for arm in arms], name)
        fits, seeds = [_fit(grid) for grid in grids], len(grids[0])
        means = fits[0].means - (fits[1].means if len(fits) > 1 else 0.0)
        answered = np.array([fit.answered for fit in fits])
        several, part = (answered > 1).all(axis=0), (1 / answered).sum(axis=0)
        # What both arms' answers share is no error of their difference.
        chance = (fits[0].brought - (fits[1].brought if len(fits) > 1 else 0.0)) * several
        value += float(means.mean()) / count
        weight = 1 / count / len(means)
        numbers = np.array([of.setdefault(cluster, len(of)) for cluster in clusters])
        sizes = np.bincount(numbers)
        leverage = sizes[numbers] / len(means)  # of a document's cluster on the mean of the task
        lone = bool(leverage[0] == 1)
        deviations = 0.0 * means if lone else (means - means.mean()) * weight / np.sqrt(1 - leverage)
        alike = np.square(deviations).sum() <= ROUNDING
        task = _Stratum(
            deviations=deviations,
            shares=np.full(len(means), weight),
            lone=lone,
            unseen=float(alike / count**2 / np.count_nonzero(sizes) ** 2),
            answers=chance * weight,
            weights=np.array([part, part * several]) * weight**2,
            clusters=numbers,
        )
        own, tasks = set(task.clusters.tolist()), [task]
        for part in [part for part in parts if part[0] & own]:
            parts.remove(part)
            own, tasks = own | part[0], [*part[1], *tasks]
        parts.append((own, tasks))
    return value, [_joined(tasks) for _, tasks in parts], seeds


def _joined(tasks: Sequence[_Stratum]) -> _Stratum:
    return _Stratum(
        deviations=np.concatenate([task.deviations for task in tasks]),
        shares=np.concatenate([task.shares for task in tasks]),
        answers=np.concatenate([task.answers for task in tasks], axis=1),
        weights=np.concatenate([task.weights for task in tasks], axis=1),
        clusters=np.unique(np.concatenate([task.clusters for task in tasks]), return_inverse=True)[1],
        lone=any(task.lone for task in tasks),
        unseen=sum(task.unseen for task in tasks),
    )


def _in_common(arms: Sequence[TaskScores], task: str) -> tuple[list[Grid], list[Hashable]]:
    """The scores of each arm on documents that all arms answered, and the clusters of these documents."""
    grids = [np.asarray(arm.scores, dtype=np.float64) for arm in arms]
    if any(
        grid.ndim != 2 or list(arm.clusters) != list(arms[0].clusters) for grid, arm in zip(grids, arms, strict=True)
    ):
        raise ValueError(
            f"{task}: the arms answered different documents, so they cannot be compared document by document."
        )
    answered = np.logical_and.reduce([np.isfinite(grid).any(axis=0) for grid in grids])
    if not answered.any():
        raise ValueError(f"{task}: no document has a score of every arm.")
    return [grid[:, answered] for grid in grids], list(itertools.compress(arms[0].clusters, answered))


def _fit(grid: Grid) -> _Fit:
    present = np.isfinite(grid)
    rows, columns = present.sum(axis=1), present.sum(axis=0)
    values = np.where(present, grid, 0.0)
    effects = np.zeros(len(grid))
    for _ in range(_STEPS):
        rest = (values - present * effects[:, None]).sum(axis=0) / columns
        before, effects = effects, (values - present * rest).sum(axis=1) / rows
        effects -= effects.mean()
        if np.abs(effects - before).max() < _CLOSE:
            break
    means = (values - present * effects[:, None]).sum(axis=0) / columns
    # A residual around the mean of m answers has (m - 1) / m of their variance.
    scale = np.sqrt(columns / np.maximum(1, columns - 1)) / columns
    brought = present * (values - means - effects[:, None]) * scale
    return _Fit(means=means, effects=effects, answered=columns, brought=brought)


def _interval(value: float, stderr: float, degrees: float, *, groups: int, level: float) -> tuple[float, float]:
    if stderr == 0:
        return alike_interval(value, groups, level=level)
    half = math.nan if math.isnan(stderr) else t_quantile(level, degrees) * stderr
    return value - half, value + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order; NaN stays NaN and does not count (give 1 for one that does)."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
