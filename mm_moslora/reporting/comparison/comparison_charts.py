"""Charts of a comparison with a row per arm: differences with intervals (a forest plot), and scores with seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.svg_charts import chart_style, colours, format_number, new_axes, number_axis, to_svg
from mm_moslora.reporting.verdicts import HOLDS_ZERO, UNJUDGED, verdict_of_nats
from mm_moslora.utils.files import replacing
from mm_moslora.utils.text_format import visible

ALL = "all tasks"
BAND = 3.0
"""Half-width of the shaded band in points: about what the paper reports for MoSLoRA (+2.8)."""
FAR = 3.0
"""An axis reaches at most this multiple of the median arm's distance; an arrow marks what lies beyond."""
WIDTH, VALUES, BOTTOM = 330, 146, 22
"""Pixels of a column of a row chart, of the numbers to the right of its marks, and of the scale below."""
LINE, MARKS = 13, 28
"""Pixels of a line of an arm's name, and of the marks below it."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of an arm as it is drawn and printed."""

    value: float | None = None
    """None: nothing is drawn."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval; None where the error is unknown."""
    seeds: Sequence[float] = ()
    text: str = "–"
    note: str = ""
    mood: str = "plain"
    """A difference is good, bad, or open where it is not shown."""

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; the value twice where there is none."""
        assert self.value is not None
        bounds = [end for end in (self.low, self.high) if end is not None] or [self.value]
        return min(bounds), max(bounds)

    def spoken(self, unit: str) -> str:
        """The numbers in a sentence."""
        seeds = f"; seeds {', '.join(format_number(seed) for seed in self.seeds)}" if self.seeds else ""
        return f"{self.text} {unit}{f', {self.note}' if self.note else ''}{seeds}"

    @property
    def reach(self) -> tuple[float, float]:
        """The interval and all seeds."""
        return min(*self.ends, *self.seeds), max(*self.ends, *self.seeds)


@dataclass(frozen=True, kw_only=True)
class RowChart:
    """Arms as rows, measures as columns with a picture each."""

    title: str
    columns: Sequence[Column]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measure of all arms."""

    heading: str
    unit: str
    rows: Sequence[tuple[str, Measure | None]]
    """Names and measures of the arms in order; a heading of a group of arms has None."""
    reference: Sequence[str] = ()
    """Names of the shaded rows."""
    zero: bool = False
    """Mark zero as the reference."""
    band: float = 0.0
    """Half-width of the shaded band around zero."""
    lines: Sequence[float] = ()
    """Dashed lines, drawn where they lie on the axis."""

    @property
    def reaches(self) -> list[tuple[float, float]]:
        """Of the measures that have a value."""
        return [measure.reach for _, measure in self.rows if measure and measure.value is not None]

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis."""
        middle = 0.0 if self.zero else median(value for pair in self.reaches for value in pair)
        far = FAR * median(max(abs(low - middle), abs(high - middle)) for low, high in self.reaches)
        low, high = min(low for low, _ in self.reaches), max(high for _, high in self.reaches)
        if far:
            low, high = max(low, middle - far), min(high, middle + far)
        if self.zero:
            low, high = min(low, -self.band), max(high, self.band)
        air = (high - low) * 0.08 or abs(low) * 0.1 or 1.0
        return low - air, high + air

    @property
    def height(self) -> int:
        """Pixels of the rows."""
        return sum(LINE * len(_wrapped(name)) + (MARKS if measure else 8) for name, measure in self.rows)

    @property
    def picture(self) -> Markup:
        """The column as SVG; a row shows its numbers under the pointer."""
        with chart_style():
            axes = new_axes(WIDTH, self.height + BOTTOM, left=4, right=VALUES, top=0, bottom=BOTTOM)
            spoken = self.draw(axes)
            return to_svg(axes.figure, f"{self.heading}: {'. '.join(spoken)}", titles=spoken)

    def draw(self, axes: Any) -> list[str]:
        """Draw on axes of `height` pixels; returns the text of each row."""
        spoken: list[str] = []
        top, named = 0, colours()
        axes.set(xlim=self.limits, ylim=(self.height, 0), yticks=[])
        number_axis(axes.xaxis, count=4)
        axes.grid(visible=False)
        across = {"xmin": -0.02, "xmax": WIDTH / (WIDTH - VALUES - 4), "clip_on": False}
        for name, measure in self.rows:
            lines = _wrapped(name)
            upper = top + LINE * len(lines)
            lower = upper + (MARKS if measure else 8)
            axes.axhline(top, color=named["edge"], linewidth=1, **across)
            if name in self.reference:
                axes.axhspan(top, lower, facecolor=named["soft"], zorder=0.4, **across)
            text_style = {"transform": axes.get_yaxis_transform(), "va": "top"}
            axes.text(0, top + 3, "\n".join(lines), fontweight="normal" if measure else "bold", **text_style)
            if measure:
                axes.fill_betweenx(
                    [upper + 2, lower], -self.band, self.band, color=named["accent-soft"], zorder=0.5, lw=0
                )
                axes.vlines(axes.get_xticks(), upper + 2, lower, color=named["edge"], linewidth=1, zorder=0.6)
                axes.vlines(self.lines, upper + 2, lower, color=named["quiet"], linewidth=1, linestyle="--")
                axes.vlines([0.0] * self.zero, upper + 2, lower, color=named["ink"], linewidth=1.2)
                axes.axhspan(top, lower, facecolor="none", gid=f"title-{len(spoken)}", **across)
                spoken.append(f"{name}: {measure.spoken(self.unit)}")
                middle = lower - MARKS / 2
                axes.text(1.05, middle - (11 if measure.note else 6), measure.text, fontsize=10, **text_style)
                axes.text(1.05, middle + 1, measure.note, fontsize=9, color=named["quiet"], **text_style)
                if measure.value is not None:
                    self._mark(axes, measure, middle)
            top = lower
        axes.set_xlim(self.limits)
        return spoken

    def _mark(self, axes: Any, measure: Measure, y: float) -> None:
        assert measure.value is not None
        named = colours()
        colour = {"good": named["good"], "bad": named["bad"], "open": named["quiet"]}.get(measure.mood, named["accent"])
        (low, high), (first, last), (start, end) = measure.ends, measure.reach, self.limits
        axes.errorbar(
            [measure.value], [y], xerr=[[measure.value - low], [high - measure.value]], fmt="s", color=colour,
            markersize=7, markeredgewidth=1.5, markerfacecolor=named["card"] if measure.mood == "open" else colour,
            capsize=4 if measure.low is not None else 0, elinewidth=2, capthick=2,
        )  # fmt: skip
        axes.plot(measure.seeds, [y - 9] * len(measure.seeds), "o", color=colour, markersize=5, alpha=0.6)
        for edge, beyond, marker in ((start, first < start, "<"), (end, last > end, ">")):
            axes.plot([edge] * beyond, [y] * beyond, marker, color=colour, markersize=7, clip_on=False)


def _wrapped(name: str) -> list[str]:
    return [line.replace(" @", "@") for line in textwrap.wrap(visible(name).replace("@", " @"), 46)] or [""]


def draw_png(chart: RowChart, path: Path) -> None:
    """The columns of a chart side by side as a PNG file."""
    wide, tall = 20 + len(chart.columns) * (WIDTH + 20), chart.columns[0].height + BOTTOM + 30
    with chart_style():
        axes = new_axes(wide, tall, left=20, right=wide - 20 - WIDTH + VALUES, top=30, bottom=BOTTOM)
        for number, column in enumerate(chart.columns):
            x, *box = axes.get_position().bounds
            panel = axes if not number else axes.figure.add_axes((x + number * (WIDTH + 20) / wide, *box))
            panel.set_title(column.heading, loc="left", fontsize=11)
            column.draw(panel)
        with replacing(path) as part:
            axes.figure.savefig(part, format="png", dpi=144, facecolor="white")


def columns(results: Mapping[str, Any]) -> list[str]:
    """Names of the measured columns, the mean over all tasks first."""
    names = dict.fromkeys(name for arm in results["arms"] for name in arm["tasks"])
    return sorted(names, key=lambda name: name != ALL)


def forest(parts: Sequence[tuple[str, Mapping[str, Any]]], task: str | None = None, *, title: str) -> RowChart | None:
    """Every arm minus its reference in points, and beside it in nats; None without a compared arm."""
    rows: list[tuple[str, Sequence[Measure | None]]] = []
    for heading, results in parts:
        column = task or next(iter(columns(results)), "")
        rows += [(heading, (None, None))] * bool(heading)
        rows += [(arm["name"], differences_of(results, arm, column)) for arm in results["arms"]]
    names = {results["settings"]["reference"] for _, results in parts}
    against = f"against {names.pop() if len(names) == 1 else 'the reference'}"
    meaning = f"Shaded: ±{BAND:g} points, about what the paper reports for MoSLoRA (+2.8)."
    notes = [meaning, "Filled square: the difference is shown. Open: it is not.", HOLDS_ZERO]
    kinds = [
        {"heading": f"Score: points {against}", "unit": "points", "zero": True, "band": BAND},
        {"heading": f"Log-likelihood of the reference answer: nats {against}", "unit": "nats", "zero": True},
    ]
    return _row_chart(title, rows, kinds, [results["settings"]["reference"] for _, results in parts], notes)


def score_rows(results: Mapping[str, Any], task: str, *, title: str) -> RowChart | None:
    """Every arm's mean with its interval and its seeds as points, in percent and beside it in nats."""
    floors = {name: 100 * value for name, value in results["floors"].get(task, {}).items() if value is not None}
    notes = ["Points: reported runs, one seed each. Square: their mean with its 95 % interval."]
    if floors:
        listed = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in floors.items())
        notes.append(f"Dashed, where the axis reaches: answers without a model ({listed}).")
    kinds: list[dict[str, Any]] = [
        {"heading": "Score, percent", "unit": "percent", "lines": sorted(set(floors.values()))},
        {"heading": "Log-likelihood of the reference answer, nats", "unit": "nats"},
    ]
    rows = [(arm["name"], means_of(arm, task)) for arm in results["arms"]]
    return _row_chart(title, rows, kinds, [results["settings"]["reference"]], notes)


