"""Charts of a comparison on two axes: validation by learning rate, a small chart per arm, and score against cost.

Shapes: places are percent of a plot, 0 to 100, left to right and top to bottom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.comparison_charts import Plot, means_of
from mm_moslora.reporting.svg_charts import Axis, at, format_number, levels, line_between, upright

LOG_RATIO = 4.0
"""Ratio of the largest to the smallest loss above which its axis is logarithmic."""
DODGE = 4.0
"""Least distance of two arms in the charts of cost."""
FLOOR = 85.0
"""End of the scores in the charts of cost; below it thin lines lead to the exact cost."""
_SQUARE = '<rect class="mean" x="-4" y="-4" width="8" height="8"/>'


@dataclass(frozen=True, kw_only=True)
class RateChart:
    """The tuning runs of one arm."""

    name: str
    plot: Plot
    chosen: str
    edge: bool
    means: Mapping[float, float]
    """Mean validation value of each rate that worked."""
    failed: Sequence[float]
    """Rates with a failed run."""


@dataclass(frozen=True, kw_only=True)
class CostChart:
    """Score against one kind of cost, arms as numbered points."""

    title: str
    plot: Plot


def rate_charts(arms: Sequence[Mapping[str, Any]], *, loss: bool) -> list[RateChart]:
    """A chart per tuned arm, all with the same axes; none without two rates that worked.

    Args:
        arms: arms of the results.
        loss: whether the value is a loss, otherwise a share. Runs that failed are drawn at the worse edge.
    """
    points = [point for arm in arms for point in arm["curve"]]
    values = [point["value"] if loss else 100 * point["value"] for point in points if point["value"] is not None]
    if len({point["rate"] for point in points if point["value"] is not None}) < 2:
        return []
    across = Axis.over([point["rate"] for point in points], log=True)
    log = loss and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    up = Axis.over(values, start=100.0, end=0.0, log=log)
    return [_rate_chart(arm, across, up, loss=loss) for arm in arms if arm["curve"]]


def cost_charts(arms: Sequence[Mapping[str, Any]], task: str) -> list[CostChart]:
    """Score against trained parameters and against seconds of training, on logarithmic axes.

    Args:
        arms: arms of the results; a point has the number of its arm in this list.
        task: name of the column.
    """
    kinds = (("Score, percent, by trained parameters", "trainable"),
             ("Score, percent, by seconds of training", "train_seconds"))  # fmt: skip
    return [chart for title, key in kinds if (chart := _cost_chart(arms, task, title, key))]


def apart(places: Sequence[float], distance: float) -> list[float]:
    """Places moved as little as possible (in squares) so that neighbours keep a distance, within 0 to 100.

    Isotonic regression of the places less their steps, by pooling adjacent violators.

    Args:
        places: from 0 to 100, in any order, which they keep.
        distance: between neighbours; less where they do not fit.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    step = min(distance, 100 / max(1, len(places)))
    blocks: list[tuple[float, int]] = []  # sum and number of the places that stand side by side
    for rank, index in enumerate(order):
        total, size = places[index] - rank * step, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / size:
            before = blocks.pop()
            total, size = total + before[0], size + before[1]
        blocks.append((total, size))
    last = 100 - (len(places) - 1) * step
    means = [min(max(total / size, 0.0), last) for total, size in blocks for _ in range(size)]
    moved = {index: mean + rank * step for rank, (index, mean) in enumerate(zip(order, means, strict=True))}
    return [moved[index] for index in range(len(places))]


