"""Looks at a comparison after some of its seeds, with error rates kept: group-sequential tests by alpha spending.

After each look the comparison may stop. Up to the fraction ``t`` of the planned information (the final variance over
the present one), ``4 - 4 Phi(z / sqrt(t))`` of the error rate ``a`` is spent, with ``Phi(z) = 1 - a / 4``: O'Brien and
Fleming's kind of boundary on both sides (Lan and DeMets 1983). The nominal levels follow by recursive integration
(Armitage, McPherson and Rowe 1969) and are used on t-tests. Documents are the same at all looks, which the theory
allows: the covariance of two estimates is still the variance of the later one. Intervals at the nominal level are
repeated confidence intervals (Jennison and Turnbull 1989): they hold at all looks together, so any reason to stop is
allowed, and an arm may stop before the others. Its numbers stay those of its last look: the seeds that the reference
runs later do not count for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_moslora.compare.seed_statistics import ArmEstimate, TaskScores, differences, holm
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json, replace_json
from mm_moslora.utils.untrusted_data import build_strictly

Array = NDArray[np.float64]
OVERALL = 0.05
_RATES = np.unique(np.append(np.geomspace(1e-5, 0.5, 40), OVERALL))
"""Overall error rates at which the levels are computed."""
_CELLS, _SPAN = 200, 5.0
"""Cells of the Brownian motion's positive half; at the last look its standard deviation is 1."""
_APART = abs(np.arange(_CELLS)[:, None] - np.arange(_CELLS))
_AGAINST = np.arange(_CELLS)[:, None] + np.arange(_CELLS) + 1
"""Distances of cells on the same side and on different sides, in cells."""
LEAST = 0.03
"""Least growth of the fraction between two looks; the kernel of a smaller one would be narrower than a few cells."""


@dataclass(frozen=True)
class Looks:
    """The looks that a plan allows."""

    seeds: tuple[int, ...]
    """Number of seeds of each look; the last is the plan's."""
    fractions: tuple[float, ...]
    """Share of the planned information at each look, 1 at the last."""

    def __post_init__(self) -> None:
        rising = all(one < other for row in (self.seeds, self.fractions) for one, other in pairwise((0, *row)))
        if not rising or len(self.seeds) != len(self.fractions) or self.fractions[-1:] != (1.0,):
            raise ValueError(f"looks after {self.seeds} seeds with {self.fractions} of the information do not rise")

    def level(self, seeds: int) -> float:
        """The nominal two-sided level of the look at so many seeds, for an error rate of 5 % over all looks."""
        levels = nominal_levels(self.fractions)[:, self.seeds.index(seeds)]
        return float(levels[np.searchsorted(_RATES, OVERALL)])

    def p_value(self, p: float, seeds: int) -> float:
        """The smallest overall error rate at which this look shows a difference.

        It holds whenever the comparison stops, so it may be corrected for several arms like any p-value.

        Args:
            p: of the t-test at this look.
            seeds: number of seeds.
        """
        levels = nominal_levels(self.fractions)[:, self.seeds.index(seeds)]
        if not p <= levels[-1]:  # NaN, too
            return p if p != p else max(p, float(_RATES[-1]))
        logs = np.log(np.maximum(levels, 1e-300))
        return max(p, float(np.exp(np.interp(np.log(max(p, 1e-300)), logs, np.log(_RATES)))))


def planned_looks(first: int, last: int, variance: Sequence[float], *, step: int = 1) -> Looks:
    """Looks after every `step` seeds, as far as they bring information.

    Args:
        first: seeds of the first look.
        last: seeds of the last one.
        variance: of a difference by number of seeds, from `first` on to `last`.
        step: seeds that are run at the same time.
    """
    fractions = {first + index: round(float(variance[-1] / value), 2) for index, value in enumerate(variance)}
    chosen: list[int] = []
    for seeds in range(first, last, step):
        if fractions[seeds] - (fractions[chosen[-1]] if chosen else 0.0) >= LEAST and 1 - fractions[seeds] >= LEAST:
            chosen.append(seeds)
    return Looks((*chosen, last), (*(fractions[seeds] for seeds in chosen), 1.0))


@functools.lru_cache(maxsize=256)
def nominal_levels(fractions: tuple[float, ...]) -> Array:
    """Two-sided nominal levels ``[R, L]`` of looks, for each overall error rate of `_RATES`.

    Args:
        fractions: information of each look, rising to 1.
    """
    from scipy.special import ndtr, ndtri

    width = _SPAN / _CELLS
    cells = np.linspace(width / 2, _SPAN - width / 2, _CELLS)  # by symmetry, a cell holds both signs
    whole = ndtri(1 - _RATES / 4)
    inside = np.zeros((len(_RATES), _CELLS))
    levels, before, last = np.zeros((len(_RATES), len(fractions))), np.zeros(len(_RATES)), 0.0
    for look, fraction in enumerate(fractions):
        spent = 4 - 4 * ndtr(whole / fraction**0.5)
        if look == 0:
            mass = np.tile(2 * width * _density(cells, fraction), (len(_RATES), 1))
        else:
            steps = _density(np.arange(2 * _CELLS, dtype=np.float64) * width, fraction - last) * width
            mass = inside @ (steps[_APART] + steps[_AGAINST])
        bounds = _bounds(mass, spent - before, width)
        levels[:, look] = 2 - 2 * ndtr(bounds / fraction**0.5)
        inside = mass * np.clip((bounds[:, None] - cells + width / 2) / width, 0.0, 1.0)
        before, last = spent, fraction
    return levels


