"""SVG charts of a comparison: seeds as points, differences with intervals, scores by learning rate.

Colours come from the page's style sheet (`c0` to `c5`). Shapes: a chart is a view box of ``WIDTH`` units, with a height
that depends on its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mm_moslora.reporting.svg_charts import format_number, ticks
from mm_moslora.reporting.verdicts import HOLDS_ZERO

WIDTH, ROW, NAMES, RIGHT, BOTTOM = 640, 34, 190, 24, 40
COLOURS = 6


class _Scale:
    """Maps values to view-box units, linear or logarithmic, with a margin at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self.log = log
        placed = [math.log10(value) if log else value for value in values]
        low, high = min(placed), max(placed)
        air = (high - low) * 0.08 or abs(low) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - air, high + air, start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[float]:
        return ticks(self.low, self.high)


def means_chart(arms: Sequence[Mapping[str, Any]], task: str, floors: Mapping[str, float], *, title: str) -> str:
    """Arms as rows: every seed as a point, the mean with its 95 % interval, the baselines as dashed lines.

    Args:
        arms: arms of the results; those that were measured on the task are drawn.
        task: name of the column.
        floors: scores of answers without a model.
        title: text of the heading and for screen readers.
    """
    rows = [(index, arm["name"], arm["tasks"][task]) for index, arm in enumerate(arms) if task in arm["tasks"]]
    if not rows:
        return ""
    values = [v for _, _, m in rows for v in (*m["seeds"], m["low"], m["high"]) if v is not None]
    shown = {name: value for name, value in floors.items() if value is not None}
    scale = _Scale([100 * value for value in (*values, *shown.values())], NAMES, WIDTH - RIGHT)
    height = ROW * len(rows) + BOTTOM + 12
    parts = [_axis(scale, height, "percent")]
    for value in sorted(set(shown.values())):
        names = " and ".join(name.replace("_", " ") for name, v in shown.items() if v == value)
        x = scale(100 * value)
        parts.append(f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - BOTTOM}"/>')
        side = f'x="{x - 4:.1f}" text-anchor="end"' if x > WIDTH / 2 else f'x="{x + 4:.1f}"'
        parts.append(f'<text class="floor-name" y="12" {side}>{escape(names)}</text>')
    for row, (index, name, measure) in enumerate(rows):
        y, colour = ROW * row + ROW / 2 + 12, index % COLOURS
        parts.append(_name(name, y))
        parts.append(_interval(scale, 100 * measure["low"], 100 * measure["mean"], 100 * measure["high"], y, colour))
        parts += [
            f'<circle class="seed c{colour}" cx="{scale(100 * value):.1f}" cy="{y - 9:.1f}" r="3.4"/>'
            for value in measure["seeds"]
        ]
    spoken = "; ".join(f"{name} {100 * m['mean']:.1f}" for _, name, m in rows)
    return _figure(title, f"{title}: {spoken}", "".join(parts), height, "Points: seeds. Bar: mean and 95 % interval.")


def differences_chart(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[str], *, title: str, unit: str = "points"
) -> str:
    """Each arm minus the reference, with its 95 % interval and a mark at zero.

    Args:
        rows: differences with `arm`, `reference`, `difference`, `low` and `high`; shares where the unit is points.
        arms: all names, for the colours.
        title: text of the heading and for screen readers.
        unit: points, or nats.
    """
    if not rows:
        return ""
    factor, digits = (100, 1) if unit == "points" else (1, 3)
    values = [factor * row[key] for row in rows for key in ("low", "high")] + [0.0]
    scale = _Scale(values, NAMES, WIDTH - RIGHT)
    height = ROW * len(rows) + BOTTOM
    zero = scale(0.0)
    parts = [_axis(scale, height, f"{unit} against {rows[0]['reference']}")]
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height - BOTTOM}"/>')
    for number, row in enumerate(rows):
        y, colour = ROW * number + ROW / 2, arms.index(row["arm"]) % COLOURS
        parts.append(_name(row["arm"], y))
        low, middle, high = (factor * row[key] for key in ("low", "difference", "high"))
        parts.append(_interval(scale, low, middle, high, y, colour))
    spoken = "; ".join(f"{row['arm']} {factor * row['difference']:+.{digits}f}" for row in rows)
    return _figure(title, f"{title}: {spoken}", "".join(parts), height, HOLDS_ZERO)


