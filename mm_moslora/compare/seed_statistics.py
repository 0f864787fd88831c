"""Differences of arms with documents and seeds as crossed random effects; seeds are blocks.

The runs of one seed share the order of the data, and the start of A where the arms have one. So arms are compared seed
by seed, and what moves all arms of a seed alike is no error of their differences.

Shapes: an arm's scores on a task are ``K x N``, seeds by documents; NaN is a missing answer. Sources: Owen 2007
(crossed random effects), Henderson 1953 (components by moments), Yates 1933 (blocks with missing runs), Miller 2024
(2411.00640, clustered errors), Satterthwaite 1946 (degrees of freedom), Bancroft 1944 (pooling of variances after a
test), Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from mm_moslora_eval.scoring.error_bars import (
    alike_interval,
    alike_p_value,
    clustered_stderr,
    f_upper_tail,
    t_quantile,
    t_two_sided,
)
from numpy.typing import NDArray

Grid = NDArray[np.float64]
Scores = Sequence[Sequence[float]]
"""``K x N``."""
LEVEL, POWER = 0.95, 0.8
_ROUNDING = 1e-24
"""A variance of shares below this is rounding: all differences are equal."""
_POOLED = 0.25
"""An arm's variance between seeds is pooled unless it is above that of the other arms at this level (Bancroft 1944)."""
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
        """Of the seeds."""
        return self.seeds or range(len(self.scores))

    def answered(self) -> list[int]:
        """Numbers of the seeds with any answer."""
        return [number for number, row in zip(self.numbers, self.scores, strict=True) if np.isfinite(row).any()]

    def of(self, seeds: Iterable[int]) -> TaskScores:
        """The scores of these seeds, in the order of their numbers."""
        rows = dict(zip(self.numbers, self.scores, strict=True))
        numbers = sorted(rows.keys() & set(seeds))
        return replace(self, scores=[rows[number] for number in numbers], seeds=numbers)

    def first(self, count: int) -> TaskScores:
        """The scores of seeds with a number below `count`."""
        return self.of(range(count))


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components by moments, negative ones set to 0: the squared error of a mean over ``K`` seeds and ``N``
    documents is ``documents / N + seeds / K + answers / (K N)``."""

    documents: float
    """Between documents (of one, clustering included)."""
    seeds: float
    """Between seeds (of one of each arm)."""
    answers: float
    """Single answers that change with the seed."""

    def variance(self, *, seeds: float, documents: float) -> float:
        """The squared error at a size; infinite sizes are allowed."""
        return self.documents / documents + self.seeds / seeds + self.answers / seeds / documents


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
    components: Components
    size: tuple[float, int]
    """Seeds of an arm and documents."""

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a true value of zero."""
        if math.isnan(self.stderr):
            return math.nan
        if self.stderr == 0:
            return alike_p_value(self.value, self.groups)
        return t_two_sided(self.value / self.stderr, self.degrees)

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    def at_level(self, level: float) -> Estimate:
        """The same estimate with an interval of this error rate instead of 5 %."""
        low, high = _interval(self.value, self.stderr, self.degrees, groups=self.groups, level=1 - level)
        return replace(self, low=low, high=high)

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


def arm_mean(tasks: Mapping[str, TaskScores], *, bounded: bool = True) -> Estimate:
    """The mean over seeds, documents and (with equal weight) tasks, with its error for new documents and new seeds."""
    tasks = _of_seeds(tasks, _seeds(tasks))
    squares, degrees = _residual([_runs(tasks)], blocks=False)
    return _estimate([tasks], [_Spread(squares=squares, degrees=degrees)], bounded=bounded)


def difference(a: Mapping[str, TaskScores], b: Mapping[str, TaskScores], *, bounded: bool = True) -> Estimate:
    """A - B on the same documents: `differences` of one arm.

    Raises:
        ValueError: see `differences`; or the arms have no seed in common.
    """
    found = differences({"": a}, b, bounded=bounded)
    if not found:
        raise ValueError("The arms have no seed in common, so they cannot be compared seed by seed.")
    return found[""]


def differences(
    arms: Mapping[str, Mapping[str, TaskScores]], reference: Mapping[str, TaskScores], *, bounded: bool = True
) -> dict[str, Estimate]:
    """Each arm - the reference on the same documents and seeds, with its error for new documents and new seeds.

    The variance is that of the documents (of differences of seed means, clustered) plus that of each arm's runs around
    the common effects of the seeds, minus their common part (the noise of single answers). A variance of runs is the
    mean over all arms, with the degrees of freedom of all, unless the arm's own is larger than those of the others (an
    F-test at the level 0.25): then it is the arm's own. With one seed, the variance between runs is unknown and left
    out. A document without an answer of one arm is left out, and so is a seed without a run of one arm. An arm that has
    no seed of the reference is not in the result.

    Args:
        arms: by name, task -> scores; the tasks weigh equally.
        reference: its scores, on the same documents in the same order.
        bounded: whether scores lie between 0 and 1, so that equal differences still bound the error.

    Raises:
        ValueError: two arms have other tasks or other documents, or no document in common.
    """
    if other := next((tasks for tasks in arms.values() if tasks.keys() != reference.keys()), None):
        raise ValueError(f"The arms were measured on different tasks: {list(other)} and {list(reference)}.")
    seeds = {name: found for name, tasks in arms.items() if (found := _seeds(tasks, reference))}
    if not seeds:
        return {}
    own, *spreads = _pooled([_runs(_of_seeds(t, _seeds(t))) for t in (reference, *(arms[name] for name in seeds))])
    return {
        name: _estimate([_of_seeds(arms[name], both), _of_seeds(reference, both)], [spread, own], bounded=bounded)
        for (name, both), spread in zip(seeds.items(), spreads, strict=True)
    }


