"""The parts of a comparison: settings, runs, folders and cost.

Folder of a comparison:

    comparison.json          the settings and checksums of the data; arms, rates and seeds may be added later, the
                             rest may not change
    data/                    the validation split, where one was held out
    runs/ARM_lrRATE_seedN/   one run each: cell.json (its order), recipe.yaml, log.txt, metrics.jsonl, checkpoints,
                             eval/, outcome.json
    array.sbatch             the runs that can start, as a SLURM array
    results.json             the analysis; report.html shows it
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mm_moslora.compare.arms import Arm
from mm_moslora.config import Recipe
from mm_moslora.config.recipe_keys import NO_NUMBERS
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.run_paths import file_and_folder

FORMAT = 2
TUNING_SEEDS = 1000
"""Seeds of tuning runs start here, so that no run that chose a rate is reported with it."""
LOSS = "loss"
"""Name of the held-out loss as a metric."""
ALL = "all tasks"
"""Name of the mean over tasks."""

Status = Literal["ok", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """Settings of a comparison: arms, learning rates, seeds and tasks."""

    arms: Sequence[Arm]
    rates: Sequence[float]
    """Peak learning rates of the adapter to try for every arm."""
    seeds: int
    """Reported runs per arm, at its chosen rate."""
    tasks: Sequence[str]
    """Test tasks, as for `mm-moslora eval run`."""
    validation: Sequence[str] = (LOSS,)
    """Metric for choosing a rate: the held-out loss, or the mean over these tasks."""
    tuning_seeds: int = 1
    """Tuning runs per arm and rate."""
    grow: int = 0
    """Rates by which the grid of an arm may grow, where it has three and the best one is at its edge."""
    reference: str = ""
    """The reference arm; "" is the first one."""
    limit: int | None = None
    """Use only the first documents of every task, up to this number."""
    batch_size: int = 16
    """Questions per decoding batch."""
    max_new_tokens: int | None = None
    """Longest answer of tasks that are data files; None: the task's own."""
    controls: bool = True
    """Also measure reported runs with a plain picture and with another item's picture."""
    train_answers: str = ""
    """Training file for the most-frequent-answer baseline; "" uses the test set itself."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seeds", self.seeds, 1),
            ("tune-seeds", self.tuning_seeds, 1),
            ("grow", self.grow, 0),
        ):
            if value < least:
                raise ConfigError(f"--{name} is {value}, expected {least} or more.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}, expected 1 or more.")
        if not self.rates or any(not (0 < rate < math.inf) for rate in self.rates):
            raise ConfigError(f"--lr is {list(self.rates)}, expected positive numbers such as 5e-5,1e-4,2e-4.")
        if len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"--lr names a learning rate twice: {', '.join(f'{rate:g}' for rate in self.rates)}.")
        if LOSS in self.validation and len(self.validation) > 1:
            raise ConfigError(
                f"--validation is {', '.join(self.validation)}; choose by the loss or by tasks, not both."
            )
        names = [arm.name for arm in self.arms]
        if self.reference and self.reference not in names:
            raise ConfigError(f"--reference {self.reference!r} is not an arm. Arms: {', '.join(names)}.")

    @property
    def reference_arm(self) -> str:
        """Name of the reference arm."""
        return self.reference or self.arms[0].name

    @property
    def tunes(self) -> bool:
        """Whether there are several rates or alternatives to choose from."""
        return any(self.chooses(arm) for arm in self.arms)

    def chooses(self, arm: Arm) -> bool:
        """Whether tuning runs choose a rate or an alternative of this arm."""
        return len(self.rates) * len(arm.ways) > 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: an arm at a learning rate with a seed."""

    arm: Arm
    rate: float
    seed: int
    tuning: bool
    """Whether the run chooses a rate (on the validation split); otherwise it is reported (on the test split)."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        short = f"{self.rate:g}"
        rate = short if float(short) == self.rate else repr(self.rate)
        return f"{self.arm.slug}_lr{rate}_{'tune' if self.tuning else 'seed'}{self.seed % TUNING_SEEDS}"

    def recipe(self, shared: Recipe, folder: Path) -> Recipe:
        """The run's recipe: the shared one with the changes of the arm, the rate, the seed and the folder."""
        return self.arm.apply(
            shared, optim__lr=self.rate, train__seed=shared.train.seed + self.seed,
            train__output=str(folder / "runs" / self.name), track__name=self.name,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a run."""

    status: Status
    reason: str = ""
    recipe: str = ""
    """Hash of its recipe."""
    validation: dict[str, float] = field(default_factory=dict)
    """Held-out loss, and the scores of validation tasks."""
    test: dict[str, float] = field(default_factory=dict)
    """Scores of test tasks."""
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    """Test task -> image mode (own, blind, wrong) -> folder of its samples, below the comparison's folder."""
    first_loss: float | None = None
    last_loss: float | None = None
    """Mean training loss of the first and of the last tenth of the steps."""
    trainable: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    """Median seconds of an optimiser step."""
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    """Seconds of loading, training and measuring."""
    memory_gib: float = 0.0
    processes: int = 1


_NONE: Mapping[str, Outcome] = MappingProxyType({})


def tuning_cells(settings: ComparisonSettings, outcomes: Mapping[str, Outcome] = _NONE) -> list[Cell]:
    """Runs that choose the rates, every arm's first rate first, so that the cost of every arm is known early."""
    ways = [way for arm in settings.arms if settings.chooses(arm) for way in arm.ways]
    grids = {way.name: grid_of(settings, way, outcomes) for way in ways}
    rates = dict.fromkeys([*settings.rates, *(rate for grid in grids.values() for rate in grid)])
    return [
        _tuning(way, rate, seed)
        for seed in range(settings.tuning_seeds)
        for rate in rates
        for way in ways
        if rate in grids[way.name]
    ]


def _tuning(arm: Arm, rate: float, seed: int) -> Cell:
    return Cell(arm=arm, rate=rate, seed=TUNING_SEEDS + seed, tuning=True)


def grid_of(settings: ComparisonSettings, arm: Arm, outcomes: Mapping[str, Outcome]) -> list[float]:
    """An arm's learning rates in order: the given ones, and up to `settings.grow` where the best was at an edge."""
    # A grid of at least three grows by the factor between its outer two. A rate beyond the best that failed, or an edge
    # that is only as good as its neighbour, ends it.
    grid = sorted(settings.rates)
    for _ in range(settings.grow if len(grid) > 2 else 0):
        scores = _scores(settings, arm, grid, outcomes)
        best = None if scores is None else best_rate(settings, scores)
        if scores is None or best not in (grid[0], grid[-1]):
            break
        edge, inner = (grid[0], grid[1]) if best == grid[0] else (grid[-1], grid[-2])
        if scores[edge] == scores.get(inner):
            break
        grid = sorted([*grid, float(f"{edge * edge / inner:.3g}")])
    return grid


def _scores(
    settings: ComparisonSettings, arm: Arm, grid: Sequence[float], outcomes: Mapping[str, Outcome]
) -> dict[float, float] | None:
    """Validation scores of the rates that worked; None while a run has not ended."""
    scores = {}
    for rate in grid:
        names = [_tuning(arm, rate, seed).name for seed in range(settings.tuning_seeds)]
        if any(name not in outcomes for name in names):
            return None
        values = [measured(settings, outcomes[name]) for name in names]
        good = [value for value in values if value is not None]
        if len(good) == len(values):  # a rate must work for all seeds
            scores[rate] = math.fsum(good) / len(good)
    return scores


def best_rate(settings: ComparisonSettings, scores: Mapping[float, float]) -> float | None:
    """The rate with the best score; None without any."""
    return min(scores, key=lambda rate: _rank(settings, rate, scores[rate]), default=None)


def _rank(settings: ComparisonSettings, rate: float, score: float) -> tuple[float, float]:
    """Order of results, the best first; of equal ones the smaller rate, which is less likely to diverge."""
    return (score if tuple(settings.validation) == (LOSS,) else -score), rate


def reported_cells(settings: ComparisonSettings, chosen: Mapping[str, float]) -> list[Cell]:
    """Reported runs of the arms with a chosen rate; `chosen` as `choose_rates` gives it."""
    return [
        Cell(arm=way, rate=chosen[way.name], seed=seed, tuning=False)
        for seed in range(settings.seeds)
        for arm in settings.arms
        for way in arm.ways
        if way.name in chosen
    ]


def run_count(settings: ComparisonSettings, outcomes: Mapping[str, Outcome] = _NONE) -> int:
    """The total number of runs; an arm with only failed tuning runs has no reported ones."""
    hopeless = hopeless_arms(settings, outcomes)
    reported = sum(arm.name not in hopeless for arm in settings.arms)
    return len(tuning_cells(settings, outcomes)) + settings.seeds * reported


def choose_rates(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The best rate of every arm, by the name of its best alternative, if its tuning runs ended and one worked."""
    chosen = {}
    for arm in settings.arms:
        if not settings.chooses(arm):
            chosen[arm.name] = settings.rates[0]
            continue
        scores: dict[tuple[str, float], float] = {}
        for way in arm.ways:
            of_way = tuning_scores(settings, way, outcomes)
            if of_way is None:
                break
            scores |= {(way.name, rate): score for rate, score in of_way.items()}
        else:
            if scores:
                name, rate = min(scores, key=lambda one: _rank(settings, one[1], scores[one]))
                chosen[name] = rate
    return chosen


def tuning_scores(settings: ComparisonSettings, way: Arm, outcomes: Mapping[str, Outcome]) -> dict[float, float] | None:
    """Validation scores of the rates that worked; None while a run has not ended."""
    return _scores(settings, way, grid_of(settings, way, outcomes), outcomes)


def hopeless_arms(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Arms without a working rate after all their tuning runs have ended."""
    chosen = choose_rates(settings, outcomes)
    missing = {cell.arm.group for cell in tuning_cells(settings, outcomes) if cell.name not in outcomes}
    worked = {way.group for arm in settings.arms for way in arm.ways if way.name in chosen}
    return [arm.name for arm in settings.arms if arm.name not in worked | missing]


def measured(settings: ComparisonSettings, outcome: Outcome) -> float | None:
    """The validation score of one run; None where it failed."""
    values = [outcome.validation.get(name, math.nan) for name in settings.validation]
    mean = math.fsum(values) / len(values)
    return mean if outcome.status == "ok" and math.isfinite(mean) else None


def recipe_hash(recipe: Recipe) -> str:
    """Hash of what decides a run's numbers."""
    return sha256_of_values(recipe.values(without=NO_NUMBERS), ascii_only=True)[:16]


def describe(settings: ComparisonSettings) -> dict[str, Any]:
    """Settings that must stay the same when a comparison continues, as plain data."""
    return {
        "format": FORMAT,
        "tasks": list(settings.tasks),
        "validation": list(settings.validation),
        "limit": settings.limit,
        "max_new_tokens": settings.max_new_tokens,
        "controls": settings.controls,
    }


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """A unique display name for each task: for a data file its file name, with as many folders as needed."""
    files = {}
    for task in tasks:
        kind, _, rest = task.partition(":")
        if file := {"llava": file_and_folder(rest)[0], "tsv": rest}.get(kind):
            files[task] = Path(file).with_suffix("")
    names = {task: files[task].name if task in files else task for task in tasks}
    for depth in range(2, 1 + max((len(file.parts) for file in files.values()), default=0)):
        taken = Counter(names.values())
        names |= {task: "/".join(file.parts[-depth:]) for task, file in files.items() if taken[names[task]] > 1}
    taken = Counter(names.values())
    return {task: task if taken[name] > 1 else name for task, name in names.items()}
