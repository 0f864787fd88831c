"""A comparison from start to end: plan, tune the rates, run the seeds, analyse. The same call again continues it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import CellRun
from mm_moslora.compare.comparison_plan import (
    LOSS,
    Cell,
    ComparisonSettings,
    Outcome,
    choose_rates,
    describe,
    grid_of,
    hopeless_arms,
    reported_cells,
    run_count,
    short_names,
    tuning_cells,
)
from mm_moslora.compare.holdout import check_share, with_holdout
from mm_moslora.compare.run_cost import PROBE_STEPS, ArmCost, cost_line, cost_of, cost_table
from mm_moslora.config import Recipe
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.launch.imported_code import import_words
from mm_moslora.launch.jobs import Job, JobEngine, run_jobs, write_array
from mm_moslora.models.model_paths import CONTENTS, same_parts, trained_on
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import discard, mark, read_json, remove, replace_json
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import read_value

logger = logging.getLogger(__name__)

ARRAY = "array.sbatch"
PROGRAM = "mm_moslora"
_FILES = (ARRAY, "comparison.json", "results.json", "report.html", "data", "runs", "features")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBudget:
    """Resources of a comparison."""

    cards: int = 0
    """Accelerators per run; 0: one, where the run's process sees any."""
    max_minutes: float | None = None
    """Time limit; the same command continues."""
    keep_all: bool = False
    """Keep the checkpoints of tuning runs, too."""


