"""The variance between runs of arms, with seeds as blocks: pooled over arms, except where an arm's runs spread more.

Sources: Yates 1933 (blocks with missing runs), Satterthwaite 1946 (degrees of freedom), Bancroft 1944 (pooling of
variances after a test).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mm_moslora_eval.scoring.estimates import f_upper_tail

ROUNDING = 1e-24
"""A variance of shares below this is rounding: all differences are equal."""
_POOLED = 0.25
"""An arm's variance between seeds is pooled unless it is above that of the other arms at this level (Bancroft 1944)."""
Runs = Mapping[int, float]
"""Deviation of each seed's score, over all tasks, from the mean of the arm's runs."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Variance between the runs of an arm, in the score of a run over all tasks."""

    squares: float
    """Sum of squares."""
    degrees: int
    """Degrees of freedom; 0 where it is unknown."""
    pooled: bool = False
    """Whether it is the mean over arms."""

    @property
    def variance(self) -> float:
        """Variance of one run; 0 where it is unknown."""
        return self.squares / max(1, self.degrees)


def variance_of_means(spreads: Sequence[Spread], seeds: int) -> tuple[float, float]:
    """The variance of a sum of means over seeds, one of each spread, and its degrees of freedom (0: unknown)."""
    # The mean over arms holds the squares of an arm that has a variance of its own, too; sums of squares that are
    # independent are taken apart, and count once each.
    alone = [spread for spread in spreads if not spread.pooled]
    together = [spread for spread in spreads if spread.pooled]
    of_each = len(together) / max(1, together[0].degrees) if together else 0.0  # a square's weight by the mean
    parts = [(spread.variance + of_each * spread.squares, spread.degrees) for spread in alone]
    if together:
        rest = together[0].degrees - sum(spread.degrees for spread in alone)
        squares = max(0.0, together[0].squares - sum(spread.squares for spread in alone))
        parts.append((of_each * squares, rest))
    variance = sum(part for part, _ in parts)
    all_known = all(spread.degrees for spread in spreads)
    squared = sum(part**2 / max(1, degrees) for part, degrees in parts)
    degrees = variance**2 / squared if squared else float(sum(degrees for _, degrees in parts))
    return variance / seeds, degrees if all_known else 0.0


def residual(arms: Sequence[Runs], *, blocks: bool = True) -> tuple[float, int]:
    """Sum of squares of the runs around the effects of arms and, as blocks, of seeds, and its degrees of freedom."""
    values = np.array([value for runs in arms for value in runs.values()])
    effects = (
        [("arm", index) for index, runs in enumerate(arms) for _ in runs],
        [("seed", seed) for runs in arms for seed in runs],
    )
    columns = {name: index for index, name in enumerate({*effects[0], *effects[1]})}
    design = np.zeros((len(values), len(columns)))
    for names in effects if blocks else effects[:1]:
        design[range(len(values)), [columns[name] for name in names]] = 1.0
    fitted, _, rank, _ = np.linalg.lstsq(design, values)
    return float(np.square(values - design @ fitted).sum()), len(values) - int(rank)


def pooled(arms: Sequence[Runs]) -> list[Spread]:
    """The variances between runs that differences take: the mean over arms, or an arm's own if it is larger."""
    squares, degrees = residual(arms)
    mean, spreads = Spread(squares=squares, degrees=degrees, pooled=True), []
    for index in range(len(arms)):
        # What an arm adds to the squares of the others is independent of them.
        rest, below = residual([*arms[:index], *arms[index + 1 :]])
        own = Spread(squares=max(0.0, squares - rest), degrees=degrees - below)
        ratio = own.variance * below / rest if rest > ROUNDING else math.inf
        tested = own.degrees and below and own.squares > ROUNDING
        alone = tested and f_upper_tail(ratio, own.degrees, below) < _POOLED
        spreads.append(own if alone else mean)
    return spreads
