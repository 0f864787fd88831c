"""The seeds and documents that show a difference of so many points: planned from a pilot, stopped early by looks.

The squared error of a difference is ``documents / N + seeds / K + answers / (K N)`` (`seed_statistics.Components`). A
size shows a difference where a t-test with the level of the last look, divided by the number of compared arms, has 80 %
power. Before a pilot the components are `ASSUMED`.
"""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mm_moslora_eval.scoring.error_bars import shown_by_t_test, t_quantile

from mm_moslora.compare.comparison_analysis import analyse
from mm_moslora.compare.comparison_plan import ComparisonSettings, planned_for, run_count
from mm_moslora.compare.comparison_run import ArmComparison
from mm_moslora.compare.comparison_text import looks_sentence
from mm_moslora.compare.seed_statistics import POWER, Components
from mm_moslora.compare.sequential_looks import OVERALL, Looks, LookState, planned_looks, read_state, write_state
from mm_moslora.reporting.verdicts import SIGNIFICANT
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.text_format import format_seconds

logger = logging.getLogger(__name__)

ASSUMED = Components(documents=0.02, seeds=2 * 0.02**2, answers=0.2)
"""Right or wrong answers of two tuned arms: runs of an arm spread by 2 points, single answers by a variance of 0.1."""
Rows = Sequence[Mapping[str, Any]]
"""Comparisons of `results.json`, or parts of them."""
MOST_SEEDS = 64
_DEGREES = 8
"""Least degrees of freedom between seeds at the last look. A pilot of few seeds often finds a small variance by chance;
a plan of as few seeds would test with that variance."""
_LOOK_DEGREES = 4
"""Least degrees of freedom between seeds at a look. With fewer, the estimated variance is sometimes almost zero, and a
look at a level far below 5 % takes chance for a difference."""
_SUGGESTED = (4, 8, 16, 32, 64)
"""Seeds for which the documents are planned where those at hand are too few."""


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """A number of seeds and documents, and what it shows."""

    seeds: float
    documents: int
    detectable: float
    """The true difference that is shown four times out of five."""
    half_width: float
    """Half-width of the 95 % interval, which holds for all looks together."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Finds sizes for components.

    Args:
        components: of the difference of two arms.
        points: the difference to show, as a share.
        comparisons: arms that are compared with the reference.
        first: seeds of the pilot, and the least of the first look.
        step: seeds that are run at the same time.
        independent: clusters of documents per document, such as pictures per question.
    """

    components: Components
    points: float
    comparisons: int
    first: int
    step: int = 1
    independent: float = 1.0

    def looks(self, seeds: int, documents: int) -> Looks:
        """The looks up to so many seeds."""
        sizes = range(min(max(self.first, self._least_seeds(_LOOK_DEGREES)), seeds), seeds + 1)
        variance = [max(1e-12, self.components.variance(seeds=k, documents=documents)) for k in sizes]
        return planned_looks(sizes[0], seeds, variance, step=self.step)

    def size(self, seeds: float, documents: int) -> SampleSize:
        """The difference that so many seeds and documents show; infinitely many seeds are allowed."""
        parts = self.components
        answers = parts.answers / seeds / documents
        by_documents, by_arm = parts.documents / documents + answers, (parts.seeds / seeds + answers) / 2
        variance = parts.variance(seeds=seeds, documents=documents)
        squares = by_documents**2 / max(1.0, documents * self.independent - 1)
        squares += (2 * by_arm) ** 2 / max(1.0, self.comparisons * (seeds - 1))
        degrees = max(1.0, variance**2 / squares) if squares else math.inf
        if not variance:
            return SampleSize(seeds=seeds, documents=documents, detectable=0.0, half_width=0.0)
        level = OVERALL if math.isinf(seeds) else self.looks(int(seeds), documents).level(int(seeds))
        error = math.sqrt(variance)
        return SampleSize(
            seeds=seeds, documents=documents, half_width=t_quantile(1 - level, degrees) * error,
            detectable=shown_by_t_test(1 - level / self.comparisons, degrees, power=POWER) * error,
        )  # fmt: skip

    def _least_seeds(self, degrees: int) -> int:
        """Seeds with so many degrees of freedom, where all arms run and their runs spread alike."""
        return 1 + math.ceil(degrees / self.comparisons)

    def fewest_seeds(self, documents: int) -> SampleSize | None:
        """The fewest seeds that show the difference on so many documents; None beyond `MOST_SEEDS`."""
        return self._fewest(
            max(self._least_seeds(_DEGREES), self.first), MOST_SEEDS, lambda seeds: self.size(seeds, documents)
        )

    def fewest_for_width(self, documents: int) -> SampleSize | None:
        """The fewest seeds with a half-width of the difference on so many documents; None beyond `MOST_SEEDS`."""
        first = max(2, self.first)
        return self._fewest(first, MOST_SEEDS, lambda seeds: self.size(seeds, documents), of="half_width")

    def fewest_documents(self, seeds: int, *, most: int = 10_000_000) -> SampleSize | None:
        """The fewest documents that show the difference with so many seeds; None beyond `most`."""
        return self._fewest(2, most, lambda documents: self.size(seeds, documents))

    def _fewest(
        self,
        low: int,
        high: int,
        size: Callable[[int], SampleSize],
        *,
        of: Literal["detectable", "half_width"] = "detectable",
    ) -> SampleSize | None:
        if getattr(size(high), of) > self.points:
            return None
        return size(bisect_left(range(high), True, lo=low, key=lambda count: getattr(size(count), of) <= self.points))