class ArmComparison:
    """A comparison and its folder; `hold_out`: share of training records for validation, where there is no split."""

    def __init__(self, recipe: Recipe, settings: ComparisonSettings, folder: Path, *, hold_out: float) -> None:
        self.settings, self.folder = settings, folder.resolve()
        splits = settings.tunes and tuple(settings.validation) == (LOSS,) and not recipe.data.held_out
        self._given, self._hold_out = recipe, check_share(hold_out) if splits else None
        self.recipe = recipe
        """The recipe that all arms share; `check` gives it the validation split."""
        self.outcomes: dict[str, Outcome] = {}
        self._cost_logged, self._at_once = False, 1

    def check(self) -> None:
        """Check tasks, data and folder before anything runs, then split the records."""
        names = dict.fromkeys([*self.settings.tasks, *self.settings.validation])
        data = {name: comparison_cell.open_task(name, self.settings).load() for name in names if name != LOSS}
        measured, trained_on = {name: loaded.sha256 for name, loaded in data.items()}, self._trained_on()
        if self.settings.tunes:
            choosing = {measured[name] for name in self.settings.validation if name != LOSS}
            if LOSS in self.settings.validation:
                choosing |= {content for name, content in trained_on.items() if name.startswith("data.validation ")}
            if shared := sorted(name for name in self.settings.tasks if measured[name] in choosing):
                raise ConfigError(
                    f"{shared[0]!r} is both a test task and the validation split: rates would be chosen on the "
                    "reported data. Give another file with --validation."
                )
        file = self.folder / "comparison.json"
        claimed = file.is_file()
        self._claim(file, {**trained_on, **measured})
        try:
            if self._hold_out is not None:  # only a folder that is claimed holds a split of these records
                self.recipe = with_holdout(self._given, self.folder / "data", share=self._hold_out, reuse=claimed)
        except MoSLoRAError:
            if not claimed:  # another share may do
                discard(file)
            raise
        self._read_outcomes()

    def _trained_on(self) -> dict[str, str]:
        """Fingerprints of the base model and of the training data; before the split is made, of its sources."""
        data = self._given.data
        parts = {"train": data.train, "validation": data.held_out}
        return trained_on(self._given.model)[CONTENTS] | {
            f"data.{part} {number}": open_source(source).fingerprint()
            for part, sources in parts.items()
            for number, source in enumerate(sources, start=1)
        }

    def _claim(self, file: Path, checksums: Mapping[str, str]) -> None:
        own = describe(self.settings) | {"hold_out": self._hold_out, "data": dict(checksums)}
        if file.is_file():
            try:
                stored = read_json(file)
            except ValueError as error:
                raise ConfigError(f"{file} is damaged ({error}). Restore it, or choose another --output.") from error
            if stored.get("format") != own["format"]:
                raise ConfigError(
                    f"{self.folder} has format {stored.get('format')!r}, this version reads {own['format']}. "
                    "Choose another --output."
                )
            before = read_value(dict[str, str], stored.get("data") or {}, source=str(file), where="data")
            self._refuse_changed_data(before, dict(checksums) | same_parts(self._given.model, before))
            changed = [key for key, value in own.items() if key != "data" and stored.get(key) != value]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self.folder} was started with {key} {stored.get(key)!r}, now it is {own[key]!r}. Arms, rates "
                    "and seeds may be added to a comparison, the rest may not change. Choose another --output."
                )
        replace_json(file, own)

    def _refuse_changed_data(self, before: Mapping[str, str], checksums: Mapping[str, str]) -> None:
        sources = {key: item for key, item in before.items() if key.startswith("data.") or key in checksums}
        now = {key: item for key, item in checksums.items() if key.startswith("data.") or key in before}
        changed = sorted(key for key in sources.keys() | now.keys() if sources.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"{self.folder} was started with other data: {', '.join(changed)} changed. Runs on different data "
                "cannot be compared. Restore the data, or choose another --output."
            )

    def _read_outcomes(self) -> None:
        """All finished runs, successful or not."""
        seen = -1
        while seen < len(self.outcomes):  # outcomes of a grid show how it has grown
            seen = len(self.outcomes)
            ways = [way for arm in self.settings.arms for way in arm.ways]
            grids = {way.name: grid_of(self.settings, way, self.outcomes) for way in ways}
            one_each = [{arm: rate} for arm, grid in grids.items() for rate in grid]
            self._read_some([item for one in one_each for item in reported_cells(self.settings, one)])
            self._read_some(tuning_cells(self.settings, self.outcomes))

    def _read_some(self, cells: Sequence[Cell]) -> None:
        for item in cells:
            recipe = item.recipe(self.recipe, self.folder)
            run_folder = Path(recipe.train.output)
            outcome = comparison_cell.known_outcome(run_folder)
            if outcome is not None:
                if not isinstance(outcome, comparison_cell.Damaged):
                    comparison_cell.require_same_recipe(run_folder, outcome, recipe)
                self.outcomes[item.name] = outcome

    def run(self, budget: RunBudget, engine: JobEngine) -> bool:
        """Run what is missing; returns whether all is done. SIGTERM and Ctrl-C save and exit, as in training."""
        # The reason of a failure may be gone; a run that diverged would diverge again.
        self.outcomes = {name: outcome for name, outcome in self.outcomes.items() if outcome.status != "failed"}
        self._at_once = engine.width(budget.cards)
        runs: dict[str, CellRun] = {}
        deadline = time.monotonic() + 60 * (math.inf if budget.max_minutes is None else budget.max_minutes)

        def new_jobs() -> list[Job]:
            self._log_cost([run for name, run in runs.items() if name not in self.outcomes])
            new = [self._order(item, budget) for item in self._next() if item.name not in runs]
            runs.update({run.cell.name: run for run in new})
            return [_job(run) for run in new]

        with StopRequest() as stop:
            run_jobs(
                new_jobs, engine, over=lambda job, problem: self._over(runs[job.name], problem),
                stop=lambda: bool(stop.received) or time.monotonic() > deadline,
            )  # fmt: skip
        if not self._ready():
            return True
        if stop.received:
            logger.info("Stopped by signal %d. The same command continues.", stop.received)
        elif time.monotonic() > deadline:
            logger.info("%g minutes are over. The same command continues.", budget.max_minutes)
        return False

    def write_array(self, budget: RunBudget) -> bool:
        """Write the SLURM array of the runs that can start; returns whether all is done, and no array is left."""
        jobs = [_job(self._order(item, budget)) for item in self._next()]
        if not jobs:
            discard(self.folder / ARRAY)
            return True
        write_array(self.folder / ARRAY, jobs)
        return False

    def _next(self) -> list[Cell]:
        """The runs that can start; after the last one the shared features go."""
        ready = self._ready()
        if not ready:
            remove(self.folder / comparison_cell.FEATURES)
        return ready

    def _cells(self) -> list[Cell]:
        """Runs known so far, tuning first; an arm's reported runs are known once its rate is chosen."""
        return [
            *tuning_cells(self.settings, self.outcomes),
            *reported_cells(self.settings, choose_rates(self.settings, self.outcomes)),
        ]

    def _ready(self) -> list[Cell]:
        """Runs that can start."""
        return [item for item in self._cells() if item.name not in self.outcomes]

    def _order(self, item: Cell, budget: RunBudget) -> CellRun:
        recipe = item.recipe(self.recipe, self.folder)
        run = CellRun(
            cell=item, recipe=recipe, settings=self.settings, folder=self.folder, cards=budget.cards,
            keep_all=budget.keep_all,
        )  # fmt: skip
        run.order()
        return run

    def _over(self, run: CellRun, problem: str) -> None:
        """Take the outcome of a run."""
        outcome = comparison_cell.known_outcome(run.run_folder)
        if outcome is None:
            outcome = Outcome(status="failed", reason=problem)
            comparison_cell.write_outcome(run.run_folder, outcome)
        self.outcomes[run.cell.name] = outcome
        logger.info("%s", self._line(run.cell, outcome))

    def _line(self, item: Cell, outcome: Outcome) -> str:
        count = run_count(self.settings, self.outcomes)
        over = sum(other.name in self.outcomes for other in self._cells())
        what = f"[{over}/{count}] {item.arm.name} at {item.rate:g}, seed {item.seed}: "
        if outcome.status != "ok":
            return f"{what}{outcome.status}: {outcome.reason}"
        scores = outcome.validation if item.tuning else outcome.test
        names = short_names([*self.settings.tasks, *self.settings.validation]) | {LOSS: "held-out loss"}
        shown = ", ".join(f"{names[task]} {score:.4f}" for task, score in scores.items())
        seconds = self.seconds_left()
        at_once = max(1, min(self._at_once, count - over))
        left = "all done" if seconds == 0 else f"about {format_seconds(seconds / at_once)} left"
        return f"{what}{shown}; {format_seconds(outcome.total_seconds)}; {left}"

    def seconds_left(self) -> float:
        """Estimate of the missing runs' seconds, from finished runs of the same arm, else from the mean of all."""
        seconds = [outcome.total_seconds for outcome in self.outcomes.values() if outcome.status == "ok"]
        if not seconds:
            return math.nan
        costs = self._costs()
        return sum(cost.runs * (fmean(seconds) if math.isnan(cost.run_seconds) else cost.run_seconds) for cost in costs)

    def _costs(self, probes: Mapping[str, CellRun] = MappingProxyType({})) -> list[ArmCost]:
        """The cost of every arm's missing runs; `probes` holds, by arm, a run of which the first steps were done."""
        hopeless, cells, costs = hopeless_arms(self.settings, self.outcomes), self._cells(), []
        for arm in self.settings.arms:
            own = [item for item in cells if item.arm.group == arm.name]
            ended = [self.outcomes[item.name] for item in own if item.name in self.outcomes]
            wanted = sum(item.tuning for item in own) + self.settings.seeds
            runs = 0 if arm.name in hopeless else max(0, wanted - len(ended))
            costs.append(cost_of(arm.name, runs, ended, probes.get(arm.name)))
        return costs

    def _log_cost(self, running: Sequence[CellRun]) -> None:
        """Log the cost once, after the first steps of the first run."""
        for job in () if self._cost_logged else running:
            cost = cost_of(job.cell.arm.group, run_count(self.settings), (), job)
            if not math.isnan(cost.run_seconds):
                logger.info("%s", cost_line(cost))
                self._cost_logged = True
                return

    def probe(self, budget: RunBudget, engine: JobEngine) -> list[str]:
        """Do a few steps of a run of every arm, which keeps them; returns a table of the cost of all runs."""
        first = {item.arm.group: item for item in reversed(self._ready())}
        if not first:
            return ["Nothing is left to run."]
        good = {name for name, outcome in self.outcomes.items() if outcome.status == "ok"}
        finished = {item.arm.group for item in self._cells() if item.name in good}
        runs = {
            arm.name: self._order(first[arm.name], budget)
            for arm in self.settings.arms
            if arm.name in first and arm.name not in finished
        }
        problems: dict[str, str] = {}
        run_jobs(
            lambda: [dataclasses.replace(_job(run, stop_at=PROBE_STEPS), name=arm) for arm, run in runs.items()],
            engine, over=lambda job, problem: problems.update({job.name: _problem(runs[job.name], problem)}),
        )  # fmt: skip
        return cost_table([dataclasses.replace(cost, problem=problems.get(cost.arm, "")) for cost in self._costs(runs)])


def _job(run: CellRun, *, stop_at: int | None = None) -> Job:
    """The job of a run: a command that does the same by hand."""
    steps = () if stop_at is None else ("--stop-at", str(stop_at))
    return Job(
        name=run.cell.name, log=run.run_folder / comparison_cell.LOG, cards=run.cards,
        command=(PROGRAM, *import_words(), "compare", str(run.folder), "--cell", run.cell.name, *steps),
        output=run.run_folder / comparison_cell.OUTCOME if stop_at is None else None,
    )  # fmt: skip


def _problem(run: CellRun, problem: str) -> str:
    """The reason why the first steps of an arm's run ended early."""
    outcome = comparison_cell.known_outcome(run.run_folder)
    return problem if outcome is None or outcome.status == "ok" else f"{outcome.status}: {outcome.reason}"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a comparison folder; ConfigError where it is locked, or holds other programs' files of the same names."""
    refuse_strangers(folder, _FILES, kind="comparison", also=("comparison.json",))
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "comparison")
    try:
        lock = lock_file(folder / ".lock", wait=False)
    except BlockingIOError as error:
        raise ConfigError(
            f"{folder} is in use by another comparison. Wait for it, or choose another --output."
        ) from error
    with lock:
        yield
