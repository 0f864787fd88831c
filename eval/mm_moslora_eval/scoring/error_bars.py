"""Distributions and tests on which `estimates` and `mm_moslora.compare` stand. Pure Python, no scipy.

Sources: Miller 2024 (2411.00640) for clustered errors, Clopper and Pearson 1934 for proportions, McNemar 1947.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist

_NORMAL = NormalDist()
NORMAL_QUANTILE = _NORMAL.inv_cdf(0.975)
"""Of 95 %, in both tails together."""
_CELLS, _MANY = 120, 1000.0
"""Cells of a numerical integral, and degrees of freedom that count as infinitely many there."""
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


def mean_stderr(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; nan for fewer than two."""
    return sample_stddev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of values that are correlated within clusters, as other harnesses print it.

    `estimates` has a larger one, for few clusters.

    Args:
        values: scores.
        clusters: the cluster of each score, such as its image.

    Returns:
        The error of Miller 2024, equation 4: the usual variance plus the cross terms within clusters.
    """
    count = len(values)
    if count < 2:
        return math.nan
    centre = mean(values)
    deviations: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster].append(value - centre)
    cross = math.fsum(math.fsum(part) ** 2 - math.fsum(item * item for item in part) for part in deviations.values())
    variance = mean_stderr(values) ** 2 + cross / count**2
    # The sum may be negative by a rounding error when clusters cancel exactly.
    return math.sqrt(max(0.0, variance))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by Lentz's continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _nonzero(1 + term * d, tiny)
            c = _nonzero(1 + term / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * result


def _nonzero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def binomial_interval(successes: float, count: float, *, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper and Pearson 1934), also of broken numbers of successes and trials."""

    def bound(tail: float, a: float, b: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _incomplete_beta(a, b, middle) < tail else (low, middle)
        return (low + high) / 2

    tail, failures = (1 - level) / 2, count - successes
    return (
        bound(tail, successes, failures + 1) if successes > 0 else 0.0,
        bound(1 - tail, successes + 1, failures) if failures > 0 else 1.0,
    )


def t_two_sided(t: float, degrees: float) -> float:
    """Two-sided p-value of Student's t."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def f_upper_tail(ratio: float, above: float, below: float) -> float:
    """One-sided p-value of Fisher's F, a ratio of two variances.

    Args:
        ratio: the observed ratio.
        above: degrees of freedom of the numerator.
        below: degrees of freedom of the denominator.
    """
    return _incomplete_beta(below / 2, above / 2, below / (below + above * ratio))


def t_quantile(level: float, degrees: float) -> float:
    """The quantile of t with probability (1 - level), at least 1e-15, in both tails together.

    Newton's method rises to it from the normal quantile, since the tails' probability is convex.
    """
    tails = max(1 - level, 1e-15)
    at = -_NORMAL.inv_cdf(tails / 2)
    scale = 2 * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    for _ in range(200):
        density = scale * (1 + at * at / degrees) ** (-(degrees + 1) / 2)
        step = (t_two_sided(at, degrees) - tails) / density
        at += step
        if step <= 1e-14 * at:
            break
    return at


@functools.lru_cache(maxsize=4096)
def shown_by_t_test(level: float, degrees: float, *, power: float = 0.8) -> float:
    """The true value, in true standard errors, that a t-test shows so often (by the noncentral t, its near tail).

    Args:
        level: 1 - the two-sided level of the test.
        degrees: degrees of freedom of the estimated standard error; infinite: it is known.
        power: how often.
    """
    quantile = t_quantile(level, min(degrees, _MANY))
    if degrees >= _MANY:
        return quantile + _NORMAL.inv_cdf(power)
    # The estimated error over the true one: a chi over the root of its degrees, in cells of equal width.
    cells = _CELLS * math.ceil(1 + 20 / degrees)  # with few degrees the quantile times a cell's width would be coarse
    width = (1 + 10 / math.sqrt(degrees)) / cells
    ratios = [(cell + 0.5) * width for cell in range(cells)]
    logs = [(degrees - 1) * math.log(ratio) - degrees * ratio**2 / 2 for ratio in ratios]
    weights = [math.exp(value - max(logs)) for value in logs]
    low, high = 0.0, 2 * quantile + 10
    for _ in range(18):
        middle = (low + high) / 2
        found = sum(w * _NORMAL.cdf(middle - quantile * ratio) for w, ratio in zip(weights, ratios, strict=True))
        low, high = (middle, high) if found < power * sum(weights) else (low, middle)
    return high


def alike_interval(difference: float, groups: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean difference if every sample differs by the same amount, so that the sample variance is zero.

    Then the error is unknown, not zero. Exact binomial bounds (Clopper and Pearson 1934) limit the share of other
    samples. If all scores are equal, up to that share may differ by 1 in either direction. Otherwise at least the rest
    differs the same way, and that share the opposite way.

    Args:
        difference: the difference of every sample.
        groups: number of independent samples.
        level: confidence level.
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
    count = wins + losses
    if count == 0:
        return 1.0
    log_half = count * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - log_half)
        for k in range(min(wins, losses) + 1)
    )
    return min(1.0, 2 * tail)
