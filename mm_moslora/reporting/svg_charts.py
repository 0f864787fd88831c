"""Line charts, heat maps and marks as SVG. The page's style sheet has the colours, so one chart serves both schemes.

Shapes: a series is ``n`` points ``(x, y)``; a chart is a view box of ``WIDTH x HEIGHT`` units. Marks are placed in
percent of an SVG without a view box: it has any width, and marks and text keep their size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from mm_moslora.reporting.lens_maps import HeatMap

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34
MOST_POINTS = 240
"""Maximum points per series; longer series are averaged in buckets."""
LABELS = 18
"""Characters of an axis' labels above which it has fewer of them, in charts of any width."""
LOG_RATIO = 15.0
"""Ratio of the largest to the smallest value above which a positive axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    faint: bool = False
    """Draw it thin and pale behind the others, without a legend entry."""
    colour: int | None = None
    """Index of its colour; None: the next one. A run or system has the same colour in all charts."""


def downsample(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of a bucket of consecutive ones.

    Args:
        points: in order of x.
        most: at least 1.
    """
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    buckets = [points[start:end] for start, end in pairwise(edges) if end > start]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average over 2 % of the curve, without the start-up bias; points in order of x."""
    decay = 1 - 1 / max(1.0, 0.02 * len(points))
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        smoothed.append((x, total / weight if weight else y))
    return smoothed


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`.

    Args:
        low: smallest value.
        high: largest value.
        count: target number of intervals.
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if raw <= factor * unit * 1.0001)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def format_number(value: float) -> str:
    """Three significant digits, `1.2 k` and `3.4 M` for large ones, `2e-4` for small ones."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e12:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