def _rate_chart(arm: Mapping[str, Any], across: Axis, up: Axis, *, loss: bool) -> RateChart:
    by_rate: dict[float, list[float]] = {}
    for point in arm["curve"]:
        known = point["value"] is not None
        by_rate.setdefault(point["rate"], []).extend([point["value"] * (1 if loss else 100)] if known else [])
    means = {rate: math.fsum(values) / len(values) for rate, values in sorted(by_rate.items()) if values}
    failed = sorted({point["rate"] for point in arm["curve"] if point["value"] is None})
    places = {rate: (across.place(rate), up.place(value)) for rate, value in means.items()}
    parts = [levels(up), *(line_between("curve", *pair) for pair in pairwise(places.values()))]
    parts += [
        at(across.place(rate), up.place(value), '<circle class="seed" r="2.8"/>')
        for rate, values in by_rate.items()
        for value in values
    ]
    cross = '<path class="failed" d="M-4,-4L4,4M-4,4L4,-4"/>'
    parts += [at(across.place(rate), 5 if loss else 95, cross) for rate in failed]
    rate, edge = arm["rate"], bool(arm["edge"])
    if rate in places:
        way = 1 if rate == max(means) else -1
        arrow = f'<path class="arrow" d="M{10 * way},-5L{16 * way},0L{10 * way},5"/>' if edge else ""
        parts.append(at(*places[rate], f'<circle class="chosen" r="6.5"/>{arrow}'))
    parts += _rate_labels(across, means, rate)
    told = [f"{tried:g}: {format_number(value)}" for tried, value in means.items()]
    told += [f"{tried:g}: failed" for tried in failed]
    chosen = "no rate chosen" if rate is None else f"chosen {rate:g}"
    spoken = f"{chosen}{', an edge of the grid' if edge else ''}; {'; '.join(told)}"
    return RateChart(name=arm["name"], plot=_plot(parts, spoken), chosen=chosen, edge=edge, means=means, failed=failed)


def _rate_labels(across: Axis, means: Mapping[float, float], chosen: float | None) -> list[str]:
    """The outer rates and the chosen one, which leaves out what it would touch."""
    picked = [rate for rate in means if rate == chosen]
    outer = [min(means), max(means)] if means else []
    kept = [rate for rate in outer if all(abs(across.place(rate) - across.place(other)) > 38 for other in picked)]
    return [
        f'<text{" class=picked" if rate == chosen else ""} x="{across.place(rate):.2f}%" y="100%" dy="15" '
        f'text-anchor="middle">{rate:g}</text>'
        for rate in (*kept, *picked)
    ]


def _cost_chart(arms: Sequence[Mapping[str, Any]], task: str, title: str, key: str) -> CostChart | None:
    found = [
        (number, arm["name"], arm["cost"][key], measure)
        for number, arm in enumerate(arms, 1)
        if arm["cost"] and (arm["cost"].get(key) or 0) > 0
        and (measure := means_of(arm, task)[0]).value is not None
    ]  # fmt: skip
    if len(found) < 2:
        return None
    across = Axis.over([cost for _, _, cost, _ in found], log=True)
    up = Axis.over([end for *_, measure in found for end in measure.ends], start=FLOOR, end=0.0)
    parts = [levels(up)]
    for mark in across.few_ticks():
        x = across.place(mark)
        parts.append(upright("grid", x))
        parts.append(f'<text x="{x:.2f}%" y="100%" dy="15" text-anchor="middle">{format_number(mark)}</text>')
    places = apart([across.place(cost) for _, _, cost, _ in found], DODGE)
    for (number, _, cost, measure), x in zip(found, places, strict=True):
        low, high = (up.place(end) for end in measure.ends)
        parts += [
            line_between("leader", (x, low), (x, FLOOR)),
            line_between("leader", (x, FLOOR), (across.place(cost), 100)),
        ]
        parts.append(line_between("interval", (x, low), (x, high)))
        parts.append(at(x, up.place(measure.value or 0.0), _SQUARE))
        parts.append(f'<text class="number" x="{x:.2f}%" y="{high:.2f}%" dy="-4" text-anchor="middle">{number}</text>')
    spoken = "; ".join(f"{name}: {format_number(cost)}, {measure.text} percent" for _, name, cost, measure in found)
    return CostChart(title=title, plot=_plot(parts, spoken))


def _plot(parts: Sequence[str], spoken: str) -> Plot:
    return Plot(marks=Markup("".join(parts)), spoken=spoken)  # noqa: S704
