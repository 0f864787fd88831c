"""Charts of a comparison with a row per arm: differences with intervals (a forest plot), and scores with their seeds.

The template lays out names and numbers, this module draws the plots. Shapes: places are percent of a plot, 0 to 100,
left to right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.svg_charts import Axis, at, format_number, line_between, upright
from mm_moslora.reporting.verdicts import HOLDS_ZERO, UNJUDGED, verdict_of_nats

ALL = "all tasks"
BAND = 0.03
"""Half-width of the shaded band without `--resolve`, as a share."""
FAR = 3.0
"""An axis reaches so many times as far as the median arm; what lies beyond it ends in an arrow."""


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
        known = [end for end in (self.low, self.high) if end is not None] or [self.value]
        return min(known), max(known)

    @property
    def reach(self) -> tuple[float, float]:
        """The interval and all seeds."""
        return min(*self.ends, *self.seeds), max(*self.ends, *self.seeds)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """The inside of an SVG, with its text alternatives."""

    marks: Markup
    spoken: str
    text: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm, or the heading of a group of arms, which has no plots."""

    name: str
    reference: bool
    plots: Sequence[Plot]


@dataclass(frozen=True, kw_only=True)
class RowChart:
    """Arms as rows, measures as columns with a scale each."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Row]
    scales: Sequence[Markup]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An arm with its measures, or the heading of a group without."""

    name: str
    reference: bool = False
    measures: Sequence[Measure] = ()


@dataclass(frozen=True, kw_only=True)
class _Column:
    """How one measure of all arms is drawn."""

    heading: str
    unit: str
    axis: Axis
    zero: bool = False
    """Mark zero as the reference."""
    band: float = 0.0
    """Half-width of the shaded band around zero."""
    lines: Sequence[float] = ()
    """Dashed lines, drawn where they lie on the axis."""

    def plot(self, name: str, measure: Measure) -> Plot:
        """The cell of an arm."""
        marks = self._ground() + ("" if measure.value is None else self._mark(measure))
        seeds = f"; seeds {', '.join(format_number(seed) for seed in measure.seeds)}" if measure.seeds else ""
        spoken = f"{name}: {measure.text} {self.unit}{f', {measure.note}' if measure.note else ''}{seeds}"
        return Plot(marks=Markup(marks), spoken=spoken, text=measure.text, note=measure.note)  # noqa: S704

    def scale(self) -> Markup:
        """The numbers below the rows."""
        labels = (
            f'<text x="{self.axis.place(mark):.2f}%" y="14" text-anchor="middle">{format_number(mark)}</text>'
            for mark in self.axis.few_ticks()
        )
        return Markup("".join(labels))  # noqa: S704

    def cuts(self, measure: Measure) -> bool:
        """Whether a measure goes on beyond the axis."""
        return measure.value is not None and not all(0 <= self.axis.place(end) <= 100 for end in measure.reach)

    def _ground(self) -> str:
        left, right = self.axis.place(-self.band), self.axis.place(self.band)
        band = f'<rect class="band" x="{left:.2f}%" width="{right - left:.2f}%" y="0" height="100%"/>'
        parts = [band] if self.band else []
        parts += [upright("grid", self.axis.place(mark)) for mark in self.axis.few_ticks()]
        parts += [upright("floor", x) for line in self.lines if 0 <= (x := self.axis.place(line)) <= 100]
        return "".join([*parts, *([upright("zero", self.axis.place(0.0))] if self.zero else [])])

    def _mark(self, measure: Measure) -> str:
        assert measure.value is not None
        ends = [self.axis.place(end) for end in measure.ends]
        left, right = (min(100.0, max(0.0, end)) for end in ends)
        parts = [line_between("interval", (left, 50), (right, 50))] if left < right else []
        caps = [end for end in ends if 0 <= end <= 100 and measure.low is not None]
        parts += [at(end, 50, '<line class="interval" y1="-4" y2="4"/>') for end in caps]
        low, high = (self.axis.place(end) for end in measure.reach)
        arrows = [*([(0, -1)] if low < 0 else []), *([(100, 1)] if high > 100 else [])]
        parts += [at(x, 50, f'<path class="arrow" d="M{-7 * way},-5L0,0L{-7 * way},5"/>') for x, way in arrows]
        middle = self.axis.place(measure.value)
        if 0 <= middle <= 100:
            parts.append(at(middle, 50, '<rect class="mean" x="-4" y="-4" width="8" height="8"/>'))
        seeds = [self.axis.place(seed) for seed in measure.seeds]
        parts += [at(seed, 50, '<circle class="seed" cy="-10" r="2.8"/>') for seed in seeds if 0 <= seed <= 100]
        return f'<g class="{measure.mood}">{"".join(parts)}</g>'


def columns(results: Mapping[str, Any]) -> list[str]:
    """Names of the measured columns, the mean over all tasks first."""
    found = dict.fromkeys(name for arm in results["arms"] for name in arm["tasks"])
    return sorted(found, key=lambda name: name != ALL)


def forest(parts: Sequence[tuple[str, Mapping[str, Any]]], task: str | None = None, *, title: str) -> RowChart | None:
    """Every arm minus its reference in points, and beside it in nats; None without a compared arm.

    Args:
        parts: comparisons, each with the heading of its rows or "".
        task: name of the column; None: the first one of each comparison.
        title: heading of the chart.
    """
    entries = []
    for heading, results in parts:
        column = task or next(iter(columns(results)), "")
        entries += [_Entry(name=heading)] * bool(heading)
        entries += [
            _Entry(
                name=arm["name"],
                reference=arm["name"] == results["settings"]["reference"],
                measures=differences_of(results, arm, column),
            )
            for arm in results["arms"]
        ]
    names = {results["settings"]["reference"] for _, results in parts}
    against = f"against {names.pop() if len(names) == 1 else 'the reference'}"
    band, meaning = band_of([results for _, results in parts])
    found = [
        _column(entries, 0, f"Score: points {against}", "points", zero=True, band=band),
        _column(entries, 1, f"Log-likelihood of the reference answer: nats {against}", "nats", zero=True),
    ]
    notes = [meaning, "Filled square: the difference is shown. Open: it is not.", HOLDS_ZERO]
    return _row_chart(title, entries, found, notes)