def plan_resolution(planner: Planner, documents: int) -> tuple[SampleSize | None, list[str]]:
    """The size that shows the difference, None where the documents do not allow it, and the plan in sentences.

    Args:
        planner: with the components.
        documents: those of the test tasks.
    """
    points, now = f"{100 * planner.points:g} points", planner.size(planner.first, documents)
    whole = planner.components.variance(seeds=planner.first, documents=documents) or 1.0
    alone = (planner.components.documents / documents / whole, planner.components.seeds / planner.first / whole)
    lines = [
        f"{planner.first} seeds on {documents} documents show a true difference of {100 * now.detectable:.1f} points "
        f"four times out of five (half-width of the 95 % interval: {100 * now.half_width:.1f}). More seeds would cut "
        f"up to {100 * (1 - alone[0]):.0f} % of the squared error, more documents up to {100 * (1 - alone[1]):.0f} %."
    ]
    narrow = planner.fewest_for_width(documents)
    if narrow is not None:
        lines[0] += f" A half-width of {points} takes {narrow.seeds:.0f} seeds."
    size = planner.fewest_seeds(documents)
    if size is None:
        least = planner.size(math.inf, documents)
        if least.detectable > planner.points:
            lines.append(
                f"A difference of {points} is beyond what {documents} documents allow: any number of seeds shows "
                f"{100 * least.detectable:.1f} points at best."
            )
        else:
            lines.append(f"{points} would need more than {MOST_SEEDS} seeds on {documents} documents.")
        tried = (planner.fewest_documents(seeds) for seeds in _SUGGESTED if seeds >= planner.first)
        needed = list(itertools.islice((size for size in tried if size is not None), 2))
        either = " or ".join(f"{size.documents:,} documents and {size.seeds:.0f} seeds" for size in needed)
        lines.append(f"Needed: {either or f'more than {MOST_SEEDS} seeds, or a coarser --resolve'}.")
        return None, lines
    seeds = int(size.seeds)
    enough = planner.fewest_documents(seeds, most=documents)
    fewer = f" ({enough.documents} would do)" if enough is not None and enough.documents < 0.9 * documents else ""
    looks = planner.looks(seeds, documents).seeds
    lines.append(
        f"For {points}: {seeds} seeds on {documents} documents{fewer}, half-width {100 * size.half_width:.1f}. "
        f"Looks after {', '.join(map(str, looks))} seeds; an arm ends early where it is decided: its corrected "
        f"p-value is below {SIGNIFICANT:g}, or its interval lies within {points}. Intervals and p-values hold for all "
        "looks together (alpha spending)."
    )
    return size, lines


class Resolution:
    """Plans the seeds of a comparison and ends it early.

    Args:
        comparison: checked.
        points: the difference to show, as a share.
        step: seeds that are run at the same time.

    Raises:
        ConfigError: the comparison was started with another difference, or has too few seeds for a pilot.
    """

    def __init__(self, comparison: ArmComparison, points: float, *, step: int = 1) -> None:
        if not 0 < points < 1:
            raise ConfigError(f"--resolve is {100 * points:g}, expected points between 0 and 100, such as 3.")
        if comparison.settings.seeds < 2:
            raise ConfigError("--resolve needs a pilot of at least 2 seeds per arm (--seeds 3).")
        state = read_state(comparison.folder)
        if state is not None and not math.isclose(state.points, points):
            raise ConfigError(
                f"{comparison.folder} was planned with --resolve {100 * state.points:g}, now it is {100 * points:g}. "
                "Its looks were planned for the first one. Choose another --output."
            )
        self._comparison, self._points, self._step = comparison, points, step

    def lines(self) -> list[str]:
        """The plan in sentences, with the time: as fixed after the pilot, before that from the runs so far."""
        state, settings = read_state(self._comparison.folder), self._comparison.settings
        if state is not None:
            return [looks_sentence(asdict(state)), self._hours(state.seeds if state.ended else state.looks.seeds[-1])]
        rows = main_rows(analyse(self._comparison)) if self._comparison.outcomes else []
        components = mean_components(rows)
        source = "from the runs so far" if components is not None else (
            "before a pilot, assumed: runs of an arm spread by 2 points, answers as right and wrong ones usually do"
        )  # fmt: skip
        planner = replace(self._planner(components or ASSUMED, settings.seeds), independent=independent_share(rows))
        size, lines = plan_resolution(planner, self._comparison.documents)
        lines = [f"--resolve {100 * self._points:g}, {source}: {lines[0]}", *lines[1:]]
        return [*lines, self._hours(int(size.seeds) if size is not None else settings.seeds)]

    def settings_after(self) -> ComparisonSettings:
        """The settings to go on with, after a look at the seeds that are over; the present seeds where it ends."""
        comparison, settings = self._comparison, self._comparison.settings
        results, state = analyse(comparison), read_state(comparison.folder)
        if state is None:
            planned = plan_looks(self._planner(ASSUMED, settings.seeds), main_rows(results), comparison.documents)
            state = replace(planned, reference=settings.reference_arm, fixed=planned_for(settings))
            write_state(comparison.folder, state)
            results = analyse(comparison)  # with the level of the first look
        state = after_look(state, main_rows(results), settings.seeds)
        write_state(comparison.folder, state)
        ended = f"It ends after {settings.seeds} seeds: {state.ended}." if state.ended else ""
        logger.info("%s", ended or f"It goes on to {state.seeds} seeds.")
        return replace(settings, seeds=state.seeds, decided=state.arms)

    def _planner(self, components: Components, first: int) -> Planner:
        comparisons = max(1, len(self._comparison.settings.arms) - 1)
        return Planner(
            components=components, points=self._points, comparisons=comparisons, first=first, step=self._step
        )

    def _hours(self, seeds: int) -> str:
        comparison, settings = self._comparison, self._comparison.settings
        ended = [outcome.total_seconds for outcome in comparison.outcomes.values() if outcome.status == "ok"]
        each = sum(ended) / len(ended) if ended else comparison.run_seconds
        runs = run_count(replace(settings, seeds=seeds), comparison.outcomes)
        left = max(0, runs - len(comparison.outcomes))
        if math.isnan(each):
            return f"{runs} runs, {left} of them left; the time of a run is not known yet."
        what = "" if ended else " of training"
        return (
            f"{runs} runs of about {format_seconds(each)}{what}: {format_seconds(each * runs)} in all one after the "
            f"other, {format_seconds(each * left)} of it left."
        )