def _density(at: Array, variance: float) -> Array:
    return np.asarray(np.exp(-np.square(at) / (2 * variance)) / (2 * math.pi * variance) ** 0.5)


def _bounds(mass: Array, spend: Array, width: float) -> Array:
    """The places ``[R]`` beyond which lies the mass to spend, between the edges of the cells of mass ``[R, cells]``."""
    beyond = np.pad(np.cumsum(mass[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    first = (beyond > spend[:, None]).sum(axis=1)  # the first edge with no more than that beyond it
    edges = np.stack([np.maximum(first - 1, 0), np.minimum(first, mass.shape[1] - 1)], axis=1)
    low, high = np.log(np.maximum(np.take_along_axis(beyond, edges, axis=1), 1e-300)).T
    fall = np.where(low > high, low - high, 1.0)
    share = np.where(low > high, (low - np.log(np.maximum(spend, 1e-300))) / fall, 1.0)
    return np.asarray(np.maximum(first - 1 + np.minimum(1.0, share), 0.0) * width * (first > 0))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An arm against the reference."""

    estimate: ArmEstimate
    """Its interval holds for all looks together; between two looks, for the present seeds alone."""
    p_corrected: float
    """P-value corrected over all looks and arms; NaN between two looks, where nothing is judged."""
    look: bool = True
    """Whether it is one of the looks."""

    def numbers(self, *, comparisons: int) -> dict[str, Any]:
        """The numbers of a row of `results.json`, with p-values of so many arms."""
        estimate = self.estimate
        return {
            "difference": estimate.value,
            "stderr": estimate.stderr,
            "low": estimate.low,
            "high": estimate.high,
            "half_width": estimate.half_width,
            "p": estimate.p_value,
            "p_corrected": self.p_corrected,
            "detectable": estimate.detectable(comparisons=comparisons),
            "components": asdict(estimate.components),
            "run_degrees": estimate.run_degrees,
            "seeds": estimate.size[0],
            "documents": estimate.size[1],
            "clusters": estimate.groups,
        }


Arms = Mapping[str, Mapping[str, TaskScores]]


def judge(
    arms: Arms, reference: Mapping[str, TaskScores], seeds: Mapping[str, int], *, looks: Looks | None,
    bounded: bool = True,
) -> dict[str, Judged]:  # fmt: skip
    """Each arm that has a seed of the reference against it, at its last look; p-values are corrected over them (Holm).

    Args:
        arms: by name, task -> scores.
        reference: its scores.
        seeds: of each arm, planned; all arms count with so many in its comparison.
        looks: of the comparison; None: all arms have the same seeds, at the only look. An arm with another number of
            seeds than a look gets no p-value: no part of the error rate is spent there.
        bounded: see `differences`.
    """
    estimates: dict[str, ArmEstimate] = {}
    for count in sorted({seeds[name] for name in arms}):
        these = {name: first_seeds(tasks, count) for name, tasks in arms.items()}
        at_count = differences(these, first_seeds(reference, count), bounded=bounded)
        estimates |= {name: one for name, one in at_count.items() if seeds[name] == count}
    estimates = {name: estimates[name] for name in arms if name in estimates}
    at_look: Mapping[str, ArmEstimate] = {}
    if looks is None:
        p_values = [one.p_value for one in estimates.values()]
    else:
        at_look = {name: one for name, one in estimates.items() if seeds[name] in looks.seeds}
        p_values = [
            looks.p_value(one.p_value, seeds[name]) if name in at_look else 1.0 for name, one in estimates.items()
        ]
        estimates |= {name: one.at_level(looks.level(seeds[name])) for name, one in at_look.items()}
    judged = {name: looks is None or name in at_look for name in estimates}  # the others count in the correction
    return {
        name: Judged(estimate=one, p_corrected=corrected if judged[name] else math.nan, look=judged[name])
        for (name, one), corrected in zip(estimates.items(), holm(p_values), strict=True)
    }


def first_seeds(tasks: Mapping[str, TaskScores], count: int) -> dict[str, TaskScores]:
    """The scores of the seeds below a number."""
    return {name: task.first(count) for name, task in tasks.items()}


FILE = "resolve.json"


@dataclass(frozen=True, kw_only=True)
class LookState:
    """The plan of a comparison with looks, fixed after its pilot, and where it stands; kept in its folder."""

    points: float
    """The difference to show, as a share."""
    seeds: int
    """Seeds to run now."""
    looks: Looks
    components: dict[str, float]
    """Variance components of the pilot."""
    ended: str = ""
    """Why no more seeds are run; empty while they are."""
    arms: dict[str, int] = field(default_factory=dict)
    """Seeds of the arms that were decided before the last look, and run no more."""
    reference: str = ""
    """The arm that the others were compared with; empty in files of earlier versions."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings that the error rates count on, see `comparison_plan.planned_for`; empty in files of earlier versions."""


def read_state(folder: Path) -> LookState | None:
    """The plan of a folder; None where the comparison has none.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / FILE
    try:
        return build_strictly(LookState, read_json(file), source="it")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}). Restore it, or choose another --output.") from error


def write_state(folder: Path, state: LookState) -> None:
    """Write the plan atomically."""
    replace_json(folder / FILE, asdict(state))
