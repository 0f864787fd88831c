"""Error bars: standard errors, intervals, paired comparison, bootstrap, power. Pure Python, no scipy.

Sources: Miller 2024 (2411.00640) for clustered errors and power, Bell and McCaffrey 2002 for errors of few clusters,
Wilson 1927 for proportions, McNemar 1947.
"""

from __future__ import annotations

import functools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from mm_moslora.reporting.verdicts import Difference

_NORMAL = NormalDist()
_CELLS, _MANY = 120, 1000.0
"""Cells of a numerical integral, and degrees of freedom that count as infinitely many there."""
_ROUNDING = 1e-12
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
    """Standard error of the mean of values that are correlated within clusters (questions on one image).

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


def few_clusters_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Standard error of the mean for a t-test, also of few clusters or of clusters of uneven size.

    Args:
        values: scores.
        clusters: the cluster of each score.

    Returns:
        The error of Bell and McCaffrey 2002 (CR2), and the number of clusters of equal size that have the same degrees
        of freedom; 0 and 1 where all scores are of one cluster.
    """
    centre, count = mean(values), len(values)
    deviations: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster].append(value - centre)
    sizes = [len(part) for part in deviations.values()]
    if len(sizes) < 2:
        return 0.0, 1.0
    squares = math.fsum(math.fsum(part) ** 2 / (1 - len(part) / count) for part in deviations.values())
    return math.sqrt(squares) / count, sum(size**2 for size in sizes) ** 2 / sum(size**4 for size in sizes)


def normal_interval(centre: float, stderr: float, *, level: float = 0.95) -> tuple[float, float]:
    """Interval from a standard error."""
    half = _NORMAL.inv_cdf((1 + level) / 2) * stderr
    return centre - half, centre + half


def wilson_interval(successes: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, which stays within 0 to 1."""
    if count == 0:
        return math.nan, math.nan
    z = _NORMAL.inv_cdf((1 + level) / 2)
    share = successes / count
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


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
    width = (1 + 10 / math.sqrt(degrees)) / _CELLS
    ratios = [(cell + 0.5) * width for cell in range(_CELLS)]
    logs = [(degrees - 1) * math.log(ratio) - degrees * ratio**2 / 2 for ratio in ratios]
    weights = [math.exp(value - max(logs)) for value in logs]
    low, high = 0.0, 2 * quantile + 10
    for _ in range(18):
        middle = (low + high) / 2
        found = sum(w * _NORMAL.cdf(middle - quantile * ratio) for w, ratio in zip(weights, ratios, strict=True))
        low, high = (middle, high) if found < power * sum(weights) else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Run A against run B on the same samples; the difference is A - B."""

    n: int
    difference: float
    stderr: float
    low: float
    high: float
    """95 % interval of the difference."""
    groups: int
    """Number of independent samples: of clusters, if they were given, fewer where some are much larger."""
    t: float
    p_value: float
    """Two-sided paired t-test, with the clustered error if clusters were given."""
    wins: int
    losses: int
    ties: int
    mcnemar_p: float
    """Exact sign test on the samples that differ."""

    @property
    def as_difference(self) -> Difference:
        """The difference in the form for verdicts."""
        return Difference(value=self.difference, low=self.low, high=self.high, groups=self.groups)


def paired(a: Sequence[float], b: Sequence[float], *, clusters: Sequence[Hashable] | None = None) -> Paired:
    """Compare two runs sample by sample.

    Args:
        a: scores of run A.
        b: scores of run B on the same samples in the same order.
        clusters: the cluster (image) of each sample, for a clustered error.
    """
    differences = [left - right for left, right in zip(a, b, strict=True)]
    count, centre = len(differences), mean(differences)
    wins, losses = sum(item > 0 for item in differences), sum(item < 0 for item in differences)
    stderr, independent = mean_stderr(differences), float(count)
    if clusters is not None and count > 1:
        stderr, independent = few_clusters_stderr(differences, clusters)
    degrees, groups = max(1.0, independent - 1), math.floor(independent + 1e-6)
    if count < 2:
        t, p_value, low, high = math.nan, math.nan, math.nan, math.nan
    elif stderr < _ROUNDING:
        t, p_value = 0.0 if centre == 0 else math.copysign(math.inf, centre), alike_p_value(centre, groups)
        low, high = alike_interval(centre, groups)
    else:
        t, p_value = _t_test(centre, stderr, degrees)
        half = t_quantile(0.95, degrees) * stderr
        low, high = centre - half, centre + half
    return Paired(
        n=count,
        difference=centre,
        stderr=stderr,
        low=low,
        high=high,
        groups=groups,
        t=t,
        p_value=p_value,
        wins=wins,
        losses=losses,
        ties=count - wins - losses,
        mcnemar_p=sign_test(wins, losses),
    )


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


def _t_test(centre: float, stderr: float, degrees: float) -> tuple[float, float]:
    t = centre / stderr
    return t, t_two_sided(t, degrees)


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


def bootstrap_stderr(
    groups: Sequence[Sequence[int]],
    statistic: Callable[[Sequence[int]], float],
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Standard error and 95 % interval of any statistic by a bootstrap over whole groups.

    Args:
        groups: sample numbers by group (image, question with its rotations).
        statistic: function of the drawn sample numbers.
        rounds: number of draws.
        seed: seed of this function's own generator.

    Returns:
        (standard error, low, high).
    """
    generator = random.Random(seed)
    values = sorted(
        statistic([member for group in generator.choices(groups, k=len(groups)) for member in group])
        for _ in range(rounds)
    )
    low, high = values[int(0.025 * rounds)], values[min(rounds - 1, math.ceil(0.975 * rounds))]
    return sample_stddev(values), low, high


def detectable_difference(stderr: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Minimum detectable difference of a paired comparison (Miller 2024, section 5).

    Args:
        stderr: standard error of the difference, clustered if samples are clustered.
        alpha: accepted rate of false positives.
        power: rate at which a true difference is detected.
    """
    return (_NORMAL.inv_cdf(1 - alpha / 2) + _NORMAL.inv_cdf(power)) * stderr
