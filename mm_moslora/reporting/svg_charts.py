"""Line charts and heat maps by matplotlib, as SVG for a page: its style sheet has the colours of both schemes.

Shapes: a series is ``n`` points ``(x, y)``; sizes are pixels of an SVG that the page scales to its width.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.lens_maps import HeatMap, default_style
from mm_moslora.reporting.page_templates import asset
from mm_moslora.utils.text_format import visible

WIDTH, HEIGHT = 440, 250
MOST_POINTS = 240
"""Maximum points per series; longer series are averaged in buckets, so a spike of one step among 10,000 is drawn at a
fortieth of its height."""
LOG_RATIO = 15.0
"""Ratio of the largest to the smallest value above which a positive axis is logarithmic."""
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    faint: bool = False
    """Draw it thin and pale behind the others, without a legend entry."""


def downsample(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of a bucket of consecutive ones."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    buckets = [points[start:end] for start, end in pairwise(edges) if end > start]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average over 2 % of the curve, without the start-up bias; points in order of x."""
    # The line lags behind by these 2 %, and its last point is not the last loss; the faint line shows that.
    decay = 1 - 1 / max(1.0, 0.02 * len(points))
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        smoothed.append((x, total / weight if weight else y))
    return smoothed


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


@functools.cache
def colours() -> dict[str, str]:
    """Colours of the light scheme by their names in the style sheet."""
    return dict(reversed(re.findall(r"--([\w-]+): (#\w{6})", asset("report.css"))))


@contextmanager
def chart_style() -> Iterator[dict[str, str]]:
    """matplotlib's default style with changes for pages; gives the colours."""
    named = colours()
    changes: Any = {
        "figure.dpi": 72, "font.size": 11, "grid.color": named["edge"], "axes.axisbelow": True, "axes.grid": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.facecolor": "none", "text.color": named["ink"],
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "mm_moslora",
        **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), named["quiet"]),
    }  # fmt: skip
    with default_style(changes):
        yield named


def new_axes(width: float, height: float, *, left: float, right: float = 14, top: float = 14, bottom: float) -> Any:
    """Axes in a figure of their own, with margins in pixels."""
    from matplotlib.figure import Figure

    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return Figure(figsize=(width / 72, height / 72)).add_axes(box)


def number_axis(axis: Any, *, count: int = 5, log: bool = False, whole: bool = False) -> None:
    """About `count` round numbers on an axis of matplotlib, in the style of all charts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    even = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else even)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def to_svg(figure: Any, label: str, *, titles: Sequence[str] = (), more: str = "") -> Markup:
    """The figure, drawn in `chart_style`, as an element of a page; `more`: elements for the page's script."""
    # An artist with the gid `title-3` shows `titles[3]` under the pointer.
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page has other fonts than matplotlib
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    text = re.search(r"<svg[^>]*>(.*)</svg>", stream.getvalue(), re.DOTALL)
    assert text is not None
    variables = {value: f"var(--{name})" for name, value in colours().items()}
    body = re.sub(r"<style.*?</style>", "", text[1], flags=re.DOTALL)  # it would hold for the whole page
    body = re.sub(r"(?<=: )#\w{6}(?=[;\"])", lambda colour: variables.get(colour[0], colour[0]), body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)  # a hundredth of a pixel
    heads = [f'<g class="titled"><title>{_text(title)}</title>' for title in titles]
    body = re.sub(r'<g id="(?:title-(\d+)|\w+)">', lambda mark: heads[int(mark[1])] if mark[1] else "<g>", body)
    size = f"0 0 {figure.get_figwidth() * 72:g} {figure.get_figheight() * 72:g}"
    return Markup(  # noqa: S704  (matplotlib escapes texts)
        f'<svg class="plot" viewBox="{size}" role="img" aria-label="{_text(label)}"{" tabindex=0" if more else ""}>'
        f"{body}{more}</svg>"
    )


def _text(text: str) -> str:
    return escape(visible(text))


_X_LABEL = "optimiser step"


