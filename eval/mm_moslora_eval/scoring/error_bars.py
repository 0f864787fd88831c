"""Distributions and tests on which `estimates` and `mm_moslora.compare` stand. scipy is imported where it is used.

Sources: Clopper and Pearson 1934 for proportions, McNemar 1947.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

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