def plan_looks(planner: Planner, rows: Rows, documents: int) -> LookState:
    """The plan from a pilot; a pilot that more seeds do not help is the only look.

    Args:
        planner: with the pilot's seeds; its components are replaced.
        rows: the pilot's comparisons, see `main_rows`.
        documents: those of the test tasks.
    """
    first, components = planner.first, mean_components(rows)
    only = LookState(points=planner.points, seeds=first, looks=Looks((first,), (1.0,)), components={})
    if components is None:
        if any(row["run_degrees"] for row in rows):
            return replace(only, ended="no answers of the pilot differ between arms")
        return replace(only, ended="no arm has two measured seeds in common with the reference")
    only = replace(only, components=asdict(components))
    planner = replace(planner, components=components, independent=independent_share(rows))
    size, lines = plan_resolution(planner, documents)
    if size is None:
        return replace(only, ended=" ".join(lines[1:]).removesuffix("."))
    return replace(only, looks=planner.looks(int(size.seeds), documents))


def after_look(state: LookState, rows: Rows, seeds: int) -> LookState:
    """The plan after a look: decided arms run no more, the others and the reference go on to the next look.

    Args:
        state: the plan.
        rows: the comparisons at this look, see `main_rows`.
        seeds: those of the arms that still run.
    """
    later = [planned for planned in state.looks.seeds if planned > seeds]
    if later and seeds not in state.looks.seeds and not state.ended:  # no error rate is spent here
        return replace(state, seeds=later[0])
    running = [row for row in rows if row["arm"] not in state.arms]
    decided = {row["arm"]: seeds for row in running if is_decided(row, state.points)}
    ended = state.ended or ("" if rows else "no arm is left to compare")
    if not ended and len(decided) == len(running):
        ended = "every arm is decided"
    elif not ended and not later:
        ended = f"all {seeds} planned seeds are over"
    if ended:
        return replace(state, ended=ended, seeds=seeds)
    return replace(state, seeds=later[0], arms=state.arms | decided)


def is_decided(row: Mapping[str, Any], points: float) -> bool:
    """Whether an arm needs no more seeds to show a difference of `points`, a share."""
    if row["run_degrees"] < _LOOK_DEGREES or row["p_corrected"] is None:
        return False
    close = -points <= row["low"] and row["high"] <= points
    return close or bool(row["p_corrected"] < SIGNIFICANT)


def mean_components(rows: Rows) -> Components | None:
    """The mean over the arms of the components of their differences; None where there are none or all are zero."""
    rows = [row for row in rows if row["run_degrees"]]
    means = {name: sum(row["components"][name] for row in rows) / len(rows) for name in asdict(ASSUMED) if rows}
    return Components(**means) if any(means.values()) else None


def independent_share(rows: Rows) -> float:
    """The least share of clusters among the documents of a row; 1 without rows."""
    return min((row["clusters"] / row["documents"] for row in rows), default=1.0)


def main_rows(results: Mapping[str, Any]) -> Rows:
    """The comparisons of all tasks together, or of the only task."""
    tasks = [row["task"] for row in results["comparisons"]]
    return [row for row in results["comparisons"] if row["task"] == tasks[-1]]