def score_rows(results: Mapping[str, Any], task: str, *, title: str) -> RowChart | None:
    """Every arm's mean with its interval and its seeds as points, in percent and beside it in nats.

    Args:
        results: the comparison's.
        task: name of the column.
        title: heading of the chart.
    """
    entries = [
        _Entry(
            name=arm["name"],
            reference=arm["name"] == results["settings"]["reference"],
            measures=means_of(arm, task),
        )
        for arm in results["arms"]
    ]
    floors = {name: 100 * value for name, value in results["floors"].get(task, {}).items() if value is not None}
    found = [
        _column(entries, 0, "Score, percent", "percent", lines=sorted(set(floors.values()))),
        _column(entries, 1, "Log-likelihood of the reference answer, nats", "nats"),
    ]
    notes = ["Points: reported runs, one seed each. Square: their mean with its 95 % interval."]
    if floors:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in floors.items())
        notes.append(f"Dashed, where the axis reaches: answers without a model ({told}).")
    return _row_chart(title, entries, found, notes)


def band_of(comparisons: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """Half-width of the shaded band in points, and a sentence about it."""
    planned = [results["resolve"]["points"] for results in comparisons if results.get("resolve")]
    if len(planned) == len(comparisons) and len(set(planned)) == 1:
        points = 100 * planned[0]
        told = f"Shaded: ±{points:g} points, the difference that --resolve {points:g} planned to show."
        return points, f"{told} Intervals hold for all looks together."
    return 100 * BAND, f"Shaded: ±{100 * BAND:g} points, about what the paper reports for MoSLoRA (+2.8)."


def means_of(arm: Mapping[str, Any], task: str) -> tuple[Measure, Measure]:
    """An arm's score in percent and log-likelihood in nats, with intervals and seeds."""
    nats = arm.get("nats", {}).get(task, {}).get("own")
    return _mean(arm["tasks"].get(task), missing=_unmeasured(arm)), _mean(nats, factor=1.0, digits=3)


def differences_of(results: Mapping[str, Any], arm: Mapping[str, Any], task: str) -> tuple[Measure, Measure]:
    """An arm minus the reference in points and in nats.

    Args:
        results: the comparison's.
        arm: of the results.
        task: name of the column.
    """
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
    known = measure["low"] is not None and measure["high"] is not None
    return Measure(
        value=value,
        low=factor * measure["low"] if known else None,
        high=factor * measure["high"] if known else None,
        seeds=[factor * seed for seed in measure["seeds"] if seed is not None],
        text=f"{value:.{digits}f} ± " + ("unknown" if error is None else f"{factor * error:.{digits}f}"),
    )


def _row_chart(
    title: str, entries: Sequence[_Entry], found: Sequence[_Column | None], notes: Sequence[str]
) -> RowChart | None:
    if found[0] is None:
        return None
    drawn = [(index, column) for index, column in enumerate(found) if column is not None]
    rows = [
        Row(
            name=entry.name,
            reference=entry.reference,
            plots=[column.plot(entry.name, entry.measures[index]) for index, column in drawn if entry.measures],
        )
        for entry in entries
    ]
    cut = any(column.cuts(entry.measures[index]) for index, column in drawn for entry in entries if entry.measures)
    return RowChart(
        title=title, rows=rows,
        headings=[column.heading for _, column in drawn],
        scales=[column.scale() for _, column in drawn],
        notes=[*notes, *(["Arrow: goes on beyond the axis."] if cut else [])],
    )  # fmt: skip


def _column(
    entries: Sequence[_Entry], index: int, heading: str, unit: str, *, zero: bool = False, band: float = 0.0,
    lines: Sequence[float] = (),
) -> _Column | None:  # fmt: skip
    """A column over the measures that have a value; None without one."""
    found = [entry.measures[index] for entry in entries if entry.measures]
    ends = [measure.reach for measure in found if measure.value is not None]
    if not ends:
        return None
    middle = 0.0 if zero else median(value for pair in ends for value in pair)
    far = FAR * median(max(abs(low - middle), abs(high - middle)) for low, high in ends)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    shown = [max(low, middle - far), min(high, middle + far)] if far else [low, high]
    axis = Axis.over([*shown, *([0.0, -band, band] if zero else [])])
    return _Column(heading=heading, unit=unit, axis=axis, zero=zero, band=band, lines=lines)


_MOODS = {"better": "good", "more likely": "good", "worse": "bad", "less likely": "bad"}


def _difference(found: Mapping[str, Any], word: str, *, factor: float = 100.0, digits: int = 1) -> Measure:
    if found["difference"] is None:
        return Measure(note="unknown")
    value, low, high = factor * found["difference"], found["low"], found["high"]
    if low is None or high is None:
        return Measure(value=value, text=f"{value:+.{digits}f}", note="error unknown", mood="open")
    p = found["p_corrected"]
    silent = p is None or word in UNJUDGED
    return Measure(
        value=value, low=factor * low, high=factor * high, mood=_MOODS.get(word, "open"),
        text=f"{value:+.{digits}f} [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]",
        note=word if silent else f"{word}, p {p:.2g}",
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
