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
        for name, value in (("seeds", self.seeds), ("tune-seeds", self.tuning_seeds), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}, expected 1 or more.")
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
        """Whether there are several rates to choose from."""
        return len(self.rates) > 1


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


def tuning_cells(settings: ComparisonSettings) -> list[Cell]:
    """Runs that choose the rates, every arm's first rate first, so that the cost of every arm is known early."""
    return [
        Cell(arm=arm, rate=rate, seed=TUNING_SEEDS + seed, tuning=True)
        for seed in range(settings.tuning_seeds if settings.tunes else 0)
        for rate in settings.rates
        for arm in settings.arms
    ]


def reported_cells(settings: ComparisonSettings, chosen: Mapping[str, float]) -> list[Cell]:
    """Reported runs of the arms with a chosen rate; `chosen` as `choose_rates` gives it."""
    return [
        Cell(arm=arm, rate=chosen[arm.name], seed=seed, tuning=False)
        for seed in range(settings.seeds)
        for arm in settings.arms
        if arm.name in chosen
    ]


def known_cells(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """Runs known so far, tuning first; an arm's reported runs are known once its rate is chosen."""
    return [*tuning_cells(settings), *reported_cells(settings, choose_rates(settings, outcomes))]


def run_count(settings: ComparisonSettings, outcomes: Mapping[str, Outcome] = MappingProxyType({})) -> int:
    """The total number of runs; an arm of which no rate worked has no reported ones."""
    ended = [arm for arm in settings.arms if settings.tunes and _scores(settings, arm, outcomes) == {}]
    return len(tuning_cells(settings)) + settings.seeds * (len(settings.arms) - len(ended))


def choose_rates(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The best rate of every arm after its tuning runs have ended, if one succeeded; of equal ones the smaller, which
    is less likely to diverge."""
    if not settings.tunes:
        return {arm.name: settings.rates[0] for arm in settings.arms}
    sign = 1 if tuple(settings.validation) == (LOSS,) else -1
    scores = {arm.name: _scores(settings, arm, outcomes) for arm in settings.arms}
    return {name: min(of, key=lambda rate: (sign * of[rate], rate)) for name, of in scores.items() if of}


def _scores(settings: ComparisonSettings, arm: Arm, outcomes: Mapping[str, Outcome]) -> dict[float, float] | None:
    """Mean validation values of the rates that worked for all seeds; None while a run has not ended."""
    cells = [cell for cell in tuning_cells(settings) if cell.arm.name == arm.name]
    if any(cell.name not in outcomes for cell in cells):
        return None
    values = {rate: [measured(settings, outcomes[c.name]) for c in cells if c.rate == rate] for rate in settings.rates}
    worked = {rate: [value for value in of if value is not None] for rate, of in values.items()}
    return {rate: math.fsum(of) / len(of) for rate, of in worked.items() if len(of) == len(values[rate])}


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