def rates_chart(arms: Sequence[Mapping[str, Any]], *, title: str, measure: str, percent: bool) -> str:
    """Validation value by learning rate: the means of an arm as a line, runs as points, the chosen rate ringed."""
    factor = 100.0 if percent else 1.0
    drawn = [(index, arm, [p for p in arm["curve"] if p["value"] is not None]) for index, arm in enumerate(arms)]
    points = [point for _, _, curve in drawn for point in curve]
    if len({point["rate"] for point in points}) < 2:
        return ""
    height, left = 300, 62
    across = _Scale([point["rate"] for point in points], left, WIDTH - RIGHT, log=True)
    up = _Scale([factor * point["value"] for point in points], height - BOTTOM, 12)
    parts = [_grid(across, up, height, left, sorted({point["rate"] for point in points}))]
    legend = []
    for index, arm, curve in drawn:
        colour = index % COLOURS
        means = _means(curve)
        line = " ".join(f"{across(rate):.1f},{up(factor * value):.1f}" for rate, value in means)
        if len(means) > 1:
            parts.append(f'<polyline class="line c{colour}" points="{line}"/>')
        parts += [
            f'<circle class="seed c{colour}" cx="{across(p["rate"]):.1f}" cy="{up(factor * p["value"]):.1f}" r="3.4"/>'
            for p in curve
        ]
        parts += [
            f'<circle class="chosen c{colour}" cx="{across(rate):.1f}" cy="{up(factor * value):.1f}" r="7.5"/>'
            for rate, value in means
            if rate == arm["rate"]
        ]
        legend.append(f'<li><i class="key c{colour}"></i>{escape(arm["name"])}</li>')
    spoken = "; ".join(f"{arm['name']} best at {arm['rate']:g}" for arm in arms if arm["rate"])
    body = _figure(title, f"{title}: {spoken}", "".join(parts), height, f"{measure}. Ringed: the chosen rate.")
    return body.replace("</figure>", f'<ul class="legend">{"".join(legend)}</ul></figure>')


def _means(curve: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    by_rate: dict[float, list[float]] = {}
    for point in curve:
        by_rate.setdefault(point["rate"], []).append(point["value"])
    return [(rate, sum(values) / len(values)) for rate, values in sorted(by_rate.items())]


def _name(name: str, y: float) -> str:
    shown = name if len(name) <= 26 else name[:25] + "…"
    inside = f"{escape(shown)}<title>{escape(name)}</title>"
    return f'<text class="arm" x="{NAMES - 14}" y="{y + 4:.1f}" text-anchor="end">{inside}</text>'


def _interval(scale: _Scale, low: float, centre: float, high: float, y: float, colour: int) -> str:
    a, b, m = scale(low), scale(high), scale(centre)
    ends = "".join(
        f'<line class="bar c{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4:.1f}" y2="{y + 4:.1f}"/>' for x in (a, b)
    )
    return (
        f'<line class="bar c{colour}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{ends}'
        f'<rect class="mean c{colour}" x="{m - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    )


def _axis(scale: _Scale, height: float, label: str) -> str:
    base = height - BOTTOM
    parts = []
    for mark in scale.marks():
        x = scale(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{format_number(mark)}</text>')
    parts.append(f'<line class="axis" x1="{NAMES}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{height - 5}" text-anchor="end">{escape(label)}</text>')
    return "".join(parts)


def _grid(across: _Scale, up: _Scale, height: float, left: float, rates: Sequence[float]) -> str:
    base = height - BOTTOM
    parts = []
    for mark in up.marks():
        y = up(mark)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{format_number(mark)}</text>')
    parts += [f'<text x="{across(rate):.1f}" y="{base + 15}" text-anchor="middle">{rate:g}</text>' for rate in rates]
    parts.append(f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{height - 5}" text-anchor="end">learning rate</text>')
    return "".join(parts)


def _figure(title: str, spoken: str, body: str, height: float, note: str) -> str:
    return (
        f'<figure class="plot card"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(spoken)}">{body}</svg>'
        f'<p class="readout">{escape(note)}</p></figure>'
    )