def _row_chart(
    title: str, rows: Sequence[tuple[str, Sequence[Measure | None]]], kinds: Sequence[dict[str, Any]],
    reference: Sequence[str], notes: Sequence[str],
) -> RowChart | None:  # fmt: skip
    """The measures that any arm has; None without the first one."""
    measured = [
        Column(**kind, rows=[(name, measures[index]) for name, measures in rows], reference=reference)
        for index, kind in enumerate(kinds)
        if any((measure := measures[index]) and measure.value is not None for _, measures in rows)
    ]
    if not measured or measured[0].unit != kinds[0]["unit"]:
        return None
    arrow = ["Arrow: goes on beyond the axis."] * any(
        low < column.limits[0] or high > column.limits[1] for column in measured for low, high in column.reaches
    )
    return RowChart(title=title, columns=measured, notes=[*notes, *arrow])


def means_of(arm: Mapping[str, Any], task: str) -> tuple[Measure, Measure]:
    """An arm's score in percent and log-likelihood in nats, with intervals and seeds."""
    nats = arm.get("nats", {}).get(task, {}).get("own")
    return _mean(arm["tasks"].get(task), missing=_unmeasured(arm)), _mean(nats, factor=1.0, digits=3)


def differences_of(results: Mapping[str, Any], arm: Mapping[str, Any], task: str) -> tuple[Measure, Measure]:
    """An arm minus the reference in points and in nats."""
    name = arm["name"]
    if name == results["settings"]["reference"]:
        return Measure(text="reference"), Measure(text="reference")
    row = next((row for row in results["comparisons"] if (row["arm"], row["task"]) == (name, task)), None)
    if row is None:
        return Measure(note=_unmeasured(arm)), Measure()
    points, nats = _difference(row, row["verdict"]), row.get("nats", {}).get("own")
    if nats is None:
        return points, Measure(note="no log-likelihood")
    return points, _difference(nats, verdict_of_nats(row), factor=1.0, digits=3)