def line_chart(series: Sequence[Series], *, title: str, zero: bool = False) -> Markup:
    """A figure over optimiser steps with axes, lines, and the data for the page's read-out."""
    drawn = [replace(item, points=downsample(item.points)) for item in series if item.points]
    data: list[dict[str, Any]] = []
    legend: list[str] = []
    with chart_style() as named:
        axes = new_axes(WIDTH, HEIGHT, left=52, bottom=34)
        for item in drawn:
            (line,) = axes.plot(*zip(*item.points, strict=True), marker="o" if len(item.points) == 1 else "")
            if item.faint:
                line.set(color=named["c0"], linewidth=1, alpha=0.28)
            else:
                number = len(legend) % 6
                line.set(color=named[f"c{number}"], linewidth=2.2, dashes=(3, 2) if number == 1 else ())
                legend.append(f'<li><i class="key c{number}"></i>{_text(item.name)}</li>')
        _scale_lines(axes, [y for item in drawn for _, y in item.points], zero=zero)
        axes.set_xlabel(_X_LABEL, loc="right", labelpad=2)
        shown = [item for item in drawn if not item.faint]
        for item in shown:
            with_pixels = zip(item.points, axes.transData.transform(item.points).tolist(), strict=True)
            points = [[round(x, 2), float(f"{y:.5g}"), round(pixel, 1)] for (x, y), (pixel, _) in with_pixels]
            data.append({"name": item.name, "points": points})
        last = ", ".join(f"{item.name} {format_number(item.points[-1][1])}" for item in shown)
        cursor = f'<line class="cursor" y1="14" y2="{HEIGHT - 34}" x1="-9" x2="-9"/>'
        picture = to_svg(axes.figure, f"{title}. Last: {last}", more=cursor)
    key = f'<ul class="legend">{"".join(legend)}</ul>' if len(legend) > 1 else ""
    return Markup(  # noqa: S704  (escaped)
        f'<figure class="chart card" data-series="{escape(json.dumps(data))}"><figcaption>{_text(title)}</figcaption>'
        f'{picture}<p class="readout" aria-live="polite">Last: {_text(last)}</p>{key}</figure>'
    )


def _scale_lines(axes: Any, values: Sequence[float], *, zero: bool) -> None:
    low, high = min(values), max(values)
    log = not zero and low / 1.1 > 0 and high / low > LOG_RATIO
    axes.margins(x=0, y=0 if log else 0.06)
    if log:
        axes.set(yscale="log", ylim=(low / 1.1, high * 1.1))
    elif zero or low >= 0 > low - 0.06 * (high - low):
        axes.set_ylim(0, (high or 1.0) * 1.06)
    axes.grid(visible=False, axis="x")
    number_axis(axes.yaxis, log=log)
    number_axis(axes.xaxis, whole=True)
    axes.autoscale_view()  # else only drawing would set the limits, after the places of points are read


def heat_chart(item: HeatMap) -> Markup:
    """A heat map: pale is zero, full colour the largest value; a cell shows its number under the pointer."""
    from matplotlib.patches import Rectangle

    largest = max(cell for line in item.cells for cell in line if cell is not None)
    left = min(WIDTH / 2, 14 + 6.2 * max(map(len, item.rows)))
    titles: list[str] = []
    with chart_style() as named:
        axes = new_axes(WIDTH, 48 + 15 * len(item.rows), left=left, bottom=34)
        for row, (name, line) in enumerate(zip(item.rows, item.cells, strict=True)):
            for column, cell in enumerate(line):
                if cell is not None:
                    box = Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, gid=f"title-{len(titles)}", clip_on=False)
                    box.set(facecolor=(named["c1"], cell / (largest or 1)), edgecolor=named["edge"], linewidth=0.6)
                    axes.add_artist(box)
                    titles.append(f"{name} {item.columns[column]}: {format_number(cell)}")
        axes.set(xlim=(-0.5, len(item.columns) - 0.5), ylim=(len(item.rows) - 0.5, -0.5))
        names = [visible(name if len(name) <= 32 else f"…{name[-31:]}") for name in item.rows]
        axes.set_yticks(range(len(names)), names)
        labelled = range(0, len(item.columns), math.ceil(len(item.columns) * 26 / (WIDTH - left)))
        axes.set_xticks(labelled, [item.columns[column] for column in labelled])
        axes.set_xlabel("layer", loc="right", labelpad=2)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        scale = f"0 is pale, {format_number(largest)} is full colour"
        picture = to_svg(axes.figure, f"{item.title}: {scale}", titles=titles)
    return Markup(  # noqa: S704  (escaped)
        f'<figure class="chart card"><figcaption>{_text(item.title)}</figcaption>{picture}'
        f'<p class="readout">{scale}</p></figure>'
    )
