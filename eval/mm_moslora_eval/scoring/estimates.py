"""The value of a score with its error, interval, p-value and power.

Every score of this package is a sum of ratios of two sums over samples: a mean (the scores over their number),
a macro average (a ratio for each category), F1 (twice the hits over hits, false alarms and misses). So one function
measures them all, and the difference of two of them is one more such sum.

Sources: Woodruff 1971 (errors of ratios), Bell and McCaffrey 2002 (errors of few or uneven clusters, and their degrees
of freedom), Korn and Graubard 1998 (exact intervals on an effective number of samples), Clopper and Pearson 1934.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mm_moslora.reporting.verdicts import Difference

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
"""Quantile of the two-sided 95 % interval of a normal distribution."""
ROUNDING = 1e-12
"""A standard error below this value is a rounding error: all values are equal."""


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def sample_stddev(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 in the denominator; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def binomial_interval(successes: float, count: float) -> tuple[float, float]:
    """The exact 95 % interval of a proportion (Clopper and Pearson 1934), also of broken numbers of trials."""
    from scipy.special import betaincinv

    failures = count - successes
    return (
        float(betaincinv(successes, failures + 1, 0.025)) if successes > 0 else 0.0,
        float(betaincinv(successes + 1, failures, 0.975)) if failures > 0 else 1.0,
    )


def t_two_sided(t: float, degrees: float) -> float:
    """Two-sided p-value of Student's t."""
    from scipy.special import stdtr

    return 2 * float(stdtr(degrees, -abs(t)))


def f_upper_tail(ratio: float, above: float, below: float) -> float:
    """One-sided p-value of Fisher's F, a ratio of two variances with these degrees of freedom."""
    from scipy.special import fdtrc

    return float(fdtrc(above, below, ratio))


def t_quantile(level: float, degrees: float) -> float:
    """The quantile of t with probability (1 - level), at least 1e-15, in both tails together."""
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, max(1 - level, 1e-15) / 2))


@functools.lru_cache(maxsize=4096)
def shown_by_t_test(level: float, degrees: float, *, power: float = 0.8) -> float:
    """The true value, in true standard errors, that a t-test shows so often (by the noncentral t, its near tail)."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import gammaincinv, ndtr

    quantile, half = t_quantile(level, degrees), min(degrees, 1e6) / 2
    # scipy's noncentral t gives NaN or no answer for large shifts. The estimated error over the true one is a chi:
    ratios = np.sqrt(gammaincinv(half, (np.arange(2000) + 0.5) / 2000) / half)
    return float(brentq(lambda shift: ndtr(shift - quantile * ratios).mean() - power, 0.0, 2 * quantile + 10))


def alike_interval(difference: float, groups: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean difference if every sample differs by the same amount, so that the sample variance is zero.

    Then the error is unknown, not zero. Exact binomial bounds (Clopper and Pearson 1934) limit the share of other
    samples. If all scores are equal, up to that share may differ by 1 in either direction. Otherwise at least the rest
    differs the same way, and that share the opposite way.
    """
    if difference == 0:
        unseen = 1 - (1 - level) ** (1 / groups)
        return -unseen, unseen
    least = difference * (2 * ((1 - level) / 2) ** (1 / groups) - 1)
    return min(least, difference), max(least, difference)


def alike_p_value(difference: float, groups: int) -> float:
    """Two-sided p-value if every sample differs by the same amount: the sign test over independent samples."""
    return 1.0 if difference == 0 else sign_test(groups, 0)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the hypothesis that wins and losses are equally likely (McNemar's exact test)."""
    from scipy.special import bdtr

    count = wins + losses
    if count == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(wins, losses), count, 0.5)))