def _mean(measure: Mapping[str, Any] | None, *, factor: float = 100.0, digits: int = 1, missing: str = "") -> Measure:
    if measure is None or measure["mean"] is None:
        return Measure(note=missing)
    value, error = factor * measure["mean"], measure["stderr"]
    has_interval = measure["low"] is not None and measure["high"] is not None
    return Measure(
        value=value,
        low=factor * measure["low"] if has_interval else None,
        high=factor * measure["high"] if has_interval else None,
        seeds=[factor * seed for seed in measure["seeds"] if seed is not None],
        text=f"{value:.{digits}f} ± " + ("unknown" if error is None else f"{factor * error:.{digits}f}"),
    )


_MOODS = {"better": "good", "more likely": "good", "worse": "bad", "less likely": "bad"}


def _difference(row: Mapping[str, Any], verdict: str, *, factor: float = 100.0, digits: int = 1) -> Measure:
    if row["difference"] is None:
        return Measure(note="unknown")
    value, low, high = factor * row["difference"], row["low"], row["high"]
    if low is None or high is None:
        return Measure(value=value, text=f"{value:+.{digits}f}", note="error unknown", mood="open")
    p = row["p_corrected"]
    silent = p is None or verdict in UNJUDGED
    return Measure(
        value=value, low=factor * low, high=factor * high, mood=_MOODS.get(verdict, "open"),
        text=f"{value:+.{digits}f} [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]",
        note=verdict if silent else f"{verdict}, p {p:.2g}",
    )  # fmt: skip


def _unmeasured(arm: Mapping[str, Any]) -> str:
    """Why an arm has no result."""
    if arm["tasks"]:
        return "not compared"
    if arm["seeds"] and all(seed["status"] != "ok" for seed in arm["seeds"]):
        return f"all {len(arm['seeds'])} runs failed" if len(arm["seeds"]) > 1 else "the run failed"
    tried = {point["rate"] for point in arm["curve"]}
    if tried and len(tried) == len(arm["grid"]) and all(point["value"] is None for point in arm["curve"]):
        return "no learning rate worked"
    return "not measured yet"