def _seeds(*arms: Mapping[str, TaskScores]) -> set[int]:
    """Numbers of the seeds with answers of every arm on every task."""
    return set.intersection(*(set(task.answered()) for tasks in arms for task in tasks.values()))


def _of_seeds(tasks: Mapping[str, TaskScores], seeds: set[int]) -> dict[str, TaskScores]:
    return {name: task.of(seeds) for name, task in tasks.items()}


Runs = Mapping[int, float]
"""Of an arm, by seed: how far the score of its run, on all tasks, is from the mean of its runs."""


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """Variance between runs of an arm: of the score of one run, on all tasks."""

    squares: float
    """Sum of squares."""
    degrees: int
    """Degrees of freedom; 0 where it is unknown."""
    pooled: bool = False
    """Whether it is the mean over arms."""

    @property
    def variance(self) -> float:
        """Of one run; 0 where it is unknown."""
        return self.squares / max(1, self.degrees)


def _runs(tasks: Mapping[str, TaskScores]) -> Runs:
    """An arm's own, from all documents that it answered."""
    found: dict[int, float] = {}
    for name, task in tasks.items():
        grids, clusters = _in_common([task], name)
        brought = _fit(grids[0], clusters).brought * len(grids[0]) / len(tasks)
        found |= {number: found.get(number, 0.0) + part for number, part in zip(task.numbers, brought, strict=True)}
    return found


def _residual(arms: Sequence[Runs], *, blocks: bool = True) -> tuple[float, int]:
    """Sum of squares of the runs around the effects of arms and, as blocks, of seeds, and its degrees of freedom."""
    values = np.array([value for runs in arms for value in runs.values()])
    effects = (
        [("arm", place) for place, runs in enumerate(arms) for _ in runs],
        [("seed", seed) for runs in arms for seed in runs],
    )
    columns = {name: place for place, name in enumerate({*effects[0], *effects[1]})}
    design = np.zeros((len(values), len(columns)))
    for names in effects if blocks else effects[:1]:
        design[range(len(values)), [columns[name] for name in names]] = 1.0
    fitted, _, rank, _ = np.linalg.lstsq(design, values)
    return float(np.square(values - design @ fitted).sum()), len(values) - int(rank)


def _pooled(arms: Sequence[Runs]) -> list[_Spread]:
    """The variances between runs that differences take: the mean over arms, or an arm's own if it is larger."""
    squares, degrees = _residual(arms)
    pooled, found = _Spread(squares=squares, degrees=degrees, pooled=True), []
    for place in range(len(arms)):
        # What an arm adds to the squares of the others is independent of them.
        rest, below = _residual([*arms[:place], *arms[place + 1 :]])
        own = _Spread(squares=max(0.0, squares - rest), degrees=degrees - below)
        ratio = own.variance * below / rest if rest > _ROUNDING else math.inf
        tested = own.degrees and below and own.squares > _ROUNDING
        alone = tested and f_upper_tail(ratio, own.degrees, below) < _POOLED
        found.append(own if alone else pooled)
    return found


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One arm on one task: its parts of the variance of the mean."""

    means: Grid
    """``N``, over seeds."""
    brought: Grid
    """``K``, the part of the mean's deviation that each seed brings."""
    answers: float
    """Variance of the mean from single answers that change with the seed."""