Column = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A part of a score: the ratio of two sums over samples; 0 if the lower sum is 0."""

    top: Sequence[float] | Column
    bottom: Sequence[float] | Column
    low: float = 0.0
    """The smallest possible ratio."""
    high: float = 1.0
    """The largest possible ratio."""

    def __mul__(self, weight: float) -> Ratio:
        ends = sorted((weight * self.low, weight * self.high))
        return Ratio(top=weight * np.asarray(self.top, float), bottom=self.bottom, low=ends[0], high=ends[1])

    def values(self) -> tuple[float, Column, Column]:
        """The ratio; what each sample adds to its deviation; and the share of each sample in the lower sum."""
        top, bottom = np.asarray(self.top, float), np.asarray(self.bottom, float)
        whole = math.fsum(bottom)
        if not whole:
            return 0.0, np.zeros(len(top)), np.zeros(len(top))
        ratio = math.fsum(top) / whole
        return ratio, (top - ratio * bottom) / whole, bottom / whole


def mean_of(values: Sequence[float], *, low: float = 0.0, high: float = 1.0) -> Ratio:
    """The mean of values between bounds."""
    return Ratio(top=values, bottom=np.ones(len(values)), low=low, high=high)


def minus(a: Sequence[Ratio], b: Sequence[Ratio]) -> list[Ratio]:
    """The difference of two scores on the same samples; ratios with the same lower sum become one."""
    by_bottom: dict[bytes, Ratio] = {}
    for ratio in (*a, *(ratio * -1.0 for ratio in b)):
        key = np.asarray(ratio.bottom, float).tobytes()
        if (other := by_bottom.get(key)) is not None:
            top = np.asarray(other.top, float) + ratio.top
            ratio = replace(ratio, top=top, low=other.low + ratio.low, high=other.high + ratio.high)
        by_bottom[key] = ratio
    return list(by_bottom.values())


def value_of(ratios: Sequence[Ratio]) -> float:
    """The score."""
    return math.fsum(ratio.values()[0] for ratio in ratios)


def contributions(ratios: Sequence[Ratio]) -> Column:
    """A value for each sample: the mean of the values is the score, and their error is its error."""
    if len(ratios) == 1 and np.all(np.asarray(ratios[0].bottom) == 1):
        return np.asarray(ratios[0].top, float)  # a mean, to the last digit
    parts = np.array([len(ratio.top) * ratio.values()[1] for ratio in ratios], float)
    return np.asarray(value_of(ratios) + parts.sum(axis=0), float)


@dataclass(frozen=True, kw_only=True)
class ScoreEstimate:
    """A score, or a difference of two, with its error for other pictures."""

    value: float
    n: int
    """Samples."""
    clusters: int
    """Pictures, and samples that share none."""
    stderr: float
    """0 where all pictures are alike, so that the error is unknown; NaN for a single picture."""
    degrees: float
    """Degrees of freedom of the error."""
    low: float
    high: float
    """95 % interval; NaN where neither the samples nor the bounds of the score give one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of an aggregation, by name."""

    @property
    def stderr_kind(self) -> str:
        """`clustered` where several samples share a picture, else `analytic`."""
        return "clustered" if self.clusters < self.n else "analytic"

    @property
    def groups(self) -> int:
        """Number of equally large clusters with as many degrees of freedom: fewer than there are, if uneven."""
        return min(self.clusters, math.floor(self.degrees + 1 + 1e-6))

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a true value of 0, by a t-test; by a sign test where all pictures are alike."""
        if self.n < 2:
            return math.nan
        return t_two_sided(self.t, self.degrees) if self.stderr > 0 else alike_p_value(self.value, self.groups)

    @property
    def t(self) -> float:
        """The value in standard errors."""
        if self.stderr > 0:
            return self.value / self.stderr
        return 0.0 if self.value == 0 else math.copysign(math.inf, self.value)

    @property
    def detectable(self) -> float:
        """The true value that so many pictures show with 80 % power; NaN where the error is unknown."""
        return shown_by_t_test(LEVEL, self.degrees) * self.stderr if self.stderr > 0 else math.nan

    def as_difference(self, unit: str = "") -> Difference:
        """The form that verdicts take; without a unit, the score is a share of right answers."""
        return Difference(value=self.value, low=self.low, high=self.high, groups=self.groups, unit=unit)


