"""Charts of a comparison on two axes: validation by learning rate, a small chart per arm, and score against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.comparison.comparison_charts import means_of
from mm_moslora.reporting.svg_charts import chart_style, format_number, new_axes, number_axis, to_svg

LOG_RATIO = 4.0
"""Ratio of the largest to the smallest loss above which its axis is logarithmic."""
DODGE = 0.045
"""Least distance of two arms in the charts of cost, as a share of the axis."""


@dataclass(frozen=True, kw_only=True)
class RateChart:
    """The tuning runs of one arm."""

    name: str
    picture: Markup
    chosen: str
    edge: bool
    means: Mapping[float, float]
    """Mean validation value of each rate that worked."""
    failed: Sequence[float]
    """Rates with a failed run."""


def rate_charts(arms: Sequence[Mapping[str, Any]], *, loss: bool) -> list[RateChart]:
    """A chart per tuned arm, with the same axes; failed runs lie at the worse edge. None without two rates."""
    points = [point for arm in arms for point in arm["curve"]]
    values = [point["value"] * (1 if loss else 100) for point in points if point["value"] is not None]
    if len({point["rate"] for point in points if point["value"] is not None}) < 2:
        return []
    rates = [point["rate"] for point in points]
    air = (max(rates) / min(rates)) ** 0.1
    axis = {"xlim": (min(rates) / air, max(rates) * air), "xscale": "log"}
    pad = 0.08 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    axis |= {"ylim": (min(values) - pad, max(values) + pad)}
    if loss and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axis |= {"yscale": "log", "ylim": (min(values) / 1.15, max(values) * 1.15)}
    return [_rate_chart(arm, axis, loss=loss) for arm in arms if arm["curve"]]


def cost_charts(arms: Sequence[Mapping[str, Any]], task: str) -> list[tuple[str, Markup]]:
    """Score against trained parameters and against seconds of training, on logarithmic axes, with their titles."""
    kinds = (("Score, percent, by trained parameters", "trainable"),
             ("Score, percent, by seconds of training", "train_seconds"))  # fmt: skip
    return [(title, chart) for title, key in kinds if (chart := _cost_chart(arms, task, title, key))]


def dodge(positions: Sequence[float], distance: float) -> list[float]:
    """Positions from 0 to 1 in their order, moved until neighbours keep a distance, or less where they do not fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    step = min(distance, 1 / max(1, len(positions)))
    moved = dict(enumerate(positions))
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + step)
    limit = 1 - step / 2
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - step
    return [moved[index] for index in range(len(positions))]


def _rate_chart(arm: Mapping[str, Any], axis: Mapping[str, Any], *, loss: bool) -> RateChart:
    by_rate: dict[float, list[float]] = {}
    for point in arm["curve"]:
        worked = point["value"] is not None
        by_rate.setdefault(point["rate"], []).extend([point["value"] * (1 if loss else 100)] if worked else [])
    means = {rate: math.fsum(values) / len(values) for rate, values in sorted(by_rate.items()) if values}
    failed = sorted({point["rate"] for point in arm["curve"] if point["value"] is None})
    rate, edge = arm["rate"], bool(arm["edge"])
    chosen = "no rate chosen" if rate is None else f"chosen {rate:g}"
    titles = [f"{tried:g}: {format_number(value)}" for tried, value in means.items()]
    titles += [f"{tried:g}: failed" for tried in failed]
    with chart_style() as named:
        axes = new_axes(150, 105, left=32, right=14, top=10, bottom=20)
        axes.set(**axis)
        axes.plot([*means], [*means.values()], color=named["accent"], linewidth=1.6)
        for index, tried in enumerate(means):
            values = by_rate[tried]
            axes.plot([tried] * len(values), values, "o", color=named["accent"], markersize=5, gid=f"title-{index}")
        for index, tried in enumerate(failed, len(means)):
            edge_value = axis["ylim"][1 if loss else 0]
            axes.plot(tried, edge_value, "x", color=named["bad"], markersize=8, clip_on=False, gid=f"title-{index}")
        if rate in means:
            axes.plot(rate, means[rate], "o", color=named["accent"], markerfacecolor="none", markersize=12)
        if rate in means and edge:
            way, mark = (12, "→") if rate == max(means) else (-12, "←")
            axes.annotate(mark, (rate, means[rate]), (way, 0), textcoords="offset points", va="center", ha="center")
        number_axis(axes.yaxis, count=3, log="yscale" in axis)
        axes.grid(visible=False, axis="x")
        number_axis(axes.xaxis, log=True)
        axes.set_xticks(_rate_labels(means, rate, math.log10(axis["xlim"][1] / axis["xlim"][0])))
        picture = to_svg(axes.figure, f"{arm['name']}: {chosen}; {'; '.join(titles)}", titles=titles)
    return RateChart(name=arm["name"], picture=picture, chosen=chosen, edge=edge, means=means, failed=failed)


def _rate_labels(means: Mapping[float, float], chosen: float | None, decades: float) -> list[float]:
    """The outer rates and the chosen one, which leaves out what it would touch."""
    picked = [rate for rate in means if rate == chosen]
    far = [rate for rate in means if not picked or abs(math.log10(rate / picked[0])) > 0.38 * decades]
    return [*picked, *{rate for rate in far if rate in (min(means), max(means))}]


def _cost_chart(arms: Sequence[Mapping[str, Any]], task: str, title: str, key: str) -> Markup | None:
    points = [
        (number, arm["name"], arm["cost"][key], measure)
        for number, arm in enumerate(arms, 1)
        if arm["cost"] and (arm["cost"].get(key) or 0) > 0
        and (measure := means_of(arm, task)[0]).value is not None
    ]  # fmt: skip
    if len(points) < 2:
        return None
    logs = [math.log10(cost) for _, _, cost, _ in points]
    air = 0.06 * (max(logs) - min(logs)) or 0.1
    start, width = min(logs) - air, max(logs) - min(logs) + 2 * air
    positions = [10 ** (start + width * position) for position in dodge([(log - start) / width for log in logs], DODGE)]
    titles = [f"{name}: {format_number(cost)}, {measure.text} percent" for _, name, cost, measure in points]
    with chart_style() as named:
        axes = new_axes(360, 250, left=34, right=8, top=20, bottom=22)
        axes.set(xscale="log", xlim=(10**start, 10 ** (start + width)))
        for (number, *_, measure), position in zip(points, positions, strict=True):
            (low, high), value = measure.ends, measure.value or 0.0
            axes.errorbar(
                [position], [value], [[value - low], [high - value]], fmt="s", color=named["accent"], elinewidth=2
            )
            axes.annotate(
                str(number), (position, high), (0, 4), textcoords="offset points", ha="center", fontweight="bold"
            )
        low, high = axes.get_ylim()
        bottom = low - 0.15 * (high - low)
        for (_, _, cost, measure), position in zip(points, positions, strict=True):
            axes.plot(
                [position, position, cost], [measure.ends[0], low, bottom], color=named["quiet"], linewidth=1, alpha=0.5
            )
        for index, position in enumerate(positions):
            axes.plot([position], [points[index][3].value], "s", color=named["accent"], gid=f"title-{index}")
        axes.set_ylim(bottom, high)
        number_axis(axes.xaxis, count=4, log=True)
        number_axis(axes.yaxis)
        return to_svg(axes.figure, f"{title}. {'; '.join(titles)}", titles=titles)