def _estimate(arms: Sequence[Mapping[str, TaskScores]], spreads: Sequence[_Spread], *, bounded: bool) -> Estimate:
    count, seeds = len(arms[0]), [1] * len(arms)
    value, by_documents, shared, squares, groups, documents = 0.0, 0.0, 0.0, 0.0, 0, 0
    for name in arms[0]:
        grids, clusters = _in_common([arm[name] for arm in arms], name)
        fits = [_fit(grid, clusters) for grid in grids]
        means = fits[0].means - (fits[1].means if len(fits) > 1 else 0.0)
        value += float(means.mean()) / count
        # One document has no error of its own.
        variance = clustered_stderr(means.tolist(), clusters.tolist()) ** 2 / count**2 if len(means) > 1 else 0.0
        by_documents += variance
        own = int(clusters.max()) + 1
        squares += variance**2 / max(1, own - 1)
        shared += sum(fit.answers for fit in fits) / count**2
        groups, documents = groups + own, documents + len(clusters)
        seeds = [len(grid) for grid in grids]
    parts: dict[tuple[int, int], float] = {}  # a pooled variance is one source of error, however many arms take it
    for arm, (spread, own) in enumerate(zip(spreads, seeds, strict=True)):
        source = (spread.degrees, -1 if spread.pooled else arm)
        parts[source] = parts.get(source, 0.0) + spread.variance / own
    by_seeds, per_seed = sum(parts.values()), sum(1 / own for own in seeds) / len(arms)
    squares += sum(part**2 / max(1, degrees) for (degrees, _), part in parts.items())
    # Estimates of components may exceed the total; the error is never smaller than either source alone.
    common = min(shared, max(by_documents, by_seeds))
    alone = (max(0.0, by_documents - common), max(0.0, by_seeds - common))
    return _with_interval(
        value, sum(alone) + common, squares, by_documents, groups=groups, bounded=bounded,
        components=Components(
            documents=alone[0] * documents, seeds=alone[1] / per_seed, answers=common * documents / per_seed
        ),
        size=(1 / per_seed, documents),
    )  # fmt: skip


def _in_common(arms: Sequence[TaskScores], task: str) -> tuple[list[Grid], NDArray[np.intp]]:
    """The scores of each arm on documents that all arms answered, and the numbers of their clusters."""
    grids = [np.asarray(arm.scores, dtype=np.float64) for arm in arms]
    if any(
        grid.ndim != 2 or list(arm.clusters) != list(arms[0].clusters) for grid, arm in zip(grids, arms, strict=True)
    ):
        raise ValueError(
            f"{task}: the arms answered different documents, so they cannot be compared document by document."
        )
    kept = np.logical_and.reduce([np.isfinite(grid).any(axis=0) for grid in grids])
    if not kept.any():
        raise ValueError(f"{task}: no document has a score of every arm.")
    number: dict[Hashable, int] = {}
    of = [number.setdefault(name, len(number)) for name, one in zip(arms[0].clusters, kept, strict=True) if one]
    return [grid[:, kept] for grid in grids], np.array(of)


def _fit(grid: Grid, clusters: NDArray[np.intp]) -> _Fit:
    """Least squares of document and seed effects; every document weighs equally, whatever is missing."""
    there = np.isfinite(grid)
    seeds, documents = grid.shape
    weights = there / there.sum(axis=0) / documents
    known = np.where(there, grid, 0.0)
    effects = np.zeros(seeds)
    for _ in range(_STEPS):
        rest = (known - there * effects[:, None]).sum(axis=0) / there.sum(axis=0)
        before, effects = effects, (known - there * rest).sum(axis=1) / there.sum(axis=1)
        effects -= effects.mean()
        if np.abs(effects - before).max() < _CLOSE:
            break
    means = (known - there * effects[:, None]).sum(axis=0) / there.sum(axis=0)
    return _Fit(
        means=means,
        brought=weights.sum(axis=1) * effects,
        answers=_answers(known - means - effects[:, None], there, clusters),
    )


def _answers(residual: Grid, there: NDArray[np.bool_], clusters: NDArray[np.intp]) -> float:
    """Variance of the mean from single answers; 0 where no document has several, or all are of one cluster."""
    answered, groups = there.sum(axis=0), int(clusters.max()) + 1
    several = answered > 1
    if groups < 2 or not several.any():
        return 0.0
    # A residual around the mean of m answers has (m - 1) / m of their variance; documents with one answer have none.
    scale = np.where(several, np.sqrt(answered / np.maximum(1, answered - 1)), 0.0) / answered / len(answered)
    sums = np.square([np.bincount(clusters, row, groups) for row in there * residual * scale]).sum()
    return float(sums * groups / (groups - 1) * (1 / answered).sum() / (1 / answered)[several].sum())


def _with_interval(
    value: float, variance: float, squares: float, by_documents: float, *, groups: int, bounded: bool,
    components: Components, size: tuple[float, int],
) -> Estimate:  # fmt: skip
    stderr = math.sqrt(variance) if variance > _ROUNDING else 0.0
    degrees = max(1.0, variance**2 / squares) if stderr else math.inf
    if not stderr and not bounded:
        stderr = math.nan  # unknown: nothing bounds the differences of other documents
    low, high = _interval(value, stderr, degrees, groups=groups, level=LEVEL)
    return Estimate(
        value=value, stderr=stderr, degrees=degrees, low=low, high=high, groups=groups,
        documents=min(1.0, by_documents / variance) if variance else 1.0, components=components, size=size,
    )  # fmt: skip


def _interval(value: float, stderr: float, degrees: float, *, groups: int, level: float) -> tuple[float, float]:
    if stderr == 0:
        return alike_interval(value, groups, level=level)
    half = math.nan if math.isnan(stderr) else t_quantile(level, degrees) * stderr
    return value - half, value + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order; NaN stays NaN and does not count."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