class Axis:
    """Maps values to view-box units, or to percent."""

    def __init__(self, low: float, high: float, *, start: float, end: float, log: bool = False) -> None:
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high == low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, value: float) -> float:
        """Where a value stands."""
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @classmethod
    def over(cls, values: Sequence[float], *, start: float = 0.0, end: float = 100.0, log: bool = False) -> Axis:
        """An axis over the values with a margin at both ends."""
        low, high = min(values), max(values)
        if log:
            air = (high / low) ** 0.08
            return cls(low / air, high * air, start=start, end=end, log=True)
        air = (high - low) * 0.08
        return cls(low - air, high + air, start=start, end=end)

    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        if not self.log:
            return ticks(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        return [mark for mark in marks if self.low - 1e-9 <= math.log10(mark) <= self.high + 1e-9]

    def few_ticks(self) -> list[float]:
        """A few round numbers, whose labels fit beside each other in a narrow chart."""
        marks = self.ticks()
        if self.log and len(marks) < 2:
            marks = ticks(10**self.low, 10**self.high)
        if len("".join(map(format_number, marks))) <= LABELS:
            return marks
        return marks[:: math.ceil(len(marks) / 3)] if self.log else ticks(self.low, self.high, count=3)


def at(x: float, y: float, inside: str) -> str:
    """A mark of fixed size at a place in percent."""
    return f'<svg x="{x:.2f}%" y="{y:.2f}%" overflow="visible">{inside}</svg>'


def line_between(style: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line between two places in percent."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{style}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.2f}%" y2="{y2:.2f}%"/>'


def upright(style: str, x: float) -> str:
    """A line from top to bottom at a place in percent."""
    return line_between(style, (x, 0), (x, 100))


def levels(axis: Axis) -> str:
    """Lines across a plot in percent, with their numbers to the left of it."""
    parts = []
    for mark in axis.few_ticks():
        y = axis.place(mark)
        parts.append(line_between("grid", (0, y), (100, y)))
        parts.append(f'<text x="-6" y="{y:.2f}%" dy="4" text-anchor="end">{format_number(mark)}</text>')
    return "".join(parts)


_X_LABEL = "optimiser step"


def line_chart(series: Sequence[Series], *, title: str, zero: bool = False) -> str:
    """An SVG figure over optimiser steps with axes, lines, and the data for the page's read-out.

    Args:
        series: at least one point in total.
        title: text of the heading and for screen readers.
        zero: the y axis starts at zero.
    """
    drawn = [replace(item, points=downsample(item.points)) for item in series if item.points]
    every = [point for item in drawn for point in item.points]
    x_axis = Axis(min(x for x, _ in every), max(x for x, _ in every), start=LEFT, end=WIDTH - RIGHT)
    y_axis = _y_axis([y for _, y in every], zero=zero)
    parts = [_grid(x_axis, y_axis)]
    legend = []
    next_colour = 0
    for item in drawn:
        colour = next_colour if item.colour is None else item.colour
        style = "faint" if item.faint else f"line c{colour % 6}"
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in item.points)
        if len(item.points) == 1:
            x, y = item.points[0]
            parts.append(
                f'<circle class="dot c{colour % 6}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="4"/>'
            )
        else:
            parts.append(f'<polyline class="{style}" points="{path}"/>')
        if not item.faint:
            legend.append(f'<li><i class="key c{colour % 6}"></i>{escape(item.name)}</li>')
            next_colour = colour + 1
    shown = [item for item in drawn if not item.faint]
    data = [
        {
            "name": item.name,
            "points": [[round(x, 2), float(f"{y:.5g}"), round(x_axis.place(x), 1)] for x, y in item.points],
        }
        for item in shown
    ]
    key = f'<ul class="legend">{"".join(legend)}</ul>' if len(legend) > 1 else ""
    last = ", ".join(f"{item.name} {format_number(item.points[-1][1])}" for item in shown)
    return (
        f'<figure class="chart card" data-series="{escape(json.dumps(data))}" data-x="{_X_LABEL}">'
        f"<figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(title)}. Last: {escape(last)}">'
        f"{''.join(parts)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
        f'<p class="readout" aria-live="polite">Last: {escape(last)}</p>{key}</figure>'
    )


def heat_chart(item: HeatMap) -> str:
    """An SVG figure of a heat map: pale is zero, full colour the largest value; each cell tells its number.

    Args:
        item: at least one known cell; values of at least 0.
    """
    largest = max(cell for line in item.cells for cell in line if cell is not None)
    left = min(WIDTH / 2, 14 + 6.2 * max(map(len, item.rows)))
    width, height = (WIDTH - RIGHT - left) / len(item.columns), 15
    bottom = TOP + height * len(item.rows)
    parts = []
    for row, (name, line) in enumerate(zip(item.rows, item.cells, strict=True)):
        y, shown = TOP + height * row, name if len(name) <= 32 else f"…{name[-31:]}"
        parts.append(f'<text x="{left - 6:.0f}" y="{y + 11}" text-anchor="end">{escape(shown)}</text>')
        for column, cell in enumerate(line):
            if cell is not None:
                place = f'x="{left + width * column:.1f}" y="{y}" width="{max(0.6, width - 0.6):.1f}"'
                told = f"{name} {item.columns[column]}: {format_number(cell)}"
                parts.append(
                    f'<rect class="cell" {place} height="{height - 0.6}" fill-opacity="{cell / (largest or 1):.2f}">'
                    f"<title>{escape(told)}</title></rect>"
                )
    step = math.ceil(len(item.columns) * 26 / (WIDTH - left))
    for column in range(0, len(item.columns), step):
        x = left + width * (column + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(item.columns[column])}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{bottom + 30}" text-anchor="end">layer</text>')
    told = f"0 is pale, {format_number(largest)} is full colour"
    return (
        f'<figure class="chart card"><figcaption>{escape(item.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + 34}" role="img" aria-label="{escape(item.title)}: {told}">'
        f'{"".join(parts)}</svg><p class="readout">{told}</p></figure>'
    )


def _y_axis(values: Sequence[float], *, zero: bool) -> Axis:
    low, high = min(values), max(values)
    if zero:
        return Axis(0.0, (high or 1.0) * 1.06, start=HEIGHT - BOTTOM, end=TOP)
    if low > 0 and high / low > LOG_RATIO:
        return Axis(low / 1.1, high * 1.1, start=HEIGHT - BOTTOM, end=TOP, log=True)
    pad = (high - low) * 0.06
    bottom = 0.0 if low >= 0 > low - pad else low - pad
    return Axis(bottom, high + pad, start=HEIGHT - BOTTOM, end=TOP)


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    marks = y_axis.ticks()
    if len(marks) > 7:
        marks = [mark for mark in marks if math.log10(mark) % 1 < 1e-6] or marks[:: len(marks) // 6]
    for mark in marks:
        y = y_axis.place(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{format_number(mark)}</text>')
    for mark in (mark for mark in x_axis.ticks() if mark == round(mark)):  # steps are whole numbers
        x = x_axis.place(mark)
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{format_number(mark)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{_X_LABEL}</text>')
    return "".join(parts)
