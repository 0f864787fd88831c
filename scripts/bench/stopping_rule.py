#!/usr/bin/env python
"""Error rates, coverage, power and seeds of `compare --resolve`, by simulated comparisons.

    python scripts/bench/stopping_rule.py               print the tables; half an hour of one core, needs no GPU
    python scripts/bench/stopping_rule.py --runs 50     fewer comparisons per row
    python scripts/bench/stopping_rule.py --json        one object on stdout

Scores follow the crossed random effects of `mm_moslora.compare.seed_statistics`. A pilot, the plan, the looks and the
stopping of arms are the functions that `compare` calls.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from json_output import results_alone

from mm_moslora.compare.resolution_plan import ASSUMED, MOST_SEEDS, Planner, after_look, plan_looks
from mm_moslora.compare.seed_statistics import Components, TaskScores, difference, differences
from mm_moslora.compare.sequential_looks import judge
from mm_moslora.reporting.verdicts import SIGNIFICANT

DOCUMENTS, SEEDS = 60, 8
"""Documents of a task, and seeds that show the difference where the components are known."""
SETTINGS = {
    "seeds": Components(documents=0.3, seeds=0.1, answers=1.0),
    "documents": Components(documents=1.2, seeds=0.03, answers=2.0),
    "answers": Components(documents=0.1, seeds=0.003, answers=4.0),
}
"""Main source of the error -> components of a difference."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Arms of known differences."""

    components: Components
    """Of a difference; of the latent scores where answers are right or wrong."""
    rivals: int = 1
    """Arms beside the reference."""
    better: int = 0
    """Rivals that are better than the reference by the planned difference; the others are equal to it."""
    binary: bool = False
    """Whether answers are right or wrong."""
    wide: int | None = None
    """The arm whose runs have three times the standard deviation of the others'; 0 is the reference."""
    tasks: int = 1
    common: float = 1.0
    """Standard deviation of what a seed does to all arms alike, in those of a run's own deviation."""
    groups: int = 0
    """Arms, the reference first, that share one effect of a seed; the others share another one. 0: no arms do."""
    together: float = 2.0
    """Standard deviation of these effects, in those of a run's own deviation."""

    @property
    def deviation(self) -> float:
        """Standard deviation of a latent score, over documents, seeds, runs and answers."""
        parts = self.components
        return math.sqrt(1 + (parts.documents + (1 + self.common**2) * parts.seeds + parts.answers) / 2)

    @functools.cached_property
    def points(self) -> float:
        """The difference that `SEEDS` seeds show, by the plan with the true components."""
        planner = Planner(components=self.scored, points=1.0, comparisons=self.rivals, first=3)
        return planner.size(SEEDS, DOCUMENTS).detectable

    @functools.cached_property
    def scored(self) -> Components:
        """Components of the scores; of right and wrong answers from the mean of simulated comparisons of equal arms."""
        if not self.binary:
            return self.components
        generator, world = np.random.default_rng(0), replace(self, better=0, rivals=1)
        parts = [asdict(difference(*world.draw(generator, SEEDS)).components) for _ in range(200)]
        return Components(**{name: fmean(part[name] for part in parts) for name in parts[0]})

    @functools.cached_property
    def shift(self) -> float:
        """The latent shift of a better arm."""
        if not self.binary:
            return self.points
        return self.deviation * NormalDist().inv_cdf(0.5 + self.points)

    def draw(self, generator: np.random.Generator, seeds: int = MOST_SEEDS) -> list[dict[str, TaskScores]]:
        """Scores of all arms, the reference first."""
        parts = self.components
        spread = math.sqrt(parts.seeds / 2)
        alike, *runs = generator.normal(0, spread, (self.rivals + 2, seeds, 1))
        if self.groups:
            own = generator.normal(0, self.together * spread, (2, seeds, 1))
            runs = [run + own[int(arm >= self.groups)] for arm, run in enumerate(runs)]
        arms: list[dict[str, TaskScores]] = [{} for _ in runs]
        for task in range(self.tasks):
            common = generator.normal(0, 1, DOCUMENTS)
            for arm, run in enumerate(runs):
                own = generator.normal(0, math.sqrt(parts.documents / 2), DOCUMENTS)
                answers = generator.normal(0, math.sqrt(parts.answers / 2), (seeds, DOCUMENTS))
                latent = common + own + answers + self.common * alike + (3 * run if arm == self.wide else run)
                latent += self.shift if 0 < arm <= self.better else 0.0
                scores = (latent > 0).astype(float) if self.binary else latent
                arms[arm][f"task {task}"] = TaskScores(
                    scores=scores, clusters=[(task, number) for number in range(DOCUMENTS)]
                )
        return arms


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A simulated comparison at its end."""

    planned: int
    """Seeds of the plan; those of the pilot where the documents do not allow the difference."""
    seeds: list[int]
    """Of each rival, run."""
    shown: list[bool]
    """Whether each rival is shown to differ."""
    naive: list[bool]
    """The same by a t-test of 5 % for each arm at each look."""
    held: list[bool]
    """Whether each interval holds the true difference."""
    half_width: float
    """Mean over the rivals."""


def compare(world: World, pilot: int, generator: np.random.Generator) -> Ended:
    """One comparison with a pilot of so many seeds."""
    reference, *rivals = world.draw(generator)
    names = [str(number) for number in range(world.rivals)]
    arms = dict(zip(names, rivals, strict=True))
    planner = Planner(components=ASSUMED, points=world.points, comparisons=world.rivals, first=pilot)
    state, alarms = None, dict.fromkeys(names, False)
    while state is None or not state.ended:
        seeds = pilot if state is None else state.seeds
        counts = {name: state.arms.get(name, seeds) if state else seeds for name in names}
        judged = judge(arms, reference, counts, looks=state.looks if state else None, bounded=world.binary)
        rows = [one.numbers(comparisons=world.rivals) | {"arm": name} for name, one in judged.items()]
        if state is None:
            state = plan_looks(planner, rows, DOCUMENTS)
            state = replace(state, ended="")  # a pilot that is the only look is a look, too
            continue
        alarms = {name: alarms[name] or one.estimate.p_value < SIGNIFICANT for name, one in judged.items()}
        state = after_look(state, rows, seeds)
    truth = [world.points if number < world.better else 0.0 for number in range(world.rivals)]
    return Ended(
        planned=state.looks.seeds[-1],
        seeds=[counts[name] for name in names],
        shown=[judged[name].p_corrected < SIGNIFICANT for name in names],
        naive=list(alarms.values()),
        held=[
            judged[name].estimate.low <= true <= judged[name].estimate.high
            for name, true in zip(names, truth, strict=True)
        ],
        half_width=fmean(judged[name].estimate.half_width for name in names),
    )


def sequential(world: World, pilot: int, *, runs: int, seed: int = 0) -> dict[str, float]:
    """Rates over many comparisons."""
    generator = np.random.default_rng(seed)
    ended = [compare(world, pilot, generator) for _ in range(runs)]
    better, equal = slice(None, world.better), slice(world.better, None)
    return {
        "false": fmean(any(comparison.shown[equal]) for comparison in ended),
        "naive": fmean(any(comparison.naive[equal]) for comparison in ended),
        "held": fmean(covers for comparison in ended for covers in comparison.held),
        "power": fmean(shown for one in ended for shown in one.shown[better]) if world.better else math.nan,
        "seeds": fmean(seeds for comparison in ended for seeds in comparison.seeds),
        "planned": fmean(comparison.planned for comparison in ended),
        "half_width": fmean(comparison.half_width for comparison in ended),
    }


def intervals(world: World, seeds: int, *, runs: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """How often the interval of each rival holds with a fixed number of seeds, and the median half-width."""
    generator, covered, widths = np.random.default_rng(seed), [], []
    for _ in range(runs):
        reference, *rivals = world.draw(generator, seeds)
        arms = {str(number): tasks for number, tasks in enumerate(rivals)}
        estimates = list(differences(arms, reference, bounded=world.binary).values())
        covered.append([estimate.low <= 0 <= estimate.high for estimate in estimates])
        widths.append([estimate.half_width for estimate in estimates])
    return np.mean(covered, axis=0), float(np.median(widths))


def stopping_rows(runs: int) -> Iterator[dict[str, Any]]:
    """Sequential comparisons by main source of error, scores, rivals and pilot."""
    for error, binary, rivals, pilot in itertools.product(SETTINGS, (False, True), (1, 3), (2, 3, 5)):
        world = World(components=SETTINGS[error], rivals=rivals, binary=binary)
        equal = sequential(world, pilot, runs=runs)
        apart = sequential(replace(world, better=(rivals + 1) // 2), pilot, runs=runs)
        what = {"error": error, "scores": "right or wrong" if binary else "graded", "rivals": rivals, "pilot": pilot}
        yield what | {f"equal_{name}": value for name, value in equal.items()} | apart


def coverage_rows(runs: int) -> Iterator[dict[str, Any]]:
    """Intervals of comparisons with a fixed number of seeds."""
    for seeds, rivals, wide, tasks in itertools.product((2, 3, 5, 10), (1, 11), (None, 1, 0), (1, 3)):
        if tasks == 1 or wide is None:
            world = World(components=SETTINGS["seeds"], rivals=rivals, wide=wide, tasks=tasks)
            uneven = {None: "none", 0: "reference", 1: "an arm"}[wide]
            covered, half_width = intervals(world, seeds, runs=runs)
            measured = {"held": float(covered.mean()), "least": float(covered.min()), "half_width": half_width}
            yield {"seeds": seeds, "rivals": rivals, "uneven": uneven, "tasks": tasks} | measured


def group_rows(runs: int) -> Iterator[dict[str, Any]]:
    """The same where a seed has an effect that some arms share, which the intervals do not model."""
    for together, (arms, groups, seeds) in itertools.product((1.0, 2.0), ((8, 4, 5), (11, 8, 3), (11, 8, 5))):
        world = World(components=SETTINGS["seeds"], rivals=arms - 1, groups=groups, together=together)
        covered, half_width = intervals(world, seeds, runs=runs)
        inside, across = (float(part.mean()) for part in (covered[: groups - 1], covered[groups - 1 :]))
        what = {"arms": arms, "share": groups, "times a run's": together, "seeds": seeds}
        yield what | {"held, of the group": inside, "held, of the others": across, "half_width": half_width}


COLUMNS = {
    "equal_false": "false", "equal_naive": "false, naive", "equal_held": "held, equal", "held": "held",
    "power": "power", "equal_seeds": "seeds, equal", "seeds": "seeds", "planned": "plan",
}  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="comparisons of each row")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    rows: dict[str, list[dict[str, Any]]] = {"stopping": [], "coverage": [], "groups": []}
    tables = ((stopping_rows, "stopping"), (coverage_rows, "coverage"), (group_rows, "groups"))
    for results, table in ((rows_of(options.runs), table) for rows_of, table in tables):
        for row in results:
            rows[table].append(row)
            if not options.json:
                names = [
                    name for name in row if table != "stopping" or name in COLUMNS or not isinstance(row[name], float)
                ]
                if len(rows[table]) == 1:
                    print(" | ".join(COLUMNS.get(name, name) for name in names))
                print(
                    " | ".join(
                        f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names
                    ),
                    flush=True,
                )
    if options.json:
        print(json.dumps({"benchmark": "stopping_rule", "runs": options.runs, "rows": rows}), file=output)


if __name__ == "__main__":
    main()