def estimate(ratios: Sequence[Ratio], clusters: Sequence[Hashable]) -> ScoreEstimate:
    """Measure a score or a difference of scores.

    The error counts samples of one cluster together (CR2 of Bell and McCaffrey). Where one of several ratios is the
    same in all its clusters, these do not show its error, and one cluster is taken to differ as much as the bounds
    allow. The interval of a score with bounds is the exact one of as many independent right-or-wrong answers as have
    the same error, fewer by the quantiles of t (Korn and Graubard); that of a difference is the t-interval, cut at its
    bounds. Where all clusters are alike, exact bounds limit the share of others.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    numbers = np.array([names[name] for name in clusters], dtype=int)
    value, count = value_of(ratios), len(names)
    low, high = sum(ratio.low for ratio in ratios), sum(ratio.high for ratio in ratios)
    variance, degrees = _error(ratios, numbers, count)
    stderr = math.sqrt(variance) if variance > (ROUNDING * max(1.0, abs(value))) ** 2 else 0.0
    without_interval = ScoreEstimate(
        value=value, n=len(numbers), clusters=count, stderr=stderr if count > 1 else math.nan, degrees=degrees,
        low=math.nan, high=math.nan,
    )  # fmt: skip
    bounds = _interval(without_interval, low, high)
    return replace(without_interval, low=bounds[0], high=bounds[1])


def _interval(estimate: ScoreEstimate, low: float, high: float) -> tuple[float, float]:
    value, score = estimate.value, low == 0 and math.isfinite(high)
    if not high - low > 0:
        return math.nan, math.nan
    if not score and estimate.n < 2:
        return math.nan, math.nan
    if estimate.stderr > 0:
        quantile = t_quantile(LEVEL, estimate.degrees)
        if score and min(value, high - value) > ROUNDING * high:
            share = value / high
            independent = share * (1 - share) * (high / estimate.stderr * NORMAL_QUANTILE / quantile) ** 2
            bounds = binomial_interval(share * independent, independent)
            return bounds[0] * high, bounds[1] * high
        bounds = (value - quantile * estimate.stderr, value + quantile * estimate.stderr)
        return max(low, bounds[0]), min(high, bounds[1])
    if not math.isfinite(high - low):
        return math.nan, math.nan
    if not score:
        bounds = alike_interval(value / high, estimate.groups)
    elif min(value, high - value) <= ROUNDING * high:
        bounds = binomial_interval(estimate.groups * round(value / high), estimate.groups)
    else:  # as many other pictures as exact bounds allow have the least or the largest score
        unseen = alike_interval(0.0, estimate.groups)[1]
        bounds = (value * (1 - unseen) / high, (value + unseen * (high - value)) / high)
    return bounds[0] * high, bounds[1] * high


def _error(ratios: Sequence[Ratio], numbers: NDArray[np.int_], count: int) -> tuple[float, float]:
    """The variance of a score and its degrees of freedom, those of Bell and McCaffrey for equal, independent errors.

    `D - X` is their matrix of products between what two clusters bring to the variance, which for one ratio is
    `g_c g_d (q_c [c = d] - h_d q_c - h_c q_d + h_c h_d Q)`: `h` is the leverage of a cluster, `g` its correction,
    `q` the sum of the squared shares of its samples, and `Q` that of all samples.
    """
    brought, diagonal, unseen, lone = np.zeros(count), np.zeros(count), 0.0, False
    left: list[Column] = []
    right: list[Column] = []
    for ratio in ratios:
        value, deviations, shares = ratio.values()
        leverage = np.clip(np.bincount(numbers, shares, count), 0.0, 1.0)
        alone = leverage > 1 - 1e-9
        correction = np.where(alone, 0.0, 1 / np.sqrt(np.where(alone, 1.0, 1 - leverage)))
        moved = correction * np.bincount(numbers, deviations, count)
        brought += moved
        if np.abs(moved).max() <= ROUNDING * max(1.0, abs(value)):
            farthest = max(value - ratio.low, ratio.high - value)
            unseen += (farthest * min(0.5, leverage.max())) ** 2
            lone |= bool(alone.any())
        width = ratio.high - ratio.low
        scale = correction * (width if math.isfinite(width) else 1.0)
        squares = np.bincount(numbers, shares**2, count)
        g, h = scale * squares, scale * leverage
        diagonal += scale * g
        left += [g, h, -squares.sum() * h]
        right += [h, g, h]
    if not left:
        return 0.0, max(1.0, count - 1.0)
    rows, columns = np.array(left), np.array(right)
    crossed = (rows * columns).sum(axis=0)
    trace = float((diagonal - crossed).sum())
    products = float((diagonal**2 - 2 * diagonal * crossed).sum() + ((rows @ rows.T) * (columns @ columns.T)).sum())
    defined = trace > 0 and products > 0
    variance = float(np.square(brought).sum())
    variance += unseen if lone or variance > ROUNDING**2 else 0.0
    return variance, max(1.0, trace**2 / products if defined else count - 1.0)
